"""The values of a graph as steps that the HIP templates write out, one C++ statement each.

Everything is computed for one row of x. A value of width 1 is the same for the whole row; the
others are wanted at one `column`. A sum over a row is a loop, which a whole block shares.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

from q4jit.frontend.graph import REDUCTIONS, Graph, Node
from q4jit.frontend.specs import ArraySpec
from q4jit.hip.kernel import ROWS, HipKernel, HipPlan
from q4jit.plan.kernels import Buffer, Slot

# An argument is a parameter of the kernel and a member of `Arguments`, never in scope of a body: a
# name gets a `_` behind it only where it is a word of C++, a type, or means one of our own buffers.
RESERVED: Final = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
    char32_t class compl concept const consteval constexpr constinit const_cast continue co_await
    co_return co_yield decltype default delete do double dynamic_cast else enum explicit export
    extern false float for friend goto if inline int long mutable namespace new noexcept not not_eq
    nullptr operator or or_eq private protected public register reinterpret_cast requires return
    short signed sizeof static static_assert static_cast struct switch template this thread_local
    throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while
    xor xor_eq
    u8 u16 u32 u64 i8 i16 i32 i64 u32x4 f32x4 f32x8 bf16x4 bf16x8 bf16x16 fragment accumulator
    CLUSTER KERNEL DEVICE SHARED SHARED_AT_512 UNROLL ROLLED MEETING WAVE BLOCK_SIZE Arguments
    RowValues compute
    m x_values x_terms x_rough x_quants x_scales x_sums host_arguments linux unix
    """.split()
)

# The operations whose macros have other names: Jinja keeps `and` for itself.
_OPERATIONS: Final = {"and": "logical_and", "or": "logical_or", "not": "logical_not"}

# What a `rows` kernel makes of x for the kernels of its products.
_X_TYPES: Final = {
    "x_terms": "u16",
    "x_rough": "u32",
    "x_quants": "u32",
    "x_scales": "float",
    "x_sums": "i16",
}


@dataclass(frozen=True)
class Step:
    """One statement: value `id` becomes `op` of `operands`, which are C++ expressions.

    at_column: it is loaded from where `column` says.
    """

    id: int
    is_bool: bool
    op: str
    operands: tuple[str, ...]
    at_column: bool = False

    @property
    def name(self) -> str:
        """The variable that the statement sets."""
        return variable(self.id)


@dataclass(frozen=True)
class Sum:
    """Value `id` becomes the sum over `width` columns of `value`, which `steps` compute at one.

    op: `sum`, or `max` for the largest instead.
    """

    id: int
    op: str
    width: int
    steps: tuple[Step, ...]
    value: str
    is_bool: ClassVar = False

    @property
    def name(self) -> str:
        """The variable that holds the sum."""
        return variable(self.id)


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
        """Whether a kernel before may write there: everywhere but in weights."""
        return self.type.endswith("*") and self.slot.kind != "weight"

    @property
    def restricted(self) -> str:
        """The parameter of the kernel: no two arguments share memory that is written."""
        if self.type.endswith("*"):
            return f"{self.type} __restrict__ {self.name}"
        return self.declaration


def c_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a function's arguments as C++ takes them; ASCII identifiers already."""
    found: list[str] = []
    for name in names:
        # v3, output0, temp0, x_…: names that texts make themselves
        taken = name in RESERVED or re.fullmatch(r"(v|output|temp)\d+", name)
        candidate = f"{name}_" if taken or name.startswith("_") else name
        while candidate in found:
            candidate += "_"
        found.append(candidate)
    return tuple(found)


def parameters(plan: HipPlan, kernel: HipKernel) -> tuple[Parameter, ...]:
    """The parameters of a kernel, in the order of its slots."""
    names = c_names(plan.graph.names)
    written = {
        s.buffer for s in (*kernel.work.rows, *(t for c in kernel.work.sections for t in c.stores))
    }
    if kernel.work.decoded is not None:
        written.add(kernel.work.decoded.buffer)
    found = []
    for slot in kernel.slots():
        match slot.kind:
            case "array":
                found.append(Parameter(slot, names[slot.index], "const float*"))
            case "ids":
                found.append(Parameter(slot, names[slot.index], "const i64*"))
            case "scalar":
                found.append(Parameter(slot, names[slot.index], "float"))
            case "weight":
                found.append(Parameter(slot, names[slot.index], "const u8*"))
            case "m":
                found.append(Parameter(slot, "m", "i64"))
            case kind if kind in _X_TYPES:
                constant = "" if kernel.schedule == ROWS else "const "
                found.append(Parameter(slot, kind, f"{constant}{_X_TYPES[kind]}*"))
            case _:
                name = buffer_name(slot.kind, slot.index)
                mine = any(b.kind == slot.kind and b.index == slot.index for b in written)
                found.append(Parameter(slot, name, f"{'' if mine else 'const '}float*"))
    return tuple(found)


