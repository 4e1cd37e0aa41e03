"""`Weight`: quantised weights as modules of PyTorch."""

import copy
import gc
import io
import pickle
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from q4jit import ArgumentError, ExpertTensor, FormatError, QuantizedTensor, quantize, specialize
from q4jit.torch import Weight, memory
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import GGUF, INTERLEAVED16, PLANAR, TILES16
from q4jit.weights.reference import random_weight
from tests.support.memory import peak_bytes

pytestmark = pytest.mark.torch

K, N = 256, 48
Q = random_weight("Q4_K", K, N)
OTHER = random_weight("Q4_K", K, N, seed=1)
EXPERTS = ExpertTensor.stack([random_weight("Q5_1", 64, 32, seed=e) for e in range(3)])

product = specialize(lambda x, w: x @ w, target="cpu")


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def state_of(weight: nn.Module) -> dict[str, torch.Tensor]:
    return dict(weight.state_dict())


def with_infinite_scale() -> QuantizedTensor:
    raw = Q.raw.copy()
    raw[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    return QuantizedTensor.from_bytes(raw, shape=(K, N), format="Q4_K")


def has_one_copy(weight: Weight) -> bool:
    """Return whether kernels read only the blocks of the module."""
    resident = weight.tensor()._resident
    return resident.addresses == {weight.layout: weight.blocks.data_ptr()}


def wrong(value: object) -> Any:
    return value


def is_same(weight: Any, tensor: QuantizedTensor | ExpertTensor) -> bool:
    return bool((weight.numpy().raw == tensor.raw).all())


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_in_the_layout_of_the_kernels(name: str) -> None:
    tensor = random_weight(name, K, N)
    weight = Weight(tensor)
    assert weight.layout == INTERLEAVED16
    assert weight.shape == (K, N)
    assert weight.blocks.numel() == weight.nbytes
    assert is_same(weight, tensor)
    assert weight.tensor().signature == (*tensor.signature[:-1], INTERLEAVED16)
    expected = product(x().numpy(), tensor)
    np.testing.assert_array_equal(product(x(), weight).numpy(), expected)


def test_tables_stay_in_the_order_of_gguf() -> None:
    table = Weight(Q, lookup=True)
    assert table.layout == GGUF
    np.testing.assert_array_equal(table.blocks.numpy(), Q.raw.reshape(-1))
    rows = specialize(lambda ids, w: w.rows(ids), target="cpu")(torch.tensor([3, 0]), table)
    np.testing.assert_array_equal(rows.numpy(), Q.rows([3, 0]))


def test_calls_make_no_second_copy() -> None:
    tensor = random_weight("Q8_0", 1024, 1024)
    weight = Weight(tensor)
    size = weight.nbytes
    del tensor
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        y = product(torch.randn(1, 1024), weight)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert y.shape == (1, 1024)
    assert grown < size / 4
    assert has_one_copy(weight)


@pytest.mark.parametrize("n", [5, 8, 17])
@pytest.mark.parametrize("name", ["Q4_0", "F16"])
def test_no_call_of_any_size_makes_a_second_copy(name: str, n: int) -> None:
    tensor = random_weight(name, K, n)
    weight = Weight(tensor)
    for m in (1, 40):
        product(torch.randn(m, K), weight)
        assert has_one_copy(weight)
        x = torch.randn(m, K, requires_grad=True)
        y = product(x, weight)
        y.sum().backward()
        expected = np.ones((m, n)) @ tensor.dequantize().T.astype(np.float64)
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-4)
        if n < 8:  # kernels of x @ w read GGUF's order then, and those of y @ w.T the other
            return
        assert has_one_copy(weight)


@pytest.mark.parametrize(
    "use",
    [product, product.warmup, lambda x, weight: product.bind(x, weight)()],
    ids=["call", "warmup", "bind"],
)
@pytest.mark.parametrize("lookup", [False, True], ids=["packed", "lookup"])
def test_memory_is_freed_with_the_weight(use: Callable[..., Any], lookup: bool) -> None:
    gc.collect()
    known, storages = len(memory._known), len(memory._storages)
    weight = Weight(Q, lookup=lookup)
    use(x(), weight)
    tensor = weakref.ref(weight.blocks)
    assert (len(memory._known), len(memory._storages)) == (known + 1, storages + 1)
    del weight
    gc.collect()
    assert tensor() is None
    assert (len(memory._known), len(memory._storages)) == (known, storages)


