"""Gradients of the operator agree with PyTorch's autograd on the dequantised model, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from q4jit import ArgumentError, ExpertTensor, TraceError, quantize, specialize
from q4jit.torch import Weight, bridge
from q4jit.torch import gradients as gradients_of_calls
from q4jit.torch.operator import call

K, N = 64, 96
BOUND: Final = 1e-5
WEIGHTS: Final = {
    name: quantize(np.random.default_rng(i).standard_normal(shape) / 8, fmt)
    for i, (name, shape, fmt) in enumerate(
        [("gate", (K, N), "Q4_0"), ("up", (K, N), "Q8_0"), ("down", (N, K), "Q4_1")]
    )
}
HELD: Final = {name: Weight(w) for name, w in WEIGHTS.items()}
DENSE: Final = {
    name: torch.from_numpy(np.array(w.dequantize())).double() for name, w in WEIGHTS.items()
}


@dataclass(frozen=True)
class Case:
    """A decorated function, and the same in PyTorch; `shapes` are those of its arrays."""

    function: Callable[..., Any]
    reference: Callable[..., Tensor]
    weights: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ((5, K),)

    def arrays(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in self.shapes]

    def run(self, arrays: list[Tensor]) -> Tensor:
        y: Tensor = self.function(*arrays, *(HELD[name] for name in self.weights))
        return y

    def calling(self) -> Callable[..., Tensor]:
        """Return a function of the arrays. PyTorch 2.11 cannot trace attributes of the case."""
        function, weights = self.function, [HELD[name] for name in self.weights]

        def call_it(*arrays: Tensor) -> Tensor:
            y: Tensor = function(*arrays, *weights)
            return y

        return call_it

    def exact(self, arrays: list[Tensor]) -> Tensor:
        return self.reference(*arrays, *(DENSE[name] for name in self.weights))


def rms_norm(x: Any, scale: Any, w: Any) -> Any:
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale) @ w


def layer_norm(x: Any, scale: Any, shift: Any, w: Any) -> Any:
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return (centred / np.sqrt(variance + 1e-5) * scale + shift) @ w


def silu_gate(x: Any, gate: Any, up: Any) -> Any:
    g = x @ gate
    return g / (1 + np.exp(-g)) * (x @ up)


def gelu_gate(x: Any, gate: Any, up: Any) -> Any:
    g = x @ gate
    return 0.5 * g * (1 + np.tanh(0.7978845608028654 * (g + 0.044715 * g**3))) * (x @ up)


def softmax(x: Any, w: Any) -> Any:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return (e / np.sum(e, axis=-1, keepdims=True)) @ w


def residual(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return x + silu_gate(x, gate, up) @ down


def chained(x: Any, bias: Any, up: Any, down: Any) -> Any:
    return np.maximum(x @ up + bias, 0) @ down


def halves(x: Any, bias: Any, gate: Any) -> Any:
    h = x @ gate + bias
    return h[..., : N // 2] * np.tanh(h[..., N // 2 :])


def both_ways(x: Any, w: Any) -> Any:
    return np.tanh(x @ w) @ w.T


def energy(x: Any, w: Any) -> Any:
    y = x @ w
    return np.sum(y * y, axis=-1)


CASES: Final = {
    "rms_norm": Case(
        specialize(rms_norm),
        lambda x, s, w: functional.rms_norm(x, (K,), s, 1e-6) @ w,
        ("gate",),
        ((5, K), (K,)),
    ),
    "layer_norm": Case(
        specialize(layer_norm),
        lambda x, s, b, w: functional.layer_norm(x, (K,), s, b) @ w,
        ("gate",),
        ((5, K), (K,), (K,)),
    ),
    "silu_gate": Case(
        specialize(silu_gate), lambda x, g, u: functional.silu(x @ g) * (x @ u), ("gate", "up")
    ),
    "gelu_gate": Case(
        specialize(gelu_gate),
        lambda x, g, u: functional.gelu(x @ g, approximate="tanh") * (x @ u),
        ("gate", "up"),
    ),
    "softmax": Case(specialize(softmax), lambda x, w: torch.softmax(x, -1) @ w, ("gate",)),
    "residual": Case(
        specialize(residual),
        lambda x, g, u, d: x + (functional.silu(x @ g) * (x @ u)) @ d,
        ("gate", "up", "down"),
        ((2, 3, K),),
    ),
    "chained": Case(
        specialize(chained),
        lambda x, b, u, d: functional.relu(x @ u + b) @ d,
        ("up", "down"),
        ((5, K), (N,)),
    ),
    "halves": Case(
        specialize(halves),
        lambda x, b, g: (x @ g + b)[..., : N // 2] * torch.tanh((x @ g + b)[..., N // 2 :]),
        ("gate",),
        ((5, K), (N,)),
    ),
    "energy": Case(specialize(energy), lambda x, w: (x @ w).square().sum(-1), ("gate",)),
    "both_ways": Case(specialize(both_ways), lambda x, w: torch.tanh(x @ w) @ w.T, ("gate",)),
}

every_case = pytest.mark.parametrize("name", CASES)


def gradients(y: Tensor, arrays: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a sum with fixed random factors."""
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return list(torch.autograd.grad(y, arrays, factors))


