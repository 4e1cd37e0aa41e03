"""What `q4jit bench` lets run: q4jit's kernels, other libraries' products, a read of the bytes.

An entrant opens for a piece of work: it brings the arguments where it reads them, in copies that no
cache keeps, and runs when it is asked to, so that several can take turns. A library that is not
here has a reason instead.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from q4jit.arrays.device_array import DeviceArray
from q4jit.backends import find_backend
from q4jit.dispatcher import specialize
from q4jit.errors import Q4JitError
from q4jit.hip import tunings
from q4jit.hip.harness import Bench, Built
from q4jit.hip.kernel import ELEMENT
from q4jit.hip.render import render_read
from q4jit.plan.kernels import Source
from q4jit.plan.options import Tuning
from q4jit.runtime.devices import driver_of, target_of
from q4jit.runtime.driver import Device
from q4jit.runtime.prepared import Launch
from q4jit.targets import find_target
from q4jit.tools import limits
from q4jit.tools.ggml import Ggml, GgmlError
from q4jit.tools.selftest import driver_version
from q4jit.weights.formats import decode
from q4jit.weights.tensor import QuantizedTensor

Floats = NDArray[np.float32]
T = TypeVar("T")

READ: Final = "read"
PEAKS: Final = {"f32": "FMA peak", "i8": "dot peak"}
"""By precision, what many rows are held against on a CPU."""
LIMITS: Final = frozenset({READ, *PEAKS.values()})
_ROTATED_BYTES: Final = 256 << 20  # weights that no cache keeps; AMD's last level is not its L2
_MEMORY_SHARE: Final = 8  # of a device's memory, at most this part for them
_UNKNOWN_CACHE_BYTES: Final = 64 << 20
_READ_BYTES: Final = 16  # of a load
# threads of a block and loads ahead, then blocks per compute unit (None: each block has one run)
_READ_TEXTS: Final = ((256, 2), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 2), (1024, 4))
_READ_BLOCKS: Final = (1, 2, 4, 8, None)
_CPU_CALLS_S: Final = 0.03
_READ_PASSES: Final = 5
_READ_PASS_BYTES: Final = 32 << 20  # of passes together, at least: fewer end before they are timed
_PEAK_PASSES: Final = 4
_CPU_WARM_CALLS: Final = 3
# products of a graph of ggml's, which starts its threads anew: so many, or so much work
_GRAPH_PRODUCTS: Final = 16
_GRAPH_OPERATIONS: Final = 10_000_000_000
# until threads of the library before have stopped spinning: OpenBLAS's took PyTorch's product from
# 40 µs to 8 ms after 50 ms, and no longer after 100
_CPU_REST_S: Final = 0.15


class AbsentError(Exception):
    """Why a peer is not here, or cannot do a piece of work."""


@dataclass(frozen=True, eq=False)
class Work:
    """A call of `function` with x [M, K], one of the `copies` of weights [K, N], and `others`.

    error: of the results, None where they are no numbers.
    """

    function: Callable[..., Any]
    x: Floats
    copies: tuple[tuple[QuantizedTensor, ...], ...]
    others: tuple[Floats, ...]
    error: Callable[[Sequence[Floats]], float | None]

    @property
    def operations(self) -> int:
        """Of the products of a call, two per multiply-add."""
        return 2 * len(self.x) * sum(math.prod(w.shape) for w in self.weights)

    @property
    def weights(self) -> tuple[QuantizedTensor, ...]:
        """The weights of a call."""
        return self.copies[0]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of a call."""
        return sum(w.nbytes for w in self.weights)

    def args(self, weights: Sequence[QuantizedTensor]) -> tuple[Any, ...]:
        """The arguments of a call with one of the copies."""
        return (self.x, *weights, *self.others)


@dataclass(frozen=True)
class Running:
    """An entrant that is ready.

    us: runs for some milliseconds, and gives the microseconds of a call. poison: makes the results
    NaN. error: of the last results, None where they are no numbers. note: how it is computed.
    """

    us: Callable[[], float]
    poison: Callable[[], None]
    error: Callable[[], float | None]
    note: str = ""


