"""Symbolic expert tensors, and the matrices that ids choose from them."""

from typing import Any, Final, NoReturn

from q4jit.errors import TraceError, expected
from q4jit.frontend.builder import Builder
from q4jit.frontend.carets import located
from q4jit.frontend.graph import Node
from q4jit.frontend.refusals import cure_for, refuse, refuse_other_trace
from q4jit.frontend.refused_operators import RefusedOperators, RefusedWeightOperators
from q4jit.frontend.shapes import show_shape
from q4jit.frontend.traced_weight import TracedWeight
from q4jit.frontend.vectors import vecmat
from q4jit.weights.experts import ExpertTensor

USE_VECMAT: Final = "use np.vecmat(x, w[ids])"


class _SymbolicExpertWeight(TracedWeight):
    """The base of both: they can only be the right operand of np.vecmat."""

    __slots__ = ()

    @staticmethod
    def _traced_vecmat(x: object, w: object) -> Any:
        return product_of(x, w)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # protocols that Python and NumPy probe for
            raise AttributeError(name)
        return located(refuse)(f"use the attribute .{name} of an expert tensor", USE_VECMAT)

    @located
    def _refuse_product(self, *_: object) -> NoReturn:
        refuse("use @ with an expert tensor", USE_VECMAT)

    __matmul__ = __rmatmul__ = _refuse_product

    @located
    def __array_ufunc__(self, ufunc: object, *_: object, **__: object) -> NoReturn:
        name = getattr(ufunc, "__name__", "a function")
        refuse(f"compute np.{name} of an expert tensor and no traced array", USE_VECMAT)

    @located
    def __array_function__(self, function: object, *_: object) -> NoReturn:
        name = getattr(function, "__name__", "a function")
        refuse(f"compute np.{name} of an expert tensor", USE_VECMAT)


class SymbolicExperts(_SymbolicExpertWeight):
    """An expert tensor [E, K, N] of the function being traced."""

    __slots__ = ()

    @property  # type: ignore[misc]  # read-only, because nobody changes it
    def __class__(self) -> type:
        """The type that isinstance() sees."""
        return ExpertTensor

    def __repr__(self) -> str:
        return f"<traced experts {self._spec}>"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N)."""
        return self._spec.experts, self._spec.k, self._spec.n

    @property
    def ndim(self) -> int:
        """Always 3."""
        return 3

    def __len__(self) -> int:
        return self._spec.experts

    @located
    def __getitem__(self, index: object) -> "SymbolicIndexed":
        cure = "pass the ids, or a matrix w[e] of one expert, as an argument"
        ids = self._ids_node(index, "an int32 or int64 array", "ids of w[ids]", cure)
        return SymbolicIndexed(self._builder, self._arg, ids)


class SymbolicIndexed(_SymbolicExpertWeight):
    """The matrices w[ids] of an expert tensor of the function being traced."""

    __slots__ = ("_ids",)

    def __init__(self, builder: Builder, arg: int, ids: Node) -> None:
        super().__init__(builder, arg)
        self._ids = ids

    def __repr__(self) -> str:
        return f"<traced matrices {show_shape(self._ids.shape)} of {self._spec}>"


@located
def product_of(x: object, w: object) -> Any:  # a SymbolicArray, whose module imports this one
    """Return the traced product np.vecmat(x, w). Raises TraceError for other operands."""
    if type(w) is not SymbolicIndexed:
        got = (
            repr(w)
            if isinstance(w, RefusedOperators | RefusedWeightOperators)
            else type(w).__name__
        )
        what = "w[ids] of an ExpertTensor that is an argument"
        raise TraceError(expected(what, got, where="right operand of np.vecmat"))
    if not isinstance(x, RefusedOperators):
        where = "left operand of np.vecmat"
        cure = cure_for(x, "np.asarray(x, np.float32)")
        raise TraceError(expected("a float array", type(x).__name__, where=where, cure=cure))
    array: Any = x
    builder = w._builder
    if array._builder is not builder:
        refuse_other_trace()
    node = vecmat(builder, array._node, w._arg, w._ids)
    return array._of(node, float_type=array._float_type)
