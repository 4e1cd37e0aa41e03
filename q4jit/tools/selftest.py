"""`q4jit selftest`: every schedule of a GPU held to the contract, then timed, with a report.

The kernels are forced (`Tuning`), where a call would choose one. Each result is set to NaN before
the kernels run, and compared with float64 products of weights that `formats.decode` decodes. A
case that raises an error is a failed case, and the next one runs. The report is written however the
run ends, with all that is known by then.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import importlib.util
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from q4jit.hip.harness import Bench, Built
from q4jit.hip.kernel import (
    ELEMENT,
    GEMV,
    GEMV_DOT,
    TILE_FMA,
    TILE_MATRIX,
)
from q4jit.plan.options import Tuning
from q4jit.precision import BOUNDS, FUNCTION_BOUND
from q4jit.progress import progress
from q4jit.runtime.devices import find_device
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS, Target
from q4jit.tools import aot
from q4jit.weights.formats import FORMATS, Format, decode
from q4jit.weights.layouts import GGUF, PLANAR
from q4jit.weights.reference import random_weight, random_x
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Measure = Callable[[Sequence[Any], Sequence[Any]], float]
T = TypeVar("T")

_SHAPES: Final = ((576, 37), (256, 37), (4096, 37), (256, 300), (576, 1), (4096, 300))
_EVERY_M: Final = (1, 2, 3, 8, 16, 17, 64, 100)
_ROWS: Final[dict[str, tuple[int, ...]]] = {
    ELEMENT: (1, 3, 17, 100),
    GEMV: (1, 2, 3, 8, 16),  # a kernel each
    GEMV_DOT: (1, 2, 3, 8, 16),
    TILE_FMA: (17, 64, 100),
    TILE_MATRIX: (17, 64, 100),
}
# compared with what `dequantize` gives on the device
_DECODED_TOO: Final = (ELEMENT, GEMV, TILE_FMA, TILE_MATRIX)
_LARGE: Final = (65600, 32, 32768)  # M, K, N: the result's elements need more than 31 bits
_STREAM_CALLS: Final = 20
_TIMED_SHAPES: Final = ((4096, 4096), (4096, 14336))
_TIMED_ROWS: Final = (1, 8, 64, 512)
_OFFSET_BYTES: Final = 7  # of a weight in a larger buffer: as odd as it gets

_ROTATED_BYTES: Final = 256 << 20  # weights that no cache keeps; AMD's last level is not its L2
_MEMORY_SHARE: Final = 8  # of the device's memory, at most this part for them
_SHOWN_LETTERS: Final = 100


def add_selftest(commands: Any) -> argparse.ArgumentParser:
    """Add the command `selftest` to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "selftest",
        help="test and time every kernel on this machine's GPU, with a report",
        description="Hold every schedule, layout, format and precision to its bound on a GPU,\n"
        "time them, and write report.txt and report.json, which can be attached to an issue.",
    )
    command.add_argument(
        "--device", default="hip", help="hip:0, cuda:0 or an arch as gfx1100 (default: the first)"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="for the reports (default: q4jit-selftest-ARCH)"
    )
    command.add_argument("--quick", action="store_true", help="Q4_0 alone, in one layout, one size")
    command.set_defaults(run=run)
    return command


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 where a case failed. Raises DeviceError and TargetError without a GPU."""
    name = f"hip:{options.device}" if options.device in HIP_ARCHS else options.device
    device = find_device(name)
    folder: Path = options.out or Path(f"q4jit-selftest-{device.arch}")
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the work
    findings = Findings()
    with Bench(device) as bench:
        try:
            _find_out(bench, options.quick, findings)
        except BaseException as error:  # Ctrl-C, above all
            findings.ended_by = _told(error)
            raise
        finally:
            report = _report(bench, findings)
            _write(report, folder)
    return 1 if report["failed"] else 0


@dataclass
class Findings:
    """What is known so far; ended_by: the exception that ended the run early, else empty."""

    cases: "list[Outcome]" = field(default_factory=list)
    copy: dict[str, Any] = field(default_factory=lambda: {"gb_per_s": None, "message": "not run"})
    timings: "list[Timing]" = field(default_factory=list)
    ended_by: str = ""
    start: float = field(default_factory=time.perf_counter)


def _find_out(bench: Bench, quick: bool, findings: Findings) -> None:
    for outcome in outcomes(bench, cases(bench.target, quick)):
        findings.cases.append(outcome)
    for check in progress(checks(quick), "checking"):
        findings.cases.append(outcome_of(bench, check))
    _time(bench, _TIMED_SHAPES[:1] if quick else _TIMED_SHAPES, findings)


def _write(report: dict[str, Any], folder: Path) -> None:
    (folder / "report.txt").write_text(report_text(report), encoding="utf-8")
    data = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "report.json").write_text(data + "\n", encoding="utf-8")
    sys.stdout.write(report_text(report, shortened=True))
    sys.stdout.write(f"{folder / 'report.txt'} and report.json hold all of it\n")


# --- what is run ----------------------------------------------------------------------------------


def product(x: Any, w: Any) -> Any:
    """A product alone."""
    return x @ w


def product_and_values(x: Any, w: Any) -> Any:
    """A product, and the weight's values by the kernel that only decodes."""
    return x @ w, w.dequantize()


