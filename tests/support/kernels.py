"""Helpers for tests of kernels: random weights, an oracle, the precision contract, other CPUs."""

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from q4jit import ExpertTensor, QuantizedTensor, specialize
from q4jit.arrays.arguments import holds_ids
from q4jit.arrays.call_shapes import lead_shape
from q4jit.arrays.specs import spec_of
from q4jit.compilers import cache, llvm
from q4jit.cpu.experts import ChosenExperts
from q4jit.cpu.lower import lower
from q4jit.cpu.schedule import EXPERT_SLOTS, CpuKernel, CpuPlan, digits_bytes, make_plan, padded_k
from q4jit.dispatcher import Specialized
from q4jit.floats import float_type_of, numpy_dtype
from q4jit.frontend.specs import (
    ScalarSpec,
    Signature,
    Spec,
    WeightSpec,
    array_spec,
    ids_spec,
    with_inner_axes,
)
from q4jit.frontend.trace import trace
from q4jit.plan.kernels import Slot
from q4jit.targets import Target, find_target, host_target, runs_here
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.reference import float_bytes, store_scales
from tests.support.emulator import X86_64_CPUS, run_kernel
from tests.support.emulator import Slot as Argument
from tests.support.tools import lack

F32: Final = np.float32
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.integer[Any]]

BOUND: Final = 2e-6  # the contract of `precision="f32"`
FLOAT_FORMATS: Final = ("F16", "F32", "BF16")
E8M0_LARGEST: Final = 254  # 2^126 times 12 is beyond f32's range
# bits of ±0, the smallest and largest denormal, 2^-14, the largest number, ±Inf, NaN
_EDGES: Final = (0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0xFE00)
FORMATS_OF_32: Final = tuple(  # K may be any multiple of 32
    name for name, fmt in FORMATS.items() if fmt.block_elements <= 32
)

IN_PROCESS: Final = ("cpu", "cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64")

_TWO_ZEROS: Final = 0x88  # a byte of Q4_0 with the code 8, the value 0, in both nibbles
_NO_GAP: Final = 0
# QEMU 7.2 reads all bytes of a masked load (`vmaskmovps`), a real CPU only those under the mask.
# The gap holds NaN, so that a result shows any use of these bytes.
_MASKED_LOAD_GAP: Final = 64


def require_target(name: str) -> str:
    """Return `name`; if this CPU lacks the features, the test is skipped, or fails in CI."""
    target = find_target(name)
    if not runs_here(target):
        missing = ", ".join(sorted(target.features - host_target().features)) or target.family
        lack(f"this CPU ({host_target()}) cannot run {name}: it lacks {missing}")
    return name


@dataclass(frozen=True)
class Guarded:
    """A CPU that runs kernels on arrays before guard pages."""

    target: str
    native: bool = False

    def __str__(self) -> str:
        return f"{self.target} {'here' if self.native else 'in QEMU'}"

    @property
    def model(self) -> str | None:
        """QEMU's CPU model; None for its default or this CPU."""
        target = find_target(self.target)
        known = {**X86_64_CPUS, "aarch64": "max" if target.has("dotprod") else None}
        return None if self.native else known[target.arch]

    @property
    def gap_bytes(self) -> int:
        """Bytes between an array and its guard page."""
        wide = not self.native and self.target == "cpu:x86-64-v3"
        return _MASKED_LOAD_GAP if wide else _NO_GAP


GUARDED: Final = (
    Guarded("cpu:x86-64"),
    Guarded("cpu:x86-64-v3"),
    Guarded("cpu:aarch64"),
    Guarded("cpu:aarch64+dotprod"),
    Guarded("cpu:x86-64-v3", native=True),
    Guarded("cpu:x86-64-v4", native=True),
    Guarded("cpu:x86-64-v4+avx512vnni", native=True),
)


def each_guarded(cpus: Sequence[Guarded]) -> pytest.MarkDecorator:
    """Run a test on each of `cpus`."""
    return pytest.mark.parametrize(
        "cpu",
        [
            pytest.param(cpu, id=str(cpu), marks=() if cpu.native else pytest.mark.emulated)
            for cpu in cpus
        ],
    )


