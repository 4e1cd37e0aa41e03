"""Functions that together use every generator of the CPU's back end, and their texts."""

import hashlib
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from q4jit.cpu.lower import lower
from q4jit.cpu.schedule import CpuKernel, CpuPlan
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from q4jit.weights.layouts import INTERLEAVED16
from q4jit.weights.reference import float_bytes
from tests.support.kernels import (
    E8M0_LARGEST,
    FLOAT_FORMATS,
    block,
    dequantizer,
    lookups,
    lowered,
    products,
    random_x,
    weight,
    weights,
    wrap,
)
from tests.support.layouts import held_in

TARGETS: Final = ("cpu:x86-64", "cpu:x86-64-v3", "cpu:x86-64-v4", "cpu:aarch64")


def elementary(x: Any, w: Any, a: Any) -> Any:
    """Use every operation that a prologue and an epilogue may have."""
    h = np.tanh(x) * np.exp(-abs(x)) + np.log(np.maximum(x, 0.5)) / np.sqrt(x * x + 1)
    y = np.where(h > 0, h, np.sum(h, axis=-1, keepdims=True)) @ w
    return np.clip(y, -1, 1) ** 3 + np.minimum(np.exp(y), a) + np.tanh(y) + np.log(abs(y))


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Return functions and arguments that together use every generator with every format."""
    every_format = weights(256, (37, 16, 1))
    broken = [infinite(name) for name in FORMATS]
    in_panels = [held_in(INTERLEAVED16, w.tensor) for w in weights(512, [37])]
    padded = weights(37, (37, 1), names=FLOAT_FORMATS)
    gate, up = weight("Q4_0", 256, 37, seed=1), weight("Q6_K", 256, 37, seed=2)
    fused = [random_x(3, 256), random_x(256), gate.tensor, up.tensor, random_x(37)]
    return {
        "products": (
            products(len(every_format)),
            [random_x(3, 256), *(w.tensor for w in every_format)],
        ),
        "not finite": (products(len(broken)), [random_x(1, 256), *broken]),
        "padded": (products(len(padded)), [random_x(3, 37), *(w.tensor for w in padded)]),
        "values": (dequantizer(len(FORMATS)), [w.tensor for w in weights(512, [37])]),
        "rows": (lookups(len(FORMATS)), [np.arange(3), *(w.tensor for w in weights(512, [37]))]),
        "columns": (lookups(len(FORMATS)), [np.arange(3), *in_panels]),
        "block": (block, [*fused, random_x(3, 37), 0.5]),
        "elementary": (elementary, [random_x(3, 256), gate.tensor, 0.5]),
    }


def infinite(name: str) -> Any:
    """Return a weight with an Inf, whose kernels must propagate Inf and NaN."""
    raw = weight(name, 256, 37).tensor.raw.copy()
    fmt = FORMATS[name]
    at = fmt.scale_at or 0
    if fmt.scale_type == "e8m0":
        raw[0, at] = E8M0_LARGEST
    else:
        bits = float_bytes(fmt.float_type or "f16", np.array([np.inf], np.float32))
        raw[0, at : at + len(bits)] = bits
    return wrap(name, 256, raw).tensor


def kernels(target: str) -> list[tuple[str, CpuPlan, CpuKernel]]:
    cpu = find_target(target)
    plans = [(name, lowered(f, cpu, args)) for name, (f, args) in cases().items()]
    return [(name, plan, kernel) for name, plan in plans for kernel in plan.kernels]


def texts(target: str) -> list[str]:
    return [lower(plan, kernel).text for _, plan, kernel in kernels(target)]


def digest(target: str) -> str:
    return hashlib.sha256("\n".join(texts(target)).encode()).hexdigest()