def looked_up(ids: Any, w: Any) -> Any:
    """Rows of a weight."""
    return w.rows(ids)


def affine(x: Any, w: Any, bias: Any, residual: Any, scale: Any) -> Any:
    """Bias, a scale and a residual after a product."""
    return residual + scale * (x @ w + bias)


def mlp(x: Any, gain: Any, gate: Any, up: Any, down: Any) -> Any:
    """RMSNorm, SwiGLU, a second product and the residual."""
    h = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain
    g = h @ gate
    return x + (g / (1 + np.exp(-g)) * (h @ up)) @ down


@dataclass(frozen=True, eq=False)
class Case:
    """A call of `function` with kernels by `tuning`; `measure` gives its error, at most `bound`.

    group: the line of the table that it counts in. args: NumPy arrays (f32, or ids in i64),
    weights and floats.
    """

    group: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    tuning: Tuning
    bound: float
    measure: Measure

    @property
    def rows(self) -> int:
        """M."""
        return len(self.args[0])

    def __str__(self) -> str:
        weights = ", ".join(
            f"{w.format} {list(w.shape)}" for w in self.args if isinstance(w, QuantizedTensor)
        )
        return f"{self.function.__name__}, {self.group}, M = {self.rows}, {weights}"


def cases(target: Target, quick: bool = False) -> list[Case]:
    """What is run on an arch: some 120 kernels, each for several M where it serves them.

    Not every combination: the shapes and, but for Q4_0, the classes of M take turns.
    """
    formats = ("Q4_0",) if quick else tuple(sorted(FORMATS, key=lambda name: name != "Q4_0"))
    layouts = (PLANAR,) if quick else (PLANAR, GGUF)
    found: list[Case] = []
    for schedule, precision in schedules(target):
        for layout in layouts:
            if precision == "f16" and layout == GGUF:
                continue  # the text that decodes is that of f32
            for turn, name in enumerate(formats):
                if _suits(schedule, FORMATS[name]):
                    tuning = Tuning(precision, None, schedule, layout)
                    found += _product_cases(tuning, name, turn)
    found += _chosen_cases()
    found += _lookup_cases(formats, layouts)
    found += _function_cases()
    found += _offset_cases(layouts)
    return found


def schedules(target: Target) -> list[tuple[str, str]]:
    """The schedules that an arch has, each with the precisions that change its text."""
    found = [(ELEMENT, "f32"), (GEMV, "f32"), (GEMV_DOT, "i8"), (TILE_FMA, "f32")]
    if target.hip.matrix is not None:
        found += [(TILE_MATRIX, "f32"), (TILE_MATRIX, "f16")]
    return found


def _suits(schedule: str, fmt: Format) -> bool:
    return fmt.float_dtype is None or schedule not in {GEMV_DOT, TILE_MATRIX}


