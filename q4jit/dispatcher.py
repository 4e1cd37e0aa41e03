"""`@specialize`: from a call's arguments to compiled kernels, and from then on one look-up.

A call with known shapes is launched. Else its signature and class of M are looked up; else the
function is traced, planned, lowered, fetched (disk, then compiler) and loaded. An error of any
stage is raised; nothing falls back silently.
"""

import functools
import inspect
import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, ParamSpec, TypeVar, overload

import numpy as np

from q4jit import config
from q4jit.arrays.arguments import F32, check_array, check_ids, check_out, holds_ids, lead_shape
from q4jit.arrays.device import DeviceView, as_device_array, require_f32, tensor_facts
from q4jit.backends import DeviceLaunch, Launch, find_backend
from q4jit.compilers import cache
from q4jit.errors import ArgumentError, CompileError, ConfigError
from q4jit.frontend.graph import (
    Graph,
    ScalarSpec,
    Signature,
    Spec,
    StaticSpec,
    WeightSpec,
    reachable,
)
from q4jit.frontend.trace import array_spec, ids_spec, trace
from q4jit.hip import tunings
from q4jit.hip.schedule import Tuning, check_block_size
from q4jit.hip.tunings import Machine, Tuned
from q4jit.locks import BUILD
from q4jit.plan.kernels import Plan, Source
from q4jit.policy import Place, choose_place, names_device, work_of
from q4jit.runtime.driver import Device
from q4jit.targets import Target, find_target
from q4jit.weights.tensor import QuantizedTensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_L = TypeVar("_L", bound=Launch)

_PRECISIONS: Final = ("f32", "f16", "i8")
_MOST_LAUNCHES: Final = 4096  # sets of exact shapes remembered by one function
_MOST_RULES: Final = 8  # numbers of rows that `explain` tells of a plan, the last ones


@dataclass(frozen=True)
class Options:
    """How a function is specialised; see `specialize`."""

    K: int | None = None
    N: int | None = None
    block_size: int | None = None
    target: str | None = None
    precision: str = "f32"
    cache: bool = True
    tune: bool = False

    def __post_init__(self) -> None:
        for name in ("K", "N", "block_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value <= 0):
                raise ArgumentError(f"{name}={value!r}: accepted is a positive int, or None")
        for name in ("cache", "tune"):
            if type(getattr(self, name)) is not bool:
                value = getattr(self, name)
                raise ArgumentError(f"{name}={value!r}: accepted is True or False")
        if self.tune and self.block_size is not None:
            raise ArgumentError(
                f"tune=True and block_size={self.block_size}: accepted is one of them, a search "
                "chooses the block size"
            )
        if self.precision not in _PRECISIONS:
            accepted = ", ".join(map(repr, _PRECISIONS))
            raise ArgumentError(f"precision={self.precision!r}: accepted are {accepted}")
        if not isinstance(self.target, str | None):
            raise ArgumentError(
                f"target={self.target!r}: accepted are names, 'cpu' or 'hip:gfx1100', and None"
            )
        if self.target is not None and not names_device(self.target):
            target = find_target(self.target)
            if target.backend == "hip":
                check_block_size(target, self.block_size)

    @property
    def tuning(self) -> Tuning:
        """What of them a schedule is asked for."""
        return Tuning(self.precision, self.block_size)


@dataclass(frozen=True)
class Stats:
    """Counts since the function was decorated.

    hits: calls with shapes that were known; misses: the other calls, which bind new shapes and
    specialise where no kernel serves them; compiles: kernels made by a compiler (the others came
    from the disk cache); seconds: time spent specialising, compilation included.
    """

    hits: int = 0
    misses: int = 0
    compiles: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.hits} hits, {self.misses} misses, {self.compiles} kernels compiled, "
            f"{self.seconds:.2f} s"
        )


@dataclass(frozen=True)
class _Kernel:
    """A kernel ready to run; `loaded` owns its executable memory."""

    source: Source
    entry: cache.Entry
    loaded: object


@dataclass(frozen=True)
class _Compiled:
    """The kernels of one signature and class of M on one device (None: the CPU)."""

    plan: Plan[Any]
    kernels: tuple[_Kernel, ...]


_Key = tuple[Signature, Target, int]  # and the class of M
_PLAIN: Final = frozenset(
    {np.ndarray, QuantizedTensor, float, int, bool, str, type(None), np.float32, np.float64}
)