def variable(value: int) -> str:
    """The variable that holds a value of the graph, by its id."""
    return f"v{value}"


def buffer_name(kind: str, index: int) -> str:
    """The parameter of a buffer: `output0`, `temp1`; `x_values` is the stored prologue."""
    return "x_values" if kind == "x" else f"{kind}{index}"


class HipValues:
    """Writes the steps of a kernel's values; `known` are expressions by the id of their value.

    operations: those of all steps that were written.
    """

    def __init__(self, graph: Graph, kernel: HipKernel) -> None:
        self.operations: set[str] = set()
        self._graph = graph
        self._names = c_names(graph.names)
        self._buffers = {s.node.id: s.buffer for s in kernel.work.loads}

    # --- values of a row ------------------------------------------------------------------------

    def row_steps(self, roots: Iterable[Node], known: Mapping[int, str]) -> tuple[Step | Sum, ...]:
        """Everything of width 1 that the roots need, in order."""
        steps: list[Step | Sum] = []
        names = dict(known)
        for node in self._needed(roots, names):
            if node.width == 1:
                steps += self._row_step(node, names)
        return tuple(steps)

    def _row_step(self, node: Node, names: dict[int, str]) -> list[Step | Sum]:
        if node.op in REDUCTIONS and node.id not in self._buffers and node.operands[0].width > 1:
            inner = self.at([node.operands[0]], names)
            names[node.id] = variable(node.id)
            return [Sum(node.id, node.op, node.operands[0].width, *_one(inner))]
        return [*self._step(node, names, "0")]

    # --- values at a column ---------------------------------------------------------------------

    def at(
        self, roots: Sequence[Node], known: Mapping[int, str]
    ) -> tuple[tuple[Step, ...], tuple[str, ...]]:
        """The steps at a `column` and the expressions of the roots; row values are `known`."""
        steps: list[Step] = []
        names = dict(known)
        for node in self._needed(roots, names):
            steps += self._step(node, names, "column" if node.width > 1 else "0")
        return tuple(steps), tuple(names[n.id] for n in roots)

    def _needed(self, roots: Iterable[Node], known: Mapping[int, str]) -> list[Node]:
        """The roots and their operands in order, without what is known."""
        found: dict[int, Node] = {}
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node.id in found or node.id in known:
                continue
            found[node.id] = node
            if node.id not in self._buffers:
                stack.extend(node.operands)
        return [found[i] for i in sorted(found)]

    def _step(self, node: Node, names: dict[int, str], column: str) -> list[Step]:
        if node.op == "const":
            names[node.id] = literal(node.value)
            return []
        if node.id in self._buffers:
            operands: tuple[str, ...] = (self._in_buffer(self._buffers[node.id], node, column),)
            op = "load"
        elif node.op == "scalar":
            names[node.id] = f"a.{self._names[node.arg]}"
            return []
        elif node.op == "load":
            operands, op = (self._in_array(node, column),), "load"
        elif node.op == "reshape" or (node.op in REDUCTIONS and node.operands[0].width == 1):
            names[node.id] = names[node.operands[0].id]
            return []
        else:
            operands = tuple(names[n.id] for n in node.operands)
            op = _OPERATIONS.get(node.op, node.op)
        names[node.id] = variable(node.id)
        self.operations.add(op)
        return [Step(node.id, node.is_bool, op, operands, op == "load" and column != "0")]

    def _in_array(self, node: Node, column: str) -> str:
        spec = self._graph.signature[node.arg]
        assert isinstance(spec, ArraySpec)
        width = spec.shape[-1]
        assert isinstance(width, int)
        at = _sum_of(column, node.start)
        return f"a.{self._names[node.arg]}[{_place(node, width, at)}]"

    def _in_buffer(self, buffer: Buffer, node: Node, column: str) -> str:
        place = _place(node, buffer.width, column)
        return f"a.{buffer_name(buffer.kind, buffer.index)}[{place}]"


def store_index(node: Node, width: int) -> str:
    """Where a value of this row and column goes in its buffer."""
    return _place(node, width, "column" if node.width > 1 else "0")


def literal(value: float) -> str:
    """A float constant in C++, the very same number."""
    number = np.float32(value)
    if not np.isfinite(number):
        return f"as_f32({int(number.view(np.uint32)):#010x}u)"
    text = str(number)
    return f"{text if set(text) & set('.e') else f'{text}.0'}f"


def _one(inner: tuple[tuple[Step, ...], tuple[str, ...]]) -> tuple[tuple[Step, ...], str]:
    steps, (value,) = inner
    return steps, value


def _place(node: Node, width: int, column: str) -> str:
    """The index of a value in rows of `width` elements; there is one row of what does not vary."""
    if not node.varies:
        return column
    row = f"row * {width}" if width > 1 else "row"
    return row if column == "0" else f"{row} + {column}"


def _sum_of(column: str, start: int) -> str:
    if column == "0":
        return str(start)
    return f"{column} + {start}" if start else column