def _product_cases(tuning: Tuning, name: str, turn: int) -> Iterator[Case]:
    schedule, layout = str(tuning.schedule), str(tuning.layout)
    group = f"{schedule} {layout} {tuning.precision}"
    # the same for every schedule: what decodes alone is then compiled once
    k, n = _shape(name, turn + (layout == GGUF))
    w = random_weight(name, k, n)
    bound = BOUNDS[tuning.precision]
    for m in _rows(schedule, layout, name, turn):
        args = (random_x(m, k), w)
        if schedule in _DECODED_TOO:
            yield Case(group, product_and_values, args, tuning, bound, against_values)
            if schedule in {ELEMENT, GEMV}:  # the kernel that decodes is the others' too
                group_of_values = f"dequantize {layout}"
                yield Case(group_of_values, product_and_values, args, tuning, 0.0, values_error)
        else:
            yield Case(group, product, args, tuning, bound, contract_error)


def _shape(name: str, turn: int) -> tuple[int, int]:
    block = FORMATS[name].block_elements
    fitting = [(k, n) for k, n in _SHAPES if k % block == 0]
    return fitting[turn % len(fitting)]


def _rows(schedule: str, layout: str, name: str, turn: int) -> tuple[int, ...]:
    """Which M: all for Q4_0 and where they share a kernel, which one row alone does not."""
    every = _ROWS[schedule]
    if name == "Q4_0" and layout == PLANAR:
        return every
    if schedule not in {GEMV, GEMV_DOT}:
        return tuple(m for m in every if m > 1)
    turning = every[1 + turn % (len(every) - 1)]
    return (every[0], turning) if layout == PLANAR else (turning,)


def _chosen_cases() -> Iterator[Case]:
    """Q4_0 with the schedule left to choose: every M in each precision, and every shape."""
    calls = [(precision, m, _SHAPES[0]) for precision in BOUNDS for m in _EVERY_M]
    calls += [("f32", m, shape) for m in (1, 17) for shape in _SHAPES[1:]]
    for precision, m, (k, n) in calls:
        args = (random_x(m, k), random_weight("Q4_0", k, n))
        group = f"as chosen {precision}"
        yield Case(group, product, args, Tuning(precision), BOUNDS[precision], contract_error)


def _lookup_cases(formats: Sequence[str], layouts: Sequence[str]) -> Iterator[Case]:
    for turn, name in enumerate(formats):
        w = random_weight(name, *_shape(name, 3))
        ids = np.random.default_rng(1).integers(0, w.shape[1], 17)
        ids[:2] = 0, w.shape[1] - 1
        layout = layouts[turn % len(layouts)]
        tuning = Tuning("f32", None, None, layout)
        yield Case(f"look-up {layout}", looked_up, (ids, w), tuning, 0.0, lookup_error)


def _function_cases() -> Iterator[Case]:
    k, hidden, n = 576, 256, 37
    gain, bias = random_x(1, k)[0], random_x(1, n)[0]
    w = random_weight("Q4_0", k, n)
    gate, up = random_weight("Q4_0", k, hidden), random_weight("Q4_0", k, hidden, seed=1)
    down = random_weight("Q4_0", hidden, k)
    for m in (1, 8, 64):
        x = random_x(m, k)
        calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (affine, (x, w, bias, random_x(m, n), 0.75)),
            (mlp, (x, gain, gate, up, down)),
        ]
        for function, args in calls:
            measure = functools.partial(function_error, function)
            yield Case("functions f32", function, args, Tuning(), FUNCTION_BOUND, measure)


def _offset_cases(layouts: Sequence[str]) -> Iterator[Case]:
    k, n = _SHAPES[0]
    inside = random_weight("Q4_0", k, n).raw.tobytes()
    buffer = memoryview(bytes(_OFFSET_BYTES) + inside + bytes(_OFFSET_BYTES))
    raw = buffer[_OFFSET_BYTES : _OFFSET_BYTES + len(inside)]
    w = QuantizedTensor.from_bytes(raw, shape=(k, n), format="Q4_0")
    for layout in layouts:
        for m in (1, 17):
            tuning = Tuning("f32", None, None, layout)
            args = (random_x(m, k), w)
            group = "weights at an offset"
            yield Case(group, product, args, tuning, BOUNDS["f32"], contract_error)


