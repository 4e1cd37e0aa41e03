"""Tensors that only have the bytes of a layout: they behave like those with GGUF blocks."""

import gc
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import ArgumentError, ExpertTensor, FormatError, QuantizedTensor, specialize, vecmat
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, INTERLEAVED16, PLANAR, TILES16, pack, pack_experts
from q4jit.weights.reference import random_weight, random_x
from q4jit.weights.resident import device_key
from tests.support.layouts import formats_and_layouts
from tests.support.memory import MB

K, N, E = 512, 37, 3
LAYOUTS = (GGUF, INTERLEAVED16, PLANAR, TILES16)
CASES = formats_and_layouts(LAYOUTS)
of_every_format_and_layout = pytest.mark.parametrize(("name", "layout"), CASES)
of_some_formats_and_layouts = pytest.mark.parametrize(
    ("name", "layout"),
    [case for case in CASES if case[0] in ("Q4_0", "Q5_1", "Q4_K", "Q6_K", "MXFP4", "F16")],
)

Reader = Callable[[], NDArray[np.uint8]]


class Source:
    """Bytes of a layout in writable memory, as PyTorch has them, and how often they were read."""

    def __init__(self, packed: NDArray[np.uint8], offset: int = 0) -> None:
        """Copy the bytes to `offset` bytes beyond a cache line."""
        memory = np.empty(packed.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        self.bytes = memory[start : start + packed.nbytes]
        self.bytes[...] = packed.reshape(-1)
        self.reads = 0

    def __call__(self) -> NDArray[np.uint8]:
        self.reads += 1
        return self.bytes


def ordinary(name: str) -> QuantizedTensor:
    """Return a tensor of its own, without copies."""
    w = random_weight(name, K, N)
    return QuantizedTensor.from_bytes(w.raw, shape=(K, N), format=name)


def packed_twin(
    w: QuantizedTensor, layout: str, offset: int = 0, facts: tuple[bool, bool] | None = None
) -> tuple[QuantizedTensor, Source]:
    fmt = w.block_format
    source = Source(w.raw if layout == GGUF else pack(fmt, layout, w.raw), offset)
    return QuantizedTensor.of_packed(fmt, *w.shape, layout, source, facts), source


def ordinary_experts(name: str) -> ExpertTensor:
    raw = random_weight(name, K, E * N).raw
    return ExpertTensor.from_bytes(raw, shape=(E, K, N), format=name)


def packed_experts(w: ExpertTensor, layout: str) -> tuple[ExpertTensor, Source]:
    fmt = FORMATS[w.format]
    source = Source(w.raw if layout == GGUF else pack_experts(fmt, layout, w.raw))
    return ExpertTensor.of_packed(fmt, *w.shape, layout, source), source


# --- what users see -------------------------------------------------------------------------------


@of_every_format_and_layout
def test_it_equals_the_ordinary_tensor(name: str, layout: str) -> None:
    w = ordinary(name)
    twin, _ = packed_twin(w, layout)
    assert type(twin) is QuantizedTensor
    assert (twin.shape, twin.nbytes) == (w.shape, w.nbytes)
    assert twin.signature == (*w.signature[:-1], layout)
    assert repr(twin) == repr(w)
    np.testing.assert_array_equal(twin.raw, w.raw, strict=True)
    assert not twin.raw.flags.writeable
    np.testing.assert_array_equal(twin.dequantize(), w.dequantize(), strict=True)
    ids = np.array([[36, 0], [5, 5]])
    np.testing.assert_array_equal(twin.rows(ids), w.rows(ids), strict=True)
    x, y = random_x(3, K), random_x(3, N)
    np.testing.assert_array_equal(x @ twin, x @ w, strict=True)
    np.testing.assert_array_equal(y @ twin.T, y @ w.T, strict=True)
    again = pickle.loads(pickle.dumps(twin))
    np.testing.assert_array_equal(again.raw, w.raw, strict=True)


@of_some_formats_and_layouts
def test_experts_equal_the_ordinary_ones(name: str, layout: str) -> None:
    w = ordinary_experts(name)
    twin, _ = packed_experts(w, layout)
    assert type(twin) is ExpertTensor
    assert (twin.shape, twin.nbytes, twin.signature) == (w.shape, w.nbytes, w.signature)
    np.testing.assert_array_equal(twin.raw, w.raw, strict=True)
    np.testing.assert_array_equal(twin.dequantize(), w.dequantize(), strict=True)
    for own, other in zip(twin, w, strict=True):
        assert type(own) is QuantizedTensor
        assert own.signature == (*other.signature[:-1], layout)
        np.testing.assert_array_equal(own.raw, other.raw, strict=True)
    x, ids = random_x(4, K), np.array([2, 0, 2, 1])
    np.testing.assert_array_equal(vecmat(x, twin[ids]), vecmat(x, w[ids]), strict=True)
    again = pickle.loads(pickle.dumps(twin))
    np.testing.assert_array_equal(again.raw, w.raw, strict=True)


# --- kernels --------------------------------------------------------------------------------------


@of_some_formats_and_layouts
@pytest.mark.parametrize("m", [1, 20])
def test_kernels_compute_the_same_bits(name: str, layout: str, m: int) -> None:
    @specialize(target="cpu")
    def layer(x: Any, y: Any, w: Any, ids: Any) -> Any:
        return np.tanh(x @ w) * 2, y @ w.T, w.rows(ids)

    w = ordinary(name)
    twin, source = packed_twin(w, layout)
    x, y, ids = random_x(m, K), random_x(m, N), np.arange(m)[::-1].copy()
    results = layer(x, y, twin, ids)
    for got, expected in zip(results, layer(x, y, w, ids), strict=True):
        np.testing.assert_array_equal(got, expected, strict=True)
    assert len(layer.signatures) == 2
    assert layer.stats.compiles <= (6 if layout == INTERLEAVED16 else 4)  # look-ups differ
    reads = source.reads
    layer(x, y, twin, ids)
    layer(x, y, twin, ids, out=tuple(map(np.empty_like, results)))
    assert source.reads == reads


@of_some_formats_and_layouts
def test_kernels_of_experts_compute_the_same_bits(name: str, layout: str) -> None:
    @specialize(target="cpu")
    def layer(x: Any, w: Any, ids: Any) -> Any:
        return vecmat(x, w[ids])

    w = ordinary_experts(name)
    twin, _ = packed_experts(w, layout)
    x, ids = random_x(4, K), np.array([2, 0, 2, 1])
    np.testing.assert_array_equal(layer(x, twin, ids), layer(x, w, ids), strict=True)


@pytest.mark.parametrize("layout", [INTERLEAVED16, GGUF])
@pytest.mark.parametrize("offset", [0, 16])
def test_the_memory_of_the_own_layout_is_read_in_place(layout: str, offset: int) -> None:
    twin, source = packed_twin(ordinary("Q4_0"), layout, offset)
    address = twin._resident.address(layout)
    in_place = offset == 0 or layout == GGUF  # kernels read GGUF's order at any alignment
    assert (address == source.bytes.ctypes.data) == in_place
    assert in_place or address % 64 == 0
    packed = twin._resident.blocks(layout)
    assert packed is twin._resident.blocks(layout)
    assert packed.tobytes() == source.bytes.tobytes()
    assert not packed.flags.writeable
    assert source.bytes.flags.writeable
    assert source.reads == 1


@of_some_formats_and_layouts
def test_copies_in_other_layouts_are_those_of_the_ordinary_tensor(name: str, layout: str) -> None:
    w = ordinary(name)
    twin, _ = packed_twin(w, layout)
    for other in LAYOUTS:
        if (name, other) in CASES:
            got, expected = twin._resident.blocks(other), w._resident.blocks(other)
            assert got.tobytes() == expected.tobytes()
            assert twin._resident.address(other) == twin._resident.addresses[other]
    with pytest.raises(FormatError, match="unknown weight layout 'sideways'"):
        twin._resident.blocks("sideways")


class Memory:
    """What is uploaded to a device."""

    pointer = 4096

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array


def test_uploads_take_the_bytes_of_the_own_layout() -> None:
    w = ordinary("Q4_K")
    twin, source = packed_twin(w, TILES16, offset=1)
    for layout in LAYOUTS:
        key = device_key("hip", 0, layout)
        memory = twin._resident.upload(key, layout, Memory)
        assert isinstance(memory, Memory)
        assert twin._resident.upload(key, layout, no_copy) is twin._resident.uploads[key] is memory
        assert memory.array.tobytes() == w._resident.blocks(layout).tobytes()
        assert np.shares_memory(memory.array, source.bytes) == (layout == TILES16)
    assert not twin._resident.addresses
    assert source.reads == len(LAYOUTS)


def test_callers_may_put_the_address_and_the_upload() -> None:
    resident = QuantizedTensor.of_packed(FORMATS["Q4_K"], K, N, TILES16, no_bytes)._resident
    key, memory = device_key("hip", 0, TILES16), Memory(np.empty(0))
    resident.uploads[key] = memory
    assert resident.upload(key, TILES16, no_copy) is memory
    w = ordinary("Q4_K")
    packed = w._resident.blocks(INTERLEAVED16)
    facts = (True, True)
    twin = QuantizedTensor.of_packed(FORMATS["Q4_K"], K, N, INTERLEAVED16, no_bytes, facts)
    twin._resident.addresses[INTERLEAVED16] = packed.ctypes.data
    f, x = specialize(lambda x, w: x @ w, target="cpu"), random_x(2, K)
    np.testing.assert_array_equal(f(x, twin), f(x, w))


def no_bytes() -> NDArray[np.uint8]:
    raise AssertionError("the bytes were read")


def no_copy(array: NDArray[Any]) -> Memory:
    raise AssertionError("the bytes were copied")


def test_out_that_overlaps_the_packed_memory() -> None:
    w = ordinary("F32")
    twin, source = packed_twin(w, INTERLEAVED16)
    x, before = random_x(2, K), source.bytes.copy()
    f = specialize(lambda x, w: x @ w, target="cpu")
    for start in (0, source.bytes.nbytes - 4 * 2 * N):  # beyond the bytes of the GGUF blocks
        out = source.bytes[start : start + 4 * 2 * N].view(np.float32).reshape(2, N)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="out= overlaps the argument 'w'"):
                f(x, twin, out=out)
    np.testing.assert_array_equal(source.bytes, before)
    apart = np.empty((2, N), np.float32)
    assert f(x, twin, out=apart) is apart
    np.testing.assert_array_equal(apart, f(x, w))