every_guarded_cpu = each_guarded(GUARDED)


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A quantised tensor and its values [K, N], decoded to float64 by the gguf package."""

    tensor: QuantizedTensor
    values: Doubles

    def __str__(self) -> str:
        return f"{self.tensor.format} {list(self.tensor.shape)}"


def turned(w: Weight) -> Weight:
    """Return a weight with the values of its transpose, for the checks of products with `w.T`."""
    return Weight(w.tensor, w.values.T)


def wrap(name: str, k: int, blocks: NDArray[Any]) -> Weight:
    """Return the weight of columns [N, …] of any dtype."""
    n = len(blocks)
    columns = np.frombuffer(blocks.tobytes(), np.uint8).reshape(n, -1)
    tensor = QuantizedTensor.from_bytes(columns, shape=(k, n), format=name)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return Weight(tensor, decoded(name, columns).astype(np.float64))


def decoded(name: str, columns: NDArray[np.uint8]) -> Floats:
    """Decode a matrix [K, N] with gguf."""
    with np.errstate(all="ignore"):
        values = quants.dequantize(columns, gguf.GGMLQuantizationType[name])
    return np.asarray(values, F32).T


def f16_scales(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float16]:
    """Return random f16 scales: normal, zero, denormal, largest, mixed, or of random bits."""
    sign = rng.choice([-1.0, 1.0], shape)
    values: Doubles
    match kind:
        case "normal":
            values = rng.normal(0, 0.05, shape)
        case "zero":
            values = np.zeros(shape)
        case "denormal":
            values = rng.integers(1, 1024, shape).astype(np.float64) / 2**24
        case "largest":
            values = np.full(shape, 65504.0, np.float64)
        case "mixed":
            kinds = ("normal", "zero", "denormal", "largest")
            choices = [f16_scales(k, shape, rng).astype(np.float64) for k in kinds]
            values = np.choose(rng.integers(0, 4, shape), choices)
        case "bits":
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            bits.reshape(-1)[: len(_EDGES)] = _EDGES[: bits.size]
            return bits.view(np.float16)
        case _:
            raise AssertionError(kind)
    return np.asarray(sign * values, np.float16)


@functools.cache
def weight(name: str, k: int, n: int, scales: str = "normal", seed: int = 0) -> Weight:
    """Return a random weight with a kind of `f16_scales` (of elements, for F16 and F32)."""
    rng = np.random.default_rng([seed, k, n])
    fmt = FORMATS[name]
    if fmt.float_type is not None:
        values = f16_scales(scales, (n, k), rng).astype(F32)
        if name != "F16" and scales == "normal":  # all bits of the fraction
            values *= rng.uniform(1, 2, (n, k)).astype(F32)
        return wrap(name, k, float_bytes(fmt.float_type, values))
    return wrap(name, k, random_blocks(fmt, k, n, scales, rng))


def random_blocks(
    fmt: Format, k: int, n: int, scales: str, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Return blocks uint8 [n, blocks, block_bytes] of random codes and a kind of scales."""
    blocks = rng.integers(0, 256, (n, k // fmt.block_elements, fmt.block_bytes), np.uint8)
    if fmt.scale_type == "e8m0":
        set_e8m0(fmt, blocks, scales, rng)
    elif fmt.scale_at is not None:
        set_f16(blocks, fmt.scale_at, f16_scales(scales, blocks.shape[:2], rng))
    if fmt.minimum_at is not None:
        set_f16(blocks, fmt.minimum_at, f16_scales(scales, blocks.shape[:2], rng))
    return blocks


def set_e8m0(fmt: Format, blocks: NDArray[np.uint8], scales: str, rng: np.random.Generator) -> None:
    """Write a kind of scales in E8M0, which has no signs; all its bytes are the kind `bits`."""
    assert fmt.scale_at is not None, "a block format without a scale"
    if scales == "bits":
        exponents = rng.permutation(np.resize(np.arange(256), blocks[..., 0].size))
        blocks[..., fmt.scale_at] = exponents.reshape(blocks.shape[:2])
    else:
        store_scales(fmt, blocks, np.abs(f16_scales(scales, blocks.shape[:2], rng)))


def set_f16(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float16]) -> None:
    """Write the f16 field at byte `at` of every block."""
    blocks[..., at : at + 2] = values.astype("<f2")[..., np.newaxis].view(np.uint8)


def weights(
    k: int, widths: Sequence[int], scales: str = "normal", names: Sequence[str] = tuple(FORMATS)
) -> list[Weight]:
    """Return a weight for each format and each N."""
    return [weight(name, k, n, scales) for name in names for n in widths]


def weights_in_turn(
    k: int, widths: Sequence[int], scales: str = "normal", names: Sequence[str] = tuple(FORMATS)
) -> list[Weight]:
    """Return a weight for each format, with each N in turn."""
    return [
        weight(name, k, n, scales) for name, n in zip(names, itertools.cycle(widths), strict=False)
    ]


def spoiled(name: str, k: int, n: int, value: float, field: str) -> Weight:
    """Return a weight with `value` in field d or m of some blocks (in elements of floats).

    A scale in E8M0 has no Inf or NaN: it gets the exponent 254, with which elements overflow.
    """
    fmt = FORMATS[name]
    rng = np.random.default_rng([k, n])
    columns = sorted({0, 5, 16, n - 1} & set(range(n)))
    if fmt.float_type is not None:
        values = f16_scales("normal", (n, k), rng).astype(F32)
        for i, column in enumerate(columns):
            values[column, [0, k // 2, k - 1][i % 3]] = value
        return wrap(name, k, float_bytes(fmt.float_type, values))
    at = fmt.scale_at if field == "d" else fmt.minimum_at
    assert at is not None
    blocks = random_blocks(fmt, k, n, "normal", rng)
    for i, column in enumerate(columns):
        block = blocks[column, i % blocks.shape[1]]
        if fmt.scale_type == "e8m0":
            block[at] = E8M0_LARGEST
        else:
            set_f16(block, at, np.asarray(value, np.float16))
    return wrap(name, k, blocks)


def spoiled_weights(k: int, widths: tuple[int, ...], value: float) -> list[Weight]:
    """Return a spoiled weight of every format, and with a spoiled minimum if it has one.

    They have each N in turn.
    """
    fields = [(name, "d") for name in FORMATS]
    fields += [(name, "m") for name, fmt in FORMATS.items() if fmt.minimum_at is not None]
    turns = zip(fields, itertools.cycle(widths), strict=False)
    return [spoiled(name, k, n, value, field) for (name, field), n in turns]


def without_weight(k: int, n: int, *elements: int) -> Weight:
    """Return a Q4_0 weight with zeros as `elements` of every column."""
    blocks = random_blocks(FORMATS["Q4_0"], k, n, "normal", np.random.default_rng(elements[0]))
    for element in elements:
        blocks[:, element // 32, 2 + element % 16] = _TWO_ZEROS  # elements i and i + 16
    w = wrap("Q4_0", k, blocks)
    assert not w.values[[*elements]].any()
    return w


def all_bits() -> list[Weight]:
    """Return weights of random bits (with NaN, Inf, denormals) and of whole and padded K and N."""
    every_format = [weight(name, 512, 37, "bits") for name in FORMATS]
    return [*every_format, weight("Q4_0", 96, 16, "bits"), weight("F16", 37, 5, "bits")]


def tables() -> list[Weight]:
    """Return weights of random bits (with NaN, Inf, denormals) and of whole and odd K."""
    every_format = [weight(name, 512, 37, "bits") for name in FORMATS]
    return [*every_format, weight("Q4_0", 96, 37, "bits"), weight("F16", 37, 37, "bits")]


# --- functions ------------------------------------------------------------------------------------


def one_product(x: Any, w: Any) -> Any:
    return x @ w


def block(x: Any, gain: Any, gate: Any, up: Any, bias: Any, residual: Any, scale: Any) -> Any:
    """Return RMSNorm, two products, bias, SiLU and a residual, which make one kernel."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate + bias
    return residual + scale * (g / (1 + np.exp(-g)) * (h @ up))


def around(x: Floats, gate: Weight, up: Weight) -> tuple[list[Any], NDArray[np.float64]]:
    """Return arguments of `block` for x and two weights, and its result in f64."""
    k, n = gate.values.shape
    gain, bias, residual = random_x(k), random_x(n), random_x(len(x), n)
    args = [x, gain, gate.tensor, up.tensor, bias, residual, 0.5]
    wide = [a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args]
    wide[2:4] = [gate.values, up.values]
    return args, block(*wide)


def relative_error(y: Floats, exact: NDArray[np.float64]) -> float:
    """Return the rms error divided by the rms of the exact result."""
    return float(np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)))


@functools.cache
def products(count: int) -> Callable[..., tuple[Any, ...]]:
    """Return a function of x and `count` weights that returns all products, in one kernel."""

    def function(x: Any, *weights: Any) -> tuple[Any, ...]:
        return tuple(x @ w for w in weights)

    function.__signature__ = _signature("x", *(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "products"
    return function


@functools.cache
def joined_products(count: int) -> Callable[..., tuple[Any, ...]]:
    """Return a function of x and `count` weights that returns all products and their sum.

    The sum makes GPUs compute them in one kernel. The weights must have the same N.
    """

    def function(x: Any, *weights: Any) -> tuple[Any, ...]:
        ys = tuple(x @ w for w in weights)
        return *ys, functools.reduce(operator.add, ys)

    function.__signature__ = _signature("x", *(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "products"
    return function


@functools.cache
def dequantizer(count: int) -> Callable[..., tuple[Any, ...]]:
    """Return a function of `count` weights that returns all their values."""

    def function(*weights: Any) -> tuple[Any, ...]:
        return tuple(w.dequantize() for w in weights)

    function.__signature__ = _signature(*(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "values"
    return function


@functools.cache
def lookups(count: int) -> Callable[..., tuple[Any, ...]]:
    """Return a function of ids and `count` weights that returns these rows of all weights."""

    def function(ids: Any, *weights: Any) -> tuple[Any, ...]:
        return tuple(w.rows(ids) for w in weights)

    function.__signature__ = _signature("ids", *(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "rows"
    return function


def _signature(*names: str) -> inspect.Signature:
    return inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
    )


def slices(x: Any, w: Any) -> tuple[Any, ...]:
    y = x @ w
    return y[..., 16:32], y[..., 5:36], y[..., 36:37], y[..., 32:37], y[..., :8]


@functools.cache
def on(target: str, function: Callable[..., Any]) -> Specialized[..., Any]:
    """Return `function` specialised for a target; tests share it, so it compiles once."""
    return specialize(function, target=require_target(target))


# --- the contract ---------------------------------------------------------------------------------


def errors(y: Floats, x: Floats, w: Doubles) -> Doubles:
    """Return the relative error of every element; NaN if the exact value exceeds f32's range."""
    k = x.shape[-1]
    wide = x.astype(np.float64)
    exact = wide @ w
    scale = np.sqrt(wide**2 @ w**2) + k * 2.0**-149
    inside = np.abs(exact) <= np.finfo(F32).max
    with np.errstate(invalid="ignore"):  # such outputs may be Inf
        return np.where(inside, np.abs(y - exact) / scale, np.nan)


def assert_contract(y: Floats, x: Floats, w: Weight, bound: float = BOUND) -> None:
    """Check the bound for each row of y, as the rms of a whole result could hide a bad row."""
    assert y.dtype == F32
    assert y.shape == (*x.shape[:-1], w.values.shape[1])
    if y.size == 0:
        return
    relative = errors(y, x, w.values)
    counted = np.isfinite(relative) | np.isnan(y)  # a NaN instead of a number counts
    squares = np.where(counted, relative, 0.0) ** 2
    rms = np.sqrt(squares.sum(-1) / np.maximum(counted.sum(-1), 1))
    worst = np.max(rms)
    assert worst < bound, f"{w}: rms error {worst:.2e} in row {np.argmax(rms)} of {list(x.shape)}"


def kinds(y: NDArray[Any]) -> NDArray[Any]:
    """Return a result with 0 instead of finite numbers: NaN, Inf and −Inf remain."""
    return np.where(np.isfinite(y), 0, y)


def exact_products(x: Floats, w: Doubles) -> Doubles:
    """Return x @ w without BLAS, which may treat NaN and Inf differently."""
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.stack([(row[:, np.newaxis] * w).sum(0) for row in wide])


def assert_ieee(y: Floats, x: Floats, w: Weight, bound: float = BOUND) -> None:
    """Check that NaN and Inf are where float64 has them, and the contract elsewhere.

    Finite columns whose products or sums may be beyond f32's range are left out.
    """
    exact = exact_products(x, w.values)
    with np.errstate(all="ignore"):
        huge = np.abs(x).astype(np.float64) @ np.abs(w.values) > np.finfo(F32).max
    inside = ~(np.isfinite(exact) & huge)
    np.testing.assert_array_equal(kinds(y)[inside], kinds(exact)[inside], err_msg=str(w))
    rows = np.isfinite(x).all(1)
    columns = np.isfinite(w.values).all(0) & ~huge[rows].any(0)
    clean = Weight(w.tensor, w.values[:, columns])
    assert_contract(np.ascontiguousarray(y[rows][:, columns]), x[rows], clean, bound)


def assert_same_bits(got: Floats, w: Weight) -> None:
    """Check the bits of a weight's values, except the payload of NaN."""
    _assert_bits(got, decoded(w.tensor.format, w.tensor.raw), w)


def assert_rows(got: Floats, ids: Ids, w: Weight) -> None:
    """Check the bits of GGUF rows of a weight, except the payload of NaN."""
    _assert_bits(got, decoded(w.tensor.format, w.tensor.raw).T[ids], w)


def _assert_bits(got: Floats, expected: Floats, w: Weight) -> None:
    assert got.dtype == F32
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), err_msg=str(w))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        got[numbers].view(np.uint32), expected[numbers].view(np.uint32), err_msg=str(w)
    )


# --- activations and ids --------------------------------------------------------------------------


def random_x(*shape: int, seed: int = 0) -> Floats:
    """Return normally distributed activations."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(F32)


def distributions(k: int) -> dict[str, Floats]:
    """Return a row of x for each distribution of the contract."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(k)
    outliers = np.where(rng.random(k) < 0.02, 100 * normal, normal)
    rows = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, k),
        "lognormal": rng.lognormal(0, 3, k) * rng.choice([-1, 1], k),
        "outliers": outliers,
        "small": normal * 1e-30,
        "large": normal * 1e30,
        "zero": 0 * normal,
        "mixed magnitudes": normal * 10.0 ** rng.uniform(-20, 20, k),
    }
    for size in (1e4, 1e10, 1e20, 1e30, 1e38):
        rows[f"one element of {size:.0e}"] = np.where(np.arange(k) == 300 % k, size, normal)
    return {name: row.astype(F32) for name, row in rows.items()}


