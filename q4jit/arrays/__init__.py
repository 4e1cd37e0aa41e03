"""Arrays: the arguments of a call, its results, and arrays of other libraries on a GPU.

`specs` makes the spec of an argument, `arguments` checks arrays and converts ids and numbers,
`call_shapes` has everything that exact shapes determine, `outputs` checks `out=`, and `dtypes` has
the element types. An array on a GPU is represented by a `DeviceView` (`views`). `libraries` makes
it with `torch_tensors`, `cupy_arrays` or `protocols` (and `dlpack`), depending on the array's
library; `device_array` is q4jit's own. `on_device` checks arguments and `out=` on a GPU.
"""
