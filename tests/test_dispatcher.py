"""The dispatcher: counts, reports, options and errors, and one compilation for all threads."""

import contextlib
import dataclasses
import gc
import inspect
import os
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import (
    ArgumentError,
    CompileError,
    ConfigError,
    QuantizedTensor,
    TargetError,
    TraceError,
    quantize,
    specialize,
)
from q4jit.backends import find_backend
from q4jit.compilers import llvm
from q4jit.cpu import lower as lower_cpu
from q4jit.cpu.schedule import CpuKernel, CpuPlan
from q4jit.dispatch import inspected, kept, specializer
from q4jit.dispatcher import Specialized
from q4jit.plan.kernels import Source
from q4jit.runtime.cpu import LoadedObject, undefined_symbols
from q4jit.targets import find_target, host_target
from tests.support import child

Array = NDArray[Any]
K, N = 64, 32


@pytest.fixture(scope="module")
def w() -> QuantizedTensor:
    return quantize(np.random.default_rng(1).standard_normal((K, N)).astype(np.float32), "Q4_0")


@pytest.fixture(scope="module")
def x() -> Array:
    return np.random.default_rng(2).standard_normal((3, K)).astype(np.float32)


def scaled(x: Array, w: QuantizedTensor, scale: float = 1.0) -> Array:
    """Scale a product."""
    y: Array = x @ w * scale
    return y


def close(result: Array, wanted: Array) -> None:
    np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


# --- counts ---------------------------------------------------------------------------------------


def test_hits_misses_and_compiles(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled, cache=False)
    assert f.stats == inspected.Stats(0, 0, 0, 0.0)
    f(x, w)
    first = f.stats
    assert (first.hits, first.misses, first.compiles) == (0, 1, 1)
    assert 0 < first.seconds < 60
    for _ in range(5):
        f(x, w)
    assert f.stats == inspected.Stats(5, 1, 1, first.seconds)


def test_stats_read_as_singular_and_plural() -> None:
    assert str(inspected.Stats(1, 1, 1, 0.5)) == "1 hit, 1 miss, 1 kernel compiled, 0.50 s"
    assert str(inspected.Stats(0, 2, 2)) == "0 hits, 2 misses, 2 kernels compiled, 0.00 s"


def test_a_thousand_scalars_compile_once(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled)
    for scale in np.linspace(-3, 3, 1000):
        f(x, w, float(scale))
    assert (f.stats.misses, len(f.signatures)) == (1, 1)
    compiles = f.stats.compiles
    quarter: Any = np.float32(0.25)  # not a float for mypy
    for _ in range(2):
        close(f(x, w, quarter), scaled(x, w, 0.25))
    assert (f.stats.misses, f.stats.compiles, len(f.signatures)) == (2, compiles, 1)


def test_static_values_and_shapes_have_signatures_of_their_own(
    x: Array, w: QuantizedTensor
) -> None:
    f = specialize(lambda x, w, n: x @ w * n)
    for n in (1, 2, True, 2):
        close(f(x, w, n), x @ w * n)
    assert (f.stats.misses, f.stats.hits, len(f.signatures)) == (3, 1, 3)
    f(x[:1], w, 2)  # one row is another signature; two rows are of the class of three
    f(x[:2], w, 2)
    assert len(f.signatures) == 4


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    program = "check(); print(product.stats.compiles, product.stats.misses)"
    cache_dir = str(tmp_path / "cache")
    assert child.run(program, Q4JIT_CACHE_DIR=cache_dir).split() == ["2", "2"]
    assert child.run(program, Q4JIT_CACHE_DIR=cache_dir).split() == ["0", "2"]


def test_warmup_makes_the_first_call_a_hit(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled)
    f.warmup((3, K), w)
    assert (f.stats.hits, f.stats.misses) == (0, 1)
    close(f(x, w), scaled(x, w))
    assert (f.stats.hits, f.stats.misses) == (1, 1)
    f.warmup(x=x, w=w, scale=2.0)
    assert f.stats.misses == 1
    with pytest.raises(TraceError):
        f.warmup((3, K + 32), w)


