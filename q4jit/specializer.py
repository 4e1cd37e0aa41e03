"""Compile and bind kernels for calls with new shapes.

    args ──▶ Request ──trace──▶ Graph ──plan, render, fetch, load──▶ kernels ──launch──▶ Launch

Each function has one `Specializer`. It keeps its graphs, plans and kernels, and reports on them.
"""

import contextlib
import errno
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from q4jit import config
from q4jit.arrays.call_shapes import CallShapes, lead_shape
from q4jit.arrays.outputs import check_out
from q4jit.arrays.specs import spec_of
from q4jit.arrays.views import DeviceView
from q4jit.backends import find_backend
from q4jit.compilers.cache import Compiler, Entry
from q4jit.errors import ArgumentError, ConfigError, TargetError, TraceError, expected
from q4jit.floats import float_type_of
from q4jit.frontend.frozen import Frozen, freeze
from q4jit.frontend.graph import Graph
from q4jit.frontend.refusals import show_value
from q4jit.frontend.specs import ScalarSpec, Signature
from q4jit.frontend.trace import trace
from q4jit.locks import BUILD
from q4jit.options import Options
from q4jit.pipeline import Backend, Launch, ReadyKernel, Remark, fetch, ready_kernels
from q4jit.plan.kernels import Plan, Source
from q4jit.policy import Place, check_system, choose_place, cost_of
from q4jit.runtime.driver import Device
from q4jit.targets import Target, find_target

_ON_HOST: Final = "an array in host memory, because Q4JIT_DISABLE_JIT is set"
_MOST_RULES: Final = 8  # `explain` lists the latest numbers of rows of a plan, at most this many

_PlanKey = tuple[Signature, Target, int]  # and the class of M
_Key = tuple[_PlanKey, Device | None]


@dataclass(frozen=True)
class Request:
    """One call with new shapes, and everything that the stages need to know of it.

    Attributes:
        leading: the common dimensions of the arguments before the last.
        rows: their product, M.
        place: where the call runs.
        key: of the kernels that serve it: signature, target, class of M and device.
    """

    args: Sequence[Any]
    signature: Signature
    leading: tuple[int, ...]
    rows: int
    place: Place
    backend: Backend
    key: _Key


@dataclass(frozen=True)
class _Compiled:
    """The kernels of one signature and class of M, loaded on one device or on the CPU."""

    plan: Plan[Any]
    backend: Backend
    kernels: tuple[ReadyKernel, ...]