@pytest.mark.parametrize("lookup", [False, True], ids=["packed", "lookup"])
def test_results_do_not_overwrite_blocks(lookup: bool) -> None:
    weight = Weight(Q, lookup=lookup)
    product(x(), weight)
    out = weight.blocks[: 3 * 4 * N].view(torch.float32).reshape(3, N)
    with pytest.raises(ArgumentError, match="out= overlaps the argument 'w'"):
        product(x(), weight, out=out)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_moving_frees_the_old_blocks(device: str) -> None:
    weight = Weight(Q)
    product(x(), weight)
    old = weakref.ref(weight.blocks)
    weight.to_empty(device=device)
    gc.collect()
    assert old() is None


def test_blocks_that_are_written_to_are_read_again() -> None:
    weight, other = Weight(Q), Weight(OTHER)
    product(x(), weight)
    weight.blocks.copy_(other.blocks)
    assert torch.equal(product(x(), weight), product(x(), other))


@pytest.mark.parametrize("way", ["as made", "moved", "copied"])
def test_facts_of_blocks_that_are_written_to(way: str) -> None:
    weight, other = Weight(Q), Weight(with_infinite_scale())
    if way == "moved":
        weight.share_memory()
    if way == "copied":
        weight = copy.deepcopy(weight)
    weight.blocks.copy_(other.blocks)
    assert weight.tensor().signature == other.tensor().signature
    assert not weight.tensor()._scales[0]


@pytest.mark.parametrize(
    "copied",
    [
        Weight,
        lambda q: Weight(q).share_memory(),
        lambda q: copy.deepcopy(Weight(q)),
        lambda q: pickle.loads(pickle.dumps(Weight(q))),
        lambda q: pickle.loads(pickle.dumps(Weight(q, lookup=True))),
    ],
    ids=["made", "moved", "copied", "pickled", "pickled table"],
)
def test_facts_are_computed_once(copied: Any) -> None:
    assert copied(Q).tensor()._scale_facts == Q._scales


# --- dtypes and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_leave_blocks_as_they_are(cast: str) -> None:
    weight = Weight(Q)
    blocks = weight.blocks
    getattr(weight, cast)()
    assert weight.blocks is blocks


def test_blocks_are_not_cast_by_type() -> None:
    with pytest.raises(ArgumentError, match=r"expected uint8 blocks, got a cast to float32; use f"):
        Weight(Q).type(torch.float32)


def test_meta_and_back() -> None:
    weight = Weight(Q).to("meta")
    assert weight.blocks.device.type == "meta"
    assert [(k, tuple(v.shape)) for k, v in state_of(weight).items()] == [("Q4_K", Q.raw.shape)]
    with pytest.raises(ArgumentError, match=r"expected a weight with values, got Q4_K .* on meta"):
        product(x(), weight)
    with pytest.raises(NotImplementedError, match="meta"):
        weight.to("cpu")
    assert weight.to_empty(device="cpu").layout == INTERLEAVED16
    weight.load_state_dict(state_of(Weight(Q)))
    assert is_same(weight, Q)


def test_weights_without_values() -> None:
    for device in ("meta", "cpu"):
        weight = Weight.empty("q4_k", (K, N), device=device)
        assert (weight.format, weight.shape) == ("Q4_K", (K, N))
        weight.load_state_dict(state_of(Weight(Q)), assign=device == "meta")
        assert is_same(weight, Q)
        assert weight.blocks.device.type == "cpu"
    experts = Weight.empty("Q5_1", EXPERTS.shape)
    experts.load_state_dict(state_of(Weight(EXPERTS)))
    assert is_same(experts, EXPERTS)