def recorded(calls: list[tuple[Any, ...]]) -> Callable[..., list[Tensor]]:
    """Return the operator, which keeps the arguments of each call."""

    def record(*args: Any) -> list[Tensor]:
        calls.append(args)
        results: list[Tensor] = call(*args)
        return results

    return record


def assert_close(got: list[Tensor], arrays: list[Tensor], case: Case) -> None:
    wide = [array.detach().double().requires_grad_() for array in arrays]
    for mine, theirs in zip(got, gradients(case.exact(wide), wide), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype is torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < BOUND


@every_case
def test_gradients_agree_with_autograd(name: str) -> None:
    case = CASES[name]
    arrays = case.arrays()
    assert_close(gradients(case.run(arrays), arrays), arrays, case)


@every_case
def test_compiled_gradients_have_equal_bits(name: str) -> None:
    case = CASES[name]
    arrays = case.arrays()
    compiled = torch.compile(case.calling(), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        gradients(compiled(*arrays), arrays), gradients(case.run(arrays), arrays), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("inductor")
def test_two_training_graphs_serve_every_number_of_rows() -> None:
    case = CASES["residual"]
    compiled = torch.compile(case.calling(), fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for m in (1, 3, 17, 200):
        x = torch.randn(m, K, requires_grad=True)
        assert_close(gradients(compiled(x), [x]), [x], case)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


# opcheck itself reads it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_case
def test_opcheck_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    for module in bridge, gradients_of_calls:  # the forward call, and those of its gradient
        monkeypatch.setattr(module, "call", recorded(calls))
    case = CASES[name]
    arrays = case.arrays()
    gradients(case.run(arrays), arrays)
    monkeypatch.undo()
    assert len(calls) >= 2
    for given, *rest in calls:
        own = [array.detach().contiguous().requires_grad_() for array in given]
        torch.library.opcheck(call, (own, *rest))


def test_only_wanted_gradients_are_computed() -> None:
    case = CASES["chained"]
    x, bias = case.arrays()
    y = case.run([x.detach(), bias])
    (got,) = gradients(y, [bias])
    wide = bias.detach().double().requires_grad_()
    (exact,) = gradients(case.exact([x.detach().double(), wide]), [wide])
    assert float((got - exact).norm() / exact.norm()) < BOUND


def test_rows_that_share_an_array_add_up() -> None:
    @specialize
    def two(x: Any, bias: Any) -> Any:
        return x + bias, bias * 2.0

    x, bias = torch.randn(5, K), torch.randn(K, requires_grad=True)
    first, second = two(x, bias)
    (got,) = torch.autograd.grad(first.sum() + second.sum(), bias)
    assert torch.equal(got, torch.full((K,), 7.0))


def test_results_without_cotangents_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    @specialize
    def pair(x: Any, w: Any) -> Any:
        return x @ w, np.exp(x)

    x = torch.randn(3, K, requires_grad=True)
    y, _ = pair(x, HELD["gate"])
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gradients_of_calls, "call", recorded(calls))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert ["cotangent_1" in text for *_, text in calls] == [False]
    exact = DENSE["gate"].sum(dim=1).expand(3, K)
    assert float((got - exact).norm() / exact.norm()) < BOUND


def test_second_derivatives() -> None:
    case = CASES["silu_gate"]
    (x,) = case.arrays()

    def penalty(run: Callable[[list[Tensor]], Tensor], value: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(run([value]).sum(), value, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), value)
        return second

    wide = x.detach().double().requires_grad_()
    exact = penalty(case.exact, wide)
    assert float((penalty(case.run, x) - exact).norm() / exact.norm()) < BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_arrays_have_gradients_in_their_dtype(dtype: torch.dtype) -> None:
    case = CASES["silu_gate"]
    x = case.arrays()[0].detach().to(dtype).requires_grad_()
    (got,) = gradients(case.run([x]), [x])
    assert got.dtype is dtype
    wide = x.detach().double().requires_grad_()
    (exact,) = gradients(case.exact([wide]), [wide])
    assert float((got - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_gradients_flow_through_autocasting() -> None:
    case = CASES["silu_gate"]
    (x,) = case.arrays()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.run([x])
    assert y.dtype is torch.bfloat16
    (got,) = torch.autograd.grad(y.float().sum(), x)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(case.exact([wide]).sum(), wide)
    assert got.dtype is torch.float32
    assert float((got - exact).norm() / exact.norm()) < 2e-2


def test_training_with_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    case = CASES["residual"]
    (x,) = case.arrays()
    y = checkpoint(lambda v: case.run([v]), x, use_reentrant=False)
    assert_close(gradients(y, [x]), [x], case)


def test_an_operation_without_a_formula_is_named_by_the_backward_call() -> None:
    @specialize
    def mixture(x: Any, w: Any, ids: Any) -> Any:
        return np.vecmat(x, w[ids])

    experts = Weight(ExpertTensor.stack([WEIGHTS["gate"]] * 2))
    x = torch.randn(3, K, requires_grad=True)
    y = mixture(x, experts, torch.tensor([0, 1, 0]))
    with pytest.raises(TraceError, match=r"vecmat.* in mixture"):
        y.sum().backward()


def test_numbers_are_not_differentiated() -> None:
    @specialize
    def scaled(x: Any, w: Any, scale: Any) -> Any:
        return x @ w * scale

    x, scale = torch.randn(3, K), torch.tensor(0.5, requires_grad=True)
    y = scaled(x, HELD["gate"], scale)
    with pytest.raises(TraceError, match="number 'scale'"):
        y.sum().backward()


def run_dual(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        run(forward_ad.make_dual(x, x))


OTHER_WAYS: Final[dict[str, Callable[..., Any]]] = {
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "vjp": torch.func.vjp,
    "grad": lambda run, x: torch.func.grad(run)(x),
    "dual": run_dual,
}


# PyTorch compiles decompositions for forward mode with torch.jit
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_differentiate_are_refused(way: str) -> None:
    case = CASES["silu_gate"]
    with pytest.raises(ArgumentError, match=r"torch\.func.*use torch\.autograd\.grad"):
        OTHER_WAYS[way](lambda x: case.run([x]).sum(), torch.randn(3, K))


def test_calls_with_weights_are_prepared() -> None:
    case = CASES["silu_gate"]
    function: Any = case.function
    weights = [HELD[name] for name in case.weights]
    function.warmup((3, K), *weights)
    x = torch.randn(3, K)
    bound = function.bind(x, *weights)
    assert torch.equal(bound(), case.run([x]))
    x.copy_(torch.randn(3, K))
    assert torch.equal(bound(), case.run([x]))
