"""`@specialize`: from a call's arguments to compiled kernels, and from then on one look-up.

A call with known shapes is launched. For any other the specialiser finds or makes the kernels
(`specializer`). An error of any stage is raised; nothing falls back silently.
"""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, ParamSpec, TypeVar, overload

import numpy as np

from q4jit import config
from q4jit.arrays.dtypes import F32
from q4jit.arrays.libraries import as_device_array
from q4jit.arrays.outputs import check_out
from q4jit.arrays.specs import shape_key, stand_in
from q4jit.arrays.torch_tensors import tensor_facts
from q4jit.arrays.views import DeviceView
from q4jit.errors import ArgumentError
from q4jit.frontend.specs import Signature
from q4jit.locks import BUILD
from q4jit.options import Options
from q4jit.pipeline import DeviceLaunch, Launch, Remark
from q4jit.plan.kernels import Source
from q4jit.specializer import Specializer, assembly
from q4jit.weights.tensor import QuantizedTensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_L = TypeVar("_L", bound=Launch)

_MOST_LAUNCHES: Final = 4096  # sets of exact shapes remembered by one function
# types whose part of a call's key needs no look at where an array lies
_PLAIN: Final = frozenset(
    {np.ndarray, QuantizedTensor, float, int, bool, str, type(None), np.float32, np.float64}
)


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
        self._hits = self._misses = 0
        self._specializer = Specializer(function, options, self._parameters, self._keywords)

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
                key.append(shape_key(value))
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
        key = tuple([shape_key(value) for value in args])
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
        self._specializer.signature_of(args)  # the same arguments are refused
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
            self._specializer.search(args)
        with BUILD:
            launch = self._launches.get(key)
            if launch is not None:  # another thread was faster
                self._hits += 1
                return launch
            self._misses += 1
            launch = self._specializer.launch(args)
            _remember(self._launches, key, launch)
            return launch

    # --- looking inside ---------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """Hits, misses, compilations and the time they took."""
        made = self._specializer
        return Stats(self._hits, self._misses, made.compiles, made.seconds)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signatures that were traced, oldest first."""
        return self._specializer.signatures

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Specialise for arguments like these without running anything.

        A tuple of ints stands for an f32 array of that shape; everything else is given as in a
        call. The repacked weights are made too. Raises what a call would raise.
        """
        stand_ins = [stand_in(value) for value in self._in_order(args, kwargs)]
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
            self._specializer.signature_of(args)
            return None
        key = tuple(shape_key(value) for value in args)
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
        return "\n".join(assembly(source) for source in self._sources(target))

    def _sources(self, target: str | None) -> list[Source]:
        if self._disabled:
            raise ArgumentError(
                f"{self._name} was decorated under Q4JIT_DISABLE_JIT, so nothing is generated: "
                "accepted is a process without that variable"
            )
        sources = self._specializer.sources(target)
        if not sources:
            raise ArgumentError(
                f"{self._name} has no signature yet: call it once, or warmup(...) with arguments "
                "like those of a call"
            )
        return sources

    def explain(self) -> str:
        """What was compiled for which arguments, from where it came, and which rule chose it."""
        lines = [f"{self._name}: {self.stats}"]
        if self._disabled:
            return "\n".join([*lines, "Q4JIT_DISABLE_JIT is set: every call runs py_func"])
        compiled = self._specializer.explain()
        nothing = ["nothing is compiled yet: that happens at the first call, or by warmup"]
        return "\n".join(lines + (compiled or nothing))

    @property
    def remarks(self) -> list[Remark]:
        """What `explain` says about options that kernels do not follow, and about constants."""
        return self._specializer.remarks()


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


def _remember(launches: dict[tuple[object, ...], _L], key: tuple[object, ...], launch: _L) -> None:
    if len(launches) >= _MOST_LAUNCHES:
        launches.clear()
    launches[key] = launch


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