def test_the_default_device_is_that_of_pytorch() -> None:
    with torch.device("meta"):
        assert Weight(Q).blocks.device.type == "meta"
        assert Weight(Q, device="cpu:0").blocks.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Weight(wrong(np.ones((K, N)))),
            r"weight: expected a QuantizedTensor .*, got ndarray; us",
        ),
        (lambda: Weight(Q, device="xpu"), r"device: expected a CPU, or a GPU .*, got xpu"),
        (lambda: Weight.empty("Q4_K", (100, N)), r"K: expected a positive multiple of 256"),
        (lambda: Weight.empty("Q4_9", (K, N)), r"unknown format 'Q4_9'"),
        (lambda: Weight.empty("Q4_K", (K,)), r"expected a pair of ints \(K, N\)"),
    ],
)
def test_refused_weights(make: Any, message: str) -> None:
    with pytest.raises((ArgumentError, FormatError), match=message):
        make()


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [Q, EXPERTS, quantize(np.ones((7, 5)), "F16")], ids=str)
def test_states_hold_the_blocks_of_gguf(tensor: Any) -> None:
    for lookup in (False, True):
        weight = Weight(tensor, lookup=lookup)
        (name, blocks), *rest = state_of(weight).items()
        assert (name, rest) == (tensor.format, [])
        assert blocks.is_contiguous()
        np.testing.assert_array_equal(blocks.numpy(), tensor.raw)
        new = Weight.empty(tensor.format, tensor.shape, lookup=lookup)
        new.load_state_dict({name: blocks})
        assert is_same(new, tensor)


@pytest.mark.parametrize("layout", [GGUF, PLANAR, TILES16])
@pytest.mark.parametrize("tensor", [Q, EXPERTS, quantize(np.eye(96, 5), "Q8_0")], ids=str)
def test_weights_change_their_layout(
    tensor: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving to a GPU and back: blocks are repacked, and outside of the module in GGUF's order."""
    weight = Weight(tensor)
    original = weight.layout
    with monkeypatch.context() as patch:
        patch.setattr("q4jit.torch.weight.layout_on", lambda *_: layout)
        assert weight.cpu().layout == layout
        assert weight.blocks.numel() == weight.nbytes
        assert is_same(weight, tensor)
        # as with PyTorch's modules, a state may share the memory of the blocks
        state = copy.deepcopy(state_of(weight))
        data, copied = pickle.dumps(weight), copy.deepcopy(weight)
        weight.load_state_dict({tensor.format: torch.zeros(tensor.raw.shape, dtype=torch.uint8)})
        assert not weight.numpy().raw.any()
        weight.load_state_dict(state)
    np.testing.assert_array_equal(state[tensor.format].numpy(), tensor.raw)
    assert copied.layout == layout
    for moved in (weight.cpu(), pickle.loads(data), copied.cpu()):
        assert moved.layout == original
        assert is_same(moved, tensor)


def test_loading_writes_to_the_same_memory() -> None:
    weight = Weight(Q)
    product(x(), weight)
    address = weight.blocks.data_ptr()
    weight.load_state_dict(state_of(Weight(OTHER)))
    assert weight.blocks.data_ptr() == address
    np.testing.assert_array_equal(product(x(), weight), product(x().numpy(), OTHER))


@pytest.mark.parametrize("lookup", [False, True], ids=["packed", "lookup"])
def test_making_and_loading_copy_blocks_once(lookup: bool) -> None:
    """The one copy is memory of PyTorch's, which `peak_bytes` does not see."""
    tensor = random_weight("Q8_0", 4096, 4096)
    state = {"Q8_0": torch.from_numpy(tensor.raw.copy())}
    weight = Weight.empty("Q8_0", (4096, 4096), lookup=lookup)
    assert peak_bytes(lambda: weight.load_state_dict(state)) < weight.nbytes / 2
    assert peak_bytes(lambda: weight.load_state_dict(state, assign=True)) < weight.nbytes / 2
    assert is_same(weight, tensor)
    assert peak_bytes(lambda: Weight(tensor, lookup=lookup)) < weight.nbytes / 2


@pytest.mark.parametrize("inference", [False, True])
def test_loading_finds_out_whether_scales_are_finite(inference: bool) -> None:
    infinite = with_infinite_scale()
    with torch.inference_mode(inference):
        weight = Weight(Q)
        assert weight.tensor()._scales[0]
        weight.load_state_dict(state_of(Weight(infinite)))
    assert not weight.tensor()._scales[0]


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        weight = Weight(Q)
        y = product(x(), weight)
    with torch.inference_mode(inside):
        assert torch.equal(product(x(), weight), y)
        weight.load_state_dict(state_of(Weight(OTHER)))
        np.testing.assert_array_equal(product(x(), weight), product(x().numpy(), OTHER))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r'Missing key\(s\) in state_dict: "gate.Q4_K"'),
        ({"gate.Q4_K": None}, r"gate.Q4_K: expected uint8 \[48, 144\] for Q4_K .*, got NoneType"),
        (
            {"gate.Q4_K": torch.zeros(48, 144)},
            r"expected uint8 \[48, 144\] .*, got float32 \[48, 1",
        ),
        (
            {"gate.Q4_K": torch.zeros(144, 48, dtype=torch.uint8)},
            r"gate.Q4_K: expected uint8 \[48, 144\] .*, got uint8 \[144, 48\]",
        ),
        (
            {"gate.Q8_0": torch.zeros(48, 272, dtype=torch.uint8)},
            r"gate: expected Q4_K \[256, 48\], got Q8_0; make the module with the format of the st",
        ),
        (
            {"gate.Q4_K": torch.from_numpy(Q.raw.copy()), "gate.scale": torch.ones(1)},
            r'Unexpected key\(s\) in state_dict: "gate.scale"',
        ),
        (
            {"gate.Q4_K": torch.empty(48, 144, dtype=torch.uint8, device="meta")},
            r"gate.Q4_K: expected a tensor with values, got one on meta",
        ),
    ],
)
def test_refused_states(state: Any, message: str) -> None:
    module = nn.ModuleDict({"gate": Weight(Q)})
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    weight: Any = module["gate"]
    if "gate.scale" not in state:
        assert is_same(weight, Q)


