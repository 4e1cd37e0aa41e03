"""What a plan is made of: kernels with their phases, buffers and slots, whatever the target.

How each kernel is computed is the business of the schedules (`cpu.schedule`, `hip.schedule`). A
kernel works in two phases. The *rows* phase computes values row by row: the x of its products (the
prologue, RMSNorm for example) and whatever else is known before the products. The *columns* phase
computes products of that x and, on their results, the epilogue. A graph needs several kernels where
products have different x (chained products among them), or where a product's result is reduced.
Values that a later phase needs are kept in temporaries; all else is recomputed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from q4jit.frontend.graph import Graph, Node, reachable
from q4jit.frontend.specs import WeightSpec
from q4jit.frontend.statements import numbered, statements
from q4jit.targets import Target


@dataclass(frozen=True)
class Buffer:
    """Where a value lives in memory, [M, width] f32: output or temporary number `index`."""

    kind: str
    index: int
    width: int

    def __str__(self) -> str:
        return f"{self.kind}{self.index}"


@dataclass(frozen=True)
class Store:
    """A value that a phase computes, and where it goes."""

    node: Node
    buffer: Buffer


@dataclass(frozen=True)
class Section:
    """Columns of equal number computed together: products and the epilogue on them."""

    width: int
    products: tuple[Node, ...]
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Slot:
    """One argument of a compiled kernel: 8 bytes, in the order of the kernel's `slots`.

    kind: `m` (rows), `array`, `ids` (i64), `scalar`, `weight` (in `layout`), `output`, `temp`, and
    what a schedule adds to these.
    """

    kind: str
    index: int = 0
    layout: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{self.index if self.kind in {'output', 'temp'} else ''}"


@dataclass(frozen=True)
class Kernel:
    """One compiled function: what its rows phase and its columns phase compute.

    `loads` are the values of earlier phases that it reads. `uniform` kernels compute values that
    are the same for every row, and run with M = 1. A kernel with `decoded` set writes that value of
    a weight itself (see `graph.DECODED`) and does nothing else.
    """

    name: str
    rows: tuple[Store, ...]
    x: Node | None
    sections: tuple[Section, ...]
    loads: tuple[Store, ...]
    uniform: bool
    decoded: Store | None = None

    @property
    def symbol(self) -> str:
        """The compiled function; the prefix keeps a user's `memset` from being libc's."""
        return f"q4jit_{self.name}"

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        if self.decoded is None:
            return "M = 1"
        return "the whole weight" if self.decoded.node.op == "dequantize" else "one row for each id"

    @property
    def buffers(self) -> dict[int, Buffer]:
        """Buffers by the id of the value that they hold."""
        return {s.node.id: s.buffer for s in (*self.loads, *self.rows)}

    def leaves(self) -> list[Node]:
        """The values that no operation of this kernel computes, and the operations on the way."""
        roots = [s.node for s in self.rows] + [t.node for s in self.sections for t in s.stores]
        roots += [self.x] if self.x is not None else []
        roots += [self.decoded.node] if self.decoded is not None else []
        stop = {p.id for s in self.sections for p in s.products} | {s.node.id for s in self.loads}
        return reachable(tuple(roots), stop)


@dataclass(frozen=True)
class Source:
    """Text that a compiler turns into bytes: the kernel `symbol` for `target`.

    `origins` tells for each line of the text the template and the line there that it came from.
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
        """What is computed."""
        ...

    @property
    def rows_class(self) -> str:
        """The class of M that the kernel serves, in words."""
        ...

    def schedule_of(self, section: Section) -> str:
        """Name the way in which a section of `work` is computed."""
        ...

    def slots(self) -> tuple[Slot, ...]:
        """Return the arguments in order."""
        ...


K = TypeVar("K", bound=ScheduledKernel, covariant=True)


@dataclass(frozen=True)
class Plan(Generic[K]):
    """The kernels of a graph in the order in which they run, for one target and class of M.

    `temps` are the widths of the temporaries, `outputs` the buffers of the results.
    """

    graph: Graph
    target: Target
    kernels: tuple[K, ...]
    temps: tuple[int, ...]

    def weight(self, arg: int) -> WeightSpec:
        """The spec of a weight argument."""
        spec = self.graph.signature[arg]
        assert isinstance(spec, WeightSpec)
        return spec

    def weight_layouts(self) -> list[tuple[int, str]]:
        """Return the weight arguments that kernels read, each with the layout that they want."""
        slots = (slot for kernel in self.kernels for slot in kernel.slots())
        return list(dict.fromkeys((s.index, s.layout) for s in slots if s.kind == "weight"))

    def __str__(self) -> str:
        lines = [f"plan {self.graph.name} for {self.target}"]
        for kernel in self.kernels:
            lines.append(f"  kernel {kernel.work.name}: {kernel.rows_class}")
            lines += [f"    {line}" for line in self.describe(kernel)]
        return "\n".join(lines)

    def describe(
        self,
        kernel: ScheduledKernel,
        label: Callable[[Node], str] = numbered,
        buffer: Callable[[Buffer], str] = str,
    ) -> list[str]:
        """Say line by line what a kernel computes; `label` and `buffer` name values and buffers."""
        names, work = self.graph.names, kernel.work
        if work.decoded is not None:
            return statements([(buffer(work.decoded.buffer), work.decoded.node)], names, {})
        known = {s.node.id: buffer(s.buffer) for s in work.loads}
        rows = [(buffer(s.buffer), s.node) for s in work.rows]
        if work.x is not None and all(s.node is not work.x for s in work.rows):
            rows.append((label(work.x), work.x))
        lines = ["rows:"]
        lines += [f"  {line}" for line in statements(rows, names, known, label)]
        known |= {s.node.id: buffer(s.buffer) for s in work.rows}
        for section in work.sections:
            lines.append(f"{section.width} {kernel.schedule_of(section)}:")
            for product in section.products:
                x = product.operands[0]
                (text,) = statements([(label(product), product)], names, {x.id: label(x)}, label)
                lines.append(f"  {text}    {self.weight(product.arg)}")
            inside = known | {p.id: label(p) for p in section.products}
            results = [(buffer(t.buffer), t.node) for t in section.stores]
            lines += [f"  {line}" for line in statements(results, names, inside, label)]
        return lines