@dataclass(frozen=True)
class Entrant:
    """Something that does a piece of work; precision: whose bound its error has; own: q4jit's."""

    name: str
    precision: str
    open: Callable[[Work], AbstractContextManager[Running]]
    own: bool = False


class Arena(Protocol):
    """Where entrants run."""

    target: str
    about: dict[str, Any]
    absent: dict[str, str]

    def begin(self, work: Work, precision: str) -> None:
        """Begin to compile q4jit's kernels; what fails is told when they run."""

    def own(self, precision: str) -> Entrant:
        """q4jit, as its calls run."""

    def read(self) -> Entrant:
        """A read of as many bytes as the weights of a call have."""

    def peaks(self) -> list[Entrant]:
        """How long as many multiply-adds take where nothing is read."""

    def peers(self) -> list[Entrant]:
        """What else computes a product here."""

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps; 0: one weight that stays in the cache."""

    def close(self) -> None:
        """End what was begun."""


def count_copies(total_bytes: int, one_bytes: int) -> int:
    """Of weights that take turns; total_bytes is 0 where one stays in the cache."""
    return max(2, total_bytes // max(one_bytes, 1) + 1) if total_bytes else 1


def _named(absent: dict[str, str], found: Mapping[str, Callable[[], Entrant]]) -> list[Entrant]:
    """Those that are here; what is not gets its reason."""
    here = []
    for name, find in found.items():
        try:
            here.append(find())
        except AbsentError as reason:
            absent[name] = str(reason)
    return here


def _torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise AbsentError("torch cannot be imported: pip install torch")
    return importlib.import_module("torch")  # late: no package of ours


# --- Q4_0 as others take it -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Quants:
    """Quants [N, K] from 0 to 15, of value d·(q − 8), and their d [N, K/32]."""

    q: NDArray[np.uint8]
    d: NDArray[np.float16]

    @classmethod
    def of(cls, w: QuantizedTensor) -> "_Quants":
        if w.format != "Q4_0":
            raise AbsentError(f"takes Q4_0, found {w.format}")
        k, n = w.shape
        blocks = w.raw.reshape(n, k // 32, 18)
        d = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        nibbles = blocks[..., 2:]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        return cls(q.reshape(n, k), d)


def _int4_weight(torch: Any, w: QuantizedTensor) -> tuple[NDArray[np.uint8], Any]:
    """The quants, and scales with zeros [K/32, N, 2] in bf16 as torch's int4 products take them."""
    quants = _Quants.of(w)
    d = torch.from_numpy(quants.d.astype(np.float32)).t()
    return quants.q, torch.stack([d, torch.zeros_like(d)], dim=-1).contiguous().bfloat16()


# --- a GPU ----------------------------------------------------------------------------------------