# --- streams, graphs, a large result -------------------------------------------------------------


class NotRunError(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Check:
    """Something that one call does not show; `measure` gives its error, at most `bound`."""

    name: str
    group: str
    m: int
    bound: float
    measure: Callable[[Bench], float]


def checks(quick: bool = False) -> list[Check]:
    """Graphs and streams without scratch memory and with, and a result above 2³¹ elements."""
    found = []
    for m in (1, 64):
        replay, streams = functools.partial(replay_error, m=m), functools.partial(stream_error, m=m)
        about = f"product, M = {m}, Q4_0 {list(_SHAPES[0])}"
        found.append(Check(f"graph, {about}", "graph replay", m, BOUNDS["f32"], replay))
        found.append(Check(f"two streams, {about}", "two streams", m, 0.0, streams))
    if not quick:
        m, k, n = _LARGE
        name = f"product, M = {m}, Q4_0 {[k, n]}"
        found.append(Check(name, "M·N above 2³¹", m, BOUNDS["f32"], large_error))
    return found


def replay_error(bench: Bench, m: int) -> float:
    """The error of a graph's replays with activations that changed after its capture."""
    streams = find_streams(bench.device)
    stream = streams.make()
    x, w = random_x(m, _SHAPES[0][0]), random_weight("Q4_0", *_SHAPES[0])
    built = bench.build(product, (x, w), Tuning())
    args = bench.upload((x, w), streams.handle(stream))
    (out,) = bench.outputs(built, args)
    launch = bench.bind(built, args)
    launch(args, out)  # uploads the weight, which cannot be part of a graph
    replay = streams.capture(stream, lambda: launch(args, out))
    worst = 0.0
    for scale in (-1, 3):
        changed = scale * x + np.float32(1)
        bench.overwrite(args[0], changed)
        replay()
        worst = _larger(worst, contract_error((changed, w), [out.to_numpy()]))
    return worst


def stream_error(bench: Bench, m: int) -> float:
    """The largest difference of results of two streams at a time from what each gives alone."""
    streams = find_streams(bench.device)
    made = [streams.make() for _ in range(2)]
    x, w = random_x(m, _SHAPES[0][0]), random_weight("Q4_0", *_SHAPES[0])
    built = bench.build(product, (x, w), Tuning())
    calls = [
        bench.upload((x * sign, w), streams.handle(s))
        for sign, s in zip((1, -1), made, strict=True)
    ]
    launch = bench.bind(built, calls[0])
    outs = [[bench.outputs(built, args)[0] for args in calls] for _ in range(_STREAM_CALLS)]
    alone = []
    for args in calls:
        (out,) = bench.outputs(built, args)
        launch(args, out)
        alone.append(out.to_numpy())
    for pair in outs:
        for args, out in zip(calls, pair, strict=True):
            launch(args, out)
    worst = 0.0
    for pair in outs:
        for out, wanted in zip(pair, alone, strict=True):
            worst = _larger(worst, _difference(out.to_numpy(), wanted))
    return worst


def large_error(bench: Bench) -> float:
    """The error of some rows of a result of more than 2³¹ elements, the last among them."""
    m, k, n = _LARGE
    needed, free = 5 * m * n, bench.free_bytes()  # 4 bytes each, and some room
    if free < needed:
        raise NotRunError(f"needs {needed:,} bytes of the device's memory, free are {free:,}")
    x, w = random_x(m, k), random_weight("Q4_0", k, n)
    border = (1 << 31) // n
    bands = [slice(0, 3), slice(border - 2, border + 2), slice(m - 3, m)]
    found = bench.run_rows(bench.build(product, (x, w), Tuning()), (x, w), bands)
    pairs = zip(bands, found, strict=True)
    return functools.reduce(_larger, (contract_error((x[b], w), [y]) for b, y in pairs))


def _larger(a: float, b: float) -> float:
    """The larger one, or NaN where one is NaN: `max` would lose it."""
    return float(np.maximum(a, b))


class Streams(Protocol):
    """What a library knows of streams and graphs on one device."""

    def make(self) -> Any:
        """A new stream, independent of the default one."""

    def handle(self, stream: Any) -> int:
        """The driver's address of a stream."""

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        """Record what `action` enqueues on a stream; the result enqueues it there again."""


def find_streams(device: Device) -> Streams:
    """Those of PyTorch, else of CuPy. Raises NotRunError where neither can use the device."""
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")  # late: not ours, as CuPy

        platform_of_torch = "amd" if torch.version.hip else "nvidia"
        if torch.cuda.is_available() and platform_of_torch == device.platform:
            return _TorchStreams(torch, device)
    if importlib.util.find_spec("cupy") and device.platform == "nvidia":
        # on AMD its streams are not captured
        return _CupyStreams(importlib.import_module("cupy"), device)
    raise NotRunError(f"needs torch or cupy for {device.platform}")


@dataclass(frozen=True)
class _TorchStreams:
    torch: Any
    device: Device

    def make(self) -> Any:
        return self.torch.cuda.Stream(self.device.index)

    def handle(self, stream: Any) -> int:
        return int(stream.cuda_stream)

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        cuda = self.torch.cuda
        graph = cuda.CUDAGraph()
        with cuda.device(self.device.index), cuda.graph(graph, stream=stream):
            action()

        def replay() -> None:
            with cuda.stream(stream):
                graph.replay()

        return replay


@dataclass(frozen=True)
class _CupyStreams:
    cupy: Any
    device: Device

    def make(self) -> Any:
        with self.cupy.cuda.Device(self.device.index):
            return self.cupy.cuda.Stream(non_blocking=True)

    def handle(self, stream: Any) -> int:
        return int(stream.ptr)

    def capture(self, stream: Any, action: Callable[[], object]) -> Callable[[], object]:
        with self.cupy.cuda.Device(self.device.index), stream:
            stream.begin_capture()
            action()
            graph = stream.end_capture()
        return functools.partial(graph.launch, stream)


# --- random arguments, and their float64 values ---------------------------------------------------


@functools.cache
def _values(w: QuantizedTensor) -> Floats:
    """The values of a weight [K, N], independently of every kernel."""
    return decode(w.block_format, w.raw).T


# --- errors ---------------------------------------------------------------------------------------


def contract_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """The largest rms error of a row of y = x @ w, relative to √(Σ(xw)² + K·2⁻¹⁴⁹)."""
    x, w = args
    return _contract(results[0], x, _values(w))


def against_values(args: Sequence[Any], results: Sequence[Any]) -> float:
    """The same, for the values of w that the device decoded: results are y and they."""
    y, values = results
    return _contract(y, args[0], values)


def values_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """The largest difference between decoded values, which shall have none."""
    return _difference(results[1], _values(args[1]))


def lookup_error(args: Sequence[Any], results: Sequence[Any]) -> float:
    """The largest difference between rows looked up, which shall have none."""
    ids, w = args
    return _difference(results[0], _values(w).T[ids])


def function_error(
    function: Callable[..., Any], args: Sequence[Any], results: Sequence[Any]
) -> float:
    """The relative rms of a function's result, compared with its run by NumPy in float64."""
    exact = function(*map(_in_float64, args))
    return float(np.linalg.norm(results[0] - exact) / np.linalg.norm(exact))


def _contract(y: Floats, x: Floats, values: Floats) -> float:
    wide, w = x.astype(np.float64), values.astype(np.float64)
    size = np.sqrt(wide**2 @ w**2) + x.shape[-1] * 2.0**-149
    rms: Doubles = np.sqrt(np.mean(((y - wide @ w) / size) ** 2, axis=-1))
    return float(rms.max())


def _difference(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found.astype(np.float64) - wanted).max())


