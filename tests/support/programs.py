"""Functions whose programs tests write, read, trace again and differentiate."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit import ExpertTensor, vecmat
from q4jit.arrays.specs import signature_of
from q4jit.dispatch.options import Options
from q4jit.dispatcher import Specialized
from q4jit.frontend.graph import Graph
from q4jit.frontend.programs.program import Program
from q4jit.frontend.specs import Signature, StaticSpec
from q4jit.frontend.trace import trace
from tests.support.functions import random, weight

M, K, N, EXPERTS, CHOSEN = 3, 64, 32, 4, 2


@dataclass(frozen=True)
class Case:
    """A function and its arguments, by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(self.arguments.values())

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The arguments that a program has."""
        return tuple(v for v in self.values if v is not None and type(v) not in {int, bool, str})

    @property
    def graph(self) -> Graph:
        return trace(self.function, self.signature)

    @property
    def signature(self) -> Signature:
        return signature_of(tuple(self.arguments), self.values)

    @property
    def program(self) -> Program:
        return Program.of(self.graph)


def retraced(program: Program, signature: Signature) -> Graph:
    """Return the graph of a program for the signature of its function."""
    return trace(program, tuple(s for s in signature if not isinstance(s, StaticSpec)))


def compiled(program: Program, target: str = "cpu", **options: Any) -> Specialized[Any, Any]:
    return Specialized(program, Options(target=target, **options))


def renumbered(text: str) -> str:
    """Return a text with the numbers of values in the order of their first use."""
    numbers: dict[str, str] = {}
    return re.sub(r"\bv\d+", lambda m: numbers.setdefault(m[0], f"v{len(numbers)}"), text)


def statements(graph: Graph) -> str:
    """Return a graph's statements as a program has them: without static values, and in a tuple."""
    kept = [i for i, spec in enumerate(graph.signature) if not isinstance(spec, StaticSpec)]
    text = renumbered("\n".join(graph.statements)).replace("return a tuple of", "return")
    return re.sub(r"\barg(\d+)", lambda m: f"arg{kept.index(int(m[1]))}", text)


