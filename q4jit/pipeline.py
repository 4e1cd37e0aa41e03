"""The stages between a graph and a call, and the order in which they run.

    Graph ──plan──▶ Plan ──render──▶ Source ──fetch──▶ bytes ──load──▶ kernel ──launch──▶ y

A back end is one `Backend` that holds its stage functions. This module knows their order, and
imports no back end.
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
        """Return a function that runs the kernels on these arrays' current contents."""
        ...

    def prepare(self, args: Sequence[Any]) -> None:
        """Make the repacked copies of the weights that the kernels read."""
        ...


@runtime_checkable
class DeviceLaunch(Launch, Protocol):
    """Kernels bound to exact shapes, on a GPU."""

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """Run the kernels on PyTorch tensors of shapes and dtypes that an earlier call checked.

        pointers: their addresses on the device. stream: the stream to run on.
        """
        ...


@dataclass(frozen=True)
class Remark:
    """A line of `explain` as a value.

    Attributes:
        about: `precision`, `block_size` or `constants`.
        text: the line.
    """

    about: str
    text: str


@dataclass(frozen=True)
class Backend:
    """The stages of one kind of target, in the order in which they run.

    Attributes:
        check: raises TargetError if a target cannot do what the plan options ask for.
        m_class: returns the class of M of a number of rows.
        search: measures the fastest constants of a graph's kernels on a device, unless they are
            known.
        plan: plans a graph for a target and a number of rows, with the constants that were measured
            on a device (None: on any device of the target).
        render: writes the text of one kernel of a plan.
        compiler: returns the compiler for a target.
        load: makes a compiled kernel ready to run on a device (None: this CPU).
        launch: binds the loaded kernels of a plan to the shapes of arguments, which have names.
        explain: says which plan options a plan does not follow, and where its constants come from.
            The last argument: the user asked for a search.
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
    """A kernel that can run. `loaded` is the back end's object, which owns its memory."""

    source: Source
    entry: Entry
    loaded: Any


def ready_kernels(
    sources: Iterable[Source],
    fetch: Callable[[Source], Entry],
    load: Callable[[bytes, Source, Device | None], Any],
    device: Device | None,
) -> tuple[ReadyKernel, ...]:
    """Return the rendered kernels of a plan, ready to run: fetch the bytes of each and load them.

    fetch: returns the compiled bytes of a text; it may compile now, or wait for a compilation that
    runs already. load: the back end's. device: where the kernels will run; None is the CPU. Raises
    the errors of these two.
    """
    ready = []
    for source in sources:
        entry = fetch(source)
        ready.append(ReadyKernel(source, entry, load(entry.object_bytes, source, device)))
    return tuple(ready)


def fetch(compiler: Compiler, source: Source, *, use_disk: bool = True, cause: str = "") -> Entry:
    """Return the compiled form of a text: read from disk, or compiled and saved there.

    use_disk: whether kernels are read from and saved to disk. cause: why the kernel is needed, for
    the line that Q4JIT_DEBUG=1 writes. Raises CompileError, which names the
    lines of the templates if the text has any.
    """
    try:
        return cache.fetch(source.target, compiler, source.symbol, source.text, use_disk, cause)
    except CompileError as error:
        if source.origins is None:
            raise
        raise error.with_origins(source.origins()) from None