def _in_float64(value: Any) -> Any:
    if isinstance(value, QuantizedTensor):
        return _values(value).astype(np.float64)
    return value.astype(np.float64) if isinstance(value, np.ndarray) else value


# --- cases and times ------------------------------------------------------------------------------


def _attempt(action: Callable[[], T]) -> T | Exception:
    """What an action gives, or the error that it raises: for the report, which holds them all."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a report of every error is what this is for
        return error


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `error` is None where there is no number, and `message` says why.

    passed: None where the case was not run.
    """

    case: str
    group: str
    m: int
    error: float | None
    bound: float
    passed: bool | None
    message: str = ""


def outcomes(bench: Bench, found: Sequence[Case]) -> Iterator[Outcome]:
    """What became of each case, in order; all kernels are being compiled meanwhile."""
    pairs = []
    for case in progress(found, "planning"):
        build = functools.partial(bench.build, case.function, case.args, case.tuning)
        pairs.append((case, _attempt(build)))
    for case, built in progress(pairs, "running"):
        outcome = _attempt(functools.partial(_run_case, bench, case, built))
        yield _failed(case, outcome) if isinstance(outcome, Exception) else outcome


def _run_case(bench: Bench, case: Case, built: Built | Exception) -> Outcome:
    if isinstance(built, Exception):
        raise built
    return judge(case, bench.run(built, case.args))


