"""Write the values of a graph in LLVM IR: one row at a time, and in it 16 columns or one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from q4jit.cpu.halves import STORED, load_floats, store_floats
from q4jit.cpu.lanes import ONE, SIXTEEN, Lanes, broadcast
from q4jit.cpu.llvm_text import Function, Module, Struct, StructField, float_text, splat
from q4jit.cpu.operations import apply
from q4jit.cpu.schedule import EXPERT_SLOTS, CpuKernel, CpuPlan
from q4jit.floats import FloatType
from q4jit.frontend.graph import REDUCTIONS, Node
from q4jit.frontend.specs import ArraySpec
from q4jit.plan.kernels import Buffer, Slot, Store

_LABELS: Final = {"x": "prologue"}  # an argument is likely to be called x
_KINDS: Final = {"m": "i64", "buckets": "i64", "scalar": "{ float, [4 x i8] }"}
"""LLVM's types of slots, by their kind; the others hold addresses."""


@dataclass
class Context:
    """The kernel that is being written, its plan, and the module that receives its functions."""

    plan: CpuPlan
    kernel: CpuKernel
    module: Module

    def label(self, slot: Slot) -> str:
        """Return a slot's name in the text; arguments keep the user's names."""
        if slot.kind in EXPERT_SLOTS:
            return f"{self.plan.graph.names[slot.index]}_{slot.kind}"
        of_user = slot.kind in {"array", "ids", "scalar", "weight"}
        return self.plan.graph.names[slot.index] if of_user else _LABELS.get(slot.kind, str(slot))

    def slots_struct(self) -> Struct:
        """Return the type of the kernel's arguments."""
        fields = (
            StructField(str(i), _KINDS.get(slot.kind, "ptr"), self.label(slot))
            for i, slot in enumerate(self.kernel.slots())
        )
        return Struct("Slots", "The kernel's arguments, 8 bytes each.", tuple(fields))

    def expert_argument(self, f: Function, kind: str) -> str:
        """Load an argument about the experts that the kernel's products multiply by."""
        chosen = self.kernel.work.chosen
        assert chosen is not None
        slots = (s for s in self.kernel.slots() if (s.kind, s.index) == (kind, chosen.arg))
        return self.argument(f, next(slots))

    def vector_at(self, f: Function, place: str) -> str:
        """Return the row that has a place in the order of experts; without experts, the place."""
        if self.kernel.work.chosen is None:
            return place
        at = f.at(self.expert_argument(f, "order"), "i64", place, "vector_at")
        return f.let("vector", f"load i64, ptr {at}, align 8")

    def argument(self, f: Function, slot: Slot) -> str:
        """Load an argument at the top of the function, and return its value."""
        number = self.kernel.slots().index(slot)
        kind = {"m": "i64", "buckets": "i64", "scalar": "float"}.get(slot.kind, "ptr")
        label = self.label(slot)
        at = f.let_at_entry(
            f"{label}_slot", f"getelementptr %Slots, ptr %args, i64 0, i32 {number}"
        )
        return f.let_at_entry(label, f"load {kind}, ptr {at}, align 8")


