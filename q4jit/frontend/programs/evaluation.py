"""The nodes of a program computed in NumPy, which is the reference for its kernels.

As in kernels, arithmetic is in float32 whatever the types of the arrays are, and results are
rounded once. With an array in float64, arithmetic and results are in float64.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit.floats import FloatType, numpy_dtype
from q4jit.frontend.graph import Node, reachable
from q4jit.frontend.programs.operations import needs_axis
from q4jit.frontend.shapes import Shape
from q4jit.frontend.specs import Signature
from q4jit.frontend.vectors import fixed_axes
from q4jit.weights.indexed import vecmat

_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
}


def evaluated(
    outputs: Sequence[Node],
    result_types: Sequence[FloatType],
    signature: Signature,
    leaves: Sequence[Any],
) -> tuple[NDArray[Any], ...]:
    """Return the values of nodes, from the arguments of their graph.

    leaves: arrays of floats and of ids, weights, and numbers.
    """
    exact = any(getattr(leaf, "dtype", None) == np.float64 and leaf.ndim for leaf in leaves)
    evaluation = _Evaluation(np.dtype(np.float64 if exact else np.float32), signature, leaves)
    values: dict[int, Any] = {}
    with np.errstate(all="ignore"):  # as in kernels, NaN and Inf propagate
        for node in reachable(tuple(outputs)):
            values[node.id] = evaluation.value(node, [values[n.id] for n in node.operands])
        types = [evaluation.dtype if exact else numpy_dtype(kind) for kind in result_types]
        pairs = zip(outputs, types, strict=True)
        return tuple(np.asarray(values[node.id]).astype(dtype) for node, dtype in pairs)


class _Evaluation:
    """One call; it keeps whole products, whose columns several nodes use."""

    def __init__(self, dtype: np.dtype[Any], signature: Signature, leaves: Sequence[Any]) -> None:
        self.dtype = dtype
        self._signature = signature
        self._leaves = leaves
        self._products: dict[tuple[object, ...], Any] = {}

    def value(self, node: Node, operands: list[Any]) -> Any:
        """Return the value of a node, from those of its operands."""
        leaf = self._leaves[node.arg] if node.arg >= 0 else None
        match node.op:
            case "load":
                array: Any = np.asarray(leaf).astype(self.dtype, copy=False)
                spec = self._signature[node.arg]
                adds_axis = len(node.shape) > len(_shape(spec))
                width = node.copies if adds_axis else node.width
                columns = array[..., node.start : node.start + width]
                return columns[..., None] if adds_axis else columns
            case "scalar":
                return self.dtype.type(float(leaf))  # type: ignore[arg-type]  # any number
            case "const":
                return self.dtype.type(node.value)
            case "ids":
                return leaf
            case "matmul":
                return self._product(node, operands)[..., node.start : node.start + node.width]
            case "dequantize":
                return leaf.dequantize()  # type: ignore[union-attr]  # a weight
            case "rows":
                return leaf.rows(operands[0])  # type: ignore[union-attr]  # a weight
            case "sum":
                return np.sum(operands[0], axis=-1, keepdims=True)
            case "max":
                return np.max(operands[0], axis=-1, keepdims=True)
            case "inner_sum":
                return np.sum(operands[0], axis=-2)
            case "reshape":
                grows = len(node.shape) > len(node.operands[0].shape)
                return operands[0][..., None] if grows else operands[0][..., 0]
        most = fixed_axes(node.shape)
        pairs = zip(node.operands, operands, strict=True)
        values = [v[..., None, :] if needs_axis(n, most) else v for n, v in pairs]
        return _FUNCTIONS[node.op](*values)

    def _product(self, node: Node, operands: list[Any]) -> Any:
        key = (node.arg, node.transposed, *(n.id for n in node.operands))
        if key not in self._products:
            weight, x = self._leaves[node.arg], operands[0]
            if node.chosen is None:
                product = x @ (weight.T if node.transposed else weight)
            else:
                axes = fixed_axes(node.chosen.shape) + 1
                x = x[..., None, :] if needs_axis(node.operands[0], axes) else x
                product = vecmat(x, weight[operands[1]])
            self._products[key] = product
        return self._products[key]


def _shape(spec: Any) -> Shape:
    shape: Shape = spec.shape
    return shape