# --- facts, memory, errors ------------------------------------------------------------------------


def test_known_facts_need_no_blocks() -> None:
    fmt = FORMATS["Q4_0"]
    w = QuantizedTensor.of_packed(fmt, K, N, TILES16, no_bytes, (True, False))
    assert w.signature == ("Q4_0", K, N, True, False, TILES16)
    assert (w.has_finite_scales, w.suits_f16) == (True, False)
    experts = ExpertTensor.of_packed(fmt, E, K, N, TILES16, no_bytes, (True, True))
    assert experts.signature == ("Q4_0", E, K, N, True, True)
    assert experts[1].signature == ("Q4_0", K, N, True, True, TILES16)


@pytest.mark.parametrize("spoiled", [0, 2])
def test_facts_of_experts_are_those_of_all(spoiled: int) -> None:
    raw = random_weight("Q4_0", K, E * N).raw.reshape(E, N, -1).copy()
    raw[spoiled, 5, :2] = 0xFF, 0x7F  # NaN
    w = ExpertTensor.from_bytes(raw.tobytes(), shape=(E, K, N), format="Q4_0")
    twin, _ = packed_experts(w, PLANAR)
    for tensor in (w, twin):
        assert tensor.signature == ("Q4_0", E, K, N, False, False)
        assert [own.has_finite_scales for own in tensor] == [e != spoiled for e in range(E)]
        assert [own.suits_f16 for own in tensor] == [e != spoiled for e in range(E)]


