"""Arrays: which arguments a call accepts, what their shapes decide, and where they are.

`specs` tells what an argument is, `arguments` whether it is accepted and how kernels take it,
`call_shapes` what exact shapes decide, and `outputs` what `out=` may be; `dtypes` has the element
types. An array on a GPU is seen as one of `views`: `libraries` asks `torch_tensors`, `cupy_arrays`
or `protocols` (with `dlpack`), depending on whose it is, and `device_array` is our own.
"""