def _failed(case: Case, error: Exception) -> Outcome:
    return Outcome(str(case), case.group, case.rows, None, case.bound, False, _told(error))


def outcome_of(bench: Bench, check: Check) -> Outcome:
    """What became of a check."""
    about = functools.partial(Outcome, check.name, check.group, check.m, bound=check.bound)
    error = _attempt(lambda: check.measure(bench))
    if isinstance(error, NotRunError):
        return about(error=None, passed=None, message=f"not run: {error}")
    if isinstance(error, Exception):
        return about(error=None, passed=False, message=_told(error))
    if not math.isfinite(error):
        return about(error=None, passed=False, message="results are NaN or Inf")
    passed = error <= check.bound
    return about(error=error, passed=passed, message="" if passed else _excess(error, check.bound))


def _excess(error: float, bound: float) -> str:
    return f"error {error:.2e}, allowed are {bound:.0e}"


def judge(case: Case, results: Sequence[Floats]) -> Outcome:
    """Whether results are complete, and within the bound."""
    total = sum(result.size for result in results)
    missing = total - sum(int(np.isfinite(result).sum()) for result in results)
    if missing:
        message = f"{missing:,} of {total:,} results are NaN or Inf: not written, or wrong"
        return Outcome(str(case), case.group, case.rows, None, case.bound, False, message)
    error = case.measure(case.args, results)
    passed = error <= case.bound
    message = "" if passed else _excess(error, case.bound)
    return Outcome(str(case), case.group, case.rows, error, case.bound, passed, message)


@dataclass(frozen=True)
class Timing:
    """The time of one product with Q4_0, whose weights come from memory; None where it failed.

    gb_per_s: of the weights; fraction: of what a copy within the device's memory reads and writes.
    """

    schedule: str
    precision: str
    k: int
    n: int
    m: int
    us: float | None
    gb_per_s: float | None
    fraction: float | None
    message: str = ""


def _time(bench: Bench, shapes: Sequence[tuple[int, int]], findings: Findings) -> None:
    """Add the rate of a copy within the device's memory, and the times."""
    copy_us = _attempt(lambda: bench.copy_us)
    if isinstance(copy_us, Exception):  # a device that was lost, and nothing else can be timed
        findings.copy = {"gb_per_s": None, "message": _told(copy_us)}
        return
    rate = 2e-3 * bench.copy_bytes() / copy_us
    findings.copy = {"gb_per_s": rate, "bytes": bench.copy_bytes()}
    for k, n in shapes:
        weights = _rotation(bench.device, k, n)
        calls = [(s, p, m) for s, p in schedules(bench.target) for m in _TIMED_ROWS]
        for schedule, precision, m in progress(calls, f"timing [{k}, {n}]"):
            tuning = Tuning(precision, None, schedule)
            us = _attempt(functools.partial(_time_us, bench, tuning, m, weights))
            place = (schedule, precision, k, n, m)
            if isinstance(us, Exception):
                findings.timings.append(Timing(*place, None, None, None, _told(us)))
            else:
                speed = weights[0].nbytes / us * 1e-3
                findings.timings.append(Timing(*place, us, speed, speed / rate))


