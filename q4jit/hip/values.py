"""The values of a graph as C++ statements, which the HIP templates write out.

Everything is computed for one row of x. A value of width 1 is the same for the whole row; the
others are computed for one `column`. A sum over a row is a loop that the threads of a block share.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from q4jit.floats import FloatType
from q4jit.frontend.graph import REDUCTIONS, Graph, Node
from q4jit.frontend.shapes import leading_axes
from q4jit.frontend.specs import ArraySpec, IdsSpec
from q4jit.hip.kernel import GEMV_TRANSPOSED, ROWS, SORT_EXPERTS, HipKernel, HipPlan
from q4jit.hip.names import ValueNames, buffer_name, c_names
from q4jit.plan.kernels import Buffer, Kernel, Slot

# The operations whose macros have other names: Jinja keeps `and` for itself.
_MACROS: Final = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}

_MOST_DIGITS: Final = 9  # as many tell every f32 from all others
_SMALLEST_PLAIN: Final = 1e-4  # of the numbers that are written without an exponent
_LARGEST_PLAIN: Final = 1e6

# What a `rows` kernel makes of x for the kernels of its products.
_X_TYPES: Final = {
    "x_terms": "u16",
    "x_rough": "u32",
    "x_quants": "u32",
    "x_scales": "float",
    "x_sums": "i16",
    "split_sums": "float",
    "expert_order": "i32",
    "expert_tiles": "i32",
}


_WRITE_SCRATCH: Final = frozenset({ROWS, GEMV_TRANSPOSED, SORT_EXPERTS})

ELEMENT_TYPES: Final[dict[FloatType, str]] = {"f32": "float", "f16": "u16", "bf16": "u16"}
"""The C++ types of arrays' elements, by their float types."""


@dataclass(frozen=True)
class Statement:
    """A variable that becomes `op` of `operands`.

    Attributes:
        id: the value in the graph.
        name: the variable.
        is_bool: whether it is a truth value.
        op: a macro of `operations.hip.j2`.
        operands: C++ expressions.
        at_column: whether it is loaded from an address that depends on `column`.
        float_type: of an element that is loaded.
        is_aligned: four elements from a multiple of 4 on can be loaded at once.
    """

    id: int
    name: str
    is_bool: bool
    op: str
    operands: tuple[str, ...]
    at_column: bool = False
    float_type: FloatType = "f32"
    is_aligned: bool = True


@dataclass(frozen=True)
class Sum:
    """A variable that becomes the sum or the maximum of `value` over `width` columns.

    Attributes:
        id: the value in the graph.
        name: the variable.
        op: `sum` or `max`.
        width: columns of the row.
        statements: what computes `value` at one column.
        value: a C++ expression.
    """

    id: int
    name: str
    op: str
    width: int
    statements: tuple[Statement, ...]
    value: str
    is_bool: ClassVar = False


RowStatement = Statement | Sum


@dataclass(frozen=True)
class Parameter:
    """A parameter of a generated kernel; `slot` is what the launcher puts there."""

    slot: Slot
    name: str
    type: str

    @property
    def declaration(self) -> str:
        """The parameter as C++ declares it."""
        return f"{self.type} {self.name}"

    @property
    def may_change(self) -> bool:
        """Whether an earlier kernel may write to this array: to every array but the weights."""
        return self.type.endswith("*") and self.slot.kind != "weight"

    @property
    def restricted(self) -> str:
        """The parameter of the kernel: no two arguments share memory that is written."""
        if self.type.endswith("*"):
            return f"{self.type} __restrict__ {self.name}"
        return self.declaration


def parameters(plan: HipPlan, kernel: HipKernel) -> tuple[Parameter, ...]:
    """Return the parameters of a kernel, in the order of its slots."""
    names = c_names(plan.graph.names)
    stores = [*kernel.work.rows, *(t for c in kernel.work.sections for t in c.stores)]
    if kernel.work.decoded is not None:
        stores.append(kernel.work.decoded)
    written = {(s.buffer.kind, s.buffer.index): s.buffer.float_type for s in stores}
    result = []
    for slot in kernel.slots():
        match slot.kind:
            case "array":
                spec = plan.graph.signature[slot.index]
                assert isinstance(spec, ArraySpec)
                element = ELEMENT_TYPES[spec.float_type]
                result.append(Parameter(slot, names[slot.index], f"const {element}*"))
            case "ids":
                ids = plan.graph.signature[slot.index]
                assert isinstance(ids, IdsSpec)
                integer = "i32" if ids.is_narrow else "i64"
                result.append(Parameter(slot, names[slot.index], f"const {integer}*"))
            case "scalar":
                result.append(Parameter(slot, names[slot.index], "float"))
            case "weight":
                result.append(Parameter(slot, names[slot.index], "const u8*"))
            case "m":
                result.append(Parameter(slot, "m", "i64"))
            case kind if kind in _X_TYPES:
                constant = "" if kernel.schedule in _WRITE_SCRATCH else "const "
                element = "float" if kind == "x_sums" and kernel.f16_terms else _X_TYPES[kind]
                result.append(Parameter(slot, kind, f"{constant}{element}*"))
            case _:
                name = buffer_name(Buffer(slot.kind, slot.index, 0))
                ours = written.get((slot.kind, slot.index))
                element = "const float" if ours is None else ELEMENT_TYPES[ours]
                result.append(Parameter(slot, name, f"{element}*"))
    return tuple(result)


