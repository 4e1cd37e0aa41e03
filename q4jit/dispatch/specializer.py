"""Compile and bind kernels for calls with new shapes.

    args ──▶ Request ──trace──▶ Graph ──plan, render, fetch, load──▶ kernels ──launch──▶ Launch

Each function has one `Specializer`. It keeps its graphs, plans and kernels, and reports on them.
"""

import contextlib
import errno
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4jit import config
from q4jit.arrays.call_shapes import CallShapes, lead_shape
from q4jit.arrays.specs import signature_of
from q4jit.backends import find_backend
from q4jit.compilers.cache import Compiler, Entry
from q4jit.dispatch.interpreted import run_in_numpy
from q4jit.dispatch.kept import Compiled, Kept, Key, shapes_key
from q4jit.dispatch.nested import tracing
from q4jit.dispatch.options import Options
from q4jit.dispatch.policy import Place, check_system, choose_place, cost_of
from q4jit.dispatch.results import in_containers
from q4jit.dispatch.tracer import Tracer
from q4jit.errors import ArgumentError, ConfigError, TargetError
from q4jit.frontend.refusals import show_value
from q4jit.frontend.specs import Signature, as_written
from q4jit.frontend.structures import names_of
from q4jit.frontend.trace import trace
from q4jit.locks import BUILD
from q4jit.pipeline import Backend, Launch, ReadyKernel, Remark, fetch, ready_kernels
from q4jit.plan.kernels import Plan, Source
from q4jit.runtime.driver import Device
from q4jit.targets import find_target


@dataclass(frozen=True)
class Request:
    """One call with new shapes, and everything that the stages need to know of it.

    Attributes:
        leading: the common dimensions of the arguments before the last.
        rows: their product, M.
        place: where the call runs.
        key: of the kernels that serve it: graph, target, class of M and device.
        cause: what is new in the signature; empty if it was traced before.
    """

    args: Sequence[Any]
    signature: Signature
    leading: tuple[int, ...]
    rows: int
    place: Place
    backend: Backend
    key: Key
    cause: str


