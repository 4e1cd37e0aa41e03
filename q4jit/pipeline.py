"""The stages between a graph and a call, and the order in which they run.

    Graph ──plan──▶ Plan ──render──▶ Source ──fetch──▶ bytes ──load──▶ kernel ──launch──▶ y

A back end is one value that holds its stages. This module knows the order, and no back end.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from q4jit.arrays.call_shapes import CallShapes
from q4jit.compilers import cache
from q4jit.compilers.cache import Compiler, Entry
from q4jit.errors import CompileError
from q4jit.frontend.graph import Graph
from q4jit.plan.kernels import Plan, Source
from q4jit.plan.options import PlanOptions
from q4jit.runtime.driver import Device
from q4jit.targets import Target


class Launch(Protocol):
    """Kernels bound to exact shapes."""

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels."""
        ...

    def bind(self, args: Sequence[Any], out: object = None) -> Callable[[], Any]:
        """A call with these very arrays."""
        ...

    def prepare(self, args: Sequence[Any]) -> None:
        """Bring the weights where the kernels read them."""
        ...


@runtime_checkable
class DeviceLaunch(Launch, Protocol):
    """Kernels bound to exact shapes, on a GPU."""

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """Run the kernels on PyTorch's tensors, whose like was accepted in an earlier call."""
        ...


@dataclass(frozen=True)
class Remark:
    """A line of `explain`. about: `precision`, `block_size` or `constants`."""

    about: str
    text: str


@dataclass(frozen=True)
class Backend:
    """The stages of one kind of target, in the order in which they run.

    check: raises TargetError where a target cannot do what the plan options ask for; m_class: the
    class of a number of rows; search: finds the fastest constants of the kernels of a graph on a
    device, where none are known; plan: a graph for a target and a number of rows, with the
    constants that were measured on a device (None: on any of that target); render: a kernel of a
    plan as text; compiler: the one for a target; load: a compiled kernel, ready to run on a device
    (None: this CPU); launch: a plan's loaded kernels bound to the shapes of arguments, which have
    names; explain: what a plan does not follow of the plan options, and who chose its constants
    (the last argument: whether a search was asked for).
    """

    check: Callable[[Target, PlanOptions], None]
    m_class: Callable[[Target, int, PlanOptions], int]
    search: Callable[[Device, Graph, int, PlanOptions], None]
    plan: Callable[[Graph, Target, int, PlanOptions, Device | None], Plan[Any]]
    render: Callable[[Any, Any], Source]
    compiler: Callable[[Target], Compiler]
    load: Callable[[bytes, Source, Device | None], Any]
    launch: Callable[
        [Any, Sequence[Any], CallShapes, Sequence[Any], Sequence[str], Device | None], Launch
    ]
    explain: Callable[[Any, PlanOptions, bool], list[Remark]]


@dataclass(frozen=True)
class ReadyKernel:
    """A kernel that can run; `loaded` owns its executable memory."""

    source: Source
    entry: Entry
    loaded: Any


def ready_kernels(
    sources: Iterable[Source],
    fetch: Callable[[Source], Entry],
    load: Callable[[bytes, Source, Device | None], Any],
    device: Device | None,
) -> tuple[ReadyKernel, ...]:
    """Make the rendered kernels of a plan ready to run: fetch the bytes of each, and load them.

    fetch: how compiled bytes are obtained, now or from a compilation that was begun before. load:
    the back end's. device: where the kernels will run, None for the CPU. Raises what these raise.
    """
    ready = []
    for source in sources:
        entry = fetch(source)
        ready.append(ReadyKernel(source, entry, load(entry.object_bytes, source, device)))
    return tuple(ready)


def fetch(compiler: Compiler, source: Source, *, use_disk: bool = True) -> Entry:
    """Return the compiled form of a text: from disk, or compiled and saved.

    use_disk: whether compiled kernels are looked for and kept on disk. Raises CompileError, whose
    lines are those of the templates where they are known.
    """
    try:
        return cache.fetch(source.target, compiler, source.symbol, source.text, use_disk)
    except CompileError as error:
        if source.origins is None:
            raise
        raise error.with_origins(source.origins()) from None
