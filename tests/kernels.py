"""What tests of kernels share: random weights, an independent oracle, the contract, other CPUs."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from q4jit import QuantizedTensor, cache, specialize
from q4jit.arguments import holds_ids, lead_shape
from q4jit.compilers import llvm
from q4jit.dispatcher import Specialized
from q4jit.formats import FORMATS, Format
from q4jit.frontend import array_spec, ids_spec, trace
from q4jit.ir import ScalarSpec, Signature, Spec, WeightSpec
from q4jit.lower_cpu import lower
from q4jit.plan import Slot
from q4jit.schedule_cpu import CpuKernel, CpuPlan, make_plan, padded_k
from q4jit.targets import Target, find_target, host_target, runs_here
from tests.emulator import X86_64_CPUS, run_kernel
from tests.emulator import Slot as Argument
from tests.tools import lack

F32: Final = np.float32
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

BOUND: Final = 2e-6  # of `precision="f32"`
FLOAT_FORMATS: Final = ("F16", "F32")
# ±0, the denormals next to 0 and to 2^-14, 2^-14, the largest, ±Inf, NaN
_EDGES: Final = (0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0xFE00)
FORMATS_OF_32: Final = ("Q4_0", "Q4_1", "Q8_0", *FLOAT_FORMATS)  # K may be any multiple of 32

IN_PROCESS: Final = ("cpu", "cpu:x86-64-v4", "cpu:x86-64-v3", "cpu:x86-64")

_NO_GAP: Final = 0
# QEMU 7.2 reads all of a masked load (`vmaskmovps`), a real CPU only what lies under the mask. What
# is read beyond an array is NaN there, so it cannot go unseen into a result.
_MASKED_LOAD_GAP: Final = 64


def require_target(name: str) -> str:
    """`name`; the test is skipped where this CPU lacks its features, or fails where CI is set."""
    target = find_target(name)
    if not runs_here(target):
        missing = ", ".join(sorted(target.features - host_target().features)) or target.family
        lack(f"{name} is not executed: this CPU ({host_target()}) lacks {missing}")
    return name


@dataclass(frozen=True)
class Guarded:
    """A CPU on which kernels run on arrays that end at guard pages."""

    target: str
    native: bool = False

    def __str__(self) -> str:
        return f"{self.target} {'here' if self.native else 'in QEMU'}"

    @property
    def model(self) -> str | None:
        """QEMU's CPU model; None for its default or this CPU."""
        arch = find_target(self.target).arch
        return None if self.native else X86_64_CPUS.get(arch)

    @property
    def gap_bytes(self) -> int:
        """Bytes between an array and its guard page."""
        wide = not self.native and self.target == "cpu:x86-64-v3"
        return _MASKED_LOAD_GAP if wide else _NO_GAP


GUARDED: Final = (
    Guarded("cpu:x86-64"),
    Guarded("cpu:x86-64-v3"),
    Guarded("cpu:aarch64"),
    Guarded("cpu:x86-64-v3", native=True),
    Guarded("cpu:x86-64-v4", native=True),
)


# --- weights --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A quantised tensor and its values, [K, N] in float64, as the gguf package decodes them."""

    tensor: QuantizedTensor
    values: Doubles

    def __str__(self) -> str:
        return f"{self.tensor.format} {list(self.tensor.shape)}"


def wrap(name: str, k: int, blocks: NDArray[Any]) -> Weight:
    """The weight of GGUF rows [N, …] given as an array of any type."""
    n = len(blocks)
    rows = np.frombuffer(blocks.tobytes(), np.uint8).reshape(n, -1)
    tensor = QuantizedTensor.from_bytes(rows, shape=(k, n), format=name)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return Weight(tensor, decoded(name, rows).astype(np.float64))


def decoded(name: str, rows: NDArray[np.uint8]) -> Floats:
    """The matrix [K, N] of GGUF rows, decoded by gguf."""
    with np.errstate(all="ignore"):
        values = quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    return np.asarray(values, F32).T