class Specializer:
    """Traces, plans and compiles one function.

    Callers of `launch` hold the lock BUILD. Callers of the other methods must not: the user's
    function may take locks or fork while it is traced, and a search's threads take BUILD.

    Attributes:
        frozen: the values of globals and closures that the graphs contain.
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
        self._graphs: dict[Signature, Graph] = {}
        self._plans: dict[_PlanKey, tuple[Plan[Any], int]] = {}  # a plan and its first call's M
        self._compiled: dict[_Key, _Compiled] = {}
        self._rules: dict[_Key, dict[int, str]] = {}  # the policy's rules, by number of rows
        self.frozen = Frozen()
        self.compiles = 0
        self.seconds = 0.0

    # --- from arguments to a launch ---------------------------------------------------------------

    def request(self, args: Sequence[Any]) -> Request:
        """Trace the function unless it was, and return the request of a call.

        Raises ArgumentError for unsuitable arguments, TraceError, TargetError and DeviceError, and
        the user's function's own errors.
        """
        signature, leading = self.signature_of(args)
        signature = self._shared_signature(signature)
        rows = math.prod(leading)
        with _explained():
            place = choose_place(
                self._options.target,
                args,
                self._parameters,
                lambda: cost_of(self._graph(signature), rows),
            )
        self._graph(signature)  # traced now, because `launch` runs under the lock
        backend = find_backend(place.target)
        m_class = backend.m_class(place.target, rows, self._options.plan_options)
        key = (signature, place.target, m_class), place.device
        return Request(args, signature, leading, rows, place, backend, key)

    def search(self, request: Request) -> None:
        """Search for the fastest constants of new kernels for a GPU; do nothing on the CPU."""
        device = request.place.device
        if device is None or request.key in self._compiled:
            return
        graph = self._graph(request.signature)
        request.backend.search(device, graph, request.rows, self._options.plan_options)

    def launch(self, request: Request) -> Launch:
        """Return kernels bound to the shapes of a request; compile them if necessary."""
        with _explained():
            compiled = self._compiled.get(request.key) or self._compile(request)
            launch = request.backend.launch(
                compiled.plan,
                [kernel.loaded for kernel in compiled.kernels],
                CallShapes(compiled.plan.graph, request.args, request.leading),
                request.args,
                self._parameters,
                request.place.device,
            )
        self._note_rule(request)
        return launch

    def plan(self, args: Sequence[Any]) -> None:
        """Trace and plan a call, which is all that inspecting its source takes."""
        self._plan(self.request(args))

    def signature_of(self, args: Sequence[Any]) -> tuple[Signature, tuple[int, ...]]:
        """Return the signature of arguments and their leading dimensions. Raises ArgumentError."""
        pairs = list(zip(self._parameters, args, strict=True))
        signature = tuple(spec_of(name, value) for name, value in pairs)
        try:
            return signature, lead_shape(args)
        except ArgumentError:
            # tracing with the lengths finds the user's line where the arrays meet
            sized = tuple(spec_of(name, value, sized=True) for name, value in pairs)
            trace(self._function, sized, self._keywords)
            raise

    def run_python(self, args: tuple[Any, ...], out: Any) -> Any:
        """Run the function in NumPy, on the arguments that its kernels would take."""
        self.signature_of(args)  # raises the same errors as a compiled call
        for name, value in zip(self._parameters, args, strict=True):
            if isinstance(value, DeviceView):
                raise ArgumentError(expected(_ON_HOST, str(value), where=f"argument {name!r}"))
        # float64 scalars of NumPy make the result float64, Python's floats do not
        wide = (np.float16, np.float64, np.longdouble)
        args = tuple(float(v) if isinstance(v, wide) else v for v in args)
        split = len(args) - len(self._keywords)
        keywords = dict(zip(self._keywords, args[split:], strict=True))
        result: Any = self._function(*args[:split], **keywords)
        if out is not None:
            _write_results(result, out, self._parameters, args)
        return result if out is None else out

    def _graph(self, signature: Signature) -> Graph:
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._trace(signature)
            self._options.check(graph)
            graph = self._graphs.setdefault(signature, graph)  # another thread may have been faster
        return graph

    def _shared_signature(self, signature: Signature) -> Signature:
        """Return a known signature of the same graph if only the types of numbers differ."""
        if signature in self._graphs:
            return signature
        alike = [known for known in self._graphs if _as_floats(known) == _as_floats(signature)]
        if alike:  # the function may have asked for the types
            graph = self._trace(signature)
            same = (known for known in alike if self._graphs[known].statements == graph.statements)
            return next(same, signature)
        return signature

    def _trace(self, signature: Signature) -> Graph:
        """Trace the function and note what it reads of globals and closures.

        Raises TraceError if it changes a number among them, which compiled calls would not do.
        """
        before = freeze(self._function)
        graph = trace(self._function, signature, self._keywords)
        self.frozen = freeze(self._function)
        changed = before.numbers_changed(self.frozen)
        if changed:
            raise TraceError(
                f"cannot change {', '.join(changed)}, because compiled calls only compute; pass it "
                "as an argument, and return its new value"
            )
        return graph

    @property
    def unchanged(self) -> Callable[[], bool] | None:
        """A function that returns whether globals and closures are as traced; None without any."""
        return self.frozen.unchanged if self.frozen else None

    def renew(self) -> bool:
        """Look at globals and closures again; return whether launches have to be made again.

        The kernels stay if every signature still gives the same graph.
        """
        frozen = freeze(self._function)
        if frozen.same(self.frozen):
            self.frozen = frozen
            return False
        known = dict(self._graphs)
        try:
            if all(self._trace(s).statements == graph.statements for s, graph in known.items()):
                return False
        except Exception:  # noqa: BLE001 - the call raises it again, when it traces
            self.frozen = frozen
        with BUILD:
            for made in (self._graphs, self._plans, self._compiled, self._rules):
                made.clear()
        return True

    def _compile(self, request: Request) -> _Compiled:
        """Run the stages from plan to load for a request, and keep the kernels."""
        start = time.perf_counter()
        backend, device = request.backend, request.place.device
        plan = self._plan(request)
        check_system()
        sources = [backend.render(plan, kernel) for kernel in plan.kernels]
        kernels = ready_kernels(sources, self._fetch, backend.load, device)
        self.seconds += time.perf_counter() - start
        _dump(plan, kernels, backend.compiler(plan.target))
        compiled = self._compiled[request.key] = _Compiled(plan, backend, kernels)
        return compiled

    def _plan(self, request: Request) -> Plan[Any]:
        """Plan a request and keep the plan, so that kernels that do not load can be inspected."""
        backend, place = request.backend, request.place
        graph, plan_options = self._graph(request.signature), self._options.plan_options
        plan = backend.plan(graph, place.target, request.rows, plan_options, place.device)
        plan_key, _ = request.key
        self._plans[plan_key] = plan, request.rows
        if config.debug():
            sys.stderr.write(f"q4jit: {plan}\n")
        return plan

    def _fetch(self, source: Source) -> Entry:
        compiler = find_backend(source.target).compiler(source.target)
        entry = fetch(compiler, source, use_disk=self._options.cache)
        self.compiles += entry.origin == "compiled"
        return entry

    def _note_rule(self, request: Request) -> None:
        """Remember the rule that chose the place of a call, for `explain`."""
        rules = self._rules.setdefault(request.key, {})
        rules.pop(request.rows, None)
        rules[request.rows] = request.place.rule
        if len(rules) > _MOST_RULES:
            del rules[next(iter(rules))]

    # --- looking inside ---------------------------------------------------------------------------

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures that were traced, oldest first."""
        return tuple(self._graphs)

    def sources(self, target: str | None) -> list[Source]:
        """Return the texts of every plan so far, for `target` (None: the plan's own target).

        Before the first plan the list is empty. Raises TargetError.
        """
        known = list(self._plans.values())  # a copy, because other threads may add plans
        plans = [plan for plan, _ in known]
        if known and target is not None:
            other = find_target(target)
            make, plan_options = find_backend(other).plan, self._options.plan_options
            others = [make(plan.graph, other, m, plan_options, None) for plan, m in known]
            plans = list({str(plan): plan for plan in others}.values())
        return [find_backend(p.target).render(p, kernel) for p in plans for kernel in p.kernels]

    def remarks(self) -> list[Remark]:
        """Return the options that the plans do not follow, and the origin of their constants."""
        compiled_now = list(self._compiled.values())  # a copy, because other threads may add some
        return [remark for compiled in compiled_now for remark in self._remarks(compiled)]

    def explain(self) -> list[str]:
        """Return lines about each plan: its kernels, where its calls ran and why, its origin."""
        shown = [f"{name} = {show_value(v)}" for name, (_, v) in self.frozen.values.items()]
        lines = [f"frozen when it was traced: {', '.join(shown)}"] if shown else []
        for key, compiled in list(self._compiled.items()):  # a copy, as in `remarks`
            lines.append(str(compiled.plan))
            lines += [
                f"  {counted(rows, 'row')} {rule}"
                for rows, rule in list(self._rules.get(key, {}).items())
            ]
            lines += [f"  {remark.text}" for remark in self._remarks(compiled)]
            lines += [f"  {_origin(kernel)}" for kernel in compiled.kernels]
        return lines

    def _remarks(self, compiled: _Compiled) -> list[Remark]:
        return compiled.backend.explain(
            compiled.plan, self._options.plan_options, self._options.tune
        )


def _write_results(result: Any, out: Any, names: Sequence[str], args: Sequence[Any]) -> None:
    """Copy NumPy's results to `out`. Raises ArgumentError if it has the wrong kind or shape."""
    results = result if isinstance(result, tuple) else (result,)
    wanted = [(np.shape(value), _kernel_dtype(value)) for value in results]
    arrays = check_out(out, wanted, result is results, names, args)
    for array, value in zip(arrays, results, strict=True):
        array[...] = value


def _kernel_dtype(value: Any) -> np.dtype[Any]:
    """Return the dtype that kernels give to a result of NumPy's, which may be in float64."""
    dtype = np.asarray(value).dtype
    return dtype if float_type_of(dtype) else np.dtype(np.float32)


def _as_floats(signature: Signature) -> Signature:
    return tuple(ScalarSpec() if isinstance(spec, ScalarSpec) else spec for spec in signature)


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
