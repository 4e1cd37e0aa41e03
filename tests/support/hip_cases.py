"""Named kernels for GPUs, whose texts and register counts are kept in golden files."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit import ExpertTensor, QuantizedTensor, vecmat
from q4jit.floats import FloatType, numpy_dtype
from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    GEMV_DOT,
    TILE_FMA,
    TILE_MATRIX,
)
from q4jit.hip.render import render, render_generic
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target
from q4jit.weights.formats import FORMATS
from tests.support.hip import hip_plan

AMD_ARCHS: Final = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201")
BLOCK_FORMATS: Final = tuple(name for name, fmt in FORMATS.items() if fmt.float_type is None)


@dataclass(frozen=True)
class Case:
    """A function, the arguments that it is planned for, and the options of the plan."""

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    plan_options: PlanOptions

    def sources(self, arch: str, platform: str | None = None) -> list[Source]:
        """Return the text of every kernel, in the order of launches; platform: see `render`."""
        plan = hip_plan(self.function, f"hip:{arch}", self.args, self.plan_options)
        return [render(plan, kernel, platform) for kernel in plan.kernels]


@dataclass(frozen=True)
class Generic:
    """The plain product of a format, whose M, N and K are arguments of the launch."""

    name: str
    format: str

    def sources(self, arch: str, platform: str | None = None) -> list[Source]:
        """Return the only text; platform: see `render`."""
        fmt, target = FORMATS[self.format], find_target(f"hip:{arch}")
        return [render_generic(fmt, target, 256, platform)]


# --- functions and their arguments ----------------------------------------------------------------


def product(x: Any, w: Any) -> Any:
    return x @ w


def transposed(y: Any, w: Any) -> Any:
    return y @ w.T


def transposed_norm(y: Any, gain: Any, w: Any, r: Any) -> Any:
    """RMSNorm and a residual."""
    h = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-5) * gain
    return h @ w.T + r


def gated(x: Any, gate: Any, up: Any, bias: Any) -> Any:
    """Bias and SiLU gating."""
    g = x @ gate + bias
    return g / (1 + np.exp(-g)) * (x @ up)


def residual(x: Any, w: Any, r: Any) -> Any:
    return r + x @ w


def softcap(x: Any, w: Any, cap: Any) -> Any:
    return cap * np.tanh(x @ w / cap)


def normed(x: Any, gain: Any, w: Any) -> Any:
    """RMSNorm; its result is also the residual."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    return h + h @ w


def rms_norm(x: Any, gain: Any, w: Any) -> Any:
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain) @ w


def layer_norm(x: Any, gain: Any, bias: Any, w: Any) -> Any:
    d = x - np.mean(x, axis=-1, keepdims=True)
    return (d / np.sqrt(np.mean(d * d, axis=-1, keepdims=True) + 1e-5) * gain + bias) @ w


def softmax(x: Any, w: Any) -> Any:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return (e / np.sum(e, axis=-1, keepdims=True)) @ w


