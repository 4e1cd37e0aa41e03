"""Calls of decorated functions that have to give the same bits in every mode of PyTorch."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from q4jit import ExpertTensor, QuantizedTensor, quantize, specialize
from q4jit.torch import Weight

K, N, E = 64, 96, 4
SCALE: Final = 1.25


def matrix(seed: int, name: str = "Q4_0", k: int = K, n: int = N) -> QuantizedTensor:
    """Return a random weight."""
    values = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    return quantize(values, name)


def floats(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return random numbers, the same for the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def ids(*shape: int, most: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return random row numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, most, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Case:
    """A call that a model contains.

    Attributes:
        call: takes tensors only; the weights are its own.
        tensors: returns the arguments for M rows.
        fixed: the positions of tensors whose first axis is not M.
    """

    call: Callable[..., Any]
    tensors: Callable[[int], tuple[Tensor, ...]]
    fixed: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.call.__name__


def x_only(m: int) -> tuple[Tensor, ...]:
    return (floats(m, K),)


RAW_GATE, RAW_UP = matrix(0), matrix(1, "Q4_K", 256)
GATE, UP = Weight(matrix(0)), Weight(matrix(1, "Q8_0"))
PLAIN = matrix(2, "Q5_0")
DOWN = Weight(matrix(3, "Q4_1", N, K))
SQUARE = Weight(matrix(4, "Q4_0", K, K))
EXPERTS = ExpertTensor.stack([matrix(10 + e, "Q4_0") for e in range(E)])
EXPERTS_MODULE = Weight(EXPERTS)
TIED = Weight(matrix(6, "Q4_K", 256, 40))
TABLE = Weight(matrix(5, "Q6_K", 256, 40), lookup=True)
CASES: list[Case] = []


def case(
    tensors: Callable[[int], tuple[Tensor, ...]] = x_only, fixed: tuple[int, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a function to the table."""

    def add(call: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(call, tensors, fixed))
        return call

    return add


# --- weights --------------------------------------------------------------------------------------


@specialize
def gated(x: Any, gate: Any, up: Any) -> Any:
    g = x @ gate
    return g / (1 + np.exp(-g)) * (x @ up)


@case()
def several_weights(x: Tensor) -> Any:
    return gated(x, GATE, UP)


@case()
def a_module_and_a_plain_tensor(x: Tensor) -> Any:
    return gated(x, GATE, PLAIN)


def _with_closure(w: QuantizedTensor, factor: float) -> Any:
    @specialize
    def scaled(x: Any, w: Any) -> Any:
        return x @ w * factor + SCALE

    return lambda x: scaled(x, w)


_closure = _with_closure(PLAIN, 0.3)


@case()
def closures_and_globals(x: Tensor) -> Any:
    return _closure(x)


@specialize
def _transposed(y: Any, w: Any) -> Any:
    return y @ w.T


@case(lambda m: (floats(m, N),))
def transposed(y: Tensor) -> Any:
    return _transposed(y, GATE)


