"""`Linear`, `Embedding` and `Experts`."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu
from torch.utils.data import DataLoader, Dataset

from q4jit import (
    ArgumentError,
    ExpertTensor,
    FormatError,
    Q4JitError,
    QuantizedTensor,
    quantize,
    specialize,
)
from q4jit.torch import Embedding, Experts, Linear, Weight
from q4jit.torch.arithmetic import ACTIVATIONS
from q4jit.torch.memory import weight_in
from q4jit.weights.layouts import GGUF, INTERLEAVED16
from q4jit.weights.reference import random_weight

pytestmark = pytest.mark.torch

K, N, H, E = 64, 48, 32, 4
W = random_weight("Q8_0", K, N)
VALUES = torch.from_numpy(W.dequantize().copy())
BIAS = torch.linspace(-1, 1, N)
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_experts(k: int, n: int) -> ExpertTensor:
    rng = np.random.default_rng(k)
    scale = k**-0.5
    return ExpertTensor.stack(
        [quantize(scale * rng.standard_normal((k, n)), "Q4_1") for _ in range(E)]
    )


GATE, UP, DOWN = random_experts(K, H), random_experts(K, H), random_experts(H, K)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def wrong(value: object) -> Any:
    return value


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class Block(nn.Module):
    """A module with all three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(W)
        self.linear = Linear(W, BIAS)
        self.experts = Experts(GATE, UP, DOWN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors = self.embedding(ids)
        chosen = torch.stack([ids % E, (ids + 1) % E], -1)
        mixed = self.experts(vectors, chosen, torch.full(chosen.shape, 0.5))
        y: torch.Tensor = self.linear(vectors + mixed)
        return y


# --- Linear ---------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (0,)], ids=str)
def test_linear(rows: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    layer = Linear(W, BIAS if has_bias else None).to(dtype)
    assert layer.bias is None or layer.bias.dtype == dtype
    x = normal(*rows, K, dtype=dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((*rows, N), dtype)
    bias = 0 if layer.bias is None else layer.bias.double()
    exact = x.double() @ VALUES.double() + bias
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_a_bias_in_float32_promotes() -> None:
    layer = Linear(W, BIAS)
    assert layer(normal(3, K, dtype=torch.bfloat16)).dtype == torch.float32
    assert layer.bfloat16()(normal(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight.blocks.dtype == torch.uint8


def test_linear_of_bytes() -> None:
    layer = Linear.from_bytes(W.raw.tobytes(), (K, N), "q8_0", BIAS)
    assert torch.equal(layer(normal(3, K)), Linear(W, BIAS)(normal(3, K)))
    with pytest.raises(FormatError, match=r"expected 3264 bytes .*, got 3 bytes"):
        Linear.from_bytes(b"abc", (K, N), "Q8_0")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_linear_of_a_float_layer(dtype: torch.dtype) -> None:
    old: Any = frozen(nn.Linear(K, N, dtype=dtype))
    old.bias.requires_grad_(True)
    new = Linear.from_linear(old, "Q8_0")
    assert new.bias is old.bias
    assert (new.in_features, new.out_features) == (K, N)
    expected = quantize(old.weight.detach().float().numpy().T, "Q8_0")
    np.testing.assert_array_equal(new.weight.numpy().raw, expected.raw)
    without: Any = frozen(nn.Linear(K, N, bias=False))
    assert Linear.from_linear(without, "Q8_0").bias is None


def test_linear_shares_a_weight() -> None:
    weight = Weight(W)
    a, b = Linear(weight), Linear(weight, BIAS, device="cpu")
    assert a.weight is b.weight is weight
    assert Linear(weight, device="meta").weight.blocks.device.type == "meta"
    assert weight.blocks.device.type == "cpu"


def test_biases() -> None:
    parameter = nn.Parameter(BIAS)
    assert Linear(W, parameter).bias is parameter
    made = Linear(W, BIAS.numpy()).bias
    assert isinstance(made, nn.Parameter)
    assert not made.requires_grad
    tracked = Linear(W, BIAS.clone().requires_grad_()).bias
    assert tracked is not None
    assert tracked.requires_grad
    moved = Linear(W, parameter, device="meta").bias
    assert moved is not None
    assert moved.device.type == "meta"
    assert moved.requires_grad


def test_precision_is_that_of_the_kernels() -> None:
    x = normal(3, K)
    exact = x.double() @ VALUES.double()
    errors = [float((Linear(W, precision=p)(x) - exact).abs().max()) for p in ("f32", "i8")]
    assert errors[0] < 1e-5 < errors[1] < 1


def test_linear_is_differentiated() -> None:
    layer = Linear(W, nn.Parameter(BIAS))
    x = normal(3, K).requires_grad_()
    (layer(x) * normal(3, N)).sum().backward()
    torch.testing.assert_close(x.grad, normal(3, N) @ VALUES.T, rtol=1e-5, atol=1e-5)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, normal(3, N).sum(0), rtol=1e-5, atol=1e-5)


# --- Embedding ------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_embedding(shape: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype) -> None:
    table = Embedding(W, dtype=dtype)
    assert table.weight.layout == GGUF
    ids = torch.randint(0, N, shape, dtype=kind, generator=torch.Generator().manual_seed(0))
    vectors = table(ids)
    assert vectors.dtype == dtype
    assert torch.equal(vectors, VALUES.T.to(dtype)[ids.long()])


def test_the_dtype_of_an_embedding_is_cast() -> None:
    table, ids = Embedding(W), torch.tensor([1])
    assert table.bfloat16()(ids).dtype == torch.bfloat16
    assert table.to(torch.float16)(ids).dtype == torch.float16
    assert copy.deepcopy(table)(ids).dtype == torch.float16
    with pytest.raises(ArgumentError, match=r"dtype of q4jit.torch.Embedding: .*64"):
        table.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_of_a_float_table(dtype: torch.dtype) -> None:
    old: Any = frozen(nn.Embedding(N, K, padding_idx=3, dtype=dtype))
    new = Embedding.from_embedding(old, "Q8_0")
    assert (new.num_embeddings, new.embedding_dim) == (N, K)
    ids = torch.tensor([[0, 3], [N - 1, 7]])
    assert new(ids).dtype == dtype
    assert not new(ids)[0, 1].any()
    torch.testing.assert_close(new(ids).float(), old(ids).float(), rtol=0, atol=0.02)


# --- Experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_dtype
def test_experts(activation: str, dtype: torch.dtype) -> None:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": silu,
        "gelu_tanh": lambda g: gelu(g, approximate="tanh"),
        "relu": relu,
    }
    function = functions[activation]
    gate, up, down = (torch.from_numpy(w.dequantize()).double() for w in (GATE, UP, DOWN))
    layer = Experts(GATE, UP, DOWN, activation=activation)
    for tokens, chosen in ((1, 1), (3, 2), (40, 2)):
        x, weights = normal(tokens, K, dtype=dtype), normal(tokens, chosen, dtype=dtype)
        ids = torch.arange(tokens * chosen).reshape(tokens, chosen) % E
        y = layer(x, ids, weights)
        rows = x.double()[:, None, None]
        hidden = function(rows @ gate[ids]) * (rows @ up[ids])
        exact = ((hidden @ down[ids])[:, :, 0] * weights.double()[..., None]).sum(1)
        assert y.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    for weight in (layer.gate, layer.up, layer.down):
        addresses = weight.tensor()._resident.addresses
        assert addresses == {weight.layout: weight.blocks.data_ptr()}


# --- one weight for an embedding and a head -------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.embed = Embedding(Weight(weight))
        self.head = Linear(self.embed.weight)

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids)
        return x, self.head(x)


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F16"])
@pytest.mark.parametrize("way", ["called", "compiled", "exported"])
def test_an_embedding_and_a_head_of_one_weight_have_one_copy(name: str, way: str) -> None:
    w, ids = random_weight(name, 256, 40), torch.tensor([3, 39, 0])
    module = Tied(w)
    run: Any = module
    if way == "compiled":
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    if way == "exported":
        run = torch.export.export(module, (ids,)).module()
    with torch.no_grad():
        vectors, y = run(ids)
    np.testing.assert_array_equal(vectors.numpy(), w.rows(ids.numpy()))
    np.testing.assert_array_equal(y.numpy(), Linear(w)(vectors).detach().numpy())
    blocks = module.embed.weight.blocks
    addresses = {b.data_ptr() for b in run.buffers() if b.dtype is torch.uint8}
    assert addresses == {blocks.data_ptr()}
    resident = weight_in(blocks, module.embed.weight.stored)._resident
    assert resident.addresses == {INTERLEAVED16: blocks.data_ptr()}
    assert not resident._copies


# --- compiled, exported ---------------------------------------------------------------------------


def test_modules_compile_into_one_graph() -> None:
    block, graphs = Block(), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for m in (1, 3, 17, 200):
        ids = torch.arange(m) % N
        assert torch.equal(compiled(ids), block(ids))
    assert len(graphs) <= 2


def test_modules_are_exported() -> None:
    block, ids = Block(), torch.arange(5)
    rows = {"ids": {0: torch.export.Dim("rows", min=2)}}
    program = torch.export.export(block, (ids,), dynamic_shapes=rows)
    for m in (5, 9):
        assert torch.equal(program.module()(torch.arange(m)), block(torch.arange(m)))


# --- states, copies, other processes --------------------------------------------------------------


def test_states() -> None:
    block = Block()
    state = block.state_dict()
    assert list(state) == [
        "embedding.weight.Q8_0",
        "linear.bias",
        "linear.weight.Q8_0",
        "experts.gate.Q4_1",
        "experts.up.Q4_1",
        "experts.down.Q4_1",
    ]
    with torch.device("meta"):
        new = Block()
    new.load_state_dict(state, assign=True)
    ids = torch.arange(7)
    assert torch.equal(new(ids), block(ids))
    assert new.linear.weight.layout == INTERLEAVED16
    assert new.embedding.weight.layout == GGUF


def test_states_of_float_modules() -> None:
    with pytest.raises(
        RuntimeError, match=r"linear.weight: expected Q8_0 \[64, 48\], got float32 "
    ):
        Block().load_state_dict({"linear.weight": torch.zeros(N, K)}, strict=False)
    with pytest.raises(RuntimeError, match=r"replace_linears"):
        Linear(W).load_state_dict(nn.Linear(K, N, bias=False).state_dict())
    with pytest.raises(
        RuntimeError, match=r"weight: expected Q8_0 \[64, 48\], got float32 \[48, 6"
    ):
        Embedding(W).load_state_dict(nn.Embedding(N, K).state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way: str, tmp_path: Path) -> None:
    block, ids = Block().bfloat16(), torch.arange(3)
    if way == "deepcopy":
        new = copy.deepcopy(block)
    elif way == "pickle":
        new = pickle.loads(pickle.dumps(block))
    else:
        torch.save(block, tmp_path / "block.pt")
        new = torch.load(tmp_path / "block.pt", weights_only=False)
    block.linear.weight.blocks.zero_()
    assert torch.equal(new(ids), Block().bfloat16()(ids))
    assert new.embedding.dtype == torch.bfloat16


def test_meta_and_back() -> None:
    block, ids = Block(), torch.arange(3)
    state, y = block.state_dict(), block(ids)
    block.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(block(ids), y)


class Vectors(Dataset[torch.Tensor]):
    """Results of a module, which DataLoader's workers compute."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        y: torch.Tensor = self.block(torch.tensor([i]))[0]
        return y


def report(block: Block, connection: Any) -> None:
    """Send what a spawned process has got, and zero the shared blocks."""
    blocks = block.linear.weight.blocks
    y = block(torch.arange(3))
    connection.send((blocks.is_shared(), block.linear.weight.layout, y.numpy()))
    blocks.zero_()


def test_workers_of_a_data_loader() -> None:
    block = Block()
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(
        Vectors(block), batch_size=2, num_workers=1, multiprocessing_context=context
    )
    with torch.no_grad():
        assert torch.equal(torch.cat(list(loader)), block(torch.arange(4)))
    weight = block.linear.weight  # PyTorch has moved its blocks to shared memory
    assert weight.blocks.is_shared()
    assert weight.tensor()._resident.addresses == {weight.layout: weight.blocks.data_ptr()}


def test_processes_share_blocks() -> None:
    block = Block().share_memory()
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=report, args=(block, theirs))
    process.start()
    try:
        assert ours.poll(60)
        is_shared, layout, y = ours.recv()
    finally:
        process.join(60)
    assert process.exitcode == 0
    assert (is_shared, layout) == (True, INTERLEAVED16)
    np.testing.assert_array_equal(y, Block()(torch.arange(3)).numpy())
    assert not block.linear.weight.blocks.any()


# --- errors ---------------------------------------------------------------------------------------

LINEAR: Final = (
    r"argument 'x' of Linear\(in_features=64, out_features=48, bias=False, format=Q8_0\)"
)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (normal(3, K).double(), r"float16 or bfloat16, got float64 \[3, 64\]; use x.float\(\)"),
        (torch.ones(3, K, dtype=torch.int64), r"got int64 \[3, 64\]; use x.float\(\)"),
        (normal(3, K).to(torch.complex64), r"got complex64 \[3, 64\]; use x.real.float\(\)"),
        (normal(3, K + 1), r"expected \[\.\.\., 64\], got float32 \[3, 65\]"),
        (normal(1)[0], r"expected \[\.\.\., 64\], got float32 \[\]"),
        (normal(3, K).to("meta"), r"expected a tensor on cpu, as the weight is, got one on meta; "),
        (np.ones((3, K), np.float32), r"expected a tensor .* of floats, got ndarray; use torch.as"),
        (W, r"expected a tensor .* of floats, got QuantizedTensor"),
        (normal(3, K).to_sparse(), r"expected a dense tensor, got a sparse.*x.to_dense\(\)"),
        ("x", r"expected a tensor \[\.\.\., 64\] of floats, got str"),
    ],
    ids=lambda v: str(getattr(v, "dtype", "")),
)
def test_errors_name_the_layer(x: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"{LINEAR}: .*{message}"):
        Linear(W)(x)


def test_a_layer_without_values() -> None:
    with pytest.raises(ArgumentError, match=rf"{LINEAR}.*to_empty\(device=\.\.\.\), then load_st"):
        Linear(W, device="meta")(normal(3, K))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            torch.tensor([1.0]),
            r"Embedding\(48, 64, .*expected int32 or int64, got float32 \[1\]; us",
        ),
        (torch.tensor([N]), r"argument 'ids' at \[0\]: expected ids from 0 to 47, got 48"),
        ([1], r"argument 'ids' of Embedding\(48, 64, .*expected a tensor of ids, got list"),
    ],
)
def test_refused_ids(ids: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Embedding(W)(ids)


X, IDS, WEIGHTS = normal(3, K), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (X.double(), IDS, WEIGHTS),
            r"argument 'x' of Experts\(experts=4, in_features=64, .*float64",
        ),
        ((X, WEIGHTS, WEIGHTS), r"argument 'ids' of Experts.*int32 or int64, got float32 \[3, 2\]"),
        (
            (X, IDS, WEIGHTS[:, :1].expand(3, 3)),
            r"argument 'weights' of .*\[\.\.\., 2\], got float32",
        ),
    ],
)
def test_refused_choices(args: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Experts(GATE, UP, DOWN)(*args)


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Embedding
        return 2 * super().forward(input)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Linear(wrong(VALUES)),
            r"weight of Linear: expected a QuantizedTensor or .*, got Tensor; ",
        ),
        (
            lambda: Linear(wrong(GATE)),
            r"weight of Linear: .*got one of shape \[4, 64, 32\]; use Experts",
        ),
        (
            lambda: Linear(W, BIAS[1:]),
            r"bias of Linear: expected floats \[48\], got float32 \[47\]",
        ),
        (
            lambda: Linear(W, BIAS.long()),
            r"bias of Linear: expected floats \[48\], got int64 \[48\]",
        ),
        (lambda: Linear(W, precision="f8"), r"precision of Linear: expected 'f32' or .*, got 'f8'"),
        (lambda: Linear(W, device="xpu"), r"device: expected a CPU, or a GPU of CUDA or ROCm"),
        (lambda: Embedding(wrong(GATE)), r"weight of Embedding: .*got one of shape \[4, 64, 32\]"),
        (
            lambda: Embedding(W, dtype=torch.int8),
            r"dtype of q4jit.torch.Embedding: .*got torch.int8",
        ),
        (
            lambda: Experts(wrong(W), UP, DOWN),
            r"gate of Experts: .*got one of shape \[64, 48\]; use Expe",
        ),
        (lambda: Experts(GATE, DOWN, DOWN), r"up of Experts: expected \[4, 64, 32\], the shape of"),
        (lambda: Experts(GATE, UP, UP), r"down of Experts: expected \[4, 32, N\], got \[4, 64, 32"),
        (
            lambda: Experts(GATE, UP, DOWN, activation="gelu"),
            r"activation of Experts: expected 'silu' or 'gelu_tanh' or 'relu', got 'gelu'",
        ),
        (
            lambda: Linear.from_linear(nn.Linear(K, N), "Q8_0"),
            r"linear.weight: .*requires_grad_\(F",
        ),
        (
            lambda: Linear.from_linear(frozen(nn.Linear(K, N, dtype=torch.complex64)), "Q8_0"),
            r"linear.weight: expected floats \[N, K\], got complex64 \[48, 64\]",
        ),
        (
            lambda: Linear.from_linear(nn.Conv1d(1, 1, 1), "Q8_0"),
            r"expected an nn.Linear.*got Conv1d",
        ),
        (lambda: Linear.from_linear(frozen(Doubled(K, N)), "Q8_0"), r"own forward, got Doubled"),
        (
            lambda: Embedding.from_embedding(nn.Embedding(N, K), "Q8_0"),
            r"embedding.weight: expected a weight without gradient, .*or call under torch.no_grad",
        ),
        (
            lambda: Embedding.from_embedding(frozen(Scaled(N, K)), "Q8_0"),
            r"own forward, got Scaled",
        ),
        (
            lambda: Embedding.from_embedding(frozen(nn.Embedding(N, K, max_norm=1.0)), "Q8_0"),
            r"without max_norm, got max_norm=1.0",
        ),
    ],
)
def test_refused_modules(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_weight_with_gradient_is_quantised_under_no_grad() -> None:
    with torch.no_grad():
        assert Linear.from_linear(nn.Linear(K, N), "Q8_0").in_features == K


def test_float_layers_whose_blocks_are_not_whole() -> None:
    with pytest.raises(FormatError, match=r"K: expected a positive multiple of 256"):
        Linear.from_linear(frozen(nn.Linear(K, N)), "Q4_K")


def test_modules_print_in_a_line() -> None:
    embedding, linear, experts = str(Block()).splitlines()[1:-1]
    assert embedding == "  (embedding): Embedding(48, 64, format=Q8_0, dtype=torch.float32)"
    assert linear.endswith("Linear(in_features=64, out_features=48, bias=True, format=Q8_0)")
    assert experts.endswith("hidden=32, out_features=64, activation=silu, format=Q4_1)")
    assert str(Weight(W)) == "Weight(Q8_0 [64, 48])"


def test_a_single_id_gives_a_single_vector() -> None:
    table = Embedding(random_weight("Q4_0", 64, 96))
    assert torch.equal(table(torch.tensor(3)), table(torch.tensor([3]))[0])


def object_of(value: Any) -> Any:
    """Return the value, of a type that the caller may mistake."""
    return value


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Linear(object_of(nn.Linear(64, 96))), r"Linear\.from_linear\(module"),
        (lambda: Linear(object_of(nn.Embedding(96, 64))), r"Embedding\.from_embedding\(module"),
        (
            lambda: Linear.from_bytes(random_weight("Q4_0", 64, 96).raw, (96, 64), "Q4_0"),
            r"use shape=\(64, 96\)",
        ),
        (lambda: Linear.from_bytes(b"", (64, 96), "Q4_K_M"), r"use 'Q4_K'"),
        (
            lambda: Linear(random_weight("Q4_0", 64, 96)).weight.requires_grad_(True),
            r"train adapters",
        ),
        (
            lambda: Linear(random_weight("Q4_0", 64, 96)).weight(torch.zeros(1, 64)),
            r"call the layer",
        ),
        (
            lambda: Embedding(random_weight("Q4_0", 64, 96)).double(),
            r"use float\(\), half\(\) or bfloat16\(\)",
        ),
    ],
)
def test_mistakes_get_a_cure(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(Q4JitError, match=message):
        mistake()


def test_model_code_may_ask_a_weight_for_its_device_and_dtype() -> None:
    weight = Linear(random_weight("Q4_0", 64, 96)).weight
    assert weight.device == torch.device("cpu")
    assert weight.dtype is torch.float32


def test_subclasses_of_weight_are_weights() -> None:
    class Own(Weight):
        pass

    w = random_weight("Q4_0", 64, 96)
    own, x = Own(w), torch.randn(3, 64)
    product = specialize(lambda x, w: x @ w[0] if isinstance(w, list) else x @ w)
    expected = product(x, w)
    tracked = x.clone().requires_grad_()
    for argument in (own, [own]):
        assert torch.equal(product(x, argument), expected)
        assert torch.equal(product(tracked, argument), expected)