def test_a_bound_call_reads_the_current_contents(x: Array, w: QuantizedTensor) -> None:
    f, x = specialize(scaled), x.copy()
    call = f.bind(x, w, scale=2.0)
    out = np.empty((3, N), np.float32)
    into = f.bind(x, w, scale=2.0, out=out)
    for _ in range(2):
        close(call(), scaled(x, w, 2.0))
        assert into() is out
        close(out, scaled(x, w, 2.0))
        x += 1.0
    expected = scaled(x, w, 2.0)
    del f, x
    gc.collect()  # the bound call keeps the code and the arrays alive
    np.empty(3 * K, np.float32).fill(np.nan)  # overwrites x if it was freed
    close(call(), expected)


@pytest.mark.parametrize("kind", ["strided", "spread", "ids", "number", "fewer rows"])
def test_a_bound_call_copies_the_arrays_that_a_call_copies(
    kind: str, x: Array, w: QuantizedTensor
) -> None:
    rows, ids, two = np.ones((K, 3), np.float32).T, np.arange(3), np.float32(2)
    cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "strided": (scaled, (rows, w)),
        "spread": (lambda x, r, w: x @ w + r, (x, np.ones((1, N), np.float32), w)),
        "ids": (lambda ids, w: w.rows(ids), (ids, w)),
        "number": (lambda x, w, s: (x @ w) * s, (x, w, np.array(two))),
        "fewer rows": (lambda x, g, w: (x @ w, g * 2), (x, np.ones((1, K), np.float32), w)),
    }
    function, args = cases[kind]
    call = specialize(function).bind(*args)
    for _ in range(2):
        result, wanted = call(), function(*args)
        pairs = zip(result, wanted, strict=True) if kind == "fewer rows" else [(result, wanted)]
        for one, other in pairs:
            close(one, other)
        for value in args:
            if isinstance(value, np.ndarray):
                value[...] = value[..., ::-1] if value.ndim else 3


def test_bind_checks_its_arguments(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled)
    with pytest.raises(ArgumentError, match="float32"):
        f.bind(x.astype(np.float64), w)
    with pytest.raises(ArgumentError, match="out=: expected a writable"):
        f.bind(x, w, out=np.empty((4, N), np.float32))
    square = quantize(np.eye(K), "Q8_0")
    with pytest.raises(ArgumentError, match="overlaps"):
        f.bind(x, square, out=x)


# --- inspection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("cpu:aarch64", "fmla"),
        ("cpu:x86-64", "mulps"),
        ("cpu:x86-64-v3", "vfmadd"),
        ("cpu:x86-64-v4", "%zmm"),
    ],
)
def test_inspection_for_any_target(
    x: Array, w: QuantizedTensor, target: str, instruction: str
) -> None:
    f = specialize(scaled)
    f(x, w)
    assert find_target(target).triple in f.inspect_source(target=target)
    assert instruction in f.inspect_asm(target=target)


def test_inspection_of_the_kernels_in_use(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled)
    with pytest.raises(ArgumentError, match=r"scaled has no signature yet.*warmup"):
        f.inspect_source()
    f(x, w)
    one = f.inspect_source()
    assert one.count("define void @q4jit_scaled(") == 1
    assert "scaled:" in f.inspect_asm()
    f(x[:1], w)
    assert f.inspect_source().startswith(one)
    assert f.inspect_source().count("define void @q4jit_scaled(") == 2
    with pytest.raises(TargetError, match="cpu:x86-64-v3"):
        f.inspect_source(target="cpu:z80")


