"""Find the fastest way to read a number of bytes on a GPU, among several texts and grids."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from q4jit.arrays.device_array import DeviceArray
from q4jit.hip.harness import Bench
from q4jit.hip.render import render_read
from q4jit.plan.kernels import Source
from q4jit.runtime.devices import driver_of
from q4jit.runtime.prepared import PreparedLaunch
from q4jit.tools.compare.arena import Running
from q4jit.weights.reference import rotated_copies

_LOAD_BYTES: Final = 16
# threads of a block and loads ahead, then blocks per compute unit (None: each block has one run)
_READ_TEXTS: Final = ((256, 2), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 2), (1024, 4))
_READ_BLOCKS: Final = (1, 2, 4, 8, None)


class GpuRead:
    """Reads of random bytes on a GPU; texts and grids are tried once, and the fastest is kept."""

    def __init__(self, bench: Bench, size_bytes: int, total_bytes: int) -> None:
        self._bench = bench
        units = -(-size_bytes // _LOAD_BYTES)
        rng = np.random.default_rng(units)
        self._words = rng.integers(0, 1 << 32, 4 * units, np.uint32)
        count = rotated_copies(total_bytes, size_bytes)
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

    def prepared(self, bench: Bench) -> PreparedLaunch:
        """Takes two addresses and two numbers."""
        kernel = bench.load(self.source)
        grid, block = (self.blocks, 1, 1), (self.block_size, 1, 1)
        return driver_of(bench.device).prepare(kernel, grid, block, 0, "PPqq")