@dataclass
class CpuValues:
    """Writes the values of graph nodes for one row: scalars once, other values column by column.

    A scalar has width 1. `start` goes to the present columns: a single one, or 16 under a
    mask.

    Attributes:
        lowering: the kernel that is being written.
        f: the function that is being written.
        row: the row's number.
        buffers: the buffers of values that an earlier phase has stored, by node id.
        scalars: names of the scalars that have been written, by node id.
        lanes: one column or 16.
        column: the first of the present columns.
        mask: the columns that exist; None if all do.
        wide: names of the values of the present columns, by node id.
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
        """Go to columns `column`, …; `known` are values that have been written (products)."""
        self.lanes, self.column, self.mask, self.wide = lanes, column, mask, dict(known)

    def scalar(self, node: Node) -> str:
        """Return a scalar."""
        for n in self._pending(node, self.scalars):
            self.scalars[n.id] = self._scalar(n)
        return self.scalars[node.id]

    def _pending(self, node: Node, known: dict[int, str]) -> Iterator[Node]:
        """Yield the nodes below `node` that are not `known`, operands first.

        The caller writes each node that it receives. There is no recursion: chains of operations
        (a user's unrolled loop) may be longer than Python's stack.
        """
        stack = [node]
        while stack:
            n = stack[-1]
            loaded = n.id in self.buffers or n.op == "load"
            scalar = known is self.wide and n.width == 1
            is_leaf = loaded or scalar or n.op == "inner_sum" or n.id in known
            operands = () if is_leaf else n.operands
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
            buffer = self.buffers[node.id]
            return self._load_scalar(self._buffer_row(buffer), "0", str(buffer), "f32")
        if node.op == "inner_sum":
            return self._inner_sum(node, ONE, "0")
        if node.op == "scalar":
            return self.lowering.argument(self.f, Slot("scalar", node.arg))
        if node.op == "load":
            name, float_type = self._array_name(node), self._array_spec(node).float_type
            return self._load_scalar(self._array_row(node), str(node.start), name, float_type)
        operands = [self.scalars[n.id] for n in node.operands]
        if node.op in REDUCTIONS | {"reshape"} and node.operands[0].width == 1:
            return operands[0]
        return apply(self.lowering.module, self.f, ONE, node.op, operands)

    def prepare(self, nodes: Iterable[Node]) -> None:
        """Write the scalars that `nodes` need; call this before a loop over columns starts."""
        stack, seen = list(nodes), set[int]()
        while stack:
            node = stack.pop()
            if node.id in seen or node.id in self.wide:
                continue
            seen.add(node.id)
            if node.width == 1:
                self.scalar(node)
            elif node.id not in self.buffers and node.op != "inner_sum":
                stack.extend(node.operands)

    def at(self, node: Node) -> str:
        """Return a value of the present columns; a scalar is in every lane."""
        for n in self._pending(node, self.wide):
            self.wide[n.id] = self._at(n)
        return self.wide[node.id]

    def _at(self, node: Node) -> str:
        if node.width == 1:
            return self._broadcast(node)
        if node.id in self.buffers:
            buffer = self.buffers[node.id]
            return self._load(self._buffer_row(buffer), self.column, str(buffer), "f32")
        if node.op == "inner_sum":
            return self._inner_sum(node, self.lanes, self.column)
        if node.op == "load":
            column = self.f.index("column", (self.column, 1), (node.start, 1))
            name, float_type = self._array_name(node), self._array_spec(node).float_type
            return self._load(self._array_row(node), column, name, float_type)
        operands = [self.wide[n.id] for n in node.operands]
        return apply(self.lowering.module, self.f, self.lanes, node.op, operands)

    def _inner_sum(self, node: Node, lanes: Lanes, column: str) -> str:
        """Return the sum of the vectors of this row, which an earlier kernel has stored."""
        (operand,) = node.operands
        buffer, f, total = self.buffers[operand.id], self.f, ""
        base = self.lowering.argument(f, Slot(buffer.kind, buffer.index))
        row_index = self._row_index(True, 1) or "0"
        for copy in range(buffer.copies):
            row = f.index("vector", (row_index, buffer.copies), (copy, 1))
            row_at = self._row_at(base, row, buffer.width, str(buffer), "f32")
            load = self._load if lanes.count > 1 else self._load_scalar
            value = load(row_at, column, str(buffer), "f32")
            total = f.let("sum", f"fadd {lanes.f32} {total}, {value}") if total else value
        return total

    def _row_index(self, varies: bool, copies: int) -> str | None:
        """Return the row that an array has for this row of the kernel; None: it has only one.

        varies: whether it has a row for each row of the call. copies: vectors of each.
        """
        f, work = self.f, self.lowering.kernel.work
        if copies < work.copies:
            return f.let("whole_row", f"udiv i64 {self.row}, {work.copies}") if varies else None
        if varies or (work.uniform and copies > 1):
            return self.row
        return f.let("copy", f"urem i64 {self.row}, {copies}") if copies > 1 else None

    def _broadcast(self, node: Node) -> str:
        value = self.scalar(node)
        if self.lanes.count == 1:
            return value
        if node.op == "const":
            return splat("float", value)
        return broadcast(self.f, "i1" if node.is_bool else "float", value)

    def store(self, store: Store, buffer_row: str) -> None:
        """Write a value of the present columns to a row of its buffer."""
        value, float_type = self.at(store.node), store.buffer.float_type
        at = self.f.at(buffer_row, STORED[float_type], self.column, f"{store.buffer}_at")
        store_floats(self.lowering.module, self.f, self.lanes, float_type, value, at, self.mask)

    def store_scalar(self, store: Store) -> None:
        """Write a scalar to this row of its buffer."""
        value, at = self.scalar(store.node), self.buffer_row(store)
        store_floats(self.lowering.module, self.f, ONE, store.buffer.float_type, value, at, None)

    def _load(self, row_at: str, column: str, name: str, float_type: FloatType) -> str:
        if self.lanes.count == 1:
            return self._load_scalar(row_at, column, name, float_type)
        at = self.f.at(row_at, STORED[float_type], column, f"{name}_at")
        module = self.lowering.module
        return load_floats(module, self.f, self.lanes, float_type, at, self.mask, f"{name}_columns")

    def _load_scalar(self, row_at: str, column: str, name: str, float_type: FloatType) -> str:
        at = self.f.at(row_at, STORED[float_type], column, f"{name}_at")
        return load_floats(self.lowering.module, self.f, ONE, float_type, at, None, f"{name}_value")

    def _array_name(self, node: Node) -> str:
        return self.lowering.label(Slot("array", node.arg))

    def _array_spec(self, node: Node) -> ArraySpec:
        spec = self.lowering.plan.graph.signature[node.arg]
        assert isinstance(spec, ArraySpec)
        return spec

    def _array_row(self, node: Node) -> str:
        spec, f = self._array_spec(node), self.f
        base = self.lowering.argument(f, Slot("array", node.arg))
        width, name = spec.shape[-1], self._array_name(node)
        assert isinstance(width, int)
        if node.copies > spec.copies:  # the columns of a row, one for each of its vectors
            row_at = self._row_of(base, width, name, spec.float_type, node.varies, 1)
            copy = f.let("copy", f"urem i64 {self.row}, {node.copies}")
            return f.at(row_at, STORED[spec.float_type], copy, f"{name}_copy_at")
        return self._row_of(base, width, name, spec.float_type, node.varies, node.copies)

    def _buffer_row(self, buffer: Buffer) -> str:
        base = self.lowering.argument(self.f, Slot(buffer.kind, buffer.index))
        float_type, name = buffer.float_type, str(buffer)
        return self._row_of(base, buffer.width, name, float_type, True, buffer.copies)

    def _row_of(
        self,
        base: str,
        width: int,
        name: str,
        float_type: FloatType,
        varies: bool,
        copies: int,
    ) -> str:
        row = self._row_index(varies, copies)
        return base if row is None else self._row_at(base, row, width, name, float_type)

    def _row_at(self, base: str, row: str, width: int, name: str, float_type: FloatType) -> str:
        offset = self.f.index(f"{name}_offset", (row, width))
        return self.f.at(base, STORED[float_type], offset, f"{name}_row_at")

    def buffer_row(self, store: Store) -> str:
        """Return the address of this row in a store's buffer."""
        return self._buffer_row(store.buffer)