class Specializer:
    """Traces, plans and compiles one function.

    Callers of `launch` hold the lock BUILD. Callers of the other methods must not: the user's
    function may take locks or fork while it is traced, and a search's threads take BUILD.

    Attributes:
        kept: graphs, plans, kernels and launches.
        tracer: traces the function, and knows the globals that it reads.
        compiles: kernels that a compiler has made so far.
        seconds: time from planning to loading, over all plans.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        options: Options,
        parameters: tuple[str, ...],
        keywords: tuple[str, ...],
    ) -> None:
        self._function, self._options = function, options
        self._parameters, self._keywords = parameters, keywords
        self.kept = Kept()
        self.tracer = Tracer(function, options, parameters, keywords, self.kept)
        self.compiles = 0
        self.seconds = 0.0

    # --- from arguments to a launch ---------------------------------------------------------------

    def request(self, args: Sequence[Any]) -> Request:
        """Trace the function unless it was, and return the request of a call.

        Raises ArgumentError for unsuitable arguments, TraceError, TargetError and DeviceError, and
        the user's function's own errors.
        """
        signature, leading = self.signature_of(args)
        rows = math.prod(leading)
        traced = functools.cache(lambda: self.tracer.graph(signature))
        with _explained():
            place = choose_place(
                self._options.target,
                args,
                names_of(args, self._parameters),
                lambda: cost_of(traced()[0], rows),
            )
        graph, cause = traced()  # now, because `launch` runs under the lock
        backend = find_backend(place.target)
        m_class = backend.m_class(place.target, rows, self._options.plan_options)
        key = (graph, place.target, m_class), place.device
        return Request(args, signature, leading, rows, place, backend, key, cause)

    def search(self, request: Request) -> None:
        """Search for the fastest constants of new kernels for a GPU; do nothing on the CPU."""
        device = request.place.device
        if device is None or request.key in self.kept.compiled:
            return
        (graph, _, _), _ = request.key
        request.backend.search(device, graph, request.rows, self._options.plan_options)

    def launch(self, request: Request) -> Launch:
        """Return kernels bound to the shapes of a request; compile them if necessary."""
        self.kept.trim()
        with _explained():
            compiled = self.kept.compiled.get(request.key) or self._compile(request)
            shapes = shapes_key(request.signature, request.args)
            launch = compiled.launches.get(shapes)
            if launch is None:
                launch = compiled.launches[shapes] = request.backend.launch(
                    compiled.plan,
                    [kernel.loaded for kernel in compiled.kernels],
                    CallShapes(compiled.plan.graph, request.args, request.leading),
                    request.args,
                    names_of(request.args, self._parameters),
                    request.place.device,
                )
        compiled.note_rule(request.rows, request.place.rule)
        return in_containers(launch, compiled.plan.graph.results)

    def is_current(self, request: Request) -> bool:
        """Return whether the globals that a request was traced with are still the current ones."""
        return self.kept.graphs.find(request.signature) is request.key[0][0]

    def plan(self, args: Sequence[Any]) -> None:
        """Trace and plan a call, which is all that inspecting its source takes."""
        request = self.request(args)
        with BUILD:
            self.kept.trim()
            self._plan(request)

    def signature_of(self, args: Sequence[Any]) -> tuple[Signature, tuple[int, ...]]:
        """Return the signature of arguments and their leading dimensions. Raises ArgumentError."""
        names = names_of(args, self._parameters)
        signature = signature_of(names, args)
        try:
            return signature, lead_shape(args, signature)
        except ArgumentError:
            # tracing with the lengths finds the user's line where the arrays meet
            sized = signature_of(names, args, sized=True)
            with tracing(self._options):
                trace(self._function, sized, self._keywords)
            raise

    def run_python(self, args: tuple[Any, ...], out: Any) -> Any:
        """Run the function in NumPy, on the arguments that its kernels would take."""
        self.signature_of(args)  # raises the same errors as a compiled call
        names = names_of(args, self._parameters)
        return run_in_numpy(self._function, names, self._keywords, args, out)

    def _compile(self, request: Request) -> Compiled:
        """Run the stages from plan to load for a request, and keep the kernels."""
        start = time.perf_counter()
        backend, device = request.backend, request.place.device
        plan = self._plan(request)
        check_system()
        where = f"{counted(request.rows, 'row')} on {device or plan.target}"
        cause = request.cause or f"it is the first call with {where} or a similar number"
        kernels = tuple(
            self._ready(backend.render(plan, kernel), backend, device, cause)
            for kernel in plan.kernels
        )
        self.seconds += time.perf_counter() - start
        _dump(plan, kernels, backend.compiler(plan.target))
        compiled = self.kept.compiled[request.key] = Compiled(plan, backend, kernels)
        return compiled

    def _plan(self, request: Request) -> Plan[Any]:
        """Plan a request and keep the plan, so that kernels that do not load can be inspected."""
        backend, place, (plan_key, _) = request.backend, request.place, request.key
        plan_options = self._options.plan_options
        plan = backend.plan(plan_key[0], place.target, request.rows, plan_options, place.device)
        self.kept.add_plan(plan_key, plan, request.rows)
        config.log(str(plan))
        return plan

    def _ready(
        self, source: Source, backend: Backend, device: Device | None, cause: str
    ) -> ReadyKernel:
        """Return a kernel that can run: the one in memory with the same text, or a new one."""
        ready = self.kept.kernels.get((source.text, device))
        if ready is not None:
            known = f"in memory, cache key {ready.entry.key[:12]}"
            config.log(f"{source.symbol} for {source.target}: {known}, because {cause}")
            return ready

        def fetch_now(source: Source) -> Entry:
            compiler = backend.compiler(source.target)
            entry = fetch(compiler, source, use_disk=self._options.cache, cause=cause)
            self.compiles += entry.origin == "compiled"
            return entry

        (ready,) = ready_kernels((source,), fetch_now, backend.load, device)
        self.kept.kernels[source.text, device] = ready
        return ready

    # --- looking inside ---------------------------------------------------------------------------

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures that were traced and are still in use, oldest first."""
        return tuple(map(as_written, self.kept.signatures()))

    def sources(self, target: str | None) -> list[Source]:
        """Return the texts of every plan so far, for `target` (None: the plan's own target).

        Before the first plan the list is empty. Raises TargetError.
        """
        known = self.kept.plans_in_use()
        plans = [plan for plan, _ in known]
        if known and target is not None:
            other = find_target(target)
            make, plan_options = find_backend(other).plan, self._options.plan_options
            others = [make(plan.graph, other, m, plan_options, None) for plan, m in known]
            plans = list({str(plan): plan for plan in others}.values())
        return [find_backend(p.target).render(p, kernel) for p in plans for kernel in p.kernels]

    def remarks(self) -> list[Remark]:
        """Return the options that the plans do not follow, and the origin of their constants."""
        return [remark for made in self.kept.compiled_in_use() for remark in self._remarks(made)]

    def explain(self) -> list[str]:
        """Return lines about each plan: its kernels, where its calls ran and why, its origin."""
        shown = [f"{name} = {show_value(v)}" for name, (_, v) in self.tracer.frozen.values.items()]
        lines = [f"frozen when it was traced: {', '.join(shown)}"] if shown else []
        for compiled in self.kept.compiled_in_use():
            lines.append(str(compiled.plan))
            lines += [
                f"  {counted(rows, 'row')} {rule}" for rows, rule in list(compiled.rules.items())
            ]
            lines += [f"  {remark.text}" for remark in self._remarks(compiled)]
            lines += [f"  {_origin(kernel)}" for kernel in compiled.kernels]
        return lines

    def _remarks(self, compiled: Compiled) -> list[Remark]:
        return compiled.backend.explain(
            compiled.plan, self._options.plan_options, self._options.tune
        )