def test_explain_names_target_options_and_origin(x: Array, w: QuantizedTensor) -> None:
    f = specialize(lambda x, w: x @ w * 0.123, precision="f16", block_size=256, cache=False)
    f(x, w)
    text = f.explain()
    assert str(host_target()) in text
    assert "compiled in" in text
    assert "Q4_0" in text
    assert "this CPU has no kernels of that class for w, and uses the more exact 'f32'" in text
    assert "block_size=256 is ignored: it sets a GPU's threads per block" in text
    assert "no GPU" in text
    again = specialize(scaled)
    again(x, w)
    again = specialize(scaled)
    again(x, w)
    assert "disk" in again.explain()


def test_explain_names_the_rule_for_each_number_of_rows(w: QuantizedTensor) -> None:
    f = specialize(lambda x, w: x @ w, target="cpu", cache=False)
    eights = range(24, 104, 8)  # of one class of M
    for rows in (1, *eights):
        f(np.zeros((rows, w.shape[0]), np.float32), w)
    lines = f.explain().splitlines()
    rule = "on the CPU: target='cpu'"
    assert f"  1 row {rule}" in lines
    listed = [line for line in lines if line.endswith(f" rows {rule}")]
    assert listed == [f"  {rows} rows {rule}" for rows in eights[-8:]]


def test_the_wrapper_has_the_functions_attributes() -> None:
    f: Any = specialize(scaled)
    assert f.py_func is scaled
    assert inspect.unwrap(f) is scaled
    assert f.__name__ == "scaled"
    assert f.__doc__ == "Scale a product."
    assert f.__module__ == __name__
    assert inspect.signature(f) == inspect.signature(scaled)
    assert "scaled(x, w, scale)" in repr(f)


def test_attributes_of_the_function_do_not_replace_those_of_the_wrapper() -> None:
    def function(x: Array, w: QuantizedTensor) -> Array:
        y: Array = x @ w
        return y

    vars(function).update(py_func=None, options=None, note="kept")
    f = specialize(function)
    assert f.py_func is function
    assert f.options.precision == "f32"
    assert f.note == "kept"  # type: ignore[attr-defined]  # functools.wraps copies it


@specialize
def pickled(x: Array, w: QuantizedTensor) -> Array:
    y: Array = x @ w
    return y


def test_it_is_pickled_by_name(x: Array, w: QuantizedTensor) -> None:
    pickled(x, w)
    assert pickle.loads(pickle.dumps(pickled)) is pickled


# --- options --------------------------------------------------------------------------------------


def test_the_three_ways_to_decorate_are_one(x: Array, w: QuantizedTensor) -> None:
    @specialize
    def bare(x: Array, w: QuantizedTensor) -> Any:
        return x @ w

    @specialize(K=K, N=N)
    def with_options(x: Array, w: QuantizedTensor) -> Any:
        return x @ w

    for f in (bare, with_options, specialize(lambda x, w: x @ w, K=K)):
        close(f(x, w), x @ w)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "K of 0": ({"K": 0}, ArgumentError, "K: expected a positive int or None, got 0"),
    "N of a bool": ({"N": True}, ArgumentError, "N: .* got True"),
    "K of a float": ({"K": 64.0}, ArgumentError, r"K: .* got 64\.0"),
    "block_size": ({"block_size": -1}, ArgumentError, "block_size: .* got -1"),
    "precision": (
        {"precision": "f64"},
        ArgumentError,
        "expected one of 'f32', 'f16', 'i8', got 'f64'",
    ),
    "target": ({"target": "gpu"}, TargetError, "unknown target 'gpu'.*; known targets: cpu, "),
    "cache": ({"cache": "no"}, ArgumentError, "cache: expected True or False, got 'no'"),
    "unknown": (
        {"blocksize": 1},
        ArgumentError,
        "specialize: expected options K, N, .*, got blocksize",
    ),
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options_are_refused_when_decorating(what: str) -> None:
    options, error, message = BAD_OPTIONS[what]
    with pytest.raises(error, match=message):
        specialize(scaled, **options)
    with pytest.raises(error, match=message):
        specialize(**options)