@specialize
def _halves(x: Any, w: Any) -> Any:
    y = x @ w
    return y[..., : N // 2] * np.tanh(y[..., N // 2 :])


@case()
def slices(x: Tensor) -> Any:
    return _halves(x, GATE)


@specialize
def _chained(x: Any, gate: Any, down: Any) -> Any:
    h = np.maximum(x @ gate, 0)
    return x + h @ down


@case()
def chained_products(x: Tensor) -> Any:
    return _chained(x, GATE, DOWN)


# --- numbers and static values --------------------------------------------------------------------


@specialize
def _norm(x: Any, w: Any, eps: float = 1e-5, *, gain: float = 1.0, shift: float = 0.0) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain @ w + shift


@case()
def defaults(x: Tensor) -> Any:
    return _norm(x, GATE)


@case()
def floats_by_name(x: Tensor) -> Any:
    return _norm(w=GATE, x=x, shift=0.5, gain=2.0)


@specialize
def _static(x: Any, w: Any, power: int, add: bool, kind: str, bias: Any = None) -> Any:
    y = x @ w
    for _ in range(power):
        y = y * y
    if add:
        y = y + power
    y = np.tanh(y) if kind == "tanh" else y
    return y if bias is None else y + bias


@case()
def static_values(x: Tensor) -> Any:
    return _static(x, GATE, 2, True, "tanh"), _static(x, GATE, 0, add=False, kind="", bias=1)


@specialize
def _scaled(x: Any, w: Any, scale: Any) -> Any:
    return x @ w * scale


@case(lambda m: (floats(m, K), torch.tensor(1.7)), fixed=(1,))
def tensors_without_axes(x: Tensor, scale: Tensor) -> Any:
    return _scaled(x, GATE, scale)


@case(lambda m: (floats(m, K, dtype=torch.float16), torch.tensor(1.7)), fixed=(1,))
def float32_numbers_for_halves(x: Tensor, scale: Tensor) -> Any:
    return _scaled(x, GATE, scale)


# --- containers -----------------------------------------------------------------------------------


@dataclass
class Layer:
    gate: Any
    up: Any
    eps: float = 0.5


class Pair(NamedTuple):
    first: Any
    second: Any


@specialize
def _layered(x: Any, layer: Any) -> Any:
    return gated(x, layer.gate, layer.up) + layer.eps


@case()
def dataclasses(x: Tensor) -> Any:
    return _layered(x, Layer(GATE, UP))


@specialize
def _by_key(inputs: Any, weights: Any, pair: Any) -> Any:
    return inputs[0] @ weights["q"] + inputs[1] @ weights["k-1"][0] + pair.first * pair.second


@case(lambda m: (floats(m, K), floats(m, K, seed=1), floats(N)), fixed=(2,))
def nested_containers(x: Tensor, y: Tensor, b: Tensor) -> Any:
    return _by_key([x, y], {"q": GATE, "k-1": (PLAIN,)}, Pair(b, 3.0))


@case(lambda m: (floats(m, K), floats(m, K, seed=1), floats(N)), fixed=(2,))
def ordered_dicts(x: Tensor, y: Tensor, b: Tensor) -> Any:
    weights = OrderedDict([("q", GATE), ("k-1", (UP,))])
    return _by_key((x, y), weights, Pair(3.0, b))


@specialize
def _results(x: Any, w: Any, u: Any, number: float) -> Any:
    y = x @ w
    return {"y": y, "others": [y * 2, (number, 3, None, "text")], "pair": Pair(x @ u, x)}


@case()
def containers_of_results(x: Tensor) -> Any:
    return _results(x, GATE, PLAIN, 0.75)


@specialize
def _layer_of_results(x: Any, w: Any) -> Any:
    y = x @ w
    return Layer(y, np.exp(-y * y), 2.0)


@case()
def dataclasses_as_results(x: Tensor) -> Any:
    layer = _layer_of_results(x, GATE)
    return layer.gate, layer.up, layer.eps


@specialize
def _two(x: Any, w: Any, u: Any) -> Any:
    return x @ w, np.sum(x @ u, axis=-1, keepdims=True)


@case()
def tuples_of_results(x: Tensor) -> Any:
    return _two(x, GATE, UP)


# --- ids ------------------------------------------------------------------------------------------


@specialize
def _lookup(ids: Any, table: Any) -> Any:
    return table.rows(ids)


@case(lambda m: (ids(m, most=40),))
def rows(ids: Tensor) -> Any:
    return _lookup(ids, TABLE)


@case(lambda m: (ids(m, 3, most=40, dtype=torch.int32),))
def rows_of_int32(ids: Tensor) -> Any:
    return _lookup(ids, TABLE)


@specialize
def _product(x: Any, w: Any) -> Any:
    return x @ w


@case(lambda m: (ids(m, most=40),))
def tied(ids: Tensor) -> Any:
    vectors = _lookup(ids, TIED)
    return vectors, _product(vectors, TIED)


@specialize
def _dequantized(w: Any) -> Any:
    return w.dequantize()


@case()
def dequantized(x: Tensor) -> Any:
    return x.sum() * 0 + 1, _dequantized(GATE)


@specialize
def _expert(x: Any, w: Any, ids: Any) -> Any:
    return np.vecmat(x, w[ids]) if hasattr(np, "vecmat") else None


@case(lambda m: (floats(m, K), ids(m, most=E)))
def one_expert_per_row(x: Tensor, ids: Tensor) -> Any:
    return _expert(x, EXPERTS_MODULE, ids)


@specialize
def _mixture(x: Any, w: Any, ids: Any, gates: Any) -> Any:
    y = np.vecmat(x[..., None, :], w[ids])
    return np.sum(y * gates[..., None], axis=-2)


@case(lambda m: (floats(m, K), ids(m, 2, most=E), floats(m, 2)))
def several_experts_per_row(x: Tensor, ids: Tensor, gates: Tensor) -> Any:
    return _mixture(x, EXPERTS_MODULE, ids, gates)


@case(lambda m: (floats(m, K), ids(m, 2, most=E, dtype=torch.int32), floats(m, 2)))
def plain_expert_tensors(x: Tensor, ids: Tensor, gates: Tensor) -> Any:
    return _mixture(x, EXPERTS, ids, gates)


# --- shapes and types -----------------------------------------------------------------------------


@specialize
def _affine(x: Any, w: Any, bias: Any, residual: Any) -> Any:
    return x @ w + bias + residual


@case(lambda m: (floats(m, K), floats(N), floats(m, N)), fixed=(1,))
def a_bias_and_a_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Any:
    return _affine(x, GATE, bias, residual)


@case(lambda m: (floats(m, K), floats(1, N), floats(m, N)), fixed=(1,))
def a_bias_with_two_axes(x: Tensor, bias: Tensor, residual: Tensor) -> Any:
    return _affine(x, GATE, bias, residual)


@case(lambda m: (floats(m, 2, 3, K), floats(N), floats(2, 1, N)), fixed=(1, 2))
def three_leading_axes(x: Tensor, bias: Tensor, residual: Tensor) -> Any:
    return _affine(x, GATE, bias, residual)


@case(lambda m: (floats(m, K, dtype=torch.float16), floats(N, dtype=torch.bfloat16)), fixed=(1,))
def halves(x: Tensor, bias: Tensor) -> Any:
    return _affine(x, GATE, bias, 0.5), gated(x.bfloat16(), GATE, UP)


@case(lambda m: (floats(K, m).T,))
def strided(x: Tensor) -> Any:
    return gated(x, GATE, UP)


@specialize
def _elementwise(x: Any, y: Any) -> Any:
    return x / (1 + np.exp(-x)) * y


@case(lambda m: (floats(m, K), floats(m, K, seed=1)))
def without_weights(x: Tensor, y: Tensor) -> Any:
    return _elementwise(x, y)


# --- several functions ----------------------------------------------------------------------------


@specialize
def _outer(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return x + gated(x, gate, up) @ down


@case()
def a_function_in_a_function(x: Tensor) -> Any:
    return _outer(x, GATE, UP, DOWN)


@case()
def one_function_after_another(x: Tensor) -> Any:
    y = _scaled(torch.tanh(x), GATE, 0.5)
    return _elementwise(y, torch.sin(y)) + 1


# --- options --------------------------------------------------------------------------------------


def _plain(x: Any, w: Any) -> Any:
    return x @ w


_plain_product = specialize(_plain)
_rough = specialize(_plain, precision="i8", target="cpu")
_medium = specialize(_plain, precision="f16", K=K, N=N, block_size=128, cache=False)


@case()
def precisions(x: Tensor) -> Any:
    return _rough(x, GATE), _medium(x, GATE), _rough(x, UP)
