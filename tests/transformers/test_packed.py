"""`replace_packed`: q4jit's modules in place of those that transformers keeps packed."""

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers.integrations.gguf.dequant import dequantize
from transformers.integrations.gguf.utils import GgufEmbedding, GgufExperts, GgufLinear

from q4jit import quantize
from q4jit.errors import ArgumentError
from q4jit.torch import Embedding, Experts, Linear
from q4jit.transformers.packed import ReorderedLinear, replace_packed
from q4jit.weights.formats import FORMATS

K, N, E = 256, 64, 3
Q8_0, Q4_K, IQ1_S = 8, 12, 19
BF16 = torch.bfloat16


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(parameter: Any, ggml_type: int, seed: int) -> Tensor:
    """Write random blocks to a parameter, and return their values."""
    (name,) = [name for name, fmt in FORMATS.items() if fmt.ggml_type == ggml_type]
    rows = parameter.shape[:-1].numel()
    raw = torch.from_numpy(quantize(floats(K, rows, seed=seed).numpy() / 16, name).raw.copy())
    parameter.data.copy_(raw.reshape(parameter.shape))
    return dequantize(raw, ggml_type).reshape(*parameter.shape[:-1], K)


def linear(bias: bool = False, seed: int = 0) -> tuple[Any, Tensor]:
    module: Any = GgufLinear(K, N, Q4_K, bias)
    values = fill(module.weight, Q4_K, seed)
    if bias:
        module.bias.data.copy_(floats(N, seed=seed + 1))
    return module, values


def holder(**modules: nn.Module) -> Any:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_layer_keeps_its_bias_and_the_type_of_its_input(dtype: torch.dtype) -> None:
    layer, values = linear(bias=True)
    model = holder(layer=layer.to(dtype))
    bias: Any = layer.bias
    assert replace_packed(model) == ["layer"]
    x = floats(2, 5, K).to(dtype)
    assert isinstance(model.layer, Linear)
    assert model.layer.bias is bias
    assert not model.layer.training
    y = model.layer(x)
    assert y.dtype is dtype
    wanted = x.float() @ values.T + layer.bias.float()
    assert float((y.float() - wanted).norm() / wanted.norm()) < (4e-3 if dtype is BF16 else 1e-6)


def test_a_layer_keeps_the_order_of_its_input() -> None:
    layer, values = linear()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    layer.input_permutation = order
    model = holder(layer=layer)
    replace_packed(model)
    assert isinstance(model.layer, ReorderedLinear)
    x = floats(2, 5, K)
    torch.testing.assert_close(model.layer(x), x[..., order] @ values.T, rtol=1e-4, atol=1e-5)
    assert (model.layer.in_features, model.layer.out_features) == (K, N)
    assert list(model.state_dict()) == ["layer.linear.weight.Q4_K"]


def test_tied_layers_share_a_weight() -> None:
    table = GgufEmbedding(N, K, Q4_K, BF16)
    values = fill(table.weight, Q4_K, 0)
    head = linear()[0]
    head.weight = table.weight
    other = linear(seed=5)[0]
    model = holder(table=table, head=head, other=other, again=other)
    assert replace_packed(model) == ["table", "head", "other", "again"]
    assert isinstance(model.table, Embedding)
    assert model.table.weight is model.head.weight
    assert model.other is model.again
    assert model.other.weight is not model.head.weight
    ids = torch.tensor([[3, 63, 0]])
    assert torch.equal(model.table(ids), values[ids].to(BF16))
    x = floats(2, K)
    torch.testing.assert_close(model.head(x), x @ values.T, rtol=1e-4, atol=1e-5)


def test_experts() -> None:
    experts = GgufExperts(E, K, K, Q4_K, Q8_0, nn.SiLU())
    gate, up = fill(experts.gate_up_proj, Q4_K, 1).chunk(2, dim=1)
    down = fill(experts.down_proj, Q8_0, 2)
    model = holder(experts=experts)
    replace_packed(model)
    assert isinstance(model.experts, Experts)
    x, ids, weights = floats(2, K), torch.tensor([[2, 0], [1, 1]]), floats(2, 2).abs()
    hidden = nn.functional.silu(torch.einsum("mk,mahk->mah", x, gate[ids]))
    hidden = hidden * torch.einsum("mk,mahk->mah", x, up[ids])
    wanted = torch.einsum("mah,manh->man", hidden, down[ids])
    wanted = (wanted * weights[..., None]).sum(1)
    torch.testing.assert_close(model.experts(x, ids, weights), wanted, rtol=1e-4, atol=1e-5)


def test_a_replaced_layer_has_gradients() -> None:
    layer, values = linear()
    model = holder(layer=layer)
    replace_packed(model)
    x = floats(2, K).requires_grad_()
    model.layer(x).sum().backward()
    torch.testing.assert_close(x.grad, values.sum(0).expand(2, K), rtol=1e-4, atol=1e-4)


def test_a_model_on_several_devices_keeps_the_hooks_that_move_inputs() -> None:
    layer = linear()[0]
    model = dispatch_model(holder(layer=layer), {"layer": "cpu"}, force_hooks=True)
    hook = layer._hf_hook
    replace_packed(model)
    assert isinstance(model.layer, Linear)
    assert model.layer._hf_hook is hook
    assert model.layer(floats(1, K)).shape == (1, N)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layer: layer.register_forward_hook(lambda *_: None),
            r"last \(GgufLinear\): expected a module without hooks, .*; add hooks after replacing",
        ),
        (
            lambda layer: layer.to("meta"),
            r"last \(GgufLinear\): expected uint8 blocks in memory, got torch.uint8 on meta; load",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(floats(N, K))),
            r"last \(GgufLinear\): expected uint8 blocks in memory, got torch.float32 on cpu",
        ),
        (
            lambda layer: setattr(layer, "ggml_type", IQ1_S),
            r"last \(GgufLinear\): expected a format that q4jit multiplies, got IQ1_S \(19\)",
        ),
    ],
)
def test_unsuitable_modules_are_refused_before_any_is_replaced(change: Any, message: str) -> None:
    model = holder(first=linear()[0], last=linear()[0])
    change(model.last)
    with pytest.raises(ArgumentError, match=message):
        replace_packed(model)
    assert type(model.first) is GgufLinear


def test_a_packed_module_by_itself_is_refused() -> None:
    with pytest.raises(ArgumentError, match="expected a model that contains packed modules, got"):
        replace_packed(linear()[0])
