"""The operators of arrays and weights that cannot be compiled."""

from collections.abc import Callable
from typing import Any, Final, NoReturn

from q4jit.frontend.cures import not_converted, refuse_array, refuse_torch, shown_as
from q4jit.frontend.refusals import USE_PRODUCT, USE_SUPPORTED, forbidden

COMPUTED: Final = "a value that the kernel computes"
EXPONENT: Final = (f"use {COMPUTED} as an exponent", "use np.exp and np.log")
_PRODUCT: Final = ("compile the @= operator", "use y = x @ w")


WEIGHT_ALONE: Final = "compute element by element with a quantised weight"
SIGNS: Final = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
}


class _NoTensor:
    """Base of traced values, whose type PyTorch's functions ask to compute."""

    __slots__ = ()

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *rest: Any, **_: Any) -> NoReturn:
        refuse_torch(function)


class RefusedOperators(_NoTensor):
    """Base of a traced array: the operators that raise TraceError."""

    __slots__ = ()

    __bool__ = forbidden(f"branch on {COMPUTED}", "use np.where")
    __format__ = shown_as
    __int__ = __index__ = __trunc__ = __floor__ = __ceil__ = not_converted("int")
    __float__, __complex__ = not_converted("float"), not_converted("complex")
    __len__ = forbidden(f"take len() of {COMPUTED}", "use its last dimension, x.shape[-1]")
    __iter__ = forbidden(f"iterate over {COMPUTED}", "use slices of the last axis")
    __contains__ = forbidden(f"search in {COMPUTED}", "use comparisons and np.where")
    __setitem__ = forbidden(f"assign to elements of {COMPUTED}", "use np.where to make a new value")
    __array__ = refuse_array
    __floordiv__ = __rfloordiv__ = forbidden("compile the // operator", USE_SUPPORTED)
    __mod__ = __rmod__ = forbidden("compile the % operator", USE_SUPPORTED)
    __divmod__ = __rdivmod__ = forbidden("compile divmod()", USE_SUPPORTED)
    __round__ = forbidden("compile round()", USE_SUPPORTED)
    __lshift__ = __rlshift__ = forbidden("compile the << operator", USE_SUPPORTED)
    __rshift__ = __rrshift__ = forbidden("compile the >> operator", USE_SUPPORTED)
    __xor__ = __rxor__ = forbidden("compile the ^ operator", USE_SUPPORTED)
    __rpow__ = forbidden(*EXPONENT)
    __imatmul__ = forbidden(*_PRODUCT)


class RefusedWeightOperators(_NoTensor):
    """Base of a traced weight: the operators that raise TraceError."""

    __slots__ = ()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = forbidden(WEIGHT_ALONE, USE_PRODUCT)
    __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __add__
    __neg__ = __pos__ = __abs__ = __invert__ = __add__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __add__
    __hash__ = object.__hash__

    __copy__ = __deepcopy__ = forbidden("copy a quantised weight", "use w itself: it never changes")
    __array__ = forbidden("convert a quantised weight to a NumPy array", USE_PRODUCT)
    __bool__ = forbidden("branch on a quantised weight", USE_PRODUCT)
    __float__ = __int__ = forbidden("convert a quantised weight to a number", USE_PRODUCT)
    __len__ = forbidden("take len() of a quantised weight", "use w.shape")
    __iter__ = forbidden("iterate over a quantised weight", USE_PRODUCT)