def test_only_a_plain_function_can_be_decorated() -> None:
    with pytest.raises(ArgumentError, match="cannot specialise a function twice"):
        specialize(specialize(scaled))
    with pytest.raises(ArgumentError, match="expected a function, got int"):
        specialize(3)  # type: ignore[call-overload]  # the wrong type is the test
    with pytest.raises(ArgumentError, match="'out'"):
        specialize(lambda x, out: x)
    with pytest.raises(ArgumentError, match=r"\*args"):
        specialize(lambda *args: args)


def test_k_and_n_are_checked(x: Array, w: QuantizedTensor) -> None:
    with pytest.raises(ArgumentError, match=rf"K=128\): expected .* got K = {K}"):
        specialize(scaled, K=128)(x, w)
    with pytest.raises(ArgumentError, match=rf"N=16\): expected .* got N = {N}"):
        specialize(scaled, N=16)(x, w)


# --- environment ----------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Specialized[..., Any]:
    monkeypatch.setenv("Q4JIT_DISABLE_JIT", "1")
    return specialize(scaled)


def test_without_the_jit_the_function_runs_in_numpy(
    interpreted: Specialized[..., Any], x: Array, w: QuantizedTensor
) -> None:
    np.testing.assert_array_equal(interpreted(x, w, scale=2.0), scaled(x, w, 2.0))
    out = np.empty((3, N), np.float32)
    assert interpreted(x, w, out=out) is out
    np.testing.assert_array_equal(out, scaled(x, w))
    interpreted.warmup((3, K), w)
    np.testing.assert_array_equal(interpreted.bind(x, w)(), scaled(x, w))
    assert interpreted.stats == inspected.Stats()
    assert interpreted.explain().endswith("Q4JIT_DISABLE_JIT is set: calls run py_func in NumPy")
    with pytest.raises(
        ArgumentError, match="Q4JIT_DISABLE_JIT was set when it was decorated; unset it"
    ):
        interpreted.inspect_source()


REFUSED: dict[str, Callable[[Any, Array, QuantizedTensor], object]] = {
    "float64": lambda f, x, w: f(x.astype(np.float64), w),
    "integers": lambda f, x, w: f(x.astype(np.int16), w),
    "a set": lambda f, x, w: f({1.0}, w),
    "a set in a list": lambda f, x, w: f([{1.0}], w),
    "a missing argument": lambda f, x, w: f(x),
    "an unknown argument": lambda f, x, w: f(x, w, bias=1.0),
    "out of another shape": lambda f, x, w: f(x, w, out=np.empty((9, N), np.float32)),
    "out that would broadcast": lambda f, x, w: f(x, w, out=np.empty((2, 3, N), np.float32)),
    "out of another dtype": lambda f, x, w: f(x, w, out=np.empty((3, N))),
    "out in a tuple": lambda f, x, w: f(x, w, out=(np.empty((3, N), np.float32),)),
    "out in a list": lambda f, x, w: f(x, w, out=[0.0]),
    "out over x": lambda f, x, w: f(x, w, out=x[:, :N]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_same_calls_are_refused_with_and_without_the_jit(
    interpreted: Specialized[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    x: Array,
    w: QuantizedTensor,
    what: str,
) -> None:
    monkeypatch.delenv("Q4JIT_DISABLE_JIT")
    messages = []
    for f in (specialize(scaled), interpreted):
        with pytest.raises(ArgumentError) as caught:
            REFUSED[what](f, x, w)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda f, x, w: f(x, wieght=w), r"unknown argument 'wieght'; its arguments are"),
        (lambda f, x, w: f(x, w, c=1, b=1), "unknown arguments 'b', 'c'; its arguments"),
        (
            lambda f, x, w: f(x, w, target="cpu"),
            r"unknown argument 'target' \(target: an option of @specialize, not of a call\)",
        ),
        (lambda f, x, w: f(x), "missing a required argument: 'w'"),
        (lambda f, x, w: f(x, w, x=x), "multiple values for argument 'x'"),
        (lambda f, x, w: f.warmup(x, bias=w), "unknown argument 'bias'"),
    ],
)
def test_the_error_names_unknown_arguments(
    x: Array, w: QuantizedTensor, call: Callable[..., object], problem: str
) -> None:
    with pytest.raises(ArgumentError, match=problem):
        call(specialize(scaled), x, w)