class HipValues:
    """Writes the statements of a kernel's values.

    In its methods `known` holds C++ expressions of values that exist already, by their ids.

    Attributes:
        names: the variables of the values.
        operations: the operations of all statements written so far.
        loaded: the float types of the elements that they load.
    """

    def __init__(self, graph: Graph, kernel: HipKernel) -> None:
        self.names = ValueNames(graph.names)
        self.operations: set[str] = set()
        self.loaded: set[FloatType] = set()
        self._graph = graph
        self._arguments = c_names(graph.names)
        self._work = kernel.work
        self._buffers = {s.node.id: s.buffer for s in kernel.work.loads}

    # --- values of a row ------------------------------------------------------------------------

    def of_row(self, roots: Iterable[Node], known: Mapping[int, str]) -> tuple[RowStatement, ...]:
        """Return the statements of every value of width 1 that the roots need, in order."""
        result: list[RowStatement] = []
        expressions = dict(known)
        for node in self._needed(roots, expressions):
            if node.width == 1:
                result += self._row_value(node, expressions)
        return tuple(result)

    def _row_value(self, node: Node, expressions: dict[int, str]) -> list[RowStatement]:
        if node.op in REDUCTIONS and node.id not in self._buffers and node.operands[0].width > 1:
            statements, (value,) = self.at([node.operands[0]], expressions)
            name = expressions[node.id] = self.names.of(node)
            return [Sum(node.id, name, node.op, node.operands[0].width, statements, value)]
        return [*self._value(node, expressions, "0")]

    # --- values at a column ---------------------------------------------------------------------

    def at(
        self, roots: Sequence[Node], known: Mapping[int, str]
    ) -> tuple[tuple[Statement, ...], tuple[str, ...]]:
        """Return the statements at a `column`, and an expression for each root."""
        result: list[Statement] = []
        expressions = dict(known)
        for node in self._needed(roots, expressions):
            result += self._value(node, expressions, "column" if node.width > 1 else "0")
        return tuple(result), tuple(expressions[n.id] for n in roots)

    def _needed(self, roots: Iterable[Node], known: Mapping[int, str]) -> list[Node]:
        """Return the roots and their operands in order, without the known ones."""
        needed: dict[int, Node] = {}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node.id in needed or node.id in known:
                continue
            needed[node.id] = node
            if node.id not in self._buffers and node.op != "inner_sum":
                stack.extend(node.operands)
        return [needed[i] for i in sorted(needed)]

    def _value(self, node: Node, expressions: dict[int, str], column: str) -> list[Statement]:
        if node.op == "const":
            expressions[node.id] = literal(node.value)
            return []
        if node.op == "scalar":
            expressions[node.id] = f"a.{self._arguments[node.arg]}"
            return []
        if node.op == "inner_sum" and node.id not in self._buffers:
            return self._inner_sum(node, expressions, column)
        float_type: FloatType = "f32"
        is_aligned = True
        if node.id in self._buffers:
            buffer = self._buffers[node.id]
            name, op = self.names.in_buffer(node, buffer), "load"
            operands: tuple[str, ...] = (_in_buffer(buffer, node, column, self._work),)
        elif node.op == "load":
            name, op = self.names.of(node), "load"
            operands = (self._in_array(node, column),)
            float_type, is_aligned = self._array_spec(node).float_type, self._is_aligned(node)
        elif node.op == "reshape" or (node.op in REDUCTIONS and node.operands[0].width == 1):
            expressions[node.id] = expressions[node.operands[0].id]
            return []
        else:
            name, op = self.names.of(node), _MACROS.get(node.op, node.op)
            operands = tuple(expressions[n.id] for n in node.operands)
        expressions[node.id] = name
        self.operations.add(op)
        is_load = op == "load"
        if is_load:
            self.loaded.add(float_type)
            op = op if float_type == "f32" else f"load_{float_type}"
        at_column = is_load and column != "0"
        return [
            Statement(node.id, name, node.is_bool, op, operands, at_column, float_type, is_aligned)
        ]

    def _inner_sum(self, node: Node, expressions: dict[int, str], column: str) -> list[Statement]:
        """Return the sum of the vectors of this row, which an earlier kernel has stored."""
        (operand,) = node.operands
        buffer = self._buffers[operand.id]
        row, parts = _row(operand.varies, 1, self._work), []
        for vector in range(buffer.copies):
            first = f"({row} * {buffer.copies} + {vector})" if row else str(vector)
            index = f"{first} * {buffer.width}" if buffer.width > 1 else first
            index = index if column == "0" else f"{index} + {column}"
            name = self.names.of_vector(node, buffer, vector)
            load = (f"a.{buffer_name(buffer)}[{index}]",)
            parts.append(Statement(-1, name, False, "load", load, at_column=column != "0"))
        expressions[node.id] = self.names.of(node)
        self.operations |= {"load", "inner_sum"}
        self.loaded.add("f32")
        names = tuple(part.name for part in parts)
        return [*parts, Statement(node.id, expressions[node.id], False, "inner_sum", names)]

    def _array_spec(self, node: Node) -> ArraySpec:
        spec = self._graph.signature[node.arg]
        assert isinstance(spec, ArraySpec)
        return spec

    def _is_aligned(self, node: Node) -> bool:
        spec = self._array_spec(node)
        width = spec.shape[-1]
        assert isinstance(width, int)
        in_fours = width % 4 == 0 and node.start % 4 == 0
        return spec.float_type == "f32" or (spec.is_aligned and in_fours)

    def _in_array(self, node: Node, column: str) -> str:
        width = self._array_spec(node).shape[-1]
        assert isinstance(width, int)
        spread = node.copies > self._array_spec(node).copies
        if spread and node.copies == width:  # the columns of a row, one for each of its vectors
            index = _row(node.varies, node.copies, self._work) or "0"
        elif spread:
            vector = f"row % {node.copies}" if self._work.copies > 1 else "row"
            column = f"{node.start} + {vector}" if node.start else vector
            index = _index_of(_row(node.varies, 1, self._work), width, column)
        else:
            index = _index(node, width, _sum_of(column, node.start), self._work)
        return f"a.{self._arguments[node.arg]}[{index}]"


