"""`QuantizedTensor`: results, immutability, memory and messages."""

import contextlib
import copy
import gc
import mmap
import pickle
import tracemalloc
import warnings
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from q4jit.errors import ArgumentError, FormatError
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16, pack
from q4jit.weights.quantize import quantize
from q4jit.weights.reference import float_bytes, random_weight, store_scales
from q4jit.weights.scales import _f16_squares
from q4jit.weights.tensor import QuantizedTensor
from tests.support.halves import BF16
from tests.support.memory import MB, peak_bytes

SMALL = 12 * MB  # temporary memory of a call, whatever the size of its tensor


def oracle(name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode a matrix [K, N] with gguf."""
    with np.errstate(all="ignore"):
        return np.asarray(quants.dequantize(raw, gguf.GGMLQuantizationType[name]), np.float32).T


def random_tensor(name: str, k: int = 512, n: int = 37, seed: int = 0) -> QuantizedTensor:
    """Return a tensor of random blocks with moderate scales, in any format."""
    fmt = FORMATS[name]
    rng = np.random.default_rng(seed)
    if fmt.float_type is not None:
        raw = float_bytes(fmt.float_type, rng.standard_normal((n, k)))
        return QuantizedTensor.from_bytes(raw, shape=(k, n), format=name)
    blocks = rng.integers(0, 256, (n, k // fmt.block_elements, fmt.block_bytes), np.uint8)
    store_scales(fmt, blocks, rng.uniform(0.5, 1.5, blocks.shape[:2]))
    if fmt.minimum_at is not None:
        minima = rng.standard_normal(blocks.shape[:2]).astype("<f2")
        blocks[..., fmt.minimum_at :][..., :2] = minima[..., np.newaxis].view(np.uint8)
    return QuantizedTensor.from_bytes(blocks, shape=(k, n), format=name)


# --- attributes and decoding ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_attributes_of_a_tensor(name: str) -> None:
    w = random_tensor(name, 512, 37)
    column_bytes = FORMATS[name].column_bytes(512)
    assert (w.shape, w.format, w.nbytes) == ((512, 37), name, 37 * column_bytes)
    assert w.raw.shape == (37, column_bytes)
    assert w.raw.dtype == np.uint8
    assert repr(w) == f"<QuantizedTensor {name} (K, N) = (512, 37), {w.nbytes} bytes>"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("k", "n"), [(256, 1), (512, 37), (256, 1500), (1 << 19, 2)])
def test_dequantize_is_ggufs(name: str, k: int, n: int) -> None:
    w = random_tensor(name, k, n)
    values = w.dequantize()
    assert values.dtype == np.float32
    assert values.shape == (k, n)
    np.testing.assert_array_equal(values, oracle(name, w.raw))


def test_a_column_is_one_gguf_row() -> None:
    stored = "0038" + "08" * 16 + "003c" + "09" * 16 + "00c0" + "90" * 16
    w = QuantizedTensor.from_bytes(bytes.fromhex(stored), shape=(32, 3), format="Q4_0")
    values = w.dequantize()
    assert values[0].tolist() == [0.0, 1.0, 16.0]
    assert values[31].tolist() == [-4.0, -8.0, -2.0]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_columns_of_the_matrix(name: str) -> None:
    w = random_tensor(name)
    values = w.dequantize()
    ids = [5, 0, 36, 5]
    for given in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint8), np.array(ids, ">i4")):
        rows = w.rows(given)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, values[:, ids].T)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_rows_keep_the_shape_of_their_ids(shape: tuple[int, ...]) -> None:
    w = random_tensor("Q4_0")
    ids = np.random.default_rng(0).integers(0, 37, shape)
    rows = w.rows(ids)
    assert rows.shape == (*shape, 512)
    np.testing.assert_array_equal(rows, w.dequantize().T[ids])
    assert w.rows([]).shape == (0, 512)
    assert w.rows(7).shape == (512,)


def test_many_lookups_of_two_rows() -> None:
    w = random_tensor("Q8_0", 4096, 2)
    ids = np.random.default_rng(0).integers(0, 2, 300)
    np.testing.assert_array_equal(w.rows(ids), w.dequantize().T[ids])


@pytest.mark.parametrize("bad", [-1, 37, 2**40, -(2**40)])
def test_a_row_id_out_of_range_is_refused(bad: int) -> None:
    w = random_tensor("Q4_0")
    with pytest.raises(
        ArgumentError, match=rf"ids of w\.rows\(ids\): expected row ids from 0 to 36, got {bad}$"
    ):
        w.rows([1, bad, 2])
    with pytest.raises(
        ArgumentError, match="expected row ids from 0 to 36, got 18446744073709551615"
    ):
        w.rows(np.array([2**64 - 1], np.uint64))


@pytest.mark.parametrize("bad", [[1.0], [True], ["1"], [None], np.array([], np.float32)])
def test_row_ids_are_integers(bad: Any) -> None:
    cure = r"ids\.astype\(np" if isinstance(bad, np.ndarray) else r"np\.asarray\(ids, dtype=np"
    with pytest.raises(ArgumentError, match=rf"expected integers, got \S+; use {cure}\.int64\)$"):
        random_tensor("Q4_0").rows(bad)


def test_rows_decode_only_their_blocks() -> None:
    w = random_tensor("Q4_0", 4096, 4096)
    assert peak_bytes(lambda: w.rows([1, 4000])) < MB // 2


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(512,), (0, 512), (1, 512), (3, 512), (2, 0, 512), (2, 3, 512)])
def test_a_product_is_computed_in_float64_and_rounded(name: str, shape: tuple[int, ...]) -> None:
    w = random_tensor(name)
    x = np.random.default_rng(5).standard_normal(shape)
    exact = x @ oracle(name, w.raw).astype(np.float64)
    y = x @ w
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, exact, rtol=1e-12, atol=1e-9)
    x32 = x.astype(np.float32)
    exact = x32.astype(np.float64) @ oracle(name, w.raw).astype(np.float64)
    rounded = x32 @ w
    assert rounded.dtype == np.float32
    assert rounded.shape == (*shape[:-1], 37)
    np.testing.assert_allclose(rounded, exact, rtol=1e-7, atol=1e-6)
    np.testing.assert_array_equal(np.matmul(x32, w), rounded)


def test_a_product_takes_any_strides() -> None:
    w = random_tensor("Q4_0")
    x = np.random.default_rng(6).standard_normal((4, 512)).astype(np.float32)
    wanted = x @ w
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not unaligned.flags.aligned
    for same in (np.asfortranarray(x), x[::-1][::-1], unaligned, np.repeat(x, 2, 1)[:, ::2]):
        np.testing.assert_array_equal(same @ w, wanted)
    np.testing.assert_array_equal(x[::-2] @ w, wanted[::-2])


def test_nan_and_inf_propagate() -> None:
    w = quantize(np.eye(32, 3), "F32")
    x = np.zeros((3, 32), np.float32)
    x[0, 0], x[1, 1], x[2] = np.nan, np.inf, 1e38
    with np.errstate(all="raise"):
        y = x @ w
    assert np.isnan(y[0]).all()
    assert np.isnan(y[1, [0, 2]]).all()
    assert y[1, 1] == np.inf
    assert (x[2:] @ quantize(np.full((32, 1), 1e3), "F32")).tolist() == [[np.inf]]


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [
        (">f2", "float16 in foreign byte order"),
        ("i8", "int64"),
        ("?", "bool"),
        (">f4", "float32 in foreign byte order"),
        ("c8", "complex64"),
        ("O", "object"),
    ],
)
def test_another_dtype_of_x_is_refused_with_the_conversion(dtype: str, shown: str) -> None:
    x = np.ones((2, 512), dtype)
    with pytest.raises(
        ArgumentError,
        match=rf"x in x @ w: expected .*, got {shown} \[2, 512\]; use x(\.real)?\.astype",
    ):
        x @ random_tensor("Q4_0")


@pytest.mark.parametrize("shape", [(2, 37), (511,), (2, 1), (1, 512, 2), (0,)])
def test_shapes_that_do_not_match_are_refused_with_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError) as error:
        np.ones(shape, np.float32) @ random_tensor("Q4_0")
    where = "x in x @ w with w (K, N) = (512, 37)"
    assert str(error.value) == f"{where}: expected shape [..., 512], got {list(shape)}"


def test_a_scalar_has_no_product() -> None:
    w = random_tensor("Q4_0")
    with pytest.raises(
        ArgumentError, match=r"expected a NumPy array, got float32; use np\.asarray"
    ):
        np.matmul(np.float32(1), w)
    with pytest.raises(ArgumentError, match=r"expected shape \[\.\.\., 512\], got \[\]"):
        np.array(1, np.float32) @ w


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: w @ x,
        lambda x, w: w @ w,
        lambda x, w: np.matmul(w, x),
        lambda x, w: w @ 2,
    ],
)
def test_a_weight_on_the_left_is_refused(call: Callable[[Any, Any], Any]) -> None:
    with pytest.raises(
        ArgumentError, match=r"must be the right operand of @, as in x @ w.*\(512, 37\)$"
    ):
        call(np.ones((37, 512), np.float32), random_tensor("Q4_0"))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, w: np.exp(w), "np.exp "),
        (lambda x, w: x + w, "np.add "),
        (lambda x, w: np.float32(2) * w, "np.multiply "),
        (lambda x, w: np.add.reduce(w), "np.add.reduce"),
        (lambda x, w: np.sum(w), "np.add.reduce"),
        (lambda x, w: np.matmul(x, w, out=np.ones((1, 37), np.float32)), "np.matmul with out="),
        (lambda x, w: np.matmul(x, w, dtype=np.float64), "np.matmul with dtype="),
        (lambda x, w: np.asarray(w), "does not become an array by itself; use "),
        (np.dot, "does not become an array by itself; use "),
        (lambda x, w: np.concatenate([x, w]), "does not become an array by itself; use "),
        (lambda x, w: quantize(w, "Q8_0"), "does not become an array by itself; use "),
        (lambda x, w: [[1.0] * 512] @ w, "expected a NumPy array, got list; use np.asarray"),
    ],
)
def test_other_uses_of_a_weight_are_refused(call: Callable[[Any, Any], Any], named: str) -> None:
    with pytest.raises(ArgumentError) as error:
        call(np.ones((1, 512), np.float32), random_tensor("Q4_0"))
    assert named in str(error.value)
    assert "; use " in str(error.value)
    assert isinstance(error.value, TypeError)


def test_a_traced_array_handles_products_itself() -> None:
    class Traced:
        def __array_ufunc__(self, *args: Any, **kwargs: Any) -> str:
            return "traced"

        def __rmatmul__(self, other: object) -> str:
            return "traced"

    w = random_tensor("Q4_0")
    traced: Any = Traced()
    assert w @ traced == "traced"
    assert np.matmul(w, traced) == "traced"


# --- from_bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_from_bytes_takes_any_contiguous_buffer(name: str, tmp_path: Path) -> None:
    w = random_tensor(name)
    stored = w.raw.tobytes()
    path = tmp_path / "blocks"
    path.write_bytes(stored)
    buffers: list[Any] = [
        stored,
        bytearray(stored),
        memoryview(stored),
        array("B", stored),
        w.raw,
        np.frombuffer(stored, np.uint8).copy(),
        np.frombuffer(stored, "<u2").reshape(37, -1),
        memoryview(b"\0" + stored)[1:],
        np.memmap(path, mode="r"),
    ]
    for buffer in buffers:
        same = QuantizedTensor.from_bytes(buffer, shape=(512, 37), format=name)
        np.testing.assert_array_equal(same.raw, w.raw)
        np.testing.assert_array_equal(same.dequantize(), w.dequantize())


def test_from_bytes_takes_arrays_of_bfloat16() -> None:
    stored = random_weight("BF16", 512, 37).raw.tobytes()
    values = np.frombuffer(stored, BF16).reshape(37, 512)
    w = QuantizedTensor.from_bytes(values, shape=(512, 37), format="BF16")
    assert np.array_equal(w.dequantize().T, values.astype(np.float32))
    assert np.shares_memory(w.raw, values)
    writable = values.copy()
    copied = QuantizedTensor.from_bytes(writable, shape=(512, 37), format="BF16")
    writable[:] = 0
    assert np.array_equal(copied.raw, w.raw)
    with pytest.raises(FormatError, match=r"strided or transposed buffer; use np\.asc"):
        QuantizedTensor.from_bytes(values.T, shape=(512, 37), format="BF16")


def test_read_only_bytes_are_not_copied() -> None:
    stored = random_tensor("Q4_0").raw.tobytes()
    whole = np.frombuffer(stored, np.uint8)
    for frozen in (stored, memoryview(stored), whole, whole[:], whole.data):
        w = QuantizedTensor.from_bytes(frozen, shape=(512, 37), format="Q4_0")
        assert np.shares_memory(w.raw, whole)


def test_writable_bytes_are_copied() -> None:
    stored = random_tensor("Q4_0").raw.tobytes()
    owner = bytearray(stored)
    values = np.frombuffer(owner, np.uint8)
    sealed = values.view()
    sealed.flags.writeable = False
    views: list[Any] = [
        owner,
        values,
        sealed,
        sealed[:],
        memoryview(owner).toreadonly(),
        sealed.data,
        np.frombuffer(memoryview(owner).toreadonly(), np.uint8),
    ]
    made = [QuantizedTensor.from_bytes(view, shape=(512, 37), format="Q4_0") for view in views]
    owner[:] = bytes(len(owner))
    for w in made:
        assert w.raw.tobytes() == stored


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: a[:], memoryview, lambda a: a[:].data])
def test_an_array_that_may_become_writable_is_copied(wrap: Callable[[Any], Any]) -> None:
    stored = random_tensor("Q4_0").raw.tobytes()
    owner = np.frombuffer(stored, np.uint8).copy()
    older = owner[:]
    owner.flags.writeable = False
    w = QuantizedTensor.from_bytes(wrap(owner), shape=(512, 37), format="Q4_0")
    older[:18] = 0
    assert w.raw.tobytes() == stored
    owner.flags.writeable = True
    owner[:] = 0
    assert w.raw.tobytes() == stored


def test_a_read_only_map_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    path.write_bytes(bytes(18))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(mapped, np.uint8)
    for source in (mapped, memoryview(mapped), whole, whole[:], np.memmap(path, mode="r")):
        w = QuantizedTensor.from_bytes(source, shape=(32, 1), format="Q4_0")
        assert np.shares_memory(w.raw, np.frombuffer(source, np.uint8))


def test_a_writable_map_is_copied() -> None:
    with mmap.mmap(-1, 18) as anonymous:
        w = QuantizedTensor.from_bytes(anonymous, shape=(32, 1), format="Q4_0")
        anonymous[:] = b"\1" * 18
    assert w.raw.tobytes() == bytes(18)


@pytest.mark.parametrize("size", [0, 1, 37 * 288 - 1, 37 * 288 + 1])
def test_a_wrong_byte_count_is_refused_with_the_right_one(size: int) -> None:
    with pytest.raises(FormatError, match=rf"expected {37 * 288} bytes .*, got {size} bytes$"):
        QuantizedTensor.from_bytes(bytes(size), shape=(512, 37), format="Q4_0")


@pytest.mark.parametrize("shape", [(0, 4), (32, 0), (-32, 4), (32, -1)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(
        FormatError, match=rf"expected positive sizes \(K, N\), got \({shape[0]}, {shape[1]}\)$"
    ):
        QuantizedTensor.from_bytes(b"", shape=shape, format="Q4_0")
    if min(shape) == 0:
        with pytest.raises(FormatError, match="expected positive sizes"):
            quantize(np.zeros(shape, np.float32), "Q4_0")


@pytest.mark.parametrize(
    "shape", [32, (32,), (32, 1, 1), (32.0, 1), (32, True), (32, np.True_), None, "ab"]
)
def test_a_shape_is_a_pair_of_ints(shape: Any) -> None:
    with pytest.raises(
        FormatError, match=r"shape of a weight: expected a pair of ints \(K, N\), got "
    ):
        QuantizedTensor.from_bytes(bytes(18), shape=shape, format="Q4_0")


def test_a_size_may_be_any_integer() -> None:
    shape: Any = (np.int64(32), np.uint8(1))
    w = QuantizedTensor.from_bytes(bytes(18), shape=shape, format="Q4_0")
    assert [type(size) for size in w.shape] == [int, int]


def test_k_that_is_not_whole_blocks_is_refused() -> None:
    with pytest.raises(
        FormatError, match=r"K: expected a positive multiple of 32 \(a block of Q4_0\), got 48$"
    ):
        QuantizedTensor.from_bytes(bytes(27), shape=(48, 1), format="Q4_0")
    with pytest.raises(
        FormatError, match=r"K: expected a positive multiple of 32 \(a block of Q4_0\), got 48$"
    ):
        quantize(np.zeros((48, 1), np.float32), "Q4_0")


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros(36, np.uint8)[::2],
        np.zeros((2, 9), np.uint8).T,
        memoryview(bytes(36))[::2],
        np.array([None] * 18),
    ],
)
def test_a_buffer_that_is_not_contiguous_is_refused(buffer: Any) -> None:
    with pytest.raises(
        FormatError,
        match=r"expected a C-contiguous buffer, got .*; use np\.ascontiguousarray\(raw\)",
    ):
        QuantizedTensor.from_bytes(buffer, shape=(32, 1), format="Q4_0")


@pytest.mark.parametrize("buffer", ["a" * 18, 18, None, [0] * 18])
def test_other_objects_than_buffers_are_refused(buffer: Any) -> None:
    with pytest.raises(FormatError, match=r"expected a contiguous buffer such as bytes.*, got "):
        QuantizedTensor.from_bytes(buffer, shape=(32, 1), format="Q4_0")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(FormatError, match="unknown format 'Q9_9'; known formats:"):
        QuantizedTensor.from_bytes(bytes(18), shape=(32, 1), format="Q9_9")
    with pytest.raises(FormatError, match="unknown format 'Q9_9'; known formats:"):
        quantize(np.zeros((32, 1), np.float32), "Q9_9")


# --- immutability and repacked copies -------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda w: w, lambda w: quantize(w.dequantize(), "Q4_0")])
def test_a_tensor_cannot_be_changed(make: Callable[[QuantizedTensor], QuantizedTensor]) -> None:
    w = make(random_tensor("Q4_0"))
    with pytest.raises(ValueError, match="read-only"):
        w.raw[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        w.raw.flags.writeable = True
    packed = w._resident.blocks(INTERLEAVED16)
    with pytest.raises(ValueError, match="read-only"):
        packed[0] = 1
    for name in ("shape", "format", "nbytes", "raw", "other"):
        with pytest.raises(AttributeError):
            setattr(w, name, None)
    w.dequantize()[:] = 0
    w.rows([0])[:] = 0
    assert w.dequantize().any()
    assert w.rows([0]).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: setattr(raw, "shape", (raw.size // 18, 18)),
        lambda raw: setattr(raw, "strides", (18, 1)),
        lambda raw: setattr(raw, "strides", (0, 0)),
        lambda raw: setattr(raw, "dtype", np.uint16),
        lambda raw: raw.__setstate__((1, (2, 3), np.dtype(np.uint8), False, bytes(6))),
        lambda raw: raw.resize((1, 1), refcheck=False),
    ],
    ids=["shape", "strides", "strides 0", "dtype", "state", "size"],
)
@pytest.mark.parametrize("made_by", ["quantize", "bytes", "array", "writable"])
def test_changing_the_array_of_blocks_does_not_change_the_tensor(
    change: Callable[[Any], None], made_by: str
) -> None:
    stored = random_tensor("Q4_0", 64, 3).raw.tobytes()
    array = np.frombuffer(stored, np.uint8).reshape(3, 36)
    source: Any = {"bytes": stored, "array": array, "writable": array.copy()}.get(made_by)
    if source is None:
        w = quantize(random_tensor("F32", 64, 3).dequantize(), "Q4_0")
    else:
        w = QuantizedTensor.from_bytes(source, shape=(64, 3), format="Q4_0")
    before = w.dequantize()
    reachable: list[Any] = [source, w.raw]
    while isinstance(reachable[-1], np.ndarray):
        reachable.append(reachable[-1].base)
    del stored, array, source
    for raw in reachable:
        if isinstance(raw, np.ndarray):
            with contextlib.suppress(ValueError, AttributeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy 2.4 deprecates some of these changes
                change(raw)
        else:
            assert raw is None or memoryview(raw).readonly
            with contextlib.suppress(BufferError, AttributeError):
                raw.release()
    del reachable, raw
    gc.collect()
    np.testing.assert_array_equal(w.dequantize(), before)
    np.testing.assert_array_equal(np.ones((1, 64), np.float32) @ w, before.sum(0, np.float64)[None])
    assert w.raw.shape == (3, 36)


def test_the_memory_of_a_quantised_tensor_cannot_be_reached() -> None:
    w = quantize(np.ones((64, 3), np.float32), "Q4_0")
    base: Any = w.raw.base
    while not isinstance(base, bytes):
        with contextlib.suppress(AttributeError), pytest.raises(ValueError, match="WRITEABLE"):
            base.flags.writeable = True
        base = base.base if isinstance(base, np.ndarray) else base.obj
    assert len(base) == w.nbytes


def test_the_class_is_not_called() -> None:
    for arguments in ((np.ones((32, 1)), "Q4_0"), (), (b"", (32, 1), "Q4_0")):
        with pytest.raises(ArgumentError, match=r'use q4jit\.quantize\(w, "Q4_0"\) .*from_bytes'):
            QuantizedTensor(*arguments)


def test_tensors_are_equal_by_identity() -> None:
    a, b = random_tensor("Q4_0"), random_tensor("Q4_0")
    assert a == a
    assert a != b
    assert len({a, a, b}) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_a_pickled_tensor_has_the_same_blocks(name: str) -> None:
    w = random_tensor(name)
    w._resident.blocks(INTERLEAVED16)  # does not travel
    data = pickle.dumps(w)
    assert len(data) < w.nbytes + 300
    again = pickle.loads(data)
    assert again.signature == w.signature
    np.testing.assert_array_equal(again.raw, w.raw)
    with pytest.raises(ValueError, match="WRITEABLE"):
        again.raw.flags.writeable = True


def test_a_damaged_pickle_is_refused() -> None:
    make, (raw, shape, name) = random_tensor("Q4_0").__reduce__()
    with pytest.raises(FormatError, match=r"expected .* bytes"):
        make(raw[:, 1:].copy(), shape, name)


def test_a_pickle_refers_to_one_array() -> None:
    """As joblib needs: it writes each large array to a file once, and workers map the file."""
    w = random_tensor("Q4_0")
    assert w.__reduce__()[1][0] is w.__reduce__()[1][0]
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(w, 5, buffer_callback=buffers.append)
    again = pickle.loads(data, buffers=buffers)
    assert again._resident.stored.memory.obj is w._resident.stored.memory.obj  # type: ignore[union-attr]


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy])
def test_a_copy_is_the_tensor_itself(call: Callable[[object], object]) -> None:
    w = random_tensor("Q4_0")
    assert call(w) is w


@pytest.mark.parametrize("name", FORMATS)
def test_a_repacked_copy_is_made_once_and_freed_with_its_tensor(name: str) -> None:
    w = random_tensor(name)
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(w._resident.blocks, [INTERLEAVED16] * 8))
    assert len({id(packed) for packed in copies}) == 1
    np.testing.assert_array_equal(copies[0], pack(FORMATS[name], INTERLEAVED16, w.raw))
    packed, tensor = weakref.ref(copies[0]), weakref.ref(w)
    copies.clear()
    del w, pool
    assert tensor() is None
    assert packed() is None


def test_an_unknown_layout_is_refused() -> None:
    w = random_tensor("Q4_0")
    for _ in range(2):
        with pytest.raises(FormatError, match="unknown weight layout 'sideways'"):
            w._resident.blocks("sideways")
    assert w._resident.blocks(INTERLEAVED16) is w._resident.blocks(INTERLEAVED16)


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01])
def test_one_scale_that_is_not_finite_is_detected(name: str, bits: int) -> None:
    fmt = FORMATS[name]
    good = random_tensor(name, 1024, 600)
    assert good.has_finite_scales
    fields = [at for at in (fmt.scale_at, fmt.minimum_at) if at is not None]
    for field in fields or [0]:
        for n, block in [(0, 0), (599, 1024 // fmt.block_elements - 1), (300, 1)]:
            raw = good.raw.copy()
            at = block * fmt.block_bytes + field
            if fmt.float_type in {"f32", "bf16"}:
                nan = float_bytes(fmt.float_type, np.array([np.nan]))
                raw[n, at : at + len(nan)] = nan
            elif fmt.scale_type == "e8m0":
                raw[n, at] = 254  # 2^126, with which elements overflow
            else:
                raw[n, at : at + 2] = bits & 255, bits >> 8
            bad = QuantizedTensor.from_bytes(raw, shape=(1024, 600), format=name)
            assert not bad.has_finite_scales
            assert not bad.has_finite_scales


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x0001, 0x7BFF, 0xFBFF])
def test_extreme_finite_scales_are_finite(bits: int) -> None:
    raw = np.full((1, 20), 255, np.uint8)
    raw[0, :4] = bits & 255, bits >> 8, bits & 255, bits >> 8
    assert QuantizedTensor.from_bytes(raw, shape=(32, 1), format="Q4_1").has_finite_scales


def scaled(scales: NDArray[Any]) -> QuantizedTensor:
    """Return a Q4_0 weight [K, N] with the scales [N, K / 32]."""
    raw = np.zeros((*scales.shape, 18), np.uint8)
    raw[..., :2] = scales.astype(np.float16)[..., None].view(np.uint8)
    shape = (32 * scales.shape[1], scales.shape[0])
    return QuantizedTensor.from_bytes(raw, shape=shape, format="Q4_0")


def test_which_scales_may_be_rounded_to_f16() -> None:
    many = np.exp(np.random.default_rng(1).standard_normal((600, 32))) * 1e-2
    few = np.array([1.0, 1.25, 1.5]).repeat(200)[:, None] * np.ones(32)
    assert scaled(many).suits_f16
    assert scaled(-many).suits_f16
    assert scaled(0 * many).suits_f16
    assert not scaled(few).suits_f16  # their errors add up
    assert not scaled(many * 1e-4).suits_f16  # values are denormal
    for largest, suits in ((127.9375, True), (128.0, False), (-65504.0, False), (np.nan, False)):
        one = np.random.default_rng(2).uniform(10, 100, (600, 32))
        one[599, 31] = largest
        w = scaled(one)
        assert w.suits_f16 == suits
        assert w.signature == ("Q4_0", 1024, 600, not np.isnan(largest), suits, "")
    other = QuantizedTensor.from_bytes(
        np.full((2, 34), 255, np.uint8), shape=(32, 2), format="Q8_0"
    )
    assert other.suits_f16


def test_the_errors_of_f16_equal_numpys() -> None:
    squares, errors = _f16_squares()
    for bits in (0x2E66, 0x3C00, 0x3555):
        d = float(np.array(bits, np.uint16).view(np.float16))
        values = d * np.arange(1, 9)
        worst = np.abs(values.astype(np.float16) / values - 1).max()
        assert squares[bits] == d * d
        assert errors[bits] == worst**2


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", FORMATS)
def test_a_call_needs_its_result_and_a_few_megabytes(name: str) -> None:
    k, n = 4096, 2048
    w = random_tensor(name, k, n)
    x = np.ones((4, k), np.float32)
    assert peak_bytes(w.dequantize) < 4 * k * n + SMALL
    assert peak_bytes(lambda: x @ w) < SMALL
    assert peak_bytes(lambda: w.has_finite_scales) < SMALL
    assert peak_bytes(lambda: w.rows(np.arange(n))) < 4 * k * n + SMALL
    stored = w.raw.tobytes()
    assert peak_bytes(lambda: QuantizedTensor.from_bytes(stored, shape=(k, n), format=name)) < MB


@pytest.mark.process
def test_dropping_a_tensor_frees_everything() -> None:
    def cycle() -> None:
        # too large for the pool, whose memory small weights share
        w = quantize(np.ones((1024, 8192), np.float32), "Q4_0")
        w._resident.blocks(INTERLEAVED16)
        np.ones((1, 1024), np.float32) @ w

    cycle()
    gc.disable()  # memory must be freed without the collector
    try:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            cycle()
        assert tracemalloc.get_traced_memory()[0] - before < MB // 8
    finally:
        tracemalloc.stop()
        gc.enable()