def test_debug_prints_plans_and_decisions(
    x: Array,
    w: QuantizedTensor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    specialize(scaled)(x, w)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("Q4JIT_DEBUG", "1")
    specialize(scaled)(x, w)
    captured = capsys.readouterr()
    assert "q4jit: plan scaled" in captured.err
    assert "from disk" in captured.err
    specialize(scaled, cache=False)(x, w)
    assert "compiled in" in capsys.readouterr().err
    assert captured.out == ""


def test_dump_writes_each_stage(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("Q4JIT_DUMP_DIR", str(tmp_path / "new" / "dump"))
    f = specialize(scaled)
    f(x, w)
    stages = {path.suffix: path for path in (tmp_path / "new" / "dump").iterdir()}
    assert set(stages) == {".graph", ".plan", ".ll", ".s", ".o"}
    assert stages[".plan"].read_text().startswith("plan scaled")
    assert stages[".ll"].read_text().strip() == f.inspect_source().strip()
    assert "scaled:" in stages[".s"].read_text()
    assert stages[".o"].read_bytes().startswith(b"\x7fELF")
    assert {path.stem for path in stages.values()} == {stages[".o"].stem}


def test_a_dump_that_cannot_be_written_is_an_error_each_time(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("Q4JIT_DUMP_DIR", "/dev/null/dump")
    f = specialize(scaled)
    for _ in range(2):
        with pytest.raises(ConfigError, match="Q4JIT_DUMP_DIR=/dev/null/dump cannot be written"):
            f(x, w)
    monkeypatch.delenv("Q4JIT_DUMP_DIR")
    close(f(x, w), scaled(x, w))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Q4JIT_NUM_THREADS", "0"),
        ("Q4JIT_NUM_THREADS", "many"),
        ("Q4JIT_NUM_THREADS", "-1"),
        ("Q4JIT_NUM_THREADS", "1025"),
        ("Q4JIT_NUM_THREADS", "２"),
        ("Q4JIT_DEBUG", "maybe"),
        ("Q4JIT_DISABLE_JIT", "2"),
    ],
)
def test_a_bad_environment_is_named(name: str, value: str) -> None:
    program = """
    from q4jit import ConfigError
    for _ in range(2):
        try:
            specialize(lambda x, w: x @ w)(x_small, small)
        except ConfigError as error:
            print(error)
    """
    prelude = child.PRELUDE.replace("@specialize", "")  # decorating raises the error too
    printed = child.run(program, prelude=prelude, **{name: value, "PYTHONIOENCODING": "utf-8"})
    assert printed.count(f"{name}: expected ") == printed.count(f", got '{value}'\n") == 2


# --- arguments of other libraries and kinds -------------------------------------------------------


def test_sizes_are_ints_of_any_library(x: Array, w: QuantizedTensor) -> None:
    k, n = map(np.int64, w.shape)
    sizes: dict[str, Any] = {"K": k, "N": np.uint16(n)}
    f: Any = specialize(lambda x, w: x @ w, **sizes)
    assert type(f.options.K) is int
    f.warmup((np.int32(1), k), w)
    close(f(x, w), x @ w)
    others: list[Any] = [np.True_, np.float32(64), np.int64(0), True, "64"]
    for wrong in others:
        with pytest.raises(ArgumentError, match="K: expected a positive int or None, got "):
            specialize(lambda x, w: x @ w, K=wrong)


NO_ARGUMENTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "a writable memoryview": (lambda x, w: memoryview(x), "; use np.asarray(x, dtype=np.float32)"),
    "a memoryview of ids": (
        lambda x, w: memoryview(np.arange(2).tobytes()).cast("q"),
        "; use np.asarray(x, np.int64) for ids",
    ),
    "a set": (lambda x, w: {1.5}, "; use list(x)"),
    "a counter": (lambda x, w: Counter("ab"), "; use dict(x)"),
    "an object": (lambda x, w: object(), ", got object"),
    "bytes": (lambda x, w: b"abc", ", got bytes"),
}