def halves(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float16]:
    """Random f16 scales of a kind: normal, zero, denormal, largest, mixed, or bits (anything)."""
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
            choices = [halves(k, shape, rng).astype(np.float64) for k in kinds]
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
    """A random weight, its scales (for F16 and F32 its elements) of a kind that `halves` knows."""
    rng = np.random.default_rng([seed, k, n])
    fmt = FORMATS[name]
    if fmt.float_dtype is not None:
        values = halves(scales, (n, k), rng).astype(fmt.float_dtype)
        if name == "F32" and scales == "normal":  # all 24 bits of the fraction
            values *= rng.uniform(1, 2, (n, k)).astype(F32)
        return wrap(name, k, values)
    return wrap(name, k, random_blocks(fmt, k, n, scales, rng))


def random_blocks(
    fmt: Format, k: int, n: int, scales: str, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Blocks uint8 [n, blocks, block_bytes] with random quants and the given kind of scales."""
    blocks = rng.integers(0, 256, (n, k // fmt.block_elements, fmt.block_bytes), np.uint8)
    for at in (fmt.d_offset_bytes, fmt.m_offset_bytes):
        if at is not None:
            set_halves(blocks, at, halves(scales, blocks.shape[:2], rng))
    return blocks


def set_halves(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float16]) -> None:
    """Write the f16 field at byte `at` of every block."""
    blocks[..., at : at + 2] = values.astype("<f2")[..., np.newaxis].view(np.uint8)


def weights(
    k: int, widths: Sequence[int], scales: str = "normal", names: Sequence[str] = tuple(FORMATS)
) -> list[Weight]:
    """One weight for each format and each N."""
    return [weight(name, k, n, scales) for name in names for n in widths]


# --- functions ------------------------------------------------------------------------------


def one_product(x: Any, w: Any) -> Any:
    return x @ w


def block(x: Any, gain: Any, gate: Any, up: Any, bias: Any, residual: Any, scale: Any) -> Any:
    """RMSNorm, two products, bias, SiLU and a residual: one kernel."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate + bias
    return residual + scale * (g / (1 + np.exp(-g)) * (h @ up))


@functools.cache
def products(count: int) -> Callable[..., tuple[Any, ...]]:
    """A function of x and `count` weights that gives all products: one kernel, so one compile."""

    def function(x: Any, *weights: Any) -> tuple[Any, ...]:
        return tuple(x @ w for w in weights)

    function.__signature__ = _signature("x", *(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "products"
    return function


@functools.cache
def dequantizer(count: int) -> Callable[..., tuple[Any, ...]]:
    """A function of `count` weights that gives all their values."""

    def function(*weights: Any) -> tuple[Any, ...]:
        return tuple(w.dequantize() for w in weights)

    function.__signature__ = _signature(*(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "values"
    return function


@functools.cache
def lookups(count: int) -> Callable[..., tuple[Any, ...]]:
    """A function of ids and `count` weights that gives those rows of all weights."""

    def function(ids: Any, *weights: Any) -> tuple[Any, ...]:
        return tuple(w.rows(ids) for w in weights)

    function.__signature__ = _signature("ids", *(f"w{i}" for i in range(count)))  # type: ignore[attr-defined]  # inspect reads it
    function.__name__ = "rows"
    return function


def _signature(*names: str) -> inspect.Signature:
    return inspect.Signature(
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
    )


@functools.cache
def on(target: str, function: Callable[..., Any]) -> Specialized[..., Any]:
    """`function` specialised for a target; the same one for every test, so it compiles once."""
    return specialize(function, target=require_target(target))


# --- the contract ---------------------------------------------------------------------------


def errors(y: Floats, x: Floats, w: Doubles) -> Doubles:
    """The error of every output in the contract's measure; NaN where float64 leaves f32's range."""
    k = x.shape[-1]
    wide = x.astype(np.float64)
    exact = wide @ w
    size = np.sqrt(wide**2 @ w**2) + k * 2.0**-149
    inside = np.abs(exact) <= np.finfo(F32).max
    with np.errstate(invalid="ignore"):  # such outputs may be Inf
        return np.where(inside, np.abs(y - exact) / size, np.nan)


def assert_contract(y: Floats, x: Floats, w: Weight) -> None:
    """Every row of y keeps the bound: the rms over a whole result could hide a bad one."""
    assert y.dtype == F32
    assert y.shape == (*x.shape[:-1], w.values.shape[1])
    if y.size == 0:
        return
    found = errors(y, x, w.values)
    counted = np.isfinite(found) | np.isnan(y)  # a NaN that should be a number counts
    squares = np.where(counted, found, 0.0) ** 2
    rms = np.sqrt(squares.sum(-1) / np.maximum(counted.sum(-1), 1))
    worst = np.max(rms)
    assert worst < BOUND, f"{w}: rms error {worst:.2e} in row {np.argmax(rms)} of {list(x.shape)}"


def random_x(*shape: int, seed: int = 0) -> Floats:
    """Normal activations."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(F32)


# --- kernels beside guard pages ---------------------------------------------------------------


def lowered(function: Callable[..., Any], target: Target, args: Sequence[Any]) -> CpuPlan:
    """The plan of `function` for arguments."""
    return make_plan(trace(function, specs_of(args)), target, math.prod(lead_shape(args)))


def specs_of(args: Sequence[Any]) -> Signature:
    """The signature of arguments, as a call would have it."""
    return tuple(map(_spec, args))


def _spec(value: Any) -> Spec:
    if isinstance(value, QuantizedTensor):
        return WeightSpec(*value.signature)
    if isinstance(value, np.ndarray):
        return ids_spec(value.shape) if holds_ids(value) else array_spec(value.shape)
    return ScalarSpec()


def object_of(plan: CpuPlan, kernel: CpuKernel) -> bytes:
    """The compiled kernel, from this session's cache where another test compiled it."""
    source = lower(plan, kernel)
    return cache.fetch(plan.target, llvm, source.symbol, source.text).object_bytes


def run_guarded(
    function: Callable[..., Any], cpu: Guarded, args: Sequence[Any], *, gap_bytes: int = 0
) -> list[Floats]:
    """The results of `function`, every array of every kernel standing before a guard page."""
    found = find_target(require_target(cpu.target) if cpu.native else cpu.target)
    plan = lowered(function, found, args)
    rows = math.prod(lead_shape(args))
    memory: dict[Slot, NDArray[Any]] = {}
    for kernel in plan.kernels:
        slots = kernel.slots()
        arguments = [_argument(plan, kernel, slot, args, rows, memory) for slot in slots]
        arrays = run_kernel(
            found.family,
            object_of(plan, kernel),
            kernel.symbol,
            arguments,
            cpu=cpu.model,
            gap_bytes=cpu.gap_bytes + gap_bytes,
        )
        kept = [s for s, a in zip(slots, arguments, strict=True) if isinstance(a, np.ndarray)]
        for slot, array in zip(kept, arrays, strict=True):
            memory[slot] = array
            if slot.kind in {"array", "ids", "weight"}:
                original = arguments[slots.index(slot)]
                assert array.tobytes() == np.asarray(original).tobytes(), f"{slot} was written to"
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
    rows = 1 if kernel.uniform else rows
    match slot.kind:
        case "pool":
            return 0
        case "m":
            return rows
        case "array":
            return np.asarray(args[slot.index], F32)
        case "ids":
            return np.asarray(args[slot.index], np.int64)
        case "scalar":
            return float(args[slot.index])
        case "weight":
            tensor: QuantizedTensor = args[slot.index]
            return tensor.raw if slot.layout == "gguf" else tensor.repacked(slot.layout)
        case "x":
            return np.full((rows, padded_k(plan, kernel)), np.nan, F32)
        case "exponent":
            return np.full(rows, np.nan, F32)
    if slot in memory:
        return memory[slot]
    return np.full(_result_shape(plan, kernel, slot, rows), np.nan, F32)


def _result_shape(plan: CpuPlan, kernel: CpuKernel, slot: Slot, rows: int) -> tuple[int, int]:
    if kernel.decoded is not None and kernel.decoded.node.op == "dequantize":
        spec = plan.weight(kernel.decoded.node.arg)
        return spec.k, spec.n
    widths = plan.temps if slot.kind == "temp" else [n.width for n in plan.graph.outputs]
    return rows, widths[slot.index]
