"""A GPU as an arena: q4jit's kernels and PyTorch's products, replayed from graphs."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from q4jit.arrays.device_array import DeviceArray
from q4jit.errors import Q4JitError
from q4jit.floats import FloatType
from q4jit.hip import tunings
from q4jit.hip.harness import Bench, Built, rotated_bytes
from q4jit.hip.kernel import ELEMENT
from q4jit.plan.options import PlanOptions
from q4jit.runtime.devices import target_of
from q4jit.runtime.driver import Device
from q4jit.tools.compare.arena import READ, AbsentError, Entrant, Running, available
from q4jit.tools.compare.gpu_read import GpuRead
from q4jit.tools.compare.torch_products import (
    TorchProduct,
    dense,
    dequantise,
    int4,
    load_torch,
    tensor_error,
)
from q4jit.tools.compare.work import TimedCall
from q4jit.tools.provenance import driver_version


class GpuArena:
    """One GPU. Times are those of replayed graphs."""

    def __init__(self, device: Device) -> None:
        """Open a device. Raises TargetError if its arch is unknown or has no compiler."""
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
        """Free the memory of the reads and close the device."""
        self._reads.clear()
        self.bench.close()

    def rotated_bytes(self) -> int:
        """Return how many bytes of weights exceed every cache."""
        return rotated_bytes(self.device)

    def own(self, precision: str) -> Entrant:
        """Return q4jit, with the user's and the shipped tunings as in a call."""
        open_ = functools.partial(self._own, PlanOptions(precision))
        return Entrant(f"q4jit {precision}", precision, open_, own=True)

    def begin(self, work: TimedCall, precision: str) -> None:
        """Start to compile q4jit's kernels; errors are raised when they run."""
        with contextlib.suppress(Q4JitError):
            self._build(work, PlanOptions(precision))

    def _build(self, work: TimedCall, plan_options: PlanOptions) -> Built:
        """Return the kernels of a call, which may still be compiling."""
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
        schedules = dict.fromkeys(
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
                ", ".join(schedules),
            )

    def read(self) -> Entrant:
        """Return a kernel that only loads the bytes: the fastest of several variants."""
        return Entrant(READ, "f32", self._read)

    @contextlib.contextmanager
    def _read(self, work: TimedCall) -> Iterator[Running]:
        size = work.weight_bytes
        if size not in self._reads:
            self._reads.clear()  # frees the memory of another shape
            self._reads[size] = GpuRead(self.bench, size, self.rotated_bytes())
        with self._reads[size].open() as running:
            yield running

    def peaks(self) -> list[Entrant]:
        """Return none: data sheets give a GPU's peak rates."""
        return []

    def peers(self, dtype: FloatType) -> list[Entrant]:
        """Return PyTorch's products, and q4jit's simplest schedule as the baseline."""
        element = functools.partial(self._own, PlanOptions("f32", None, ELEMENT))
        decoded_in = "f32" if dtype == "f32" else "i8"  # 8 or more bits: values are rounded too
        products = (
            ("torch bf16" if dtype == "bf16" else "torch fp16", "i8", dense),
            ("torch int4", "i8", int4),
            ("dequantise + matmul", decoded_in, dequantise),
        )
        makers = {each[0]: functools.partial(self._torch, *each) for each in products}
        return [*available(self.absent, makers), Entrant("q4jit element", "f32", element)]

    def _torch(self, name: str, precision: str, make: TorchProduct) -> Entrant:
        torch = load_torch()
        platform = "amd" if torch.version.hip else "nvidia"
        if not torch.cuda.is_available() or platform != self.device.platform:
            raise AbsentError(f"torch {torch.__version__} does not run on {self.device}")
        return Entrant(name, precision, functools.partial(self._on_torch, torch, make))

    @contextlib.contextmanager
    def _on_torch(self, torch: Any, make: TorchProduct, work: TimedCall) -> Iterator[Running]:
        device = f"cuda:{self.device.index}"  # PyTorch calls AMD's GPUs so too
        latest: list[Any] = [None]

        def calls_on(stream: int) -> list[Callable[[], object]]:
            side = torch.cuda.ExternalStream(stream, device=device)

            def call(product: Callable[[], Any]) -> None:
                with torch.cuda.stream(side):
                    latest[0] = product()

            products = make(torch, device, work, self.rotated_bytes())
            torch.cuda.synchronize(device)  # the copies were made on another stream
            return [functools.partial(call, product) for product in products]

        @contextlib.contextmanager
        def graph(stream: int, enqueue: Callable[[], None]) -> Iterator[Callable[[], None]]:
            # PyTorch must capture the graph itself, because it allocates the graph's memory
            side = torch.cuda.ExternalStream(stream, device=device)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(captured, stream=side):
                enqueue()

            def replay() -> None:
                with torch.cuda.stream(side):
                    captured.replay()

            yield replay
            torch.cuda.synchronize(device)

        def poison() -> None:
            latest[0].fill_(math.nan)
            torch.cuda.synchronize(device)

        with torch.no_grad(), self.bench.replays(calls_on, graph) as us:
            yield Running(us, poison, lambda: tensor_error(work, latest[0]))