def _rotation(device: Device, k: int, n: int) -> list[QuantizedTensor]:
    """Equal weights, more than the device's caches keep."""
    first = random_weight("Q4_0", k, n)
    room = device.memory_bytes // _MEMORY_SHARE
    count = min(max(4 * device.l2_bytes, _ROTATED_BYTES), room) // first.nbytes + 1
    return [
        QuantizedTensor.from_bytes(first.raw, shape=first.shape, format=first.format)
        for _ in range(max(2, count))
    ]


def _time_us(bench: Bench, tuning: Tuning, m: int, weights: Sequence[QuantizedTensor]) -> float:
    x = random_x(m, weights[0].shape[0])
    built = bench.build(product, (x, weights[0]), tuning)
    calls = [bench.upload((x, w)) for w in weights[:1]]
    calls += [(calls[0][0], w) for w in weights[1:]]
    (out,) = bench.outputs(built, calls[0])
    launch = bench.bind(built, calls[0])
    for args in calls:
        launch.prepare(args)
    return bench.call_us([functools.partial(launch, args, out) for args in calls])


# --- the report -----------------------------------------------------------------------------------


def _report(bench: Bench, findings: Findings) -> dict[str, Any]:
    failed = sum(o.passed is False for o in findings.cases)
    failed += sum(t.us is None for t in findings.timings)
    failed += findings.copy["gb_per_s"] is None
    return {
        "selftest_version": 1,
        "q4jit": aot.version(),
        "commit": commit(Path(__file__).parents[2]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - findings.start, 1),
        "ended_by": findings.ended_by,
        "device": dataclasses.asdict(bench.device),
        "driver": driver_version(bench.device.platform),
        "compiler": bench.fingerprint,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
        "cases": [dataclasses.asdict(outcome) for outcome in findings.cases],
        "failed": failed,
        "not_run": sum(outcome.passed is None for outcome in findings.cases),
        "copy": findings.copy,
        "timings": [dataclasses.asdict(timing) for timing in findings.timings],
        "kernels": list(_kernels(bench)),
    }


def _kernels(bench: Bench) -> Iterator[dict[str, Any]]:
    """Each kernel that was compiled, and on AMD what its code object needs."""
    for label, symbol, future in bench.compiled():
        about: dict[str, Any] = {"kernel": label, "symbol": symbol}
        if not future.done():  # after Ctrl-C nobody waits for it
            yield about | {"message": "not compiled yet"}
            continue
        entry = _attempt(future.result)
        if isinstance(entry, Exception):
            about["message"] = str(entry)
        else:
            about |= {"key": entry.key, "code_bytes": len(entry.object_bytes)}
            about |= {"origin": entry.origin, "seconds": round(entry.seconds, 3)}
            if bench.device.platform == "amd":
                about |= _needs(entry.object_bytes, symbol)
        yield about


def _needs(code: bytes, symbol: str) -> dict[str, Any]:
    from q4jit.compilers.codeobject import kernel_infos  # late, as every compiler's module

    infos = _attempt(lambda: kernel_infos(code))
    if isinstance(infos, Exception):  # without msgpack they stay unknown, and the report says so
        return {"message": str(infos)}
    info = dataclasses.asdict(infos[symbol])
    return {name: value for name, value in info.items() if isinstance(value, int)}


def commit(checkout: Path) -> str | None:
    """The commit that a folder is at, from git's own files; None where it has none to say."""
    git = checkout / ".git"
    head = git / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text(encoding="utf-8").strip()
    reference = text.removeprefix("ref: ")
    if reference == text:
        return text
    if (git / reference).is_file():
        return (git / reference).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)