class Specialized(Generic[_P, _R]):
    """A function whose calls run as compiled kernels; made by `specialize`.

    Calls take the function's own arguments and `out=`, an f32 array (or a tuple of them) for the
    result. `py_func` is the undecorated function, `options` how it is specialised.
    """

    def __init__(self, function: Callable[_P, _R], options: Options) -> None:
        functools.update_wrapper(self, function)  # first: the function's attributes may be named so
        self.py_func = function
        self.options = options
        self._name = getattr(function, "__name__", type(function).__name__)
        self._python_signature = inspect.signature(function)
        self._parameters, self._keywords = _parameters(self._python_signature, self._name)
        self._disabled = config.jit_disabled()
        self._launches: dict[tuple[object, ...], Launch] = {}
        self._on_tensors: dict[tuple[object, ...], DeviceLaunch] = {}  # by `tensor_facts`
        self._plans: dict[_Key, tuple[Plan[Any], int]] = {}  # and the M it was made for
        self._compiled: dict[tuple[_Key, Device | None], _Compiled] = {}
        self._rules: dict[tuple[_Key, Device | None], dict[int, str]] = {}  # by rows of calls
        self._graphs: dict[Signature, Graph] = {}
        self._hits = self._misses = self._compiles = 0
        self._seconds = 0.0

    def __reduce__(self) -> str:
        return str(getattr(self, "__qualname__", self._name))  # by name, as functions are pickled

    def __repr__(self) -> str:
        return f"<specialized {self._name}({', '.join(self._parameters)})>"

    # --- calls ----------------------------------------------------------------------------------

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run the function's kernels.

        Raises ArgumentError for an argument whose kind, dtype or shape cannot be taken, TraceError
        where the function cannot be compiled, and CompileError.
        """
        if kwargs or len(args) != len(self._parameters):
            args = self._positional(args, kwargs)
        key: list[object] = []
        for value in args:  # written out: a function for each argument takes as long again
            kind = type(value)
            if kind is np.ndarray and value.dtype is F32:
                key.append(value.shape)
            elif kind is QuantizedTensor:
                key.append(value.signature)
            elif kind in _PLAIN:
                key.append(_shape_key(value))
            else:
                return self._call(args, out)
        launch = self._launches.get(tuple(key))
        if launch is None:
            return self._call(args, out)
        self._hits += 1
        return launch(args, out)

    def _call(self, args: tuple[Any, ...], out: Any) -> Any:
        """A call whose shapes are new, or whose arguments may lie on a device."""
        facts = None
        if not _PLAIN.issuperset(map(type, args)):
            facts = tensor_facts(args, out)
            if facts is not None:
                known, pointers, stream = facts
                on_device = self._on_tensors.get(known)
                if on_device is not None:
                    self._hits += 1
                    return on_device.on_tensors(args, out, pointers, stream)
            args = self._with_views(args)
        key = tuple([_shape_key(value) for value in args])
        launch = self._launches.get(key)
        if launch is None:
            if self._disabled:
                return self._run_python(args, out)
            launch = self._specialise(args, key)
        else:
            self._hits += 1
        result = launch(args, out)
        if facts is not None and isinstance(launch, DeviceLaunch):
            _remember(self._on_tensors, facts[0], launch)
        return result

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind like a function: in a class, `self` is an argument as any other."""
        return self if instance is None else types.MethodType(self, instance)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        try:
            bound = self._python_signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(
                f"{self._name}(): {error}; accepted is {self._name}{self._python_signature}"
            ) from None
        bound.apply_defaults()
        return tuple(bound.arguments[name] for name in self._parameters)

    def _with_views(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, arrays on a device as kernels take them."""
        views = (as_device_array(v, n) for v, n in zip(args, self._parameters, strict=True))
        return tuple(a if v is None else v for a, v in zip(args, views, strict=True))

    def _run_python(self, args: tuple[Any, ...], out: Any) -> Any:
        self._signature_of(args)  # the same arguments are refused
        for name, value in zip(self._parameters, args, strict=True):
            if isinstance(value, DeviceView):
                raise ArgumentError(
                    f"argument {name!r} is {value}, and {self._name} runs in NumPy under "
                    "Q4JIT_DISABLE_JIT: accepted are arrays in the host's memory"
                )
        # NumPy's float64 scalars would make the result float64; Python's floats do not
        args = tuple(float(v) if isinstance(v, np.floating) else v for v in args)
        split = len(args) - len(self._keywords)
        keywords = dict(zip(self._keywords, args[split:], strict=True))
        result: Any = self.py_func(*args[:split], **keywords)
        if out is None:
            return result
        results = result if isinstance(result, tuple) else (result,)
        shapes = [np.shape(value) for value in results]
        given = check_out(out, shapes, result is results, self._parameters, args)
        for target, value in zip(given, results, strict=True):
            target[...] = value
        return out

    # --- specialising -----------------------------------------------------------------------------

    def _specialise(self, args: Sequence[Any], key: tuple[object, ...]) -> Launch:
        if self.options.tune:
            self._tune(args)  # its threads compile, for which they take BUILD
        with BUILD:
            launch = self._launches.get(key)
            if launch is not None:  # another thread was faster
                self._hits += 1
                return launch
            self._misses += 1
            signature, rows = self._signature_of(args), _rows(args)
            place = self._place(args, signature, rows)
            compiled = self._compile(signature, rows, place)
            loaded = [kernel.loaded for kernel in compiled.kernels]
            bind = find_backend(place.target).launch
            launch = bind(compiled.plan, loaded, args, self._parameters, place.device)
            self._note_rule(signature, rows, place)
            _remember(self._launches, key, launch)
            return launch

    def _place(self, args: Sequence[Any], signature: Signature, rows: int) -> Place:
        return choose_place(
            self.options.target,
            args,
            self._parameters,
            lambda: work_of(self._graph(signature), rows),
        )

    def _tune(self, args: Sequence[Any]) -> None:
        """Search for the constants of kernels that are new, where a GPU is to run them."""
        with BUILD:
            signature, rows = self._signature_of(args), _rows(args)
            place = self._place(args, signature, rows)
            known = (self._key(signature, rows, place), place.device) in self._compiled
            if place.device is None or known:
                return
            graph = self._graph(signature)
        from q4jit.tools import tune  # late: no other call needs it

        tune.ensure(place.device, graph, rows, self.options.tuning)

    def _signature_of(self, args: Sequence[Any]) -> Signature:
        pairs = list(zip(self._parameters, args, strict=True))
        signature = tuple(_spec(name, value) for name, value in pairs)
        try:
            lead_shape(args)
        except ArgumentError:
            # let the trace find the line where they meet
            sized = tuple(_spec(name, value, sized=True) for name, value in pairs)
            trace(self.py_func, sized, self._keywords)
            raise
        return signature

    def _graph(self, signature: Signature) -> Graph:
        if signature not in self._graphs:
            graph = trace(self.py_func, signature, self._keywords)
            _check_options(self.options, graph)
            self._graphs[signature] = graph
        return self._graphs[signature]

    def _note_rule(self, signature: Signature, rows: int, place: Place) -> None:
        """Remember which rule chose the place of calls with so many rows, for `explain`."""
        rules = self._rules.setdefault((self._key(signature, rows, place), place.device), {})
        rules.pop(rows, None)
        rules[rows] = place.rule
        if len(rules) > _MOST_RULES:
            del rules[next(iter(rules))]

    def _key(self, signature: Signature, rows: int, place: Place) -> _Key:
        m_class = find_backend(place.target).m_class(place.target, rows, self.options.tuning)
        return signature, place.target, m_class

    def _compile(self, signature: Signature, m: int, place: Place) -> _Compiled:
        target, tuning = place.target, self.options.tuning
        backend = find_backend(target)
        key = self._key(signature, m, place)
        if (key, place.device) not in self._compiled:
            start = time.perf_counter()
            tuned = _tuned(target, place.device)
            plan = backend.plan(self._graph(signature), target, m, tuning, tuned)
            self._plans[key] = plan, m  # what does not load can still be inspected
            if config.debug():
                sys.stderr.write(f"q4jit: {plan}\n")
            sources = [backend.lower(plan, kernel) for kernel in plan.kernels]
            kernels = tuple(self._load(source, place.device) for source in sources)
            self._seconds += time.perf_counter() - start
            _dump(plan, kernels)
            self._compiled[key, place.device] = _Compiled(plan, kernels)
        return self._compiled[key, place.device]

    def _load(self, source: Source, device: Device | None) -> _Kernel:
        backend = find_backend(source.target)
        compiler = backend.compiler(source.target)
        try:
            entry = cache.fetch(
                source.target, compiler, source.symbol, source.text, self.options.cache
            )
        except CompileError as error:
            if source.origins is None:
                raise
            raise error.with_origins(source.origins()) from None
        self._compiles += entry.origin == "compiled"
        return _Kernel(source, entry, backend.load(entry.object_bytes, source, device))

    # --- looking inside ---------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Hits, misses, compilations and the time they took."""
        return Stats(self._hits, self._misses, self._compiles, self._seconds)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures that were traced, oldest first."""
        return tuple(self._graphs)

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Specialise for arguments like these without running anything.

        A tuple of ints stands for an f32 array of that shape; everything else is given as in a
        call. The repacked weights are made too. Raises what a call would raise.
        """
        stand_ins = [_stand_in(value) for value in self._in_order(args, kwargs)]
        self._prepared(self._with_views(tuple(stand_ins)))

    def bind(self, *args: Any, out: Any = None, **kwargs: Any) -> Callable[[], Any]:
        """A call with these very arguments, as a function without parameters.

        On the CPU they are checked now, once; each call reads what then lies in the arrays, and
        takes little longer than the kernels. Arrays must stay as they are in place and shape.
        Without `out=`, every call may return the same array, filled anew. Elsewhere it is a call
        like any other, as a device's arrays have to be asked each time. Raises what a call would.
        """
        given = self._in_order(args, kwargs)
        args = self._with_views(given)
        launch = self._prepared(args)
        if launch is None:
            return functools.partial(self._run_python, args, out)
        if isinstance(launch, DeviceLaunch):
            return functools.partial(self, *given, out=out)
        return launch.bind(args, out)

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if kwargs or len(args) != len(self._parameters):
            return self._positional(args, kwargs)
        return args

    def _prepared(self, args: tuple[Any, ...]) -> Launch | None:
        """The launch for arguments, with its weights in place; None where functions stay NumPy."""
        if self._disabled:
            self._signature_of(args)
            return None
        key = tuple(_shape_key(value) for value in args)
        launch = self._launches.get(key) or self._specialise(args, key)
        launch.prepare(args)
        return launch

    def inspect_source(self, target: str | None = None) -> str:
        """The generated texts for every signature so far, for `target` (default: the one in use).

        One kernel is one text, which begins with a comment on what it is; they follow each other,
        oldest signature first. Works for targets that this machine cannot run. Raises
        ArgumentError before the first call.
        """
        return "\n".join(source.text for source in self._sources(target))

    def inspect_asm(self, target: str | None = None) -> str:
        """The assembly that the compiler makes of `inspect_source(target)`."""
        return "\n".join(_assembly(source) for source in self._sources(target))

    def _sources(self, target: str | None) -> list[Source]:
        plans = self._need_plans()
        if target is not None:
            found = find_target(target)
            tuning, tuned = self.options.tuning, _tuned(found, None)
            others = [find_backend(found).plan(p.graph, found, m, tuning, tuned) for p, m in plans]
            plans = [(plan, 0) for plan in {str(p): p for p in others}.values()]
        return [find_backend(p.target).lower(p, kernel) for p, _ in plans for kernel in p.kernels]

    def explain(self) -> str:
        """What was compiled for which arguments, from where it came, and which rule chose it."""
        lines = [f"{self._name}: {self.stats}"]
        if self._disabled:
            return "\n".join([*lines, "Q4JIT_DISABLE_JIT is set: every call runs py_func"])
        compiled_now = list(self._compiled.items())  # other threads may be adding
        if not compiled_now:
            lines.append("nothing is compiled yet: that happens at the first call, or by warmup")
        for key, compiled in compiled_now:
            lines.append(str(compiled.plan))
            lines += [
                f"  {rows} row{'' if rows == 1 else 's'}: {rule}"
                for rows, rule in list(self._rules.get(key, {}).items())
            ]
            remarks = find_backend(compiled.plan.target).remarks
            lines += [f"  {line}" for line in remarks(compiled.plan, self.options.tuning)]
            lines += [f"  {line}" for line in self._origins(compiled.plan)]
            lines += [
                f"  {k.source.symbol}: {k.entry.origin}"
                + (f" in {k.entry.seconds:.3f} s" if k.entry.origin == "compiled" else "")
                + f", {len(k.entry.object_bytes)} bytes, key {k.entry.key[:12]}"
                for k in compiled.kernels
            ]
        return "\n".join(lines)

    def _origins(self, plan: Plan[Any]) -> list[str]:
        if self.options.tune and plan.target.backend == "cpu":
            return ["tune=True: kernels of the CPU have no constants to search for yet"]
        return find_backend(plan.target).origins(plan)

    def _need_plans(self) -> list[tuple[Plan[Any], int]]:
        if self._disabled:
            raise ArgumentError(
                f"{self._name} was decorated under Q4JIT_DISABLE_JIT, so nothing is generated: "
                "accepted is a process without that variable"
            )
        if not self._plans:
            raise ArgumentError(
                f"{self._name} has no signature yet: call it once, or warmup(...) with arguments "
                "like those of a call"
            )
        return list(self._plans.values())


def _tuned(target: Target, device: Device | None) -> Tuned | None:
    """What was measured for a target: on the device itself, else what q4jit comes with."""
    if target.backend != "hip":
        return None
    if device is None:
        return tunings.find(target.arch)
    compiler = find_backend(target).compiler(target).fingerprint(target)
    return tunings.find(target.arch, Machine(device.name, target.arch, compiler))


def _assembly(source: Source) -> str:
    compiler = find_backend(source.target).compiler(source.target)
    return compiler.compile_assembly(source.text, source.target)


# --- arguments --------------------------------------------------------------------------------


def _parameters(signature: inspect.Signature, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of all parameters, and of those among them that are passed by keyword only."""
    for parameter in signature.parameters.values():
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            raise ArgumentError(
                f"{name} takes {parameter}: accepted are parameters with a name of their own"
            )
        if parameter.name == "out":
            raise ArgumentError(
                f"{name} has a parameter 'out': that name is taken by out= of calls"
            )
    keywords = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(signature.parameters), tuple(keywords)


def _shape_key(value: object) -> object:
    """What of an argument decides which launch serves a call."""
    kind = type(value)
    if kind is np.ndarray:
        shape, dtype = value.shape, value.dtype  # type: ignore[attr-defined]  # just tested
        # another dtype is that of ids, of a number (rank 0), or refused when its spec is made
        return shape if dtype is F32 else (shape, dtype)
    if kind is QuantizedTensor:
        return value.signature  # type: ignore[attr-defined]  # just tested
    if kind is float or isinstance(value, np.floating):
        return float
    if kind is DeviceView:
        view: Any = value
        return view.shape, view.dtype, view.platform, view.device
    if isinstance(value, np.ndarray):  # a subclass is looked at when its own launch is made
        return kind, value.shape, value.dtype
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    try:
        hash(value)
    except TypeError:
        return kind  # refused when its spec is made
    return type(value), value


def _spec(name: str, value: object, sized: bool = False) -> Spec:
    """The spec of an argument; raises ArgumentError for what a function cannot take."""
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if isinstance(value, DeviceView):
        if not value.shape or not value.shape[-1]:
            raise ArgumentError(
                f"argument {name!r} is {value}: accepted are arrays of one dimension or more, the "
                f"last at least 1, and float({name}) for a number"
            )
        if value.dtype.kind == "i":
            return ids_spec(value.shape, sized)
        require_f32(value, name)
        return array_spec(value.shape, sized)
    if isinstance(value, np.ndarray):
        if value.ndim == 0 and value.dtype.kind in "fiu" and type(value) is np.ndarray:
            return ScalarSpec()
        if holds_ids(value):
            check_ids(name, value)
            return ids_spec(value.shape, sized)
        check_array(name, value)
        return array_spec(value.shape, sized)
    if isinstance(value, float | np.floating):
        return ScalarSpec()
    if isinstance(value, np.integer | np.bool_):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return StaticSpec(type(value), value)
    arrays = ("__len__", "__array__", "__dlpack__")
    hint = ""
    if any(hasattr(value, attribute) for attribute in arrays):
        hint = f"; np.asarray({name}, dtype=np.float32) makes one"
    raise ArgumentError(
        f"argument {name!r} is {type(value).__name__}: accepted are float32 arrays, "
        f"QuantizedTensor, numbers, bool, str and None{hint}"
    )


def _remember(launches: dict[tuple[object, ...], _L], key: tuple[object, ...], launch: _L) -> None:
    if len(launches) >= _MOST_LAUNCHES:
        launches.clear()
    launches[key] = launch


def _rows(args: Sequence[Any]) -> int:
    return math.prod(lead_shape(args))


def _stand_in(value: object) -> object:
    if isinstance(value, tuple) and value and all(type(v) is int for v in value):
        try:
            return np.broadcast_to(np.float32(0), value).view()
        except ValueError as error:
            raise ArgumentError(
                f"warmup: found the shape {value}, accepted is that of an array ({error})"
            ) from None
    return value


def _check_options(options: Options, graph: Graph) -> None:
    if options.K is not None:
        for node in graph.nodes():
            if node.op != "matmul" or any(n.op == "matmul" for n in reachable(node.operands)):
                continue  # K is x's last dimension; the x of a chained product is another's result
            if node.operands[0].width != options.K:
                raise ArgumentError(
                    f"specialize(K={options.K}): found a product of K = {node.operands[0].width}"
                )
    if options.N is not None:
        for node in graph.outputs:
            if node.width != options.N:
                raise ArgumentError(
                    f"specialize(N={options.N}): found a result of N = {node.width}"
                )


def _dump(plan: Plan[Any], kernels: Sequence[_Kernel]) -> None:
    directory = config.dump_dir()
    if directory is None:
        return
    suffix = find_backend(plan.target).compiler(plan.target).SUFFIX
    stem = f"{plan.graph.name}-{kernels[0].entry.key[:12]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / f"{stem}.graph", str(plan.graph))
        _write(directory / f"{stem}.plan", str(plan))
        for planned, kernel in zip(plan.kernels, kernels, strict=True):
            stem = f"{planned.name}-{kernel.entry.key[:12]}"
            _write(directory / f"{stem}{kernel.source.suffix}", kernel.source.text)
            _write(directory / f"{stem}.s", _assembly(kernel.source))
            (directory / f"{stem}{suffix}").write_bytes(kernel.entry.object_bytes)
    except OSError as error:
        raise ConfigError(f"Q4JIT_DUMP_DIR={directory} cannot be written: {error}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


# --- the decorator ------------------------------------------------------------------------------


@overload
def specialize(function: Callable[_P, _R], /) -> Specialized[_P, _R]: ...


@overload
def specialize(
    function: Callable[_P, _R],
    /,
    *,
    K: int | None = None,
    N: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    precision: str = "f32",
    cache: bool = True,
    tune: bool = False,
) -> Specialized[_P, _R]: ...


@overload
def specialize(
    *,
    K: int | None = None,
    N: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    precision: str = "f32",
    cache: bool = True,
    tune: bool = False,
) -> Callable[[Callable[_P, _R]], Specialized[_P, _R]]: ...


def specialize(function: Any = None, /, **options: Any) -> Any:
    """Turn a NumPy function around quantised products into compiled kernels.

    Works as `@specialize`, `@specialize(**options)` and `specialize(f, **options)`. Options:
    K, N: x's last dimension and the result's, checked; block_size: GPU threads per block; target:
    `cpu`, `cpu:x86-64-v3`, `hip` (any GPU here), `hip:1`, `hip:gfx1100`, …; precision: `f32` (error
    ≤ 2e-6), `f16` or `i8`, an upper bound; cache: whether compiled kernels are kept on
    disk; tune: whether the first call of each class of M on a GPU searches for the fastest kernels
    (seconds to minutes, told on standard error; kept on disk; the CPU has nothing to search for).
    Raises ArgumentError and TargetError.
    """
    unknown = sorted(options.keys() - Options.__dataclass_fields__.keys())
    if unknown:
        accepted = ", ".join(Options.__dataclass_fields__)
        raise ArgumentError(f"specialize takes no {', '.join(unknown)}: accepted are {accepted}")
    chosen = Options(**options)
    if function is None:
        return functools.partial(_decorate, options=chosen)
    return _decorate(function, chosen)


def _decorate(function: Callable[_P, _R], options: Options) -> Specialized[_P, _R]:
    if isinstance(function, Specialized):
        raise ArgumentError("found a function that is specialised already: decorate it once")
    if not callable(function):
        raise ArgumentError(
            f"specialize takes a function: found {type(function).__name__}; options go by name"
        )
    return Specialized(function, options)
