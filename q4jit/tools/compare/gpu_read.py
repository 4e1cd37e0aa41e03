"""Find the fastest way to read a number of bytes on a GPU among several kernels and grids."""

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
# (threads per thread block, loads ahead) of each kernel
_READ_TEXTS: Final = ((256, 2), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 2), (1024, 4))
# thread blocks per compute unit; None: as many as there are runs of loads
_READ_BLOCKS: Final = (1, 2, 4, 8, None)


class GpuRead:
    """Reads of random bytes on a GPU. The first `open` times all variants and keeps the fastest."""

    def __init__(self, bench: Bench, size_bytes: int, total_bytes: int) -> None:
        self._bench = bench
        loads = -(-size_bytes // _LOAD_BYTES)
        rng = np.random.default_rng(loads)
        self._words = rng.integers(0, 1 << 32, 4 * loads, np.uint32)
        count = rotated_copies(total_bytes, size_bytes)
        self._copies = [DeviceArray.from_numpy(self._words, bench.device) for _ in range(count)]
        texts = [t for t in _READ_TEXTS if t[0] <= bench.target.hip.max_block_size]
        sources = [render_read(bench.target, *text) for text in texts]
        for source in sources:
            bench.compile_text(source, "a read")
        self._variants = [
            _ReadVariant(source, *text, self._blocks(loads, per_unit, *text), loads)
            for (text, source), per_unit in itertools.product(
                zip(texts, sources, strict=True), _READ_BLOCKS
            )
        ]
        self._best: _ReadVariant | None = None

    def _blocks(self, loads: int, per_unit: int | None, block_size: int, ahead: int) -> int:
        runs = -(-loads // (block_size * ahead))
        return runs if per_unit is None else min(runs, per_unit * self._bench.device.compute_units)

    @contextlib.contextmanager
    def open(self) -> Iterator[Running]:
        """Open the fastest variant."""
        if self._best is None:
            self._best = min(dict.fromkeys(self._variants), key=self._tried_us)
        with self._running(self._best) as running:
            yield running

    def _tried_us(self, variant: "_ReadVariant") -> float:
        with self._running(variant) as running:
            running.us()
            return min(running.us() for _ in range(2))

    @contextlib.contextmanager
    def _running(self, variant: "_ReadVariant") -> Iterator[Running]:
        bench, waves = self._bench, variant.block_size // self._bench.target.hip.wave
        launch = variant.prepared(bench)
        outputs: list[DeviceArray] = []

        def calls_on(stream: int) -> list[Callable[[], object]]:
            words = DeviceArray(
                (variant.blocks * waves,), bench.device, np.dtype(np.uint32), stream
            )
            outputs.append(words)
            address = words.pointer
            return [
                functools.partial(
                    launch, stream, copy.pointer, address, variant.loads, variant.blocks
                )
                for copy in self._copies
            ]

        def error() -> float | None:
            read = np.bitwise_xor.reduce(outputs[0].to_numpy())
            return 0.0 if read == np.bitwise_xor.reduce(self._words) else None

        with bench.replays(calls_on) as us:
            yield Running(us, lambda: bench.poison(outputs), error, str(variant))


@dataclass(frozen=True)
class _ReadVariant:
    source: Source = field(repr=False)
    block_size: int
    ahead: int
    blocks: int
    loads: int

    def __str__(self) -> str:
        return f"{self.blocks} blocks of {self.block_size} threads, {self.ahead} loads each"

    def prepared(self, bench: Bench) -> PreparedLaunch:
        """Return the launch, which takes two addresses and two numbers."""
        kernel = bench.load(self.source)
        grid, block = (self.blocks, 1, 1), (self.block_size, 1, 1)
        return driver_of(bench.device).prepare(kernel, grid, block, 0, "PPqq")
