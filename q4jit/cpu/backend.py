"""The stages of the CPU's back end, as one value."""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

from q4jit.arrays.call_shapes import CallShapes
from q4jit.compilers.cache import Compiler
from q4jit.cpu import schedule
from q4jit.cpu.launch import CpuLaunch, KernelFunction
from q4jit.cpu.schedule import CpuKernel, CpuPlan
from q4jit.frontend.graph import Graph
from q4jit.pipeline import Backend, Remark
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.runtime.driver import Device
from q4jit.targets import Target


def _plan(
    graph: Graph, target: Target, m: int, plan_options: PlanOptions, device: Device | None
) -> CpuPlan:
    return schedule.make_plan(graph, target, m, plan_options.precision)


def _render(plan: CpuPlan, kernel: CpuKernel) -> Source:
    from q4jit.cpu.lower import lower  # late: importing q4jit does not load the writers

    return lower(plan, kernel)


def _compiler(target: Target) -> Compiler:
    from q4jit.compilers import llvm  # late: importing q4jit must not load LLVM

    return llvm


def _load(
    object_bytes: bytes, source: Source, device: Device | None
) -> tuple[KernelFunction, object]:
    """Return the kernel's function, and the owner of its memory."""
    from q4jit.runtime.cpu import LoadedObject

    code = LoadedObject(object_bytes, (source.symbol,), source.target)
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(code.addresses[source.symbol])
    function.code = code  # a bound call may outlive the launch that made it
    return function, code


def _launch(
    plan: CpuPlan,
    loaded: Sequence[tuple[KernelFunction, object]],
    shapes: CallShapes,
    args: Sequence[Any],
    names: Sequence[str],
    device: Device | None,
) -> CpuLaunch:
    return CpuLaunch(plan, [function for function, _ in loaded], shapes, args, names)


def _explain(plan: CpuPlan, plan_options: PlanOptions, searched: bool) -> list[Remark]:
    remarks = []
    more_exact = schedule.more_exact(plan, plan_options.precision)
    if more_exact:
        text = (
            f"precision={plan_options.precision!r} is an upper bound: this CPU has no kernels "
            f"of that class for {', '.join(more_exact)}, and uses the more exact 'f32'"
        )
        remarks.append(Remark("precision", text))
    if plan_options.block_size is not None:
        text = f"block_size={plan_options.block_size} is ignored: it sets a GPU's threads per block"
        remarks.append(Remark("block_size", text))
    if searched:
        text = "tune=True is ignored: CPU kernels have no constants to search for"
        remarks.append(Remark("constants", text))
    return remarks


BACKEND: Final = Backend(
    check=lambda target, plan_options: None,
    m_class=lambda target, m, plan_options: schedule.m_class(target, m),
    search=lambda device, graph, m, plan_options: None,
    plan=_plan,
    render=_render,
    compiler=_compiler,
    load=_load,
    launch=_launch,
    explain=_explain,
)
