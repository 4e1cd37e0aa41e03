"""A GPU as an arena: q4jit's kernels and PyTorch's products in graphs that are replayed."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from q4jit.arrays.device_array import DeviceArray
from q4jit.errors import Q4JitError
from q4jit.hip import tunings
from q4jit.hip.harness import Bench, Built, rotated_bytes
from q4jit.hip.kernel import ELEMENT
from q4jit.plan.options import PlanOptions
from q4jit.runtime.devices import target_of
from q4jit.runtime.driver import Device
from q4jit.tools.compare.arena import READ, AbsentError, Entrant, Running, present
from q4jit.tools.compare.gpu_read import GpuRead
from q4jit.tools.compare.torch_products import (
    TorchProduct,
    dense_fp16,
    dequantise,
    int4,
    load_torch,
)
from q4jit.tools.compare.work import TimedCall
from q4jit.tools.provenance import driver_version


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
        self._reads: dict[int, GpuRead] = {}

    def close(self) -> None:
        """End what was begun."""
        self._reads.clear()
        self.bench.close()

    def rotated_bytes(self) -> int:
        """Bytes of weights that no cache keeps."""
        return rotated_bytes(self.device)

    def own(self, precision: str) -> Entrant:
        """q4jit, as its calls run: with what was measured, if anything was."""
        open_ = functools.partial(self._own, PlanOptions(precision))
        return Entrant(f"q4jit {precision}", precision, open_, own=True)

    def begin(self, work: TimedCall, precision: str) -> None:
        """Begin to compile q4jit's kernels; what fails is told when they run."""
        with contextlib.suppress(Q4JitError):
            self._build(work, PlanOptions(precision))

    def _build(self, work: TimedCall, plan_options: PlanOptions) -> Built:
        """The kernels of a piece of work, which are being compiled."""
        return self.bench.build(work.function, work.args(work.weights), plan_options, self._tuned)

    @contextlib.contextmanager
    def _own(self, plan_options: PlanOptions, work: TimedCall) -> Iterator[Running]:
        bench, built = self.bench, self._build(work, plan_options)
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
            k.schedule
            if k.precision == plan_options.precision
            else f"{k.schedule} in {k.precision}"
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
    def _read(self, work: TimedCall) -> Iterator[Running]:
        size = work.weight_bytes
        if size not in self._reads:
            self._reads.clear()  # of another shape: its memory is free now
            self._reads[size] = GpuRead(self.bench, size, self.rotated_bytes())
        with self._reads[size].open() as running:
            yield running

    def peaks(self) -> list[Entrant]:
        """None: a GPU's limits are looked up."""
        return []

    def peers(self) -> list[Entrant]:
        """PyTorch's products, and the schedule that q4jit grew from."""
        element = functools.partial(self._own, PlanOptions("f32", None, ELEMENT))
        products = (
            ("torch fp16", "i8", dense_fp16),
            ("torch int4", "i8", int4),
            ("dequantise + matmul", "f32", dequantise),
        )
        found = {each[0]: functools.partial(self._torch, *each) for each in products}
        return [*present(self.absent, found), Entrant("q4jit element", "f32", element)]

    def _torch(self, name: str, precision: str, make: TorchProduct) -> Entrant:
        torch = load_torch()
        platform = "amd" if torch.version.hip else "nvidia"
        if not torch.cuda.is_available() or platform != self.device.platform:
            raise AbsentError(f"this torch ({torch.__version__}) does not run on {self.device}")
        return Entrant(name, precision, functools.partial(self._on_torch, torch, make))

    @contextlib.contextmanager
    def _on_torch(self, torch: Any, make: TorchProduct, work: TimedCall) -> Iterator[Running]:
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