class GpuArena:
    """One GPU: times are those of graphs that are replayed."""

    def __init__(self, device: Device) -> None:
        """Raises TargetError where the device's arch or a compiler for it is not known."""
        self.device = device
        self.bench = Bench(device)
        self.target = str(target_of(device))
        self.about = {
            "device": device.name,
            "driver": driver_version(device.platform),
            "compiler": self.bench.fingerprint,
            "last_level_cache_bytes": device.l2_bytes,
        }
        self.absent: dict[str, str] = {}
        machine = tunings.Machine(device.name, device.arch, self.bench.fingerprint)
        self._tuned = tunings.find(device.arch, machine)
        self._reads: dict[int, _GpuRead] = {}

    def close(self) -> None:
        """End what was begun."""
        self._reads.clear()
        self.bench.__exit__(None, None, None)

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps."""
        wanted = max(4 * self.device.l2_bytes, _ROTATED_BYTES)
        return min(wanted, self.device.memory_bytes // _MEMORY_SHARE)

    def own(self, precision: str) -> Entrant:
        """q4jit, as its calls run: with what was measured, if anything was."""
        open_ = functools.partial(self._own, Tuning(precision))
        return Entrant(f"q4jit {precision}", precision, open_, own=True)

    def begin(self, work: Work, precision: str) -> None:
        """Begin to compile q4jit's kernels; what fails is told when they run."""
        with contextlib.suppress(Q4JitError):
            self._build(work, Tuning(precision))

    def _build(self, work: Work, tuning: Tuning) -> Built:
        """The kernels of a piece of work, which are being compiled."""
        return self.bench.build(work.function, work.args(work.weights), tuning, self._tuned)

    @contextlib.contextmanager
    def _own(self, tuning: Tuning, work: Work) -> Iterator[Running]:
        bench, built = self.bench, self._build(work, tuning)
        outputs: list[DeviceArray] = []

        def calls_on(stream: int) -> list[Callable[[], object]]:
            x, *others = bench.upload((work.x, *work.others), stream)
            calls = [(x, *weights, *others) for weights in work.copies]
            outputs.extend(bench.outputs(built, calls[0]))
            launch = bench.bind(built, calls[0])
            for args in calls:
                launch.prepare(args)
            out = tuple(outputs) if built.plan.graph.returns_tuple else outputs[0]
            return [functools.partial(launch, args, out) for args in calls]

        products = (kernel for kernel in built.plan.kernels if kernel.work.sections)
        how = dict.fromkeys(
            k.schedule if k.precision == tuning.precision else f"{k.schedule} in {k.precision}"
            for k in products
        )
        with bench.replays(calls_on) as us:
            yield Running(
                us,
                lambda: bench.poison(outputs),
                lambda: work.error([array.to_numpy() for array in outputs]),
                ", ".join(how),
            )

    def read(self) -> Entrant:
        """A kernel that loads the bytes and nothing else: the fastest of some ways to do so."""
        return Entrant(READ, "f32", self._read)

    @contextlib.contextmanager
    def _read(self, work: Work) -> Iterator[Running]:
        size = work.weight_bytes
        if size not in self._reads:
            self._reads.clear()  # of another shape: its memory is free now
            self._reads[size] = _GpuRead(self.bench, size, self.rotated_bytes())
        with self._reads[size].open() as running:
            yield running

    def peaks(self) -> list[Entrant]:
        """None: a GPU's limits are looked up."""
        return []

    def peers(self) -> list[Entrant]:
        """PyTorch's products, and the schedule that q4jit grew from."""
        element = functools.partial(self._own, Tuning("f32", None, ELEMENT))
        products = (
            ("torch fp16", "i8", _dense_fp16),
            ("torch int4", "i8", _int4),
            ("dequantise + matmul", "f32", _dequantise),
        )
        found = {each[0]: functools.partial(self._torch, *each) for each in products}
        return [*_named(self.absent, found), Entrant("q4jit element", "f32", element)]

    def _torch(self, name: str, precision: str, make: "_TorchProduct") -> Entrant:
        torch = _torch()
        platform = "amd" if torch.version.hip else "nvidia"
        if not torch.cuda.is_available() or platform != self.device.platform:
            raise AbsentError(f"this torch ({torch.__version__}) does not run on {self.device}")
        return Entrant(name, precision, functools.partial(self._on_torch, torch, make))

    @contextlib.contextmanager
    def _on_torch(self, torch: Any, make: "_TorchProduct", work: Work) -> Iterator[Running]:
        place = f"cuda:{self.device.index}"  # PyTorch's name for AMD's too
        last: list[Any] = [None]

        def calls_on(stream: int) -> list[Callable[[], object]]:
            side = torch.cuda.ExternalStream(stream, device=place)

            def call(one: Callable[[], Any]) -> None:
                with torch.cuda.stream(side):
                    last[0] = one()

            products = make(torch, place, work, self.rotated_bytes())
            torch.cuda.synchronize(place)  # they were made on another stream
            return [functools.partial(call, one) for one in products]

        @contextlib.contextmanager
        def graph(stream: int, enqueue: Callable[[], None]) -> Iterator[Callable[[], None]]:
            # PyTorch gives a graph memory of its own, which it must know of
            side, made = torch.cuda.ExternalStream(stream, device=place), torch.cuda.CUDAGraph()
            with torch.cuda.device(place), torch.cuda.graph(made, stream=side):
                enqueue()

            def replay() -> None:
                with torch.cuda.stream(side):
                    made.replay()

            yield replay
            torch.cuda.synchronize(place)

        def poison() -> None:
            last[0].fill_(math.nan)
            torch.cuda.synchronize(place)

        with torch.no_grad(), self.bench.replays(calls_on, graph) as us:
            yield Running(us, poison, lambda: work.error([last[0].float().cpu().numpy()]))


