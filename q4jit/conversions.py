"""Expressions that convert arrays of NumPy's and tensors of PyTorch's, as errors suggest them.

Each works for the very value that an error is about. PyTorch is never imported here: if there is a
tensor, it is imported already.
"""

import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FLOAT_TYPES, float_type_of

_IDS: Final = (np.dtype(np.int32), np.dtype(np.int64))
_NUMPYS_FLOATS: Final = frozenset({"float16", "float32", "float64"})
"""The dtypes of tensors that NumPy has too."""


AS_LEAVES: Final = "pass tensors and weights one by one, in place of the object that holds them"


def is_tensor(value: object) -> bool:
    """Return whether an object is a tensor of PyTorch's."""
    kind = getattr(sys.modules.get("torch"), "Tensor", None)
    return kind is not None and isinstance(value, kind)


def tensor_dtype(tensor: Any) -> str:
    """Return the name of a tensor's dtype, such as float32 for `torch.float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def as_float32(name: str, dtype: np.dtype[Any]) -> str:
    """Return the expression of a NumPy array, called `name`, in float32."""
    real = f"{name}.real" if dtype.kind == "c" else name
    return f"{real}.astype(np.float32)"


def as_argument(name: str, tensor: Any) -> str:
    """Return the expression of a tensor that a function takes, from one that it does not."""
    expression = _strided(name, tensor)
    dtype = tensor_dtype(tensor)
    if dtype in FLOAT_TYPES or _is_quantized(tensor):
        return expression
    return f"{expression}.float()"


def as_numpy(name: str, value: Any) -> str:
    """Return the expression of a NumPy array with the numbers of another object."""
    if not is_tensor(value):
        return f"np.asarray({name}, dtype=np.float32)"
    if not has_values(value):
        return f"torch.zeros_like({name}, device='cpu').numpy()"
    expression = _strided(name, value)
    if not _is_quantized(value) and tensor_dtype(value) not in _NUMPYS_FLOATS:
        expression += ".float()"
    return f"{expression}{'' if value.device.type == 'cpu' else '.cpu()'}.numpy()"


def as_tensor(name: str, array: NDArray[Any]) -> str:
    """Return the expression of a tensor that a function takes, with the numbers of an array."""
    expression = name
    if any(stride < 0 for stride in array.strides):
        expression = f"np.ascontiguousarray({name})"
    if float_type_of(array.dtype) == "bf16":  # PyTorch does not know NumPy's
        return f"torch.from_numpy({expression}.view(np.int16)).view(torch.bfloat16)"
    if float_type_of(array.dtype) is None and array.dtype not in _IDS:
        expression = as_float32(expression, array.dtype)
    return f"torch.from_numpy({expression})"


def has_values(tensor: Any) -> bool:
    """Return whether a tensor has numbers. Those on PyTorch's device "meta" have only a shape."""
    return bool(tensor.device.type != "meta")


def _is_quantized(tensor: Any) -> bool:
    return tensor_dtype(tensor).startswith(("qint", "quint"))


def _strided(name: str, tensor: Any) -> str:
    """Return the expression of a real tensor without gradient, whose memory holds its values."""
    torch = sys.modules["torch"]
    steps = [
        (tensor.requires_grad, ".detach()"),
        (tensor.layout is not torch.strided, ".to_dense()"),
        (_is_quantized(tensor), ".dequantize()"),
        (tensor_dtype(tensor).startswith("complex"), ".real"),
        (tensor.is_neg(), ".resolve_neg()"),
    ]
    return name + "".join(step for is_needed, step in steps if is_needed)