def test_loading_without_strict() -> None:
    module = nn.ModuleDict({"gate": Weight(Q)})
    state = {"gate.scale": torch.ones(1)}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["gate.Q4_K"], ["gate.scale"])


def test_loading_on_meta_says_how() -> None:
    weight = Weight.empty("Q4_K", (K, N), device="meta")
    with pytest.raises(RuntimeError, match=r"got one on meta; use load_state_dict\(\.\.\., assign"):
        weight.load_state_dict(state_of(Weight(Q)))


# --- copies ---------------------------------------------------------------------------------------


def test_deep_copies_have_memory_of_their_own() -> None:
    weight = Weight(Q)
    pair = nn.ModuleList([weight, weight])
    product(x(), weight)
    first, second = copy.deepcopy(pair)
    assert first is second
    first.load_state_dict(state_of(Weight(OTHER)))
    assert is_same(weight, Q)
    assert is_same(first, OTHER)


def test_pickles_hold_the_blocks_of_gguf() -> None:
    for weight in (Weight(Q), Weight(Q, lookup=True), Weight(EXPERTS)):
        data = pickle.dumps(weight)
        tensor = weight.numpy()
        assert tensor.raw.tobytes() in data
        new = pickle.loads(data)
        assert new.layout == weight.layout
        assert is_same(new, tensor)
        assert new.tensor().signature == weight.tensor().signature


def test_saved_weights(tmp_path: Path) -> None:
    path = tmp_path / "weight.pt"
    torch.save(Weight(Q), path)
    assert is_same(torch.load(path, weights_only=False), Q)
    on_meta = torch.load(path, weights_only=False, map_location="meta")
    assert on_meta.blocks.device.type == "meta"
    torch.save(state_of(Weight(Q)), path)
    weight = Weight(OTHER)
    weight.load_state_dict(torch.load(path, weights_only=True, mmap=True))
    assert is_same(weight, Q)


def test_saved_weights_on_meta() -> None:
    file = io.BytesIO()
    torch.save(Weight(Q, device="meta"), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).blocks.device.type == "meta"


def test_fake_tensors_have_no_values() -> None:
    file = io.BytesIO()
    torch.save(Weight(Q), file)
    file.seek(0)
    with FakeTensorMode():
        loaded = torch.load(file, weights_only=False)
        for weight in (Weight(Q), loaded, Weight.empty("Q4_K", (K, N))):
            assert isinstance(weight.blocks, FakeTensor)
            assert (weight.layout, weight.blocks.numel()) == (INTERLEAVED16, weight.nbytes)
            assert state_of(weight)["Q4_K"].shape == Q.raw.shape
            assert isinstance(copy.deepcopy(weight).blocks, FakeTensor)
            y = product(torch.empty(5, K), weight)
            assert isinstance(y, FakeTensor)
            assert y.shape == (5, N)


def test_shared_memory() -> None:
    weight = Weight(Q)
    y = product(x(), weight)
    assert weight.share_memory() is weight
    assert weight.blocks.is_shared()
    assert torch.equal(product(x(), weight), y)
    assert is_same(pickle.loads(pickle.dumps(weight)), Q)