_TorchProduct = Callable[[Any, str, Work, int], list[Callable[[], Any]]]


def _dense_fp16(torch: Any, place: str, work: Work, total_bytes: int) -> list[Callable[[], Any]]:
    """A product of halves, by the vendor's BLAS."""
    (w,) = work.weights
    half = torch.from_numpy(decode(w.block_format, w.raw)).to(place).half()
    x = torch.from_numpy(work.x).to(place).half()
    count = count_copies(total_bytes, half.numel() * half.element_size())
    copies = [half, *(half.clone() for _ in range(count - 1))]
    return [functools.partial(lambda w: x @ w.t(), w) for w in copies]


def _int4(torch: Any, place: str, work: Work, total_bytes: int) -> list[Callable[[], Any]]:
    """PyTorch's own product with 4-bit weights (tinygemm), x in bf16."""
    (w,) = work.weights
    q, scales = _int4_weight(torch, w)
    pairs = torch.from_numpy(q[:, ::2] << 4 | q[:, 1::2]).to(place)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)  # tiles of K of an instruction
    scales, x = scales.to(place), torch.from_numpy(work.x).to(place).bfloat16()
    copies = [(packed.clone(), scales.clone()) for _ in range(count_copies(total_bytes, w.nbytes))]
    multiply = torch.ops.aten._weight_int4pack_mm
    return [functools.partial(multiply, x, packed, 32, scales) for packed, scales in copies]


