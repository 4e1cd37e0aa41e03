"""Back ends: what stands between a graph and a call, as one value per kind of target."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from q4jit.cache import Compiler
from q4jit.errors import TargetError
from q4jit.ir import Graph
from q4jit.launch_cpu import KernelFunction
from q4jit.lower_cpu import lower
from q4jit.plan import Plan, Source
from q4jit.schedule_cpu import make_plan, rows_per_tile
from q4jit.targets import Target


@dataclass(frozen=True)
class Backend:
    """The stages of one kind of target, in the order in which the dispatcher calls them.

    m_class: the class of a number of rows; plan: a graph for a target and a number of rows; lower:
    a kernel of a plan as text; compiler: text to bytes; load: bytes and symbol to a function and
    the owner of its memory. `remarks` tell what of the options has no effect.
    """

    m_class: Callable[[Target, int], int]
    plan: Callable[[Graph, Target, int], Plan[Any]]
    lower: Callable[[Any, Any], Source]
    compiler: Compiler
    load: Callable[[bytes, str, Target], tuple[KernelFunction, object]]
    rule: str
    remarks: dict[str, str]


def find_backend(target: Target) -> Backend:
    """The back end of a target; raises TargetError where there is none."""
    if target.backend == "cpu":
        return _cpu()
    raise TargetError(f"no back end {target.backend!r} for {target}: there is 'cpu'")


@functools.cache
def _cpu() -> Backend:
    from q4jit.compilers import llvm  # late: importing q4jit does not load LLVM

    return Backend(
        m_class=rows_per_tile,
        plan=make_plan,
        lower=lower,
        compiler=llvm,
        load=_load_on_cpu,
        rule="the CPU runs every call: no GPU back end is part of this version",
        remarks={
            "precision": "an upper bound: the CPU has no kernels of that class yet and serves the "
            "more exact 'f32'",
            "block_size": "threads per block of a GPU, not used on a CPU",
        },
    )


def _load_on_cpu(object_bytes: bytes, symbol: str, target: Target) -> tuple[KernelFunction, object]:
    from q4jit.runtime.cpu import LoadedObject

    code = LoadedObject(object_bytes, (symbol,), target)
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p)(code.addresses[symbol]), code
