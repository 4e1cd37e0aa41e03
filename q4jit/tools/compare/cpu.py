"""This machine's CPU as an arena: q4jit, the peers, and the limits of memory and arithmetic."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from q4jit.backends import find_backend
from q4jit.dispatcher import specialize
from q4jit.floats import FloatType
from q4jit.targets import find_target
from q4jit.tools.compare import limits
from q4jit.tools.compare.arena import PEAKS, READ, AbsentError, Entrant, Running, available
from q4jit.tools.compare.cpu_peers import CpuPeers
from q4jit.tools.compare.cpu_times import rest, running_of
from q4jit.tools.compare.work import TimedCall
from q4jit.tools.provenance import cache_bytes, cpu_name
from q4jit.weights.reference import rotated_copies

T = TypeVar("T")
_READ_PASSES: Final = 5
_READ_PASS_BYTES: Final = 32 << 20  # of all passes together, at least: less is too fast to time
_PEAK_PASSES: Final = 4


class CpuArena:
    """This machine's CPU with a number of threads, the same for all entrants."""

    target = "cpu"

    def __init__(self, threads: int, ggml: Path | None, cached: bool = False) -> None:
        """Take the conditions of the run.

        threads: must be the size of q4jit's thread pool, which a process fixes once.
        ggml: ggml's library or its folder.
        cached: whether the weight stays in the cache.
        """
        self.threads = threads
        cache = cache_bytes()
        self._target = find_target("cpu")
        self._compiler = find_backend(self._target).compiler(self._target)
        self.about = {
            "device": cpu_name(),
            "driver": "-",
            "compiler": self._compiler.fingerprint(self._target),
            "threads": threads,
            "cached": cached,
            "last_level_cache_bytes": cache,
        }
        self.absent: dict[str, str] = {}
        self._rotated_bytes = 0 if cached else 4 * cache
        self._peers = CpuPeers(threads, self._target, ggml, self._rotated_bytes)
        self._workers = ThreadPoolExecutor(threads)

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()

    def rotated_bytes(self) -> int:
        """Return how many bytes of weights exceed every cache; 0 to keep one in the cache."""
        return self._rotated_bytes

    def begin(self, work: TimedCall, precision: str) -> None:
        """Do nothing: LLVM compiles one kernel at a time, each in some tenths of a second."""

    def own(self, precision: str) -> Entrant:
        """Return q4jit, called from Python through `bind`."""
        return Entrant(
            f"q4jit {precision}", precision, functools.partial(self._own, precision), own=True
        )

    @contextlib.contextmanager
    def _own(self, precision: str, work: TimedCall) -> Iterator[Running]:
        call = specialize(work.function, target="cpu", precision=precision)
        args = [work.args(weights) for weights in work.copies]
        result = call(*args[0])
        outputs = result if isinstance(result, tuple) else (result,)
        calls = [call.bind(*each, out=result) for each in args]
        remarks = (remark.text for remark in call.remarks if remark.about == "precision")
        yield running_of(calls, outputs, work, ", ".join(dict.fromkeys(remarks)))

    def read(self) -> Entrant:
        """Return a loop of vector loads; each thread reads its part of all copies several times."""
        return Entrant(READ, "f32", self._read)

    @contextlib.contextmanager
    def _read(self, work: TimedCall) -> Iterator[Running]:
        loads = [limits.reader(self._target, *variant) for variant in limits.READ_VARIANTS]
        count = rotated_copies(self.rotated_bytes(), work.weight_bytes)
        chunk = limits.CHUNK_BYTES * self.threads
        size_bytes = -(-count * work.weight_bytes // chunk) * chunk
        # odd, so that the exclusive or over all passes equals that of one pass
        passes = max(_READ_PASSES, _READ_PASS_BYTES // size_bytes | 1)
        data = np.random.default_rng(0).integers(0, 1 << 32, size_bytes // 4, np.uint32)
        shares = np.split(data, self.threads)
        xors = np.empty(self.threads, np.uint32)
        wanted, is_right = np.bitwise_xor.reduce(data), [True]

        def share_us(load: Callable[[int, int, int, int], None], i: int) -> float:
            start = time.perf_counter()
            load(shares[i].ctypes.data, shares[i].nbytes, passes, xors[i:].ctypes.data)
            return (time.perf_counter() - start) * 1e6 / passes

        def all_us(load: Callable[[int, int, int, int], None]) -> float:
            slowest = max(self._on_all(functools.partial(share_us, load)))
            if np.bitwise_xor.reduce(xors) != wanted:
                is_right.clear()
            return slowest

        def us() -> float:
            rest()
            # the fastest variant, because this is a limit; which one that is varies with the load
            return min(map(all_us, loads)) * work.weight_bytes / size_bytes

        yield Running(us, lambda: xors.fill(0), lambda: 0.0 if is_right else None)

    def _on_all(self, run: Callable[[int], T]) -> list[T]:
        """Run a function on all threads at the same time; return its results."""
        return list(self._workers.map(run, range(self.threads)))

    def peaks(self) -> list[Entrant]:
        """Return the peaks of f32 and, if the CPU can sum products of int8, of int8."""
        return available(
            self.absent,
            {
                name: functools.partial(self._peak, precision, name)
                for precision, name in PEAKS.items()
            },
        )

    def _peak(self, precision: str, name: str) -> Entrant:
        peak = limits.peak(self._target, precision)
        if peak is None:
            raise AbsentError(
                f"this CPU ({self._target}) has no instruction that sums products of int8"
            )
        return Entrant(name, precision, functools.partial(self._at_peak, peak))

    @contextlib.contextmanager
    def _at_peak(self, peak: limits.Peak, work: TimedCall) -> Iterator[Running]:
        is_right = [True]

        def run_s() -> float:
            runs = self._on_all(lambda i: peak.run())
            if not all(exact for _, exact in runs):
                is_right.clear()
            return max(seconds for seconds, _ in runs)

        def us() -> float:
            rest()
            fastest = min(run_s() for _ in range(_PEAK_PASSES))
            return fastest * 1e6 * work.operations / (peak.operations * self.threads)

        yield Running(us, lambda: None, lambda: 0.0 if is_right else None)

    def peers(self, dtype: FloatType) -> list[Entrant]:
        """Return NumPy's BLAS, PyTorch's product with 4-bit weights and ggml, if available."""
        return available(self.absent, self._peers.makers())