def _dequantise(torch: Any, place: str, work: Work, total_bytes: int) -> list[Callable[[], Any]]:
    """The weight's values in f32 from its blocks, then a product."""
    (w,) = work.weights
    if w.format != "Q4_0":
        raise AbsentError(f"takes Q4_0, found {w.format}")
    k, n = w.shape
    blocks = torch.from_numpy(w.raw.reshape(n, k // 32, 18).copy()).to(place)
    x = torch.from_numpy(work.x).to(place)

    def call(blocks: Any) -> Any:
        d = blocks[..., :2].contiguous().view(torch.float16).float()
        nibbles = blocks[..., 2:]
        q = torch.cat([nibbles & 15, nibbles >> 4], dim=-1)
        return x @ ((q.float() - 8) * d).view(n, k).t()

    copies = [blocks.clone() for _ in range(count_copies(total_bytes, w.nbytes))]
    return [functools.partial(call, blocks) for blocks in copies]


class _GpuRead:
    """Reads of random bytes on a GPU; texts and grids are tried once, and the fastest is kept."""

    def __init__(self, bench: Bench, size_bytes: int, total_bytes: int) -> None:
        self._bench = bench
        units = -(-size_bytes // _READ_BYTES)
        rng = np.random.default_rng(units)
        self._words = rng.integers(0, 1 << 32, 4 * units, np.uint32)
        count = count_copies(total_bytes, size_bytes)
        self._copies = [DeviceArray.from_numpy(self._words, bench.device) for _ in range(count)]
        texts = [t for t in _READ_TEXTS if t[0] <= bench.target.hip.max_block_size]
        sources = [render_read(bench.target, *text) for text in texts]
        for source in sources:
            bench.compile_text(source, "a read")
        self._ways = [
            _ReadWay(source, *text, self._blocks(units, per_unit, *text), units)
            for (text, source), per_unit in itertools.product(
                zip(texts, sources, strict=True), _READ_BLOCKS
            )
        ]
        self._best: _ReadWay | None = None

    def _blocks(self, units: int, per_unit: int | None, block_size: int, ahead: int) -> int:
        runs = -(-units // (block_size * ahead))
        return runs if per_unit is None else min(runs, per_unit * self._bench.device.compute_units)

    @contextlib.contextmanager
    def open(self) -> Iterator[Running]:
        """The fastest way to read them."""
        if self._best is None:
            self._best = min(dict.fromkeys(self._ways), key=self._tried_us)
        with self._running(self._best) as running:
            yield running

    def _tried_us(self, way: "_ReadWay") -> float:
        with self._running(way) as running:
            running.us()
            return min(running.us() for _ in range(2))

    @contextlib.contextmanager
    def _running(self, way: "_ReadWay") -> Iterator[Running]:
        bench, waves = self._bench, way.block_size // self._bench.target.hip.wave
        launch = way.prepared(bench)
        found: list[DeviceArray] = []

        def calls_on(stream: int) -> list[Callable[[], object]]:
            words = DeviceArray((way.blocks * waves,), bench.device, np.dtype(np.uint32), stream)
            found.append(words)
            where = words.pointer
            return [
                functools.partial(launch, stream, copy.pointer, where, way.units, way.blocks)
                for copy in self._copies
            ]

        def error() -> float | None:
            read = np.bitwise_xor.reduce(found[0].to_numpy())
            return 0.0 if read == np.bitwise_xor.reduce(self._words) else None

        with bench.replays(calls_on) as us:
            yield Running(us, lambda: bench.poison(found), error, str(way))


@dataclass(frozen=True)
class _ReadWay:
    source: Source = field(repr=False)
    block_size: int
    ahead: int
    blocks: int
    units: int

    def __str__(self) -> str:
        return f"{self.blocks} blocks of {self.block_size} threads, {self.ahead} loads each"

    def prepared(self, bench: Bench) -> Launch:
        """Takes two addresses and two numbers."""
        kernel = bench.load(self.source)
        grid, block = (self.blocks, 1, 1), (self.block_size, 1, 1)
        return driver_of(bench.device).prepare(kernel, grid, block, 0, "PPqq")


# --- the CPU --------------------------------------------------------------------------------------


class CpuArena:
    """This machine's CPU, with so many threads for everyone."""

    target = "cpu"

    def __init__(self, threads: int, ggml: Path | None, cached: bool = False) -> None:
        """cached: weights stay in the cache.

        threads: also those of q4jit's pool, which a process decides upon once.
        """
        self.threads = threads
        self._cached = cached
        self._ggml_path = ggml
        self._target = find_target("cpu")
        self._compiler = find_backend(self._target).compiler(self._target)
        self.about = {
            "device": _cpu_name(),
            "driver": "-",
            "compiler": self._compiler.fingerprint(self._target),
            "threads": threads,
            "cached": cached,
            "last_level_cache_bytes": cache_bytes(),
        }
        self.absent: dict[str, str] = {}
        self._workers = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End what was begun."""
        self._workers.shutdown()

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps; 0: one weight that stays in the cache."""
        return 0 if self._cached else 4 * cache_bytes()

    def begin(self, work: Work, precision: str) -> None:
        """Nothing: LLVM compiles one kernel at a time, in some tenths of a second."""

    def own(self, precision: str) -> Entrant:
        """q4jit, as bound calls run: from Python."""
        return Entrant(
            f"q4jit {precision}", precision, functools.partial(self._own, precision), own=True
        )

    @contextlib.contextmanager
    def _own(self, precision: str, work: Work) -> Iterator[Running]:
        call = specialize(work.function, target="cpu", precision=precision)
        args = [work.args(weights) for weights in work.copies]
        made = call(*args[0])
        outputs = made if isinstance(made, tuple) else (made,)
        calls = [call.bind(*each, out=made) for each in args]
        yield _on_cpu(calls, outputs, work, _remarks(call.explain()))

    def read(self) -> Entrant:
        """Vector loads of the bytes, each thread its part of all copies, several times over."""
        return Entrant(READ, "f32", self._read)

    @contextlib.contextmanager
    def _read(self, work: Work) -> Iterator[Running]:
        loads = [limits.reader(self._target, *way) for way in limits.READ_WAYS]
        count = count_copies(self.rotated_bytes(), work.weight_bytes)
        step = limits.STEP_BYTES * self.threads
        size_bytes = -(-count * work.weight_bytes // step) * step
        # an odd number: the exclusive or of all passes is that of one
        passes = max(_READ_PASSES, _READ_PASS_BYTES // size_bytes | 1)
        data = np.random.default_rng(0).integers(0, 1 << 32, size_bytes // 4, np.uint32)
        parts = np.split(data, self.threads)
        found, wanted, right = (
            np.empty(self.threads, np.uint32),
            np.bitwise_xor.reduce(data),
            [True],
        )

        def part_us(load: Callable[[int, int, int, int], None], i: int) -> float:
            start = time.perf_counter()
            load(parts[i].ctypes.data, parts[i].nbytes, passes, found[i:].ctypes.data)
            return (time.perf_counter() - start) * 1e6 / passes

        def all_us(load: Callable[[int, int, int, int], None]) -> float:
            taken = max(self._on_all(functools.partial(part_us, load)))
            if np.bitwise_xor.reduce(found) != wanted:
                right.clear()
            return taken

        def us() -> float:
            time.sleep(_CPU_REST_S)
            # the fastest, as this is a limit: which way it is depends on the machine's load too
            return min(map(all_us, loads)) * work.weight_bytes / size_bytes

        yield Running(us, lambda: found.fill(0), lambda: 0.0 if right else None)

    def _on_all(self, run: Callable[[int], T]) -> list[T]:
        """What every thread finds, all at the same time."""
        return list(self._workers.map(run, range(self.threads)))

    def peaks(self) -> list[Entrant]:
        """Multiply-adds of f32, and of int8 where the CPU has an instruction for their sums."""
        return _named(
            self.absent,
            {
                name: functools.partial(self._peak, precision, name)
                for precision, name in PEAKS.items()
            },
        )

    def _peak(self, precision: str, name: str) -> Entrant:
        peak = limits.peak(self._target, precision)
        if peak is None:
            raise AbsentError(f"no instruction of this CPU ({self._target}) sums products of int8")
        return Entrant(name, precision, functools.partial(self._at_peak, peak))

    @contextlib.contextmanager
    def _at_peak(self, peak: limits.Peak, work: Work) -> Iterator[Running]:
        right = [True]

        def run_s() -> float:
            found = self._on_all(lambda i: peak.run())
            if not all(good for _, good in found):
                right.clear()
            return max(taken for taken, _ in found)

        def us() -> float:
            time.sleep(_CPU_REST_S)
            fastest = min(run_s() for _ in range(_PEAK_PASSES))
            return fastest * 1e6 * work.operations / (peak.operations * self.threads)

        yield Running(us, lambda: None, lambda: 0.0 if right else None)

    def peers(self) -> list[Entrant]:
        """NumPy's BLAS, PyTorch's product with 4-bit weights, ggml."""
        return _named(
            self.absent,
            {
                "numpy f32": lambda: self._numpy("numpy f32", self._dense),
                "dequantise + matmul": lambda: self._numpy("dequantise + matmul", self._decoding),
                "torch int4": self._torch,
                "ggml": self._ggml,
            },
        )

    def _numpy(
        self, name: str, open_: Callable[[Work], AbstractContextManager[Running]]
    ) -> Entrant:
        _limit_blas(self.threads)
        return Entrant(name, "f32", open_)

    @contextlib.contextmanager
    def _dense(self, work: Work) -> Iterator[Running]:
        (w,) = work.weights
        rows = decode(w.block_format, w.raw)
        out = np.empty((len(work.x), w.shape[1]), np.float32)
        copies = [
            rows,
            *(rows.copy() for _ in range(count_copies(self.rotated_bytes(), rows.nbytes) - 1)),
        ]
        calls = [functools.partial(np.matmul, work.x, rows.T, out=out) for rows in copies]
        yield _on_cpu(calls, (out,), work)

    @contextlib.contextmanager
    def _decoding(self, work: Work) -> Iterator[Running]:
        out = np.empty((len(work.x), work.weights[0].shape[1]), np.float32)

        def call(w: QuantizedTensor) -> None:
            np.matmul(work.x, w.dequantize(), out=out)

        yield _on_cpu([functools.partial(call, w) for (w,) in work.copies], (out,), work)

    def _torch(self) -> Entrant:
        torch = _torch()
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise AbsentError(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")
        torch.set_num_threads(self.threads)
        return Entrant("torch int4", "i8", functools.partial(self._int4, torch))

    @contextlib.contextmanager
    def _int4(self, torch: Any, work: Work) -> Iterator[Running]:
        q, scales = _int4_weight(torch, work.weights[0])
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        packed = convert(torch.from_numpy(q.astype(np.int32)), 1)
        x = torch.from_numpy(work.x).bfloat16()
        last: list[Any] = [torch.zeros(len(work.x), work.weights[0].shape[1])]

        def call(packed: Any, scales: Any) -> None:
            last[0] = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)

        def poison() -> None:
            last[0].fill_(math.nan)

        calls = [
            functools.partial(call, packed.clone(), scales.clone()) for _ in range(len(work.copies))
        ]
        with torch.no_grad():
            yield Running(
                functools.partial(_timed_us, calls),
                poison,
                lambda: work.error([last[0].float().numpy()]),
            )

    def _ggml(self) -> Entrant:
        if self._ggml_path is None:
            raise AbsentError("no library is given: --ggml PATH of a libggml-cpu.so")
        try:
            library = Ggml(self._ggml_path)
        except GgmlError as error:
            raise AbsentError(str(error)) from None
        return Entrant("ggml", "i8", functools.partial(self._on_ggml, library))

    @contextlib.contextmanager
    def _on_ggml(self, library: Ggml, work: Work) -> Iterator[Running]:
        weights = [w for (w,) in work.copies]
        lacks = "".join(f", built without {name}" for name in library.lacks(self._target.features))
        try:
            number = min(_GRAPH_PRODUCTS, -(-_GRAPH_OPERATIONS // work.operations))
            opened = library.product(work.x, weights, max(len(weights), number), self.threads)
            with opened as made:
                yield Running(
                    lambda: _timed_us([made.compute]) / made.number,
                    made.poison,
                    lambda: work.error([made.result()]),
                    f"{made.layout}{lacks}",
                )
        except GgmlError as error:
            raise AbsentError(str(error)) from None


def _remarks(explained: str) -> str:
    """What of the precision that was asked for the dispatcher does not follow."""
    lines = (line.strip() for line in explained.splitlines())
    return ", ".join(dict.fromkeys(line for line in lines if line.startswith("precision=")))


def _on_cpu(
    calls: Sequence[Callable[[], object]], outputs: Sequence[Floats], work: Work, note: str = ""
) -> Running:
    def poison() -> None:
        for array in outputs:
            array.fill(np.nan)

    return Running(functools.partial(_timed_us, calls), poison, lambda: work.error(outputs), note)


def _timed_us(calls: Sequence[Callable[[], object]]) -> float:
    """The median of microseconds of calls, which take turns for some time."""
    time.sleep(_CPU_REST_S)
    taken: list[float] = []
    start = time.perf_counter()
    for call in calls[:_CPU_WARM_CALLS]:
        call()
        if time.perf_counter() - start > _CPU_CALLS_S:
            break
    start = time.perf_counter()
    end = start + _CPU_CALLS_S
    for call in itertools.cycle(calls):
        call()
        now = time.perf_counter()
        # one by one: a thread of another library that still spins stops a call for milliseconds
        taken.append(now - start)
        if now > end:
            break
        start = now
    return statistics.median(taken) * 1e6


def _limit_blas(threads: int) -> None:
    """Let NumPy's OpenBLAS use so many threads. Raises AbsentError where it cannot be told to."""
    module = importlib.import_module("numpy._core._multiarray_umath")
    library = ctypes.CDLL(module.__file__)
    for suffix in ("64_", ""):
        for prefix in ("scipy_openblas", "openblas"):
            if hasattr(library, f"{prefix}_set_num_threads{suffix}"):
                getattr(library, f"{prefix}_set_num_threads{suffix}")(threads)
                return
    raise AbsentError("the BLAS of this NumPy is no OpenBLAS: its threads cannot be set")


def cache_bytes() -> int:
    """Bytes of the CPU's last-level cache, as Linux tells them."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [p.read_text(encoding="ascii").strip() for p in folder.glob("index*/size")]
    known = [int(size[:-1]) << 10 for size in sizes if size.endswith("K")]
    return max(known, default=_UNKNOWN_CACHE_BYTES)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a CPU'} ({find_target('cpu')})"
