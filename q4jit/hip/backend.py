"""The stages of the back end for GPUs, in one value."""

from collections.abc import Sequence
from typing import Any, Final

from q4jit.arrays.call_shapes import CallShapes
from q4jit.compilers.cache import Compiler
from q4jit.frontend.graph import Graph
from q4jit.hip import tunings
from q4jit.hip.classes import m_class
from q4jit.hip.explain import origins, remarks
from q4jit.hip.kernel import HipKernel, HipPlan
from q4jit.hip.launch import HipLaunch, load_once
from q4jit.hip.limits import check_block_size
from q4jit.hip.schedule import make_plan
from q4jit.hip.tunings import Machine
from q4jit.pipeline import Backend, Remark
from q4jit.plan.kernels import Source
from q4jit.plan.options import PlanOptions
from q4jit.runtime.driver import Device, LoadedKernel
from q4jit.targets import Target


def _check(target: Target, plan_options: PlanOptions) -> None:
    check_block_size(target, plan_options.block_size)


def _search(device: Device, graph: Graph, m: int, plan_options: PlanOptions) -> None:
    from q4jit.hip import search  # late: only tune=True needs it

    search.ensure(device, graph, m, plan_options)


def _plan(
    graph: Graph, target: Target, m: int, plan_options: PlanOptions, device: Device | None
) -> HipPlan:
    machine = None
    if device is not None:
        machine = Machine(device.name, target.arch, _compiler(target).fingerprint(target))
    return make_plan(graph, target, m, plan_options, tunings.find(target.arch, machine))


def _render(plan: HipPlan, kernel: HipKernel) -> Source:
    from q4jit.hip.render import render  # late: it imports Jinja

    return render(plan, kernel)


def _compiler(target: Target) -> Compiler:
    from q4jit.compilers.find import find_compiler  # late: finding a compiler takes a while

    return find_compiler(target)


def _launch(
    plan: HipPlan,
    loaded: Sequence[LoadedKernel],
    shapes: CallShapes,
    args: Sequence[Any],
    names: Sequence[str],
    device: Device | None,
) -> HipLaunch:
    assert device is not None  # `load` has raised an error if there is no device
    return HipLaunch(plan, loaded, shapes, args, names, device)


def _explain(plan: HipPlan, plan_options: PlanOptions, searched: bool) -> list[Remark]:
    return [*remarks(plan, plan_options), *origins(plan)]


BACKEND: Final = Backend(
    check=_check,
    m_class=m_class,
    search=_search,
    plan=_plan,
    render=_render,
    compiler=_compiler,
    load=load_once,
    launch=_launch,
    explain=_explain,
)