def rms_norm(x: Any, gain: Any, eps: float = 1e-5) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def layer_norm(x: Any, gain: Any, bias: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gain + bias


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def gelu(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def softmax(x: Any) -> Any:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def _case(function: Callable[..., Any], *names: str, **others: Any) -> Case:
    return Case(function, {name: _ARGUMENTS[name] for name in names} | others)


def experts(format_: str = "F32") -> ExpertTensor:
    return ExpertTensor.stack([weight(K, N, format_, seed=i) for i in range(EXPERTS)])


_ARGUMENTS: Final[dict[str, Any]] = {
    "x": random(M, K),
    "gain": random(K, seed=2),
    "offset": random(K, seed=3),
    "w": weight(K, N, "Q4_0"),
    "up": weight(K, N, "Q8_0", seed=1),
    "down": weight(N, K, "Q4_0", seed=2),
    "bias": random(N, seed=4),
    "residual": random(1, N, seed=5),
    "y": random(M, N, seed=6),
    "half": random(M, K, seed=7).astype(np.float16),
    "ids": np.array([3, 1, 2], np.int64),
    "experts": experts(),
    "chosen": np.array([[0, 3], [1, 0], [2, 2]], np.int64),
    "parts": random(M, CHOSEN, seed=8),
    "scale": 0.75,
}


def _mixture(x: Any, experts: Any, chosen: Any, parts: Any) -> Any:
    y = vecmat(x[..., None, :], experts[chosen])
    return np.sum(silu(y) * parts[..., None], axis=-2)


def _vectors(x: Any, experts: Any, chosen: Any, y: Any) -> Any:
    z = vecmat(x[..., None, :], experts[chosen])
    return z * y[..., None, :] + np.max(z, axis=-1, keepdims=True), np.mean(z, axis=-2)


FORWARD: Final[dict[str, Case]] = {
    "a product": _case(lambda x, w: x @ w, "x", "w"),
    "RMSNorm": _case(lambda x, gain, w: rms_norm(x, gain) @ w, "x", "gain", "w"),
    "LayerNorm": _case(
        lambda x, gain, offset, w: layer_norm(x, gain, offset) @ w, "x", "gain", "offset", "w"
    ),
    "SwiGLU": _case(lambda x, w, up: silu(x @ w) * (x @ up), "x", "w", "up"),
    "a gated block": _case(
        lambda x, gain, w, up, down: x + gelu(rms_norm(x, gain) @ w) @ down,
        *("x", "gain", "w", "up", "down"),
    ),
    "softmax": _case(lambda x, w, scale: softmax(x @ w * scale), "x", "w", "scale"),
    "columns": _case(
        lambda x, w: silu((x @ w)[..., :12]) * (x @ w)[..., 20:] + x[..., 5:17], "x", "w"
    ),
    "columns of columns": _case(
        lambda x, w: (x[..., 8:] * 2)[..., 3:9] - (x @ w)[..., 4:20][..., :6], "x", "w"
    ),
    "where": _case(lambda x, w, bias: np.where(x @ w > bias, bias, 0.0), "x", "w", "bias"),
    "truth values": _case(
        lambda x: np.where(~((x > 0) & (x < 1)) | (x == 2), -x, (x > 0) * abs(x)), "x"
    ),
    "True and False": _case(lambda x: np.where(np.where(x > 0, True, x < -1), x, 1.0), "x"),
    "a transpose": _case(lambda y, w: np.log(1 + abs(y @ w.T)), "y", "w"),
    "sums without an axis": _case(
        lambda x, w: (np.sum(x, axis=-1), np.max(x @ w, -1)[:, None] * (x @ w)), "x", "w"
    ),
    "a vector": _case(lambda v, w: np.sum(v) * v @ w, v=_ARGUMENTS["gain"], w=_ARGUMENTS["w"]),
    "floats": _case(lambda x, scale, w: (x * scale) @ w / scale, "x", "scale", "w"),
    "numbers of NumPy": _case(
        lambda x, s, t: x * s + t, x=_ARGUMENTS["half"], s=np.float32(2), t=np.array(3.0)
    ),
    "static values": _case(
        lambda n, x, flag, w, name: (x * n if flag else x) @ w,
        n=3,
        x=_ARGUMENTS["x"],
        flag=True,
        w=_ARGUMENTS["w"],
        name="same",
    ),
    "half precision": _case(
        lambda half, w, bias: (half @ w, half * 2, half @ w + bias), "half", "w", "bias"
    ),
    "astype": _case(lambda x, w: (x @ w).astype(np.float16), "x", "w"),
    "broadcasting": _case(
        lambda x, w, bias, residual: x @ w + bias * residual, "x", "w", "bias", "residual"
    ),
    "a result without M": _case(lambda x, w, bias: (x @ w, bias * 2), "x", "w", "bias"),
    "a tuple of one": _case(lambda x: (x + 1,), "x"),
    "an argument that is not used": _case(lambda x, y, w: x @ w, "x", "y", "w"),
    "constants": _case(
        lambda x: np.where(x > np.inf, -np.inf, np.where(x < 0, np.nan, -0.0)) + 1e-30 * x, "x"
    ),
    "rows": _case(lambda ids, w: w.rows(ids), "ids", "w"),
    "decoded": _case(lambda x, w: (x @ w, w.dequantize()), "x", "w"),
    "an expert for each row": _case(
        lambda x, experts, ids: vecmat(x, experts[ids]) * 2, "x", "experts", "ids"
    ),
    "a mixture of experts": _case(_mixture, "x", "experts", "chosen", "parts"),
    "vectors of experts": _case(_vectors, "x", "experts", "chosen", "y"),
    "columns of experts": _case(
        lambda x, experts, chosen: vecmat(x[..., None, :], experts[chosen])[..., 3:9],
        *("x", "experts", "chosen"),
    ),
}


def with_rows(values: Sequence[Any], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return arguments in which the leading axis M is replaced by axes of `shape`."""
    count = int(np.prod(shape))

    def changed(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.ndim == 0 or value.shape[0] != M:
            return value
        return np.resize(value, (count, *value.shape[1:])).reshape(*shape, *value.shape[1:])

    return tuple(map(changed, values))