def swiglu(x: Any, gain: Any, gate: Any, up: Any) -> Any:
    """RMSNorm, then SiLU gating."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate
    return g / (1 + np.exp(-g)) * (h @ up)


def values(w: Any) -> Any:
    return w.dequantize()


def lookup(ids: Any, table: Any) -> Any:
    return table.rows(ids)


def zeros(*shape: int) -> NDArray[np.float32]:
    """Return activations; only their shape matters."""
    return np.zeros(shape, np.float32)


def halves(float_type: FloatType, *shape: int) -> NDArray[Any]:
    """Return half-precision activations; only their shape and type matter."""
    return np.zeros(shape, numpy_dtype(float_type))


@functools.cache
def tensor(name: str, k: int, n: int) -> QuantizedTensor:
    """Return a weight; only its shape and format matter."""
    rows = np.zeros((n, FORMATS[name].column_bytes(k)), np.uint8)
    return QuantizedTensor.from_bytes(rows, shape=(k, n), format=name)


def of_experts(x: Any, w: Any, ids: Any) -> Any:
    return vecmat(x[..., None, :], w[ids])


# --- the cases ------------------------------------------------------------------------------------


def case(name: str, function: Callable[..., Any], *args: Any, **plan_options: Any) -> Case:
    """Return a case; `plan_options` are fields of `PlanOptions`."""
    return Case(name, function, args, PlanOptions(**plan_options))


K, N = 512, 96  # the size does not change the length of a text
_W: Final = {name: tensor(name, K, N) for name in FORMATS}
_EXPERTS: Final = ExpertTensor.stack([tensor("Q4_0", K, N)] * 128)
_SQUARE: Final = tensor("Q4_0", K, K)
_TALL: Final = tensor("Q4_0", 4096, K)
_GATE_UP: Final = [_W["Q4_0"]] * 2
GOLDEN: Final[tuple[tuple[str, Case | Generic], ...]] = (
    ("gfx1030", case("element", product, zeros(1, K), _W["Q4_0"], schedule=ELEMENT)),
    (
        "gfx1100",
        case("gemv_gated", gated, zeros(1, K), _W["Q4_0"], _W["Q8_0"], zeros(N), schedule=GEMV),
    ),
    ("gfx90a", case("gemv_gguf", residual, zeros(4, K), _W["Q8_0"], zeros(4, N), layout="gguf")),
    ("sm_90", case("gemv_f16_with_a_tail", product, zeros(2, 40), tensor("F16", 40, 37))),
    ("gfx1100", case("gemv_normed", normed, zeros(1, K), zeros(K), _SQUARE, schedule=GEMV)),
    ("gfx1100", case("gemv_pairs", product, zeros(1, K), _W["Q4_0"])),
    ("gfx1201", case("gemv_matrix", residual, zeros(3, K), _W["Q4_0"], zeros(3, N))),
    ("gfx90a", case("gemv_matrix_16", normed, zeros(16, K), zeros(K), tensor("Q4_0", K, K))),
    ("gfx1100", case("gemv_matrix_rms", rms_norm, zeros(4, K), zeros(K), _W["Q4_0"])),
    ("sm_90", case("gemv_matrix_gated", gated, zeros(4, K), _W["Q4_0"], _W["Q4_0"], zeros(N))),
    (
        "gfx1201",
        case(
            "gemv_dot",
            residual,
            zeros(3, K),
            _W["Q6_K"],
            zeros(3, N),
            precision="i8",
            schedule=GEMV_DOT,
        ),
    ),
    ("gfx1030", case("tile_fma", softcap, zeros(70, K), _W["Q4_1"], 30.0)),
    ("gfx90a", case("tile_mfma", product, zeros(70, K), _W["Q4_1"], schedule=TILE_MATRIX)),
    ("gfx1100", case("tile_wmma", normed, zeros(70, K), zeros(K), _SQUARE, schedule=TILE_MATRIX)),
    (
        "sm_90",
        case(
            "tile_f16",
            residual,
            zeros(70, K),
            _W["Q6_K"],
            zeros(70, N),
            precision="f16",
            schedule=TILE_MATRIX,
        ),
    ),
    ("gfx90a", case("halves_mfma", product, zeros(40, K), _W["Q4_0"])),
    ("gfx1100", case("halves_wmma", gated, zeros(70, K), *_GATE_UP, zeros(N), precision="f16")),
    ("sm_90", case("halves_cluster", product, zeros(8, 2048), tensor("Q4_0", 2048, N))),
    ("sm_90", case("halves_warpgroup", product, zeros(64, K), _W["Q4_0"])),
    ("sm_90", case("halves_warpgroup_f16", product, zeros(64, K), _W["Q4_0"], precision="f16")),
    ("sm_90", case("gemv_transposed", transposed, zeros(1, N), _W["Q4_0"])),
    (
        "gfx90a",
        case(
            "gemv_transposed_norm",
            transposed_norm,
            *(zeros(4, N), zeros(N), _W["Q4_1"], zeros(4, K)),
        ),
    ),
    ("gfx1100", case("tile_transposed", transposed, zeros(40, N), _W["Q6_K"])),
    ("sm_80", case("transposed_wave", transposed, zeros(8, N), _W["Q4_0"])),
    ("sm_90", case("transposed_warpgroup", transposed, zeros(64, 1000), tensor("Q4_0", K, 1000))),
    ("sm_90", case("transposed_warpgroup_pair", transposed, zeros(512, K), _TALL, precision="f16")),
    (
        "gfx1201",
        case(
            "gemv_bf16",
            residual,
            halves("bf16", 1, K),
            _W["Q8_0"],
            halves("f16", 1, N),
            schedule=GEMV,
        ),
    ),
    ("sm_90", case("gemv_matrix_bf16", product, halves("bf16", 4, K), _W["Q4_0"])),
    ("gfx1100", case("halves_wmma_of_bf16", product, halves("bf16", 40, K), _W["Q4_0"])),
    ("sm_90", case("halves_warpgroup_of_f16", product, halves("f16", 32, K), _W["Q4_0"])),
    ("sm_90", case("gemv_sub_minima", product, zeros(1, K), _W["Q4_K"], schedule=GEMV)),
    ("gfx1100", case("gemv_half_minima", product, zeros(2, K), _W["Q2_K"], schedule=GEMV)),
    (
        "sm_90",
        case(
            "gemv_dot_table", product, zeros(1, K), _W["IQ4_XS"], precision="i8", schedule=GEMV_DOT
        ),
    ),
    ("gfx1100", case("gemv_e8m0", product, zeros(1, K), _W["MXFP4"], schedule=GEMV)),
    ("gfx1100", case("tile_half_minima", product, zeros(70, K), _W["Q2_K"], schedule=TILE_MATRIX)),
    ("sm_90", case("gemv_matrix_minima", product, zeros(1, K), _W["Q4_K"])),
    ("gfx90a", case("gemv_matrix_sub_blocks", product, zeros(4, K), _W["Q6_K"])),
    ("gfx1201", case("gemv_matrix_table", product, zeros(2, K), _W["IQ4_XS"])),
    ("sm_90", case("halves_warpgroup_half_minima", product, zeros(70, K), _W["Q2_K"])),
    ("gfx1100", case("halves_bytes", product, zeros(40, K), _W["Q8_0"])),
    ("gfx1100", case("experts", of_experts, zeros(1, K), _EXPERTS, np.zeros((1, 8), np.int64))),
    (
        "sm_90",
        case("experts_sorted", of_experts, zeros(9, K), _EXPERTS, np.zeros((9, 8), np.int64)),
    ),
    ("gfx90a", case("dequantize", values, _W["Q6_K"])),
    ("gfx90a", case("dequantize_gguf", values, _W["Q5_K"], layout="gguf")),
    ("gfx1100", case("lookup", lookup, np.arange(3), _W["Q8_0"])),
    ("gfx90a", case("lookup_tiles", lookup, np.arange(3), _W["Q5_K"], layout="tiles16")),
    ("gfx1030", Generic("generic", "Q4_1")),
    ("sm_90", Generic("generic_mxfp4", "MXFP4")),
)

_LAYER: Final = 4096, 4096  # K and N of a layer of a model
_TWO: Final = [tensor("Q4_0", *_LAYER)] * 2
_NORM: Final = [zeros(4096), zeros(4096)]


def _large(name: str, fmt: str, m: int, **plan_options: Any) -> Case:
    return case(name, product, zeros(m, _LAYER[0]), tensor(fmt, *_LAYER), **plan_options)


def _transposed(name: str, fmt: str, m: int) -> Case:
    return case(name, transposed, zeros(m, _LAYER[1]), tensor(fmt, *_LAYER))


_TRANSPOSED: Final = ((1, "Q4_0"), (4, "Q4_0"), (2, "Q6_K"), (4, "Q4_1"), (70, "Q4_0"))
# each structure of `tiles16`: minima of sub-blocks, scales of sub-blocks, a table, whole bytes
_PANELS: Final = ("Q4_K", "Q6_K", "IQ4_XS", "Q8_0")
RECORDED: Final[tuple[Case | Generic, ...]] = (
    _large("element Q4_0", "Q4_0", 1, schedule=ELEMENT),
    _large("chosen 1 Q4_0", "Q4_0", 1),
    _large("chosen 16 Q4_0", "Q4_0", 16),
    *(_large(f"chosen 1 {fmt}", fmt, 1) for fmt in _PANELS),
    *(_large(f"chosen 8 {fmt}", fmt, 8) for fmt in _PANELS),
    case("chosen 8 gated Q4_0", gated, zeros(8, 4096), *_TWO, zeros(4096)),
    case("chosen 4 layer norm", layer_norm, zeros(4, 4096), *_NORM, tensor("Q4_0", *_LAYER)),
    _large("gemv 1 Q4_0", "Q4_0", 1, schedule=GEMV),
    _large("gemv 1 Q6_K", "Q6_K", 1, schedule=GEMV),
    _large("gemv 1 Q2_K", "Q2_K", 1, schedule=GEMV),
    _large("gemv 16 Q4_K", "Q4_K", 16, schedule=GEMV),
    _large("gemv 1 IQ4_XS", "IQ4_XS", 1, schedule=GEMV),
    _large("gemv 4 Q4_0 gguf", "Q4_0", 4, layout="gguf"),
    _large("gemv 16 Q8_0", "Q8_0", 16, schedule=GEMV),
    case("gemv 1 gated Q4_0", gated, zeros(1, 4096), *_TWO, zeros(4096), schedule=GEMV),
    _large("gemv_dot 1 Q4_0", "Q4_0", 1, precision="i8", schedule=GEMV_DOT),
    _large("gemv_dot 16 Q6_K", "Q6_K", 16, precision="i8", schedule=GEMV_DOT),
    _large("gemv_dot 1 Q2_K", "Q2_K", 1, precision="i8", schedule=GEMV_DOT),
    _large("gemv_dot 16 Q5_K", "Q5_K", 16, precision="i8", schedule=GEMV_DOT),
    _large("gemv_dot 1 MXFP4", "MXFP4", 1, precision="i8", schedule=GEMV_DOT),
    _large("tile_fma Q4_0", "Q4_0", 512, schedule=TILE_FMA),
    _large("tile Q4_0", "Q4_0", 512),
    _large("tile Q2_K", "Q2_K", 512),
    _large("tile Q4_1 f16", "Q4_1", 512, precision="f16"),
    *(_large(f"tile {fmt}", fmt, 512) for fmt in _PANELS),
    _large("tile Q6_K gguf", "Q6_K", 512, layout="gguf"),
    case("tile normed Q6_K", normed, zeros(512, 4096), zeros(4096), tensor("Q6_K", *_LAYER)),
    *(_transposed(f"w.T {m} {fmt}", fmt, m) for m, fmt in _TRANSPOSED),
    case("dequantize Q6_K", values, tensor("Q6_K", *_LAYER)),
    case("lookup Q4_0", lookup, np.arange(512), tensor("Q4_0", *_LAYER)),
    Generic("generic Q4_0", "Q4_0"),
)