def test_unpacked_blocks_are_not_kept() -> None:
    k, n = 4096, 1024
    w, _ = packed_twin(random_weight("Q8_0", k, n), INTERLEAVED16)
    assert w.nbytes >= 4 * MB
    raw = weakref.ref(w.raw)
    assert raw() is None
    y = random_x(1, n)
    uses: list[Callable[[], object]] = [
        lambda: w.raw,
        w.dequantize,
        lambda: w.rows([1]),
        lambda: w.signature,
        lambda: y @ w.T,
        lambda: pickle.dumps(w),
        lambda: w._resident.blocks(INTERLEAVED16),
        lambda: w._resident.upload("hip 0 planar", PLANAR, lambda array: Memory(array[:1].copy())),
    ]
    tracemalloc.start()
    try:
        for use in uses:
            before = tracemalloc.get_traced_memory()[0]
            use()
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] - before < MB // 4
    finally:
        tracemalloc.stop()


def test_a_tensor_is_freed_with_its_function_and_copies() -> None:
    w = ordinary("Q4_0")
    twin, source = packed_twin(w, INTERLEAVED16)
    experts, of_experts = packed_experts(ordinary_experts("Q4_0"), INTERLEAVED16)
    kept = [weakref.ref(each) for each in (source, of_experts, twin._resident.blocks(PLANAR))]
    assert experts[1]._resident.blocks(INTERLEAVED16).nbytes
    gc.collect()
    gc.disable()  # reference counts suffice: there is no cycle
    try:
        del twin, source, experts, of_experts
        assert [each() for each in kept] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("use", [lambda w: w.raw, lambda w: w._resident.address(PLANAR)])
def test_other_bytes_are_refused_when_they_are_read(use: Callable[[Any], object]) -> None:
    fmt = FORMATS["Q4_0"]
    short = QuantizedTensor.of_packed(fmt, 64, 3, PLANAR, lambda: np.zeros(511, np.uint8))
    with pytest.raises(FormatError, match="expected 512 bytes, got 511 bytes"):
        use(short)
    experts = ExpertTensor.of_packed(fmt, 2, 64, 3, PLANAR, lambda: np.zeros(512, np.uint8))
    for w in (experts, experts[1]):
        with pytest.raises(FormatError, match="expected 1024 bytes, got 512 bytes"):
            use(w)


def test_unknown_layouts_and_other_shapes_are_refused_at_once() -> None:
    for make in (
        lambda fmt, k, layout: QuantizedTensor.of_packed(fmt, k, 3, layout, no_bytes),
        lambda fmt, k, layout: ExpertTensor.of_packed(fmt, 2, k, 3, layout, no_bytes),
    ):
        with pytest.raises(FormatError, match="unknown weight layout 'tiled'"):
            make(FORMATS["Q4_0"], 64, "tiled")
        with pytest.raises(FormatError, match="K: expected a positive multiple of 32"):
            make(FORMATS["Q4_0"], 63, PLANAR)
        with pytest.raises(FormatError, match="expected a format with blocks of codes"):
            make(FORMATS["F16"], 64, TILES16)
