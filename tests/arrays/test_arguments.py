"""Array arguments and `out=` with any strides and alignment; refusals."""

import ctypes
import gc
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import ArgumentError, QuantizedTensor, quantize, specialize
from q4jit.cpu import scratch
from tests.support.functions import F32, Floats, check, random, weight

M, K, N = 5, 32, 48
X, W, R = random(M, K), weight(K, N, "Q4_0"), random(M, N, seed=1)
BIAS = random(N, seed=2)


@specialize
def layer(x: Any, w: Any, r: Any, bias: Any) -> Any:
    return np.tanh(2 * x) @ w + bias * r


@specialize
def pair(x: Any, w: Any) -> tuple[Any, Any]:
    y = x @ w
    return y[..., :16], y[..., 16:] * 2


# --- strides ----------------------------------------------------------------------------------


def unaligned(array: Floats) -> Floats:
    """Return the same numbers at an address that is not a multiple of 4."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    moved: Floats = memory[1:].view(F32).reshape(array.shape)
    moved[...] = array
    assert not moved.flags.aligned
    return moved


def read_only(array: Floats) -> Floats:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def spread(array: Floats) -> Floats:
    """Return the same numbers as every second element of a larger array, with NaN between."""
    wide = np.full(tuple(2 * size for size in array.shape), np.nan, F32)
    view: Floats = wide[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


ARRANGEMENTS: dict[str, Callable[[Floats], Floats]] = {
    "transposed": lambda a: np.asfortranarray(a) if a.ndim > 1 else a[::-1].copy()[::-1],
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "spread": spread,
    "read-only": read_only,
    "unaligned": unaligned,
    "broadcast": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "subclass": lambda a: a.view(type("Mine", (np.ndarray,), {})),
    "memory of another array": lambda a: np.concatenate([a, a])[: len(a)],
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_arrangement(arrange: Callable[[Floats], Floats]) -> None:
    arrays = [arrange(a) for a in (X, R, BIAS)]
    before = [a.copy() for a in arrays]
    check(layer, arrays[0], W, arrays[1], arrays[2])
    for array, kept in zip(arrays, before, strict=True):
        assert np.array_equal(array, kept)


def test_arrangements_share_kernels() -> None:
    compiled = specialize(lambda x, w: x @ w)
    for arrange in ARRANGEMENTS.values():
        check(compiled, arrange(X), W)
    assert len(compiled.signatures) == 1


def test_leading_dimensions_of_any_strides() -> None:
    x = np.moveaxis(random(4, 2, 3, K), 0, 2)
    assert x.shape == (2, 3, 4, K)
    check(lambda x, w, r: x @ w + r, x, W, random(3, 1, N)[:, ::-1])


# --- refusals -------------------------------------------------------------------------------------

IDS = "int32 or int64 for ids, or float32 for numbers"
KINDS = (
    "a float array, QuantizedTensor, ExpertTensor, number, bool, str or None, or a list, tuple, "
    "dict, dataclass or NamedTuple of these"
)


def float32_for(shown: str) -> str:
    wanted = "expected float32, float16 or bfloat16"
    return f"argument 'x': {wanted}, got {shown}; use x.astype(np.float32)"


def ids_for(shown: str) -> str:
    cure = "use x.astype(np.int64) or x.astype(np.float32)"
    return f"argument 'x': expected {IDS}, got {shown}; {cure}"


REFUSED: list[tuple[object, str]] = [
    (X.astype(np.float64), float32_for("float64 [5, 32]")),
    (X.astype(np.int16), ids_for("int16 [5, 32]")),
    (X.astype(np.uint64), ids_for("uint64 [5, 32]")),
    (X.astype(">i8"), ids_for("int64 in foreign byte order [5, 32]")),
    (X > 0, float32_for("bool [5, 32]")),
    (X.astype(np.complex64), float32_for("complex64 [5, 32]").replace("x.", "x.real.")),
    (X.astype(object), float32_for("object [5, 32]")),
    (X.astype(">f4"), float32_for("float32 in foreign byte order [5, 32]")),
    (X.astype(">f8"), float32_for("float64 in foreign byte order [5, 32]")),
    (np.array(True), float32_for("bool []")),
    (np.array(1j), float32_for("complex128 []").replace("x.", "x.real.")),
    ([1.0] * 5000, "argument 'x': expected at most 4096 values in containers, got more; use"),
    ({1.0}, f"argument 'x': expected {KINDS}, got set; use list(x)"),
    ([{1j: 0}], "argument 'x[0]': expected keys that are str or int, got the complex 1j"),
    ([1j], f"argument 'x[0]': expected {KINDS}, got complex"),
    (object(), f"argument 'x': expected {KINDS}, got object"),
    (1j, f"argument 'x': expected {KINDS}, got complex"),
    (b"bytes", f"argument 'x': expected {KINDS}, got bytes"),
    (
        np.ma.masked_array(X, mask=X > 0),
        "'x': expected a plain array, got a MaskedArray; use np.asarray(x)",
    ),
    (X[:, :0], "'x': expected a last dimension of at least 1, got shape [5, 0]"),
    (X[0, :0], "'x': expected a last dimension of at least 1, got shape [0]"),
]


@pytest.mark.parametrize(
    ("x", "message"), REFUSED, ids=[r[1].split(", got ")[-1][:40] for r in REFUSED]
)
@pytest.mark.parametrize("known", [False, True], ids=["first call", "later call"])
def test_refused_argument(x: object, message: str, known: bool) -> None:
    """Check also after a call of the same shape: every call checks its arrays."""
    compiled = specialize(lambda x: x * 2)
    if known:
        compiled(X)
        compiled(np.array(2.0))
    with pytest.raises(ArgumentError, match=re.escape(message)):
        compiled(x)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"'x': expected a plain array, got a matrix; use np\.asarray\(x\)"
    ):
        layer(np.asmatrix(X), W, R, BIAS)


def test_an_error_of_arguments_is_a_type_error_and_a_value_error() -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match=r"argument 'x': .*got set"):
            layer({1.0}, W, R, BIAS)


def test_weights_instead_of_arrays_and_arrays_instead_of_weights() -> None:
    with pytest.raises(TypeError, match="element by element"):
        layer(W, W, R, BIAS)
    with pytest.raises(TypeError, match=r"got the array 'w'; pass quantize\(w, \"F32\"\)"):
        layer(X, np.asarray(W.dequantize()), R, BIAS)


def test_a_refused_call_leaves_the_function_usable() -> None:
    compiled = specialize(lambda x, w: x @ w)
    for wrong in (X.astype(np.float64), X[:, :7], [1.0]):
        with pytest.raises(TypeError):
            compiled(wrong, W)
        check(compiled, X, W)


# --- out= -----------------------------------------------------------------------------------------


def outs() -> dict[str, NDArray[Any]]:
    wide = np.full((2 * M, 3 * N), np.nan, F32)
    return {
        "plain": np.empty((M, N), F32),
        "columns of a matrix": wide[:M, N : 2 * N],
        "every second row": wide[::2, :N],
        "transposed": np.empty((N, M), F32).T,
        "negative strides": np.empty((M, N), F32)[::-1, ::-1],
        "unaligned": unaligned(np.zeros((M, N), F32)),
    }


@pytest.mark.parametrize("kind", outs())
def test_out(kind: str) -> None:
    out = outs()[kind]
    around = out.base if kind in {"columns of a matrix", "every second row"} else None
    untouched = None if around is None else np.isnan(around).sum() - out.size
    for x in (X, 2 * X):
        out[...] = np.nan
        assert layer(x, W, R, BIAS, out=out) is out
        assert np.array_equal(out, layer(x, W, R, BIAS))
    if around is not None:
        assert np.isnan(around).sum() == untouched


def test_out_of_a_tuple() -> None:
    together = np.full((M, N), np.nan, F32)
    out = (together[:, :16], together[:, 16:])  # adjacent in one matrix
    assert pair(X, W, out=out) is out
    for part, wanted in zip(out, pair(X, W), strict=True):
        assert np.array_equal(part, wanted)


def test_out_with_few_rows_and_with_none() -> None:
    def function(x: Any, r: Any) -> tuple[Any, Any]:
        return x.sum(-1, keepdims=True), x + r

    x, r = random(2, 1, K), random(3, K)
    out = (np.empty((2, 1, 1), F32), np.empty((2, 3, K), F32))
    compiled = specialize(function)
    assert compiled(x, r, out=out) is out
    check(compiled, x, r)
    assert np.array_equal(out[0], compiled(x, r)[0])
    empty = np.empty((0, N), F32)
    assert layer(X[:0], W, BIAS, BIAS, out=empty) is empty


def test_out_next_to_an_input_in_one_matrix() -> None:
    together = np.concatenate([X, np.zeros((M, N), F32)], axis=1)
    x, out = together[:, :K], together[:, K:]
    layer(x, W, R, BIAS, out=out)
    assert np.array_equal(out, layer(X, W, R, BIAS))
    assert np.array_equal(x, X)


def locked() -> Floats:
    array = np.empty((M, N), F32)
    array.flags.writeable = False
    return array


WRITABLE = "out=: expected a writable float32 [5, 48], got"
REFUSED_OUTS: list[tuple[object, str]] = [
    (np.empty((M, N)), f"{WRITABLE} float64 [5, 48]"),
    (np.empty((M, N), ">f4"), f"{WRITABLE} >f4 [5, 48]"),
    (np.empty((N, M), F32), f"{WRITABLE} float32 [48, 5]"),
    (np.empty((1, M, N), F32), f"{WRITABLE} float32 [1, 5, 48]"),
    (np.empty((), F32), f"{WRITABLE} float32 []"),
    (locked(), f"{WRITABLE} read-only float32 [5, 48]"),
    ([[0.0] * N] * M, f"{WRITABLE} list"),
    ((np.empty((M, N), F32),), "out=: expected one array, got tuple"),
    (W, f"{WRITABLE} QuantizedTensor"),
]


@pytest.mark.parametrize(
    ("out", "message"), REFUSED_OUTS, ids=[r[1].split(", got ")[-1] for r in REFUSED_OUTS]
)
def test_refused_out(out: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        layer(X, W, R, BIAS, out=out)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((M, N), F32),
        (np.empty((M, 16), F32),),
        (np.empty((M, 16), F32),) * 3,
        [np.empty((M, 16), F32), np.empty((M, 32), F32)],
    ],
    ids=["array", "one", "three", "list"],
)
def test_refused_out_of_a_tuple(out: Any) -> None:
    with pytest.raises(ArgumentError, match="out=: expected a tuple of 2 arrays, got "):
        pair(X, W, out=out)


def test_out_that_overlaps_an_input() -> None:
    memory = np.zeros(4 * M * N, F32)
    r = memory[: M * N].reshape(M, N)
    for start in (0, 1, M * N - 1):
        out = memory[start : start + M * N].reshape(M, N)
        with pytest.raises(ArgumentError, match="out= overlaps the argument 'r'"):
            layer(X, W, r, BIAS, out=out)
    layer(X, W, r, BIAS, out=memory[M * N : 2 * M * N].reshape(M, N))


def test_outs_that_overlap_each_other() -> None:
    memory = np.zeros((M, N), F32)
    with pytest.raises(ArgumentError, match="two arrays of out= overlap"):
        pair(X, W, out=(memory[:, :16], memory[:, 15:47]))


def memory_of(w: QuantizedTensor) -> Floats:
    """Return a weight's blocks as a writable array, which users cannot do."""
    start = ctypes.cast(w.raw.ctypes.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(start, (w.nbytes // 4,))


def test_out_that_overlaps_a_weight() -> None:
    w = weight(K, N, "F32")
    out = memory_of(w)[: M * N].reshape(M, N)
    before = w.raw.tobytes()
    with pytest.raises(ArgumentError, match="out= overlaps the argument 'w'"):
        specialize(lambda x, w: x @ w)(X, w, out=out)
    assert w.raw.tobytes() == before


def test_a_signal_handler_may_call_kernels_while_one_runs() -> None:
    rng = np.random.default_rng(0)
    w = quantize(rng.standard_normal((256, 256)) / 16, "Q8_0")
    chained = specialize(
        lambda x, w: np.maximum(x @ w, 0) @ w
    )  # the second kernel reads scratch memory
    x, other = (rng.standard_normal((m, 256), dtype=np.float32) for m in (1, 64))
    expected = chained(x, w)
    chained(other, w)
    lengths: list[int] = []
    inside = False

    def handler(number: int, frame: object) -> None:
        nonlocal inside
        if not inside:  # a busy machine may deliver a signal during the handler
            inside = True
            lengths.append(len(chained(other, w)))
            inside = False

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            np.testing.assert_array_equal(chained(x, w), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(lengths) > 10


def test_scratch_of_many_calls_at_the_same_time_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch, "_kept", [])
    piece_bytes = 3 << 20
    pieces = [scratch.take_scratch(piece_bytes) for _ in range(64)]
    for piece in pieces:
        scratch.keep_scratch(piece)
    assert sum(piece.size_bytes for piece in scratch._kept) <= scratch._ALL_KEPT_BYTES
    assert len(scratch._kept) == scratch._ALL_KEPT_BYTES // piece_bytes
    scratch.keep_scratch(scratch.new_scratch(1 << 10))
    assert scratch.take_scratch(1 << 10).size_bytes == 1 << 10  # the latest is kept


def test_threads_that_keep_scratch_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_kept", [])
    monkeypatch.setattr(scratch, "_ALL_KEPT_BYTES", 64 << 10)
    gate = threading.Barrier(16)

    def call() -> None:
        gate.wait()
        for _ in range(200):
            pieces = [scratch.take_scratch(4 << 10) for _ in range(3)]
            for piece in pieces:
                scratch.keep_scratch(piece)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(piece.size_bytes for piece in scratch._kept) <= 64 << 10


def test_scratch_of_a_large_call_is_not_kept() -> None:
    w = quantize(np.ones((1024, 16)), "Q4_0")
    product = specialize(lambda x, w: x @ w)
    product(np.zeros((8192, 1024), np.float32), w)
    assert all(piece.size_bytes <= scratch._KEPT_BYTES for piece in scratch._kept)


def python_calls(action: Callable[[], object]) -> int:
    """Return how many Python functions run, which determines the time outside of kernels."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()  # it would call the finalizers of other tests' functions
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count - 1  # the action's own


def test_a_warm_call_makes_few_python_calls() -> None:
    w = quantize(np.ones((32, 16)), "Q4_0")
    product = specialize(lambda x, w: x @ w)
    x, y = np.ones((1, 32), np.float32), np.empty((1, 16), np.float32)
    product(x, w)
    assert python_calls(lambda: product(x, w)) <= 10
    product(x, w, out=y)
    assert python_calls(lambda: product(x, w, out=y)) <= 12
    assert python_calls(product.bind(x, w)) <= 1


def test_a_warm_call_detects_overlaps() -> None:
    w = quantize(np.ones((32, 32)), "Q4_0")
    both = specialize(lambda x, w: (x @ w, x + 1))
    x = np.ones((1, 32), np.float32)
    memory = np.empty(256, np.float32)
    first, second = memory[:32].reshape(1, 32), memory[32:64].reshape(1, 32)
    for _ in range(2):  # the second call is warm
        both(x, w, out=(first, second))
        for outs in ((first, memory[31:63].reshape(1, 32)), (second, x), (x, second)):
            with pytest.raises(ArgumentError, match="overlap"):
                both(x, w, out=outs)
        both(first, w, out=(second, memory[64:96].reshape(1, 32)))


def test_out_with_elements_that_coincide_is_refused() -> None:
    w = quantize(np.ones((32, 16)), "Q4_0")
    out = np.lib.stride_tricks.as_strided(np.zeros(16, np.float32), (3, 16), (0, 4))
    with pytest.raises(ArgumentError, match="out=: expected a writable float32"):
        specialize(lambda x, w: x @ w)(np.ones((3, 32), np.float32), w, out=out)
