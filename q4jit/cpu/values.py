"""Values of a graph in LLVM IR: one row at a time, and within it 16 columns or one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from q4jit.cpu.lanes import (
    ONE,
    SIXTEEN,
    Lanes,
    load_vector,
    splat_value,
    store_vector,
)
from q4jit.cpu.llvm_text import (
    Function,
    Module,
    float_text,
    splat,
)
from q4jit.cpu.operations import apply
from q4jit.cpu.schedule import CpuKernel, CpuPlan
from q4jit.frontend.graph import REDUCTIONS, Node
from q4jit.frontend.specs import ArraySpec
from q4jit.plan.kernels import Buffer, Slot, Store

_LABELS: Final = {"x": "prologue"}  # an argument may well be called x


@dataclass
class Context:
    """The kernel that is being written, its plan, and the module that its functions go to."""

    plan: CpuPlan
    kernel: CpuKernel
    module: Module

    def label(self, slot: Slot) -> str:
        """A slot's name in the text: an argument has its own."""
        of_user = slot.kind in {"array", "ids", "scalar", "weight"}
        return self.plan.graph.names[slot.index] if of_user else _LABELS.get(slot.kind, str(slot))

    def argument(self, f: Function, slot: Slot) -> str:
        """An argument's value, loaded at the top of the function."""
        number = self.kernel.slots().index(slot)
        kind = {"m": "i64", "scalar": "float"}.get(slot.kind, "ptr")
        label = self.label(slot)
        at = f.let_at_entry(f"{label}.at", f"getelementptr i64, ptr %args, i64 {number}")
        return f.let_at_entry(label, f"load {kind}, ptr {at}, align 8")


@dataclass
class CpuValues:
    """Writes the values of graph nodes for one row, and within it for one place along the width.

    Scalars (width 1) are written once per row; `at` starts a place: 16 columns under a mask, or a
    single column.
    """

    lowering: Context
    f: Function
    row: str
    buffers: dict[int, Buffer]
    scalars: dict[int, str] = field(default_factory=dict)
    lanes: Lanes = SIXTEEN
    column: str = "0"
    mask: str | None = None
    wide: dict[int, str] = field(default_factory=dict)

    def start(self, lanes: Lanes, column: str, mask: str | None, known: dict[int, str]) -> None:
        """Go to columns `column`, …; `known` are values that are there already (products)."""
        self.lanes, self.column, self.mask, self.wide = lanes, column, mask, dict(known)

    def scalar(self, node: Node) -> str:
        """A value of width 1."""
        for n in self._pending(node, self.scalars):
            self.scalars[n.id] = self._scalar(n)
        return self.scalars[node.id]

    def _pending(self, node: Node, known: dict[int, str]) -> Iterator[Node]:
        """What is not `known` of a value, operands first; the caller writes what it is handed.

        No recursion: an unrolled loop makes chains longer than Python's stack.
        """
        stack = [node]
        while stack:
            n = stack[-1]
            at_hand = n.id in self.buffers or n.op == "load"
            spread = known is self.wide and n.width == 1
            operands = () if at_hand or spread or n.id in known else n.operands
            missing = [o for o in operands if o.id not in known]
            stack += reversed(missing)
            if not missing:
                stack.pop()
                if n.id not in known:
                    yield n

    def _scalar(self, node: Node) -> str:
        if node.op == "const":
            return float_text(node.value)
        if node.id in self.buffers:
            return self._load_scalar(self._buffer_row(self.buffers[node.id]), "0")
        if node.op == "scalar":
            return self.lowering.argument(self.f, Slot("scalar", node.arg))
        if node.op == "load":
            return self._load_scalar(self._array_row(node), str(node.start))
        operands = [self.scalars[n.id] for n in node.operands]
        if node.op in REDUCTIONS | {"reshape"} and node.operands[0].width == 1:
            return operands[0]
        return apply(self.lowering.module, self.f, ONE, node.op, operands)

    def prepare(self, nodes: Iterable[Node]) -> None:
        """Write the scalars that `nodes` need: to be called before a loop over columns starts."""
        stack, seen = list(nodes), set[int]()
        while stack:
            node = stack.pop()
            if node.id in seen or node.id in self.wide:
                continue
            seen.add(node.id)
            if node.width == 1:
                self.scalar(node)
            elif node.id not in self.buffers:
                stack.extend(node.operands)

    def at(self, node: Node) -> str:
        """A value at the present place, in lanes (a scalar is spread over them)."""
        for n in self._pending(node, self.wide):
            self.wide[n.id] = self._at(n)
        return self.wide[node.id]

    def _at(self, node: Node) -> str:
        if node.width == 1:
            return self._spread(node)
        if node.id in self.buffers:
            return self._load(self._buffer_row(self.buffers[node.id]), self.column)
        if node.op == "load":
            column = self.f.index("column", (self.column, 1), (node.start, 1))
            return self._load(self._array_row(node), column)
        operands = [self.wide[n.id] for n in node.operands]
        return apply(self.lowering.module, self.f, self.lanes, node.op, operands)

    def _spread(self, node: Node) -> str:
        value = self.scalar(node)
        if self.lanes.count == 1:
            return value
        if node.op == "const":
            return splat("float", value)
        return splat_value(self.f, "i1" if node.is_bool else "float", value)

    def store(self, store: Store, buffer_row: str) -> None:
        """Write a value of the present place to a row of its buffer."""
        value = self.at(store.node)
        at = self.f.at(buffer_row, "float", self.column, "out_at")
        if self.lanes.count > 1:
            store_vector(self.lowering.module, self.f, value, at, self.mask)
        else:
            self.f.do(f"store float {value}, ptr {at}, align 4")

    def _load(self, row: str, column: str) -> str:
        at = self.f.at(row, "float", column)
        if self.lanes.count > 1:
            return load_vector(self.lowering.module, self.f, at, self.mask)
        return self.f.let("v", f"load float, ptr {at}, align 4")

    def _load_scalar(self, row: str, column: str) -> str:
        return self.f.let("s", f"load float, ptr {self.f.at(row, 'float', column)}, align 4")

    def _array_row(self, node: Node) -> str:
        spec = self.lowering.plan.graph.signature[node.arg]
        assert isinstance(spec, ArraySpec)
        base = self.lowering.argument(self.f, Slot("array", node.arg))
        width = spec.shape[-1]
        assert isinstance(width, int)
        return self._row_of(base, width) if node.varies else base

    def _buffer_row(self, buffer: Buffer) -> str:
        base = self.lowering.argument(self.f, Slot(buffer.kind, buffer.index))
        return self._row_of(base, buffer.width)

    def _row_of(self, base: str, width: int) -> str:
        return self.f.at(base, "float", self.f.index("row_at", (self.row, width)), "row_ptr")

    def buffer_row(self, store: Store) -> str:
        """The address of this row in a store's buffer."""
        return self._buffer_row(store.buffer)