def store_index(node: Node, width: int, work: Kernel) -> str:
    """Return the index of a value of this row and column in its buffer."""
    return _index(node, width, "column" if node.width > 1 else "0", work)


def expert_index(work: Kernel) -> str:
    """Return the index of the id of this row's expert."""
    ids = work.chosen or work.sorted_by
    assert ids is not None
    inner = ids.shape[-1] if leading_axes(ids.shape) < len(ids.shape) else 1
    assert isinstance(inner, int)
    return _row(ids.varies, inner, work) or "0"


def literal(value: float) -> str:
    """Return a float constant in C++: exactly the same number."""
    number = np.float32(value)
    if not np.isfinite(number):
        return f"as_f32({int(number.view(np.uint32)):#010x}u)"
    exact = float(number)
    # the fewest digits that give the number back, found here: NumPy's releases print it differently
    texts = (f"{exact:.{digits}e}" for digits in range(_MOST_DIGITS))
    with np.errstate(over="ignore"):
        text = next(text for text in texts if np.float32(text) == number)
    if exact and not _SMALLEST_PLAIN <= abs(exact) < _LARGEST_PLAIN:
        return f"{text}f"
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2]) - int(exponent)
    return f"{exact:.{max(decimals, 1)}f}f"


def _in_buffer(buffer: Buffer, node: Node, column: str, work: Kernel) -> str:
    return f"a.{buffer_name(buffer)}[{_index(node, buffer.width, column, work)}]"


def _index(node: Node, width: int, column: str, work: Kernel) -> str:
    """Return the index of a value in rows of `width` elements; what never varies has one row."""
    return _index_of(_row(node.varies, node.copies, work), width, column)


def _index_of(row: str, width: int, column: str) -> str:
    if not row:
        return column
    start = f"{row} * {width}" if width > 1 else row
    return start if column == "0" else f"{start} + {column}"


def _row(varies: bool, copies: int, work: Kernel) -> str:
    """Return the row that an array has for this `row` of the kernel; "" if it has only one.

    varies: whether it has a row for each row of the call. copies: vectors of each.
    """
    if copies < work.copies:
        return f"row / {work.copies}" if varies else ""
    if varies or (work.uniform and copies > 1):
        return "row"
    return f"row % {copies}" if copies > 1 else ""


def _sum_of(column: str, start: int) -> str:
    if column == "0":
        return str(start)
    return f"{column} + {start}" if start else column
