"""Back ends: what stands between a graph and a call, as one value per kind of target."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from q4jit.compilers.cache import Compiler
from q4jit.cpu import schedule as schedule_cpu
from q4jit.cpu.launch import CpuLaunch, KernelFunction
from q4jit.errors import DeviceError, TargetError
from q4jit.frontend.graph import Graph
from q4jit.hip import schedule as schedule_hip
from q4jit.hip.schedule import Tuning
from q4jit.hip.tunings import Tuned
from q4jit.plan.kernels import Plan, Source
from q4jit.runtime.devices import driver_of, why_none
from q4jit.runtime.driver import Device
from q4jit.targets import Target


class Launch(Protocol):
    """Kernels bound to exact shapes."""

    def __call__(self, args: Sequence[Any], out: object = None) -> Any:
        """Run the kernels."""
        ...

    def bind(self, args: Sequence[Any], out: object = None) -> Callable[[], Any]:
        """A call with these very arrays."""
        ...

    def prepare(self, args: Sequence[Any]) -> None:
        """Bring the weights where the kernels read them."""
        ...


@runtime_checkable
class DeviceLaunch(Launch, Protocol):
    """Kernels bound to exact shapes, on a GPU."""

    def on_tensors(self, args: Sequence[Any], out: Any, pointers: list[int], stream: int) -> Any:
        """Run the kernels on PyTorch's tensors, whose like was accepted in an earlier call."""
        ...


@dataclass(frozen=True)
class Backend:
    """The stages of one kind of target, in the order in which the dispatcher calls them.

    m_class: the class of a number of rows; plan: a graph for a target and a number of rows; lower:
    a kernel of a plan as text; compiler: the one for a target; load: a compiled kernel, ready to
    run on a device (None: this CPU); launch: a plan's loaded kernels bound to the shapes of
    arguments; remarks: what a plan does not follow of what was asked for, a line each; origins: who
    chose the constants of a plan's kernels, a line each.
    """

    m_class: Callable[[Target, int, Tuning], int]
    plan: Callable[[Graph, Target, int, Tuning, Tuned | None], Plan[Any]]
    lower: Callable[[Any, Any], Source]
    compiler: Callable[[Target], Compiler]
    load: Callable[[bytes, Source, Device | None], Any]
    launch: Callable[[Any, Sequence[Any], Sequence[Any], Sequence[str], Device | None], Launch]
    remarks: Callable[[Any, Tuning], list[str]]
    origins: Callable[[Any], list[str]]


def find_backend(target: Target) -> Backend:
    """The back end of a target; raises TargetError where there is none."""
    try:
        return _BACKENDS[target.backend]()
    except KeyError:
        known = " and ".join(map(repr, _BACKENDS))
        raise TargetError(
            f"no back end {target.backend!r} for {target}: there are {known}"
        ) from None


# --- the CPU --------------------------------------------------------------------------------------


@functools.cache
def _cpu() -> Backend:
    from q4jit.cpu.lower import lower  # late: importing q4jit loads no back end

    return Backend(
        m_class=lambda target, m, tuning: schedule_cpu.m_class(target, m),
        plan=lambda graph, target, m, tuning, tuned: schedule_cpu.make_plan(
            graph, target, m, tuning.precision
        ),
        lower=lower,
        compiler=_llvm,
        load=_load_on_cpu,
        launch=lambda plan, loaded, args, names, device: CpuLaunch(
            plan, [function for function, _ in loaded], args, names
        ),
        remarks=_cpu_remarks,
        origins=lambda plan: [],
    )


def _cpu_remarks(plan: Plan[Any], tuning: Tuning) -> list[str]:
    found = []
    more_exact = schedule_cpu.more_exact(plan, tuning.precision)
    if more_exact:
        found.append(
            f"precision={tuning.precision!r} is an upper bound: the CPU has no kernels of that "
            f"class for {', '.join(more_exact)} here and serves the more exact 'f32'"
        )
    if tuning.block_size is not None:
        found.append(
            f"block_size={tuning.block_size}: threads per block of a GPU, not used on a CPU"
        )
    return found


def _llvm(target: Target) -> Compiler:
    from q4jit.compilers import llvm  # late: importing q4jit does not load LLVM

    return llvm


def _load_on_cpu(
    object_bytes: bytes, source: Source, device: Device | None
) -> tuple[KernelFunction, object]:
    """The kernel's function, and the owner of its memory."""
    from q4jit.runtime.cpu import LoadedObject

    code = LoadedObject(object_bytes, (source.symbol,), source.target)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(code.addresses[source.symbol])
    function.code = code  # a bound call may outlive what it was bound by
    return function, code


# --- GPUs -----------------------------------------------------------------------------------------


@functools.cache
def _hip() -> Backend:
    from q4jit.hip.launch import HipLaunch  # late, as the CPU's
    from q4jit.hip.render import render

    def launch(
        plan: Any, loaded: Sequence[Any], args: Sequence[Any], names: Sequence[str], device: Any
    ) -> Launch:
        return HipLaunch(plan, loaded, args, names, device)

    return Backend(
        m_class=schedule_hip.m_class,
        plan=schedule_hip.make_plan,
        lower=render,
        compiler=_hip_compiler,
        load=_load_on_gpu,
        launch=launch,
        remarks=schedule_hip.remarks,
        origins=schedule_hip.origins,
    )


def _hip_compiler(target: Target) -> Compiler:
    from q4jit.compilers.find import find_compiler

    return find_compiler(target)


def _load_on_gpu(code: bytes, source: Source, device: Device | None) -> object:
    if device is None:
        raise DeviceError(
            f"{source.symbol} is compiled for {source.target}, and no such device is here: "
            f"accepted are inspect_source and inspect_asm; {why_none() or 'another GPU is'}"
        )
    return driver_of(device).load(device.index, code, source.symbol)


_BACKENDS = {"cpu": _cpu, "hip": _hip}
