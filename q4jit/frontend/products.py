"""Errors of products that cannot be compiled."""

from typing import Any, Final, NoReturn

import numpy as np

from q4jit.errors import TraceError, expected
from q4jit.frontend.experts import USE_VECMAT, SymbolicExperts, SymbolicIndexed
from q4jit.frontend.ids import SymbolicIds, refuse_ids
from q4jit.frontend.refusals import USE_OTHER_PRODUCT, USE_PRODUCT, cure_for, refuse
from q4jit.frontend.refused_operators import RefusedOperators, RefusedWeightOperators
from q4jit.weights.experts import ExpertTensor
from q4jit.weights.indexed import IndexedExperts
from q4jit.weights.tensor import QuantizedTensor, TransposedTensor

_SWAPPED = f"{USE_PRODUCT}; if that is what the line says, swap the arguments of the call"


_OF_EXPERTS: Final = frozenset({SymbolicExperts, SymbolicIndexed, ExpertTensor, IndexedExperts})


def refuse_product(x: Any, w: Any) -> NoReturn:
    """Raise TraceError for `x @ w` if x is no traced array or w no traced weight."""
    if type(w) in _OF_EXPERTS:
        refuse("use @ with an expert tensor", USE_VECMAT)
    if isinstance(x, RefusedWeightOperators):
        _refuse_weight_on_the_left(x, w)
    if isinstance(w, RefusedWeightOperators):
        raise TraceError(
            expected(
                "a float array",
                type(x).__name__,
                where="left operand of @",
                cure=cure_for(x, "np.asarray(x, np.float32)"),
            )
        )
    if type(w) is QuantizedTensor:
        refuse(f"use a captured weight ({w!r})", "pass it as an argument")
    if type(w) is TransposedTensor:
        refuse(f"use a captured weight ({w!r})", "pass w as an argument, and write w.T")
    if type(w) is SymbolicIds:
        refuse_ids(w, "use @ with {}")
    if not isinstance(w, RefusedOperators):
        _refuse_right_operand(type(w).__name__, type(w))
    array: Any = w
    node = array._node
    if node.op == "dequantize":
        refuse("multiply with w.dequantize()", "use x @ w, which makes no float copy of w")
    if node.op == "load" and getattr(x, "_node", None) is not node:
        name = array._builder.show_argument(node.arg)
        _refuse_right_operand(f"the array {name}", np.ndarray)
    refuse("multiply two arrays that are no weights", USE_OTHER_PRODUCT)


def _refuse_weight_on_the_left(x: Any, w: object) -> NoReturn:
    if isinstance(w, RefusedWeightOperators):
        refuse("multiply two weights", "use x @ w with a float array x")
    weight = f"{x._builder.show_argument(x._arg)} ({x._spec})"
    refuse(
        f"multiply with a weight on the left of @, here argument {weight}",
        _SWAPPED if isinstance(w, RefusedOperators) else USE_PRODUCT,
    )


def _refuse_right_operand(shown: str, kind: type) -> NoReturn:
    cure = ""
    if issubclass(kind, np.ndarray | list):
        cure = 'pass quantize(w, "F32") as the argument, which keeps the values'
    elif issubclass(kind, int | float | np.number):
        cure = "use * for a number"
    raise TraceError(expected("a QuantizedTensor", shown, where="right operand of @", cure=cure))