def not_finite_rows(k: int) -> Floats:
    """Return rows with NaN or Inf at each kind of position, and finite rows between them."""
    positions = sorted({0, 3, 15, 16, 31, 32, k // 2, k - 1} & set(range(k)))
    values = [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [np.inf, np.inf], [np.nan, np.inf]]
    cases = list(itertools.product(values, positions))
    x = random_x(2 * len(cases) + 1, k)
    for row, (pair, position) in enumerate(cases):
        for i, value in enumerate(pair):
            x[2 * row + 1, (position + 33 * i) % k] = value
    x[-1, :] = 0
    x[-1, k // 2] = np.inf  # one Inf among zeros
    return x


def hard_x(k: int) -> list[Floats]:
    """Return two x of three rows for scales of Inf: zeros, numbers, huge numbers, NaN and Inf."""
    x = random_x(6, k)
    x[0, 1 : k // 2] = 0  # 0·Inf is NaN
    x[1] = 0
    x[2] *= F32(1e30)
    x[4, 3], x[5, k - 1] = np.inf, np.nan
    return [x[:3], x[3:]]


def in_step(w: Weight) -> Floats:
    """Return rows of ±1 whose products with spoiled columns have terms of one sign."""
    columns = w.values[:, [0, 5, 16]] if w.values.shape[1] > 1 else w.values[:, [0, 0, 0]]
    return np.where(columns > 0, F32(1), F32(-1)).T.copy()


def some_ids(*shape: int, n: int = 37, seed: int = 0) -> Ids:
    """Return random ids with the first and, if there are two, the last row."""
    ids = np.random.default_rng(seed).integers(0, n, shape)
    ids.reshape(-1)[:2] = [0, n - 1][: ids.size]
    return ids


# --- kernels before guard pages -------------------------------------------------------------------


def lowered(
    function: Callable[..., Any], target: Target, args: Sequence[Any], precision: str = "f32"
) -> CpuPlan:
    """Return the plan of `function` for arguments."""
    graph = trace(function, specs_of(args))
    return make_plan(graph, target, math.prod(lead_shape(args, graph.signature)), precision)


def specs_of(args: Sequence[Any]) -> Signature:
    """Return the signature of arguments."""
    shapes = [getattr(value, "shape", ()) for value in args]
    return with_inner_axes(tuple(map(_spec, args)), shapes)


def _spec(value: Any) -> Spec:
    if isinstance(value, WeightSpec):
        return value
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if isinstance(value, ExpertTensor):
        return spec_of("w", value)
    if isinstance(value, np.ndarray):
        if holds_ids(value):
            return ids_spec(value.shape)
        return array_spec(value.shape, float_type=float_type_of(value.dtype) or "f32")
    return ScalarSpec()


def object_of(plan: CpuPlan, kernel: CpuKernel) -> bytes:
    """Return the compiled kernel, which tests share."""
    source = lower(plan, kernel)
    return cache.fetch(plan.target, llvm, source.symbol, source.text).object_bytes


def run_guarded(
    function: Callable[..., Any],
    cpu: Guarded,
    args: Sequence[Any],
    *,
    gap_bytes: int = 0,
    precision: str = "f32",
) -> list[Floats]:
    """Return the results of `function`; every array of every kernel ends at a guard page."""
    target = find_target(require_target(cpu.target) if cpu.native else cpu.target)
    plan = lowered(function, target, args, precision)
    rows = math.prod(lead_shape(args, plan.graph.signature))
    memory: dict[Slot, NDArray[Any]] = {}
    for kernel in plan.kernels:
        slots = kernel.slots()
        arguments = [_argument(plan, kernel, slot, args, rows, memory) for slot in slots]
        arrays = run_kernel(
            target.family,
            object_of(plan, kernel),
            kernel.work.symbol,
            arguments,
            cpu=cpu.model,
            gap_bytes=cpu.gap_bytes + gap_bytes,
        )
        kept = [s for s, a in zip(slots, arguments, strict=True) if isinstance(a, np.ndarray)]
        for slot, array in zip(kept, arrays, strict=True):
            memory[slot] = array
            if slot.kind in {"array", "ids", "weight"}:
                original = arguments[slots.index(slot)]
                assert array.tobytes() == np.asarray(original).tobytes(), (
                    f"the kernel wrote to {slot}"
                )
    outputs = range(len(plan.graph.outputs))
    return [memory[Slot("output", i)] for i in outputs]


def _argument(
    plan: CpuPlan,
    kernel: CpuKernel,
    slot: Slot,
    args: Sequence[Any],
    rows: int,
    memory: dict[Slot, NDArray[Any]],
) -> Argument:
    if slot.kind in EXPERT_SLOTS:
        return _of_experts(plan, slot, args, rows)
    whole_rows = 1 if kernel.work.uniform else rows
    rows = kernel.work.rows_of(rows)
    match slot.kind:
        case "pool":
            return 0
        case "m":
            return rows
        case "array":
            return np.asarray(args[slot.index])
        case "ids":
            return np.asarray(args[slot.index], np.int64)
        case "scalar":
            return float(args[slot.index])
        case "weight":
            tensor: QuantizedTensor | ExpertTensor = args[slot.index]
            return tensor._resident.blocks(slot.layout)
        case "x":
            return np.full((rows, padded_k(plan, kernel)), np.nan, F32)
        case "row_factors":
            return np.full(rows, np.nan, F32)
        case "digits":
            row_bytes = digits_bytes(padded_k(plan, kernel), kernel.digits)
            return np.full((rows, row_bytes), 0xFF, np.uint8)
    if slot in memory:
        return memory[slot]
    outputs = plan.graph.result_types
    kind = outputs[slot.index] if slot.kind == "output" else "f32"
    result = _result_shape(plan, kernel, slot, whole_rows)
    return np.full(result, np.nan, numpy_dtype(kind))


def _of_experts(plan: CpuPlan, slot: Slot, args: Sequence[Any], rows: int) -> Argument:
    """Return what a kernel gets about the experts of the vectors of a call."""
    experts = ChosenExperts(plan, rows)
    ids = {slot.index: np.asarray(args[slot.index], np.int64)}
    values, arrays = experts.values(ids)
    (order, buckets), at = arrays, experts.slots.index(slot)  # of one argument of ids
    named: dict[str, Argument] = {"order": order, "buckets": values[at], "bucket_list": buckets}
    return named[slot.kind]


def _result_shape(plan: CpuPlan, kernel: CpuKernel, slot: Slot, rows: int) -> tuple[int, int]:
    if kernel.work.decoded is not None and kernel.work.decoded.node.op == "dequantize":
        spec = plan.weight(kernel.work.decoded.node.arg)
        return spec.k, spec.n
    widths = plan.temps
    if slot.kind == "output":
        widths = tuple(n.width * n.copies for n in plan.graph.outputs)
    return rows, widths[slot.index]