@pytest.mark.parametrize("kind", NO_ARGUMENTS)
def test_the_cure_for_an_argument_can_be_followed(kind: str, x: Array, w: QuantizedTensor) -> None:
    make, ending = NO_ARGUMENTS[kind]
    f = specialize(lambda x, w: x @ w)
    for call in (f, f.warmup):
        with pytest.raises(ArgumentError) as caught:
            call(make(x, w), w)
        message = str(caught.value)
        assert "argument 'x': expected a float array" in message
        assert ending in message
        assert ("; " in message) == ending.startswith(";")


def test_an_unhashable_argument_is_refused(w: QuantizedTensor) -> None:
    class Odd:
        def __hash__(self) -> int:
            raise RuntimeError

    with pytest.raises(ArgumentError, match="got Odd"):
        specialize(lambda x, w: x @ w)(Odd(), w)


# --- errors ---------------------------------------------------------------------------------------


def break_text(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    def lower(plan: CpuPlan, kernel: CpuKernel) -> Source:
        source = lower_cpu.lower(plan, kernel)
        return Source(source.symbol, source.target, change(source.text), source.suffix)

    broken = dataclasses.replace(find_backend(host_target()), render=lower)
    monkeypatch.setattr(specializer, "find_backend", lambda target: broken)


def test_a_compile_error_has_all_facts_each_time(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = specialize(scaled)
    break_text(monkeypatch, lambda text: text + "\ndefine void @nonsense() { frobnicate }\n")
    for _ in range(3):
        with pytest.raises(CompileError) as caught:
            f(x, w)
        error = caught.value
        assert error.compiler == "llvmlite"
        assert "-O3" in error.flags
        assert "frobnicate" in error.log
        number = error.source.splitlines().index("define void @nonsense() { frobnicate }") + 1
        assert f"{number:5d}  define void @nonsense()" in str(error)
    assert f.stats.compiles == 0
    assert "frobnicate" in f.inspect_source()
    monkeypatch.undo()
    close(f(x, w), scaled(x, w))


def test_an_object_that_needs_outside_symbols_is_refused(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call_outside(text: str) -> str:
        head, _, tail = text.partition("define void @q4jit_scaled(")
        begin, brace, body = tail.partition("{\n")
        label, _, rest = body.partition("\n")
        assert label.endswith(":")
        head += "declare void @getpid()\n\ndefine void @q4jit_scaled("
        return f"{head}{begin}{brace}{label}\n  call void @getpid()\n{rest}"

    break_text(monkeypatch, call_outside)
    f = specialize(scaled, cache=False)
    for _ in range(2):
        with pytest.raises(CompileError, match="getpid"):
            f(x, w)


def test_a_damaged_object_is_refused() -> None:
    whole = llvm.compile_object("define void @f() {\n  ret void\n}\n", host_target())
    assert undefined_symbols(whole) == frozenset()
    for damaged in (b"", b"\x7fELF", whole[:100], b"MZ" + whole[2:], whole[:-64]):
        with pytest.raises(CompileError, match="damaged object"):
            LoadedObject(damaged, ("f",), host_target())


FOREIGN = "cpu:aarch64" if host_target().family == "x86-64" else "cpu:x86-64"


def test_a_target_that_cannot_run_here_can_be_inspected(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled, target=FOREIGN)
    for _ in range(2):
        with pytest.raises(TargetError, match=f"cannot run code for {FOREIGN}"):
            f(x, w)
    assert find_target(FOREIGN).triple in f.inspect_source()
    assert "scaled:" in f.inspect_asm()
    assert host_target().triple in f.inspect_source(target="cpu")


def test_an_error_while_tracing_leaves_the_function_usable(x: Array, w: QuantizedTensor) -> None:
    fail = True

    def function(x: Array, w: QuantizedTensor) -> Any:
        if fail:
            raise ZeroDivisionError("of the user")
        return x @ w

    f = specialize(function)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="of the user"):
            f(x, w)
    fail = False
    close(f(x, w), x @ w)
    assert len(f.signatures) == 1


def test_a_wrong_call_leaves_the_function_usable(x: Array, w: QuantizedTensor) -> None:
    f = specialize(scaled)
    for _ in range(2):
        with pytest.raises(ArgumentError):
            f(x.astype(np.float64), w)
        close(f(x, w), scaled(x, w))  # also after a right call of the same shape
    with pytest.raises(TraceError):
        f(np.zeros((3, K + 32), np.float32), w)
    close(f(x, w), scaled(x, w))


# --- threads and memory ---------------------------------------------------------------------------


def test_one_bound_call_of_many_threads() -> None:
    # two weights whose kernels leave different values in the same scratch memory
    first, second = (quantize(np.ones((64, 64), np.float32) * v, "Q4_0") for v in (0.5, 2.0))
    x = np.ones((40, 64), np.float32)
    call = specialize(lambda x, v, w: (x @ v) @ w, target="cpu").bind(x, first, second)
    expected = call().copy()
    wrong: list[bool] = []

    def run() -> None:
        wrong.extend(not np.array_equal(call(), expected) for _ in range(200))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 800
    assert not any(wrong)


def test_many_threads_compile_once(x: Array, w: QuantizedTensor) -> None:
    f = specialize(lambda x, w, s: x @ w * s + 0.375, cache=False)
    gate = threading.Barrier(16)
    results: dict[int, Array] = {}

    def call(number: int) -> None:
        gate.wait()
        for _ in range(10):
            results[number] = f(x, w, float(number))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(16):
        close(results[number], scaled(x, w, float(number)) + np.float32(0.375))
    assert (f.stats.misses, f.stats.compiles) == (1, 1)
    assert f.stats.hits + f.stats.misses == 160


def test_a_call_does_not_wait_for_another_function_s_compilation(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = specialize(scaled)
    warm(x, w)
    compiling, go_on = threading.Event(), threading.Event()

    def slow(text: str) -> str:
        compiling.set()
        assert go_on.wait(child.TIMEOUT_S)
        return text

    break_text(monkeypatch, slow)
    cold = specialize(lambda x, w: x @ w + 5)
    other = threading.Thread(target=cold, args=(x, w))
    other.start()
    try:
        assert compiling.wait(child.TIMEOUT_S)
        served = threading.Thread(target=warm, args=(x, w), daemon=True)
        served.start()
        served.join(10)
        assert not served.is_alive()
    finally:
        go_on.set()
        other.join()


def test_a_dropped_function_releases_its_code(x: Array, w: QuantizedTensor) -> None:
    f = specialize(lambda x, w: x @ w - 1)
    f(x, w)
    (compiled,) = f._specializer.kept.compiled.values()
    loaded: Any = compiled.kernels[0].loaded
    code = weakref.ref(loaded[1])
    del loaded
    function = weakref.ref(f)
    del f, compiled
    gc.collect()
    assert function() is None
    assert code() is None


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_dropped_functions_free_their_memory(x: Array, w: QuantizedTensor) -> None:
    def make_and_drop(count: int) -> None:
        for _ in range(count):
            specialize(lambda x, w: x @ w - 2)(x, w)

    make_and_drop(50)
    before = resident_bytes()
    make_and_drop(300)
    # LLVM itself keeps about 10 KB per object; a leaked function takes more
    assert resident_bytes() - before < 300 * 25_000


def test_the_number_of_remembered_shapes_is_bounded(
    x: Array, w: QuantizedTensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_CALLS", 10)
    f = specialize(scaled)
    for m in range(1, 40):
        big = np.resize(x, (m, K))
        close(f(big, w), scaled(big, w))
        assert len(f._launches) <= 10
    assert len(f._specializer.kept.compiled) < 10  # classes of M, not values


# --- locks of the user ----------------------------------------------------------------------------


@pytest.mark.process
def test_a_traced_function_may_take_a_lock_that_a_caller_holds() -> None:
    child.run(
        """
        guard, tracing = threading.Lock(), threading.Event()
        @specialize
        def forward(x, w):
            tracing.set()
            with guard:
                return x @ w * 2.0
        def scale():
            with guard:
                assert tracing.wait(30)
                check()  # compiles while `forward` is traced
        threads = [threading.Thread(target=scale)]
        threads[0].start()
        time.sleep(0.1)
        threads.append(threading.Thread(target=forward, args=(x_small, small)))
        threads[1].start()
        for thread in threads:
            thread.join()
        np.testing.assert_allclose(forward(x_small, small), 2 * expected_small, 1e-4, 1e-4)
        """
    )


@pytest.mark.process
def test_a_fork_while_a_traced_function_logs() -> None:
    child.run(
        """
        import logging
        tracing = threading.Event()
        def slow(x, w):
            tracing.set()
            time.sleep(0.5)
            logging.warning("tracing")
            return x @ w
        thread = threading.Thread(target=lambda: specialize(slow)(x_small, small))
        thread.start()
        tracing.wait()
        for _ in range(3):
            reap(in_child(check))
        thread.join()
        """
    )


@pytest.mark.process
def test_a_fork_while_logging_captures_a_warning_of_the_cache() -> None:
    child.run(
        """
        import logging  # after q4jit
        from q4jit.compilers import cache
        logging.captureWarnings(True)
        logging.basicConfig(filename=os.devnull)
        os.environ["Q4JIT_CACHE_DIR"] = os.devnull + "/cache"
        compiling, warn = threading.Event(), cache.DiskCache._warn
        def slow(disk, problem):
            compiling.set()
            time.sleep(0.5)
            warn(disk, problem)
        cache.DiskCache._warn = slow
        thread = threading.Thread(target=check)
        thread.start()
        compiling.wait()
        time.sleep(0.1)
        reap(in_child(lambda: None))
        thread.join()
        """
    )


def test_threads_that_trace_the_same_function_share_one_graph() -> None:
    both = threading.Barrier(2)

    @specialize
    def product(x: Any, w: Any) -> Any:
        if not isinstance(x, np.ndarray):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(10)
        return x @ w

    x, w = np.ones((2, 32), np.float32), quantize(np.ones((32, 16), np.float32), "Q4_0")
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(product(x, w))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both.broken  # both threads traced at the same time
    np.testing.assert_array_equal(results[0], results[1])
    assert len(product.signatures) == 1
    assert (product.stats.misses, product.stats.hits) == (1, 1)


# --- bad moments ----------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("first", ["product(x_small, small)", "product.warmup(x_small, small)"])
def test_a_first_call_without_free_file_descriptors(first: str) -> None:
    """Every number of free descriptors gives an answer or our error, and the last call works."""
    output = child.run(
        f"""
        import resource, warnings
        from q4jit import CacheWarning, TargetError
        warnings.simplefilter("ignore", CacheWarning)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        held = []
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for free in range(8):
            try:
                {first}
            except TargetError as error:
                print(free, error)
            os.close(held.pop())
        check()
        """
    )
    assert output.startswith("0 cannot open the files that a first call reads")
    assert "ulimit -n" in output


@pytest.mark.process
@pytest.mark.parametrize("late", [False, True])
def test_a_first_call_at_exit(late: bool) -> None:
    """The call is the first, or q4jit is even imported by then; nothing is printed."""
    program = f"""
    import atexit
    def last():
        late = {child.PRELUDE!r} + "check()\\nproduct.inspect_asm()\\nprint('done')"
        exec(late, {{"__name__": "late"}})
    atexit.register(last)
    """
    prelude = "import threading\n" if late else "import q4jit\n"
    assert child.run(program, prelude=prelude, Q4JIT_NUM_THREADS="3") == "done\n"
