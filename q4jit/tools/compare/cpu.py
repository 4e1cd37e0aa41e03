"""This machine's CPU as an arena: q4jit's kernels, peers, and limits of its memory and units."""

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
from q4jit.targets import find_target
from q4jit.tools.compare import limits
from q4jit.tools.compare.arena import PEAKS, READ, AbsentError, Entrant, Running, present
from q4jit.tools.compare.cpu_peers import CpuPeers
from q4jit.tools.compare.cpu_times import rest, running_of
from q4jit.tools.compare.work import TimedCall
from q4jit.tools.provenance import cache_bytes, cpu_name
from q4jit.weights.reference import rotated_copies

T = TypeVar("T")
_READ_PASSES: Final = 5
_READ_PASS_BYTES: Final = 32 << 20  # of passes together, at least: fewer end before they are timed
_PEAK_PASSES: Final = 4


class CpuArena:
    """This machine's CPU, with so many threads for everyone."""

    target = "cpu"

    def __init__(self, threads: int, ggml: Path | None, cached: bool = False) -> None:
        """cached: weights stay in the cache.

        threads: also those of q4jit's pool, which a process decides upon once.
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
        """End what was begun."""
        self._workers.shutdown()

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps; 0: one weight that stays in the cache."""
        return self._rotated_bytes

    def begin(self, work: TimedCall, precision: str) -> None:
        """Nothing: LLVM compiles one kernel at a time, in some tenths of a second."""

    def own(self, precision: str) -> Entrant:
        """q4jit, as bound calls run: from Python."""
        return Entrant(
            f"q4jit {precision}", precision, functools.partial(self._own, precision), own=True
        )

    @contextlib.contextmanager
    def _own(self, precision: str, work: TimedCall) -> Iterator[Running]:
        call = specialize(work.function, target="cpu", precision=precision)
        args = [work.args(weights) for weights in work.copies]
        made = call(*args[0])
        outputs = made if isinstance(made, tuple) else (made,)
        calls = [call.bind(*each, out=made) for each in args]
        remarks = (remark.text for remark in call.remarks if remark.about == "precision")
        yield running_of(calls, outputs, work, ", ".join(dict.fromkeys(remarks)))

    def read(self) -> Entrant:
        """Vector loads of the bytes, each thread its part of all copies, several times over."""
        return Entrant(READ, "f32", self._read)

    @contextlib.contextmanager
    def _read(self, work: TimedCall) -> Iterator[Running]:
        loads = [limits.reader(self._target, *way) for way in limits.READ_WAYS]
        count = rotated_copies(self.rotated_bytes(), work.weight_bytes)
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
            rest()
            # the fastest, as this is a limit: which way it is depends on the machine's load too
            return min(map(all_us, loads)) * work.weight_bytes / size_bytes

        yield Running(us, lambda: found.fill(0), lambda: 0.0 if right else None)

    def _on_all(self, run: Callable[[int], T]) -> list[T]:
        """What every thread finds, all at the same time."""
        return list(self._workers.map(run, range(self.threads)))

    def peaks(self) -> list[Entrant]:
        """Multiply-adds of f32, and of int8 where the CPU has an instruction for their sums."""
        return present(
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
    def _at_peak(self, peak: limits.Peak, work: TimedCall) -> Iterator[Running]:
        right = [True]

        def run_s() -> float:
            found = self._on_all(lambda i: peak.run())
            if not all(good for _, good in found):
                right.clear()
            return max(taken for taken, _ in found)

        def us() -> float:
            rest()
            fastest = min(run_s() for _ in range(_PEAK_PASSES))
            return fastest * 1e6 * work.operations / (peak.operations * self.threads)

        yield Running(us, lambda: None, lambda: 0.0 if right else None)

    def peers(self) -> list[Entrant]:
        """NumPy's BLAS, PyTorch's product with 4-bit weights, ggml."""
        return present(self.absent, self._peers.finders())
