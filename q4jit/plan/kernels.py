"""The parts of a plan: kernels with their phases, buffers and slots, the same for every target.

The schedules (`cpu.schedule`, `hip.schedule`) decide how each kernel is computed.

A kernel works in two phases. The *rows* phase computes values row by row: the x of its products
(the prologue, for example an RMSNorm), and other values that need no product of this kernel. The
*columns* phase computes products of that x, and then the epilogue on their results.

A graph needs several kernels if its products have different x, as chained products do, or if it
reduces the result of a product. Temporary buffers hold the values that a later phase needs; all
others are computed again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from q4jit.floats import FloatType
from q4jit.frontend.graph import Graph, Node, reachable
from q4jit.frontend.specs import ArraySpec, WeightSpec
from q4jit.frontend.statements import numbered, product_text, statements
from q4jit.targets import Target


@dataclass(frozen=True)
class Buffer:
    """An array [M, width] of floats that a kernel writes.

    Attributes:
        kind: `output`, a result, or `temp`, a value that a later kernel reads.
        index: its number among the buffers of that kind.
        width: elements of a row.
        float_type: of its elements; only results can be narrower than f32.
        copies: vectors of each row; the buffer is [M·copies, width].
    """

    kind: str
    index: int
    width: int
    float_type: FloatType = "f32"
    copies: int = 1

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"

    @property
    def is_exact(self) -> bool:
        """Whether it holds values as they were computed, so that later phases may read them."""
        return self.float_type == "f32"


@dataclass(frozen=True)
class Store:
    """A value that a phase computes, and the buffer that it is written to."""

    node: Node
    buffer: Buffer


@dataclass(frozen=True)
class Section:
    """Products that share x and are computed together, with their epilogue.

    Attributes:
        width: columns of each product and of each result.
        products: the nodes of the products.
        stores: the results.
    """

    width: int
    products: tuple[Node, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Slot:
    """One argument of a compiled kernel: 8 bytes, in the order of the kernel's `slots`.

    Attributes:
        kind: `m` (the number of the kernel's rows), `array`, `ids` (i64), `scalar`, `weight`,
            `output`, `temp`, or a kind that a schedule adds.
        index: the number of the argument or of the buffer.
        layout: the layout of a weight.
    """

    kind: str
    index: int = 0
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{self.index if self.kind in {'output', 'temp'} else ''}"


@dataclass(frozen=True)
class Kernel:
    """One compiled function: the values that its rows phase and its columns phase compute.

    Attributes:
        rows: values that the rows phase writes.
        x: the x of the products; None if there are no products.
        sections: the products with their epilogues.
        loads: values of earlier kernels that it reads.
        uniform: its values are the same for every row, and it runs with M = 1.
        copies: rows of the kernel for each row of the call: it computes vectors [M·copies, …].
        sorted_by: if set, the kernel only sorts the vectors of a call by these ids of experts.
        decoded: if set, the kernel writes only this value of a weight itself (`graph.DECODED`).
    """

    name: str
    rows: tuple[Store, ...]
    x: Node | None
    sections: tuple[Section, ...]
    loads: tuple[Store, ...]
    uniform: bool
    decoded: Store | None = None
    copies: int = 1
    sorted_by: Node | None = None

    @property
    def chosen(self) -> Node | None:
        """The ids of the experts that its products multiply by; all have the same ones, or none."""
        return next((p.chosen for s in self.sections for p in s.products), None)

    def rows_of(self, m: int) -> int:
        """Return the rows that the kernel computes in a call with m rows."""
        return (1 if self.uniform else m) * self.copies

    @property
    def symbol(self) -> str:
        """The name of the compiled function. The prefix tells a user's `memset` from libc's."""
        return f"q4jit_{self.name}"

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.decoded is None:
            return "M = 1"
        return "the whole weight" if self.decoded.node.op == "dequantize" else "one row for each id"

    @property
    def is_transposed(self) -> bool:
        """Whether its products are products with `w.T`; either all of them are, or none."""
        return any(p.transposed for s in self.sections for p in s.products)

    @property
    def buffers(self) -> dict[int, Buffer]:
        """The buffers that it reads or that its rows phase writes, by the id of their value."""
        return {s.node.id: s.buffer for s in (*self.loads, *self.rows) if s.buffer.is_exact}

    def leaves(self) -> list[Node]:
        """Return the nodes of this kernel, without its products and the values that it loads."""
        roots = [s.node for s in self.rows] + [t.node for s in self.sections for t in s.stores]
        roots += [self.x] if self.x is not None else []
        roots += [self.decoded.node] if self.decoded is not None else []
        stop = {p.id for s in self.sections for p in s.products} | {s.node.id for s in self.loads}
        return reachable(tuple(roots), stop)


@dataclass(frozen=True)
class Source:
    """The text of one kernel, which a compiler turns into bytes.

    Attributes:
        symbol: the name of the compiled function.
        suffix: of the file that holds the text, for example ".ll".
        origins: returns the template line ("kernel/gemv.hip.j2:12") of each line of the text; None
            if the text has no templates.
    """

    symbol: str
    target: Target
    text: str
    suffix: str
    origins: Callable[[], Mapping[int, str]] | None = field(default=None, compare=False)


class ScheduledKernel(Protocol):
    """A kernel together with the way in which a target computes it."""

    @property
    def work(self) -> Kernel:
        """The kernel that it computes."""
        ...

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        ...

    def schedule_of(self, section: Section) -> str:
        """Return the name of the way in which a section of `work` is computed."""
        ...

    def slots(self) -> tuple[Slot, ...]:
        """Return the kernel's arguments in order."""
        ...


K = TypeVar("K", bound=ScheduledKernel, covariant=True)


@dataclass(frozen=True)
class Plan(Generic[K]):
    """The kernels of a graph in the order in which they run, for one target and class of M.

    Attributes:
        temps: the floats for each row of the temporary buffers.
    """

    graph: Graph
    target: Target
    kernels: tuple[K, ...]
    temps: tuple[int, ...]

    def weight(self, arg: int) -> WeightSpec:
        """Return the spec of weight argument number `arg`."""
        spec = self.graph.signature[arg]
        assert isinstance(spec, WeightSpec)
        return spec

    def weight_layouts(self) -> list[tuple[int, str]]:
        """Return the numbers of the weight arguments, each with a layout that kernels read."""
        slots = (slot for kernel in self.kernels for slot in kernel.slots())
        return list(dict.fromkeys((s.index, s.layout) for s in slots if s.kind == "weight"))

    def __str__(self) -> str:
        lines = [f"plan {self.graph.name} for {self.target}{self._halves()}"]
        for kernel in self.kernels:
            lines.append(f"  kernel {kernel.work.name}: {kernel.rows_class}")
            lines += [f"    {line}" for line in self.describe(kernel)]
        return "\n".join(lines)

    def _halves(self) -> str:
        """Return the arrays and results that are not f32, in words."""
        graph = self.graph
        pairs = zip(graph.names, graph.signature, strict=True)
        arrays = [(name, s.float_type) for name, s in pairs if isinstance(s, ArraySpec)]
        results = [(f"output{i}", kind) for i, kind in enumerate(graph.result_types)]
        named = [f"{name} in {kind}" for name, kind in (*arrays, *results) if kind != "f32"]
        return f", {', '.join(named)}" if named else ""

    def describe(
        self,
        kernel: ScheduledKernel,
        label: Callable[[Node], str] = numbered,
        buffer: Callable[[Buffer], str] = str,
    ) -> list[str]:
        """Return the statements that a kernel computes, by phase and section.

        label, buffer: name values and buffers.
        """
        names, work = self.graph.names, kernel.work
        if work.decoded is not None:
            return statements([(buffer(work.decoded.buffer), work.decoded.node)], names, {})
        if work.sorted_by is not None:
            return [f"sort vectors by {names[work.sorted_by.arg]}"]
        known = {s.node.id: buffer(s.buffer) for s in work.loads}
        rows = [(buffer(s.buffer), s.node) for s in work.rows]
        if work.x is not None and all(s.node is not work.x for s in work.rows):
            rows.append((label(work.x), work.x))
        lines = ["rows:"]
        lines += [f"  {line}" for line in statements(rows, names, known, label)]
        known |= {s.node.id: buffer(s.buffer) for s in work.rows if s.buffer.is_exact}
        for section in work.sections:
            schedule = kernel.schedule_of(section)
            how = "" if schedule == "columns" else f", {schedule}"
            noun = "column" if section.width == 1 else "columns"
            lines.append(f"{section.width} {noun}{how}:")
            for product in section.products:
                text = f"{label(product)} = {product_text(product, names, label)}"
                lines.append(f"  {text}    {self.weight(product.arg)}")
            inside = known | {p.id: label(p) for p in section.products}
            results = [(buffer(t.buffer), t.node) for t in section.stores]
            lines += [f"  {line}" for line in statements(results, names, inside, label)]
        return lines
