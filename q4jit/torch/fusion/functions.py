"""The decorated functions of a fused decoder layer: all of its arithmetic with weights.

    x ──▶ project ──▶ q, k, v ──▶ attention, by PyTorch ──▶ mixed
    x, mixed ──▶ finish: x += mixed @ o; x += down(activation(gate) * up)

Gains and biases that a layer lacks are None. `zero`: gains are zero-centred, the norm multiplies by
1 + gain, as in Gemma. Weights that hold two or three matrices side by side, as those of Phi-3, are
divided by columns.
"""

from typing import Any, Final

import numpy as np

from q4jit.torch.arithmetic import activated, affine, of_each_precision


def _normed(x: Any, gain: Any, eps: Any, zero: bool) -> Any:
    scaled = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return scaled * (1 + gain) if zero else scaled * gain


def _typed(y: Any, x: Any, zero: bool) -> Any:
    # norms with zero-centred gains keep the type of x; others promote it, as NumPy does
    return y.astype(x.dtype) if zero else y


def _project(
    x: Any,
    gain: Any,
    eps: Any,
    zero: bool,
    q: Any,
    q_bias: Any,
    k: Any,
    k_bias: Any,
    v: Any,
    v_bias: Any,
) -> Any:
    h = _normed(x, gain, eps, zero)
    made = affine(h, q, q_bias), affine(h, k, k_bias), affine(h, v, v_bias)
    return tuple([_typed(y, x, zero) for y in made])


def _project_divided(
    x: Any, gain: Any, eps: Any, zero: bool, qkv: Any, bias: Any, first: int, second: int
) -> Any:
    y = _typed(affine(_normed(x, gain, eps, zero), qkv, bias), x, zero)
    return y[..., :first], y[..., first:second], y[..., second:]


def _added(x: Any, mixed: Any, o: Any, o_bias: Any, after: Any, eps: Any, zero: bool) -> Any:
    y = affine(mixed, o, o_bias)
    return x + (y if after is None else _normed(y, after, eps, zero))


def _gated(
    x: Any,
    gain: Any,
    after: Any,
    eps: Any,
    zero: bool,
    activation: str,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> Any:
    h = _normed(x, gain, eps, zero)
    g = affine(h, gate, gate_bias)
    if up is None:
        half = g.shape[-1] // 2
        g, u = g[..., :half], g[..., half:]
    else:
        u = affine(h, up, up_bias)
    return _added(x, activated(g, activation) * u, down, down_bias, after, eps, zero)


def _add(x: Any, mixed: Any, o: Any, o_bias: Any, after: Any, eps: Any, zero: bool) -> Any:
    return _typed(_added(x, mixed, o, o_bias, after, eps, zero), x, zero)


def _feed_forward(
    x: Any,
    gain: Any,
    after: Any,
    eps: Any,
    zero: bool,
    activation: str,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> Any:
    y = _gated(x, gain, after, eps, zero, activation, gate, gate_bias, up, up_bias, down, down_bias)
    return _typed(y, x, zero)


def _finish(
    x: Any,
    mixed: Any,
    o: Any,
    o_bias: Any,
    after_attention: Any,
    gain: Any,
    after: Any,
    eps: Any,
    zero: bool,
    activation: str,
    gate: Any,
    gate_bias: Any,
    up: Any,
    up_bias: Any,
    down: Any,
    down_bias: Any,
) -> Any:
    z = _added(x, mixed, o, o_bias, after_attention, eps, zero)
    y = _gated(z, gain, after, eps, zero, activation, gate, gate_bias, up, up_bias, down, down_bias)
    return _typed(y, x, zero)


PROJECT: Final = of_each_precision(_project)
PROJECT_DIVIDED: Final = of_each_precision(_project_divided)
ADD: Final = of_each_precision(_add)
FEED_FORWARD: Final = of_each_precision(_feed_forward)
FINISH: Final = of_each_precision(_finish)