def driver_version(name: str) -> str:
    """What the kernel's driver says of itself; amdgpu is a part of the kernel where it does not."""
    paths = {"amd": "/sys/module/amdgpu/version", "nvidia": "/proc/driver/nvidia/version"}
    path = Path(paths[name])
    if path.is_file():
        return path.read_text(encoding="utf-8").splitlines()[0].strip()
    return f"{name}, of the kernel {platform.release()}"


def report_text(report: dict[str, Any], *, shortened: bool = False) -> str:
    """A report as text; where `shortened`, long messages end early and every kernel is left out."""
    device, number = report["device"], len(report["cases"])
    about = (
        f"{device['name']} ({device['arch']}, {device['platform']} device {device['index']}, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['compute_units']} compute units)"
    )
    sums = (
        f"{number} cases, {len(report['timings'])} timings, {report['failed']} failed, "
        f"{report['not_run']} not run, {report['seconds']} s"
    )
    lines = [
        f"q4jit {report['q4jit']} selftest, {report['date']}, commit {report['commit'] or '-'}",
        about,
        f"driver: {report['driver']}",
        f"compiler: {report['compiler']}",
        f"Python {report['python']}, NumPy {report['numpy']}, {report['system']}",
        "",
        *_case_lines(report["cases"]),
        "",
        *_failure_lines(report, shortened),
        *_timing_lines(report),
        *([] if shortened else _kernel_lines(report)),
        *([f"INCOMPLETE: ended by {report['ended_by']}"] if report["ended_by"] else []),
        sums,
    ]
    return "\n".join(lines) + "\n"


def _case_lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'cases':28}{'number':>8}{'failed':>8}{'not run':>9}{'worst':>10}{'allowed':>10}"
    for group in dict.fromkeys(case["group"] for case in found):
        members = [case for case in found if case["group"] == group]
        errors = [case["error"] for case in members if case["error"] is not None]
        worst = f"{max(errors):.1e}" if errors else "-"
        failed = sum(case["passed"] is False for case in members)
        idle = sum(case["passed"] is None for case in members)
        bound = f"{members[0]['bound']:.0e}"
        yield f"{group:28}{len(members):8}{failed:8}{idle:9}{worst:>10}{bound:>10}"


def _failure_lines(report: dict[str, Any], shortened: bool) -> Iterator[str]:
    cases_of = report["cases"]
    failures = [(c["case"], c["message"]) for c in cases_of if c["passed"] is False]
    failures += [(_title(t), t["message"]) for t in report["timings"] if t["us"] is None]
    for title, message in failures:
        yield f"FAILED {title}: {_short(message) if shortened else message}"
    idle = [case for case in cases_of if case["passed"] is None]
    for case in idle:
        yield f"{case['case']}: {case['message']}"
    if failures or idle:
        yield ""


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _SHOWN_LETTERS else line[: _SHOWN_LETTERS - 1] + "…"


def _title(timing: dict[str, Any]) -> str:
    schedule, precision = timing["schedule"], timing["precision"]
    return f"{schedule} {precision}, M = {timing['m']}, [{timing['k']}, {timing['n']}]"


def _timing_lines(report: dict[str, Any]) -> Iterator[str]:
    rate = report["copy"]["gb_per_s"]
    if rate is None:
        yield f"no times: {_short(report['copy']['message'])}"
        return
    yield f"a copy within the device's memory reads and writes {rate:.0f} GB/s"
    yield f"{'Q4_0':44}{'µs':>10}{'GB/s':>8}{'of copy':>9}"
    for timing in report["timings"]:
        if timing["us"] is not None:
            fraction = f"{timing['fraction']:.0%}"
            speed = f"{timing['us']:10.1f}{timing['gb_per_s']:8.0f}{fraction:>9}"
            yield f"{_title(timing):44}{speed}"
    yield ""


def _kernel_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "kernels"
    for kernel in report["kernels"]:
        facts = ", ".join(f"{name} {value}" for name, value in kernel.items() if name != "key")
        yield f"  {facts}"
    yield ""