def assembly(source: Source) -> str:
    """Return the assembly that the target's compiler writes for a text. Raises CompileError."""
    with _explained():
        compiler = find_backend(source.target).compiler(source.target)
        return compiler.compile_assembly(source.text, source.target)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise TargetError instead of an OSError that says that no file can be opened."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.EMFILE, errno.ENFILE}:
            raise
        raise TargetError(
            f"cannot open the files that a first call reads: {error}; close files, or raise the "
            "limit RLIMIT_NOFILE (ulimit -n)"
        ) from error


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Return a number with its noun: "1 row", "2 rows", "2 misses" with the ending "es"."""
    return f"{number} {noun}{'' if number == 1 else ending}"


def _origin(kernel: ReadyKernel) -> str:
    entry = kernel.entry
    compiled = entry.origin == "compiled"
    origin = f"compiled in {entry.seconds:.3f} s" if compiled else f"from {entry.origin}"
    size = counted(len(entry.object_bytes), "byte")
    return f"{kernel.source.symbol}: {origin}, {size}, cache key {entry.key[:12]}"


def _dump(plan: Plan[Any], kernels: Sequence[ReadyKernel], compiler: Compiler) -> None:
    """Write every stage to the folder Q4JIT_DUMP_DIR, if it is set. Raises ConfigError."""
    directory = config.dump_dir()
    if directory is None:
        return
    stem = f"{plan.graph.name}-{kernels[0].entry.key[:12]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / f"{stem}.graph", str(plan.graph))
        _write(directory / f"{stem}.plan", str(plan))
        for planned, kernel in zip(plan.kernels, kernels, strict=True):
            stem = f"{planned.work.name}-{kernel.entry.key[:12]}"
            _write(directory / f"{stem}{kernel.source.suffix}", kernel.source.text)
            text = compiler.compile_assembly(kernel.source.text, kernel.source.target)
            _write(directory / f"{stem}.s", text)
            (directory / f"{stem}{compiler.SUFFIX}").write_bytes(kernel.entry.object_bytes)
    except OSError as error:
        raise ConfigError(f"Q4JIT_DUMP_DIR={directory} cannot be written: {error}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
