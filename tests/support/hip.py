"""Helpers of the HIP back end's tests: a function's plan for a GPU, run with the host prelude."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from q4jit import ExpertTensor, QuantizedTensor
from q4jit.arrays.call_shapes import CallShapes, lead_shape
from q4jit.floats import numpy_dtype
from q4jit.frontend.trace import trace
from q4jit.hip.kernel import (
    GEMV_TRANSPOSED,
    ROWS,
    SORT_EXPERTS,
    HipKernel,
    HipPlan,
    grid,
)
from q4jit.hip.memory import scratch
from q4jit.hip.render import render
from q4jit.hip.schedule import make_plan
from q4jit.plan.kernels import Slot
from q4jit.plan.options import PlanOptions
from q4jit.targets import find_target
from q4jit.weights.layouts import TILES16
from tests.support.hip_host import compile_host
from tests.support.kernels import specs_of

Floats = NDArray[np.float32]

_SCRATCH: Final[dict[str, type[np.generic]]] = {
    "x": np.float32,
    "x_terms": np.uint16,
    "x_rough": np.uint32,
    "x_quants": np.uint32,
    "x_scales": np.float32,
    "x_sums": np.int16,
    "split_sums": np.float32,
    "expert_order": np.int32,
    "expert_tiles": np.int32,
}


def hip_plan(
    function: Callable[..., Any],
    target: str,
    args: Sequence[Any],
    plan_options: PlanOptions | None = None,
) -> HipPlan:
    """Return the plan of `function` for arguments whose leading dimensions are M."""
    return make_plan(
        trace(function, specs_of(args)),
        find_target(target),
        rows_of(args),
        plan_options or PlanOptions(),
    )


def rows_of(args: Sequence[Any]) -> int:
    """Return M: the product of the leading dimensions that the arrays share."""
    return math.prod(lead_shape(args, specs_of(args)))


def run_on_host(
    plan: HipPlan, args: Sequence[Any], *, edit: Callable[[str], str] = str, **options: Any
) -> list[Floats]:
    """Return the results of a plan, whose kernels run with the host prelude (see `Program.run`).

    edit: changes the text of a kernel, for tests that break it on purpose.
    """
    shapes = CallShapes(plan.graph, args)
    memory: dict[Slot, NDArray[Any]] = {}
    for kernel in plan.kernels:
        rows = kernel.work.rows_of(shapes.rows)
        if rows == 0:
            continue
        source = render(plan, kernel, "host")
        program = compile_host(edit(source.text), kernel.work.symbol)
        slots = kernel.slots()
        spread = _spread(shapes, args)
        arguments = [_argument(plan, kernel, slot, spread, rows, memory) for slot in slots]
        # x in f16 terms has room for whole instructions: rows beyond the last are never written
        # a value that is the same for every row is written to the first only
        work = kernel.work
        stores = [*work.rows, *(store for section in work.sections for store in section.stores)]
        every_row = rows == 1 or all(store.node.varies for store in stores)
        complete = {"complete": every_row and not (kernel.schedule == ROWS and kernel.f16_terms)}
        found = program.run(
            grid(plan, kernel).blocks(rows), kernel.block_size, arguments, **(complete | options)
        )
        outputs = [s for s, p in zip(slots, program.parameters, strict=True) if p.is_output]
        memory.update(zip(outputs, found, strict=True))
    empty = np.zeros(0, np.float32)
    buffers = [memory.get(Slot("output", i), empty) for i in range(len(plan.graph.outputs))]
    return [
        result.of(buffer.reshape(result.buffer))
        for result, buffer in zip(shapes.results, buffers, strict=True)
    ]


def _spread(shapes: CallShapes, args: Sequence[Any]) -> list[Any]:
    """Return the arguments; arrays that lack some of the call's rows are repeated for them."""
    spread = list(args)
    for i, shape in [*shapes.arrays, *((i, shape) for i, shape, _ in shapes.ids)]:
        if shape is not None:
            spread[i] = np.broadcast_to(args[i], shape)
    return spread


def _argument(
    plan: HipPlan,
    kernel: HipKernel,
    slot: Slot,
    args: Sequence[Any],
    rows: int,
    memory: dict[Slot, NDArray[Any]],
) -> Any:
    match slot.kind:
        case "m":
            return rows
        case "array":
            return np.ascontiguousarray(args[slot.index])
        case "ids":
            return np.ascontiguousarray(args[slot.index], np.int64)
        case "scalar":
            return float(args[slot.index])
        case "weight":
            tensor: QuantizedTensor | ExpertTensor = args[slot.index]
            return tensor._resident.blocks(slot.layout)
    whole_rows = rows // kernel.work.copies
    own = scratch(kernel, whole_rows)
    if slot in own and (
        kernel.schedule == ROWS or _writes(kernel, slot)
    ):  # a buffer of an earlier kernel has another size
        dtype = _SCRATCH[slot.kind]
        return np.zeros(own[slot] // dtype().itemsize, dtype)
    return memory[slot] if slot in memory else _buffer(plan, slot, whole_rows)


def _writes(kernel: HipKernel, slot: Slot) -> bool:
    written = {GEMV_TRANSPOSED: {"split_sums"}, SORT_EXPERTS: {"expert_order", "expert_tiles"}}
    return slot.kind in written.get(kernel.schedule, ())


def _buffer(plan: HipPlan, slot: Slot, rows: int) -> NDArray[Any]:
    if slot.kind == "temp":
        stored_rows = rows if _varies(plan, slot) else 1
        return np.zeros((stored_rows, plan.temps[slot.index]), np.float32)
    node, dtype = plan.graph.outputs[slot.index], numpy_dtype(plan.graph.result_types[slot.index])
    if node.op == "dequantize":
        spec = plan.weight(node.arg)
        return np.zeros((spec.k, spec.n), dtype)
    return np.zeros((rows, node.copies * node.width), dtype)


def _varies(plan: HipPlan, slot: Slot) -> bool:
    """Whether a temporary holds a value for each row."""
    stores = [
        store
        for kernel in plan.kernels
        for store in (*kernel.work.rows, *(t for s in kernel.work.sections for t in s.stores))
    ]
    return any(
        store.node.varies
        for store in stores
        if (store.buffer.kind, store.buffer.index) == (slot.kind, slot.index)
    )


def run_tiles(
    schedule: str,
    function: Callable[..., Any],
    args: Sequence[Any],
    arch: str,
    precision: str = "f32",
    edit: Callable[[str], str] = str,
    **constants: Any,
) -> list[NDArray[Any]]:
    """Return the results of a plan by rule, whose products have these constants instead.

    schedule: what the rules must choose, a tile whose x a `rows` kernel splits.
    """
    plan = hip_plan(function, f"hip:{arch}", args, PlanOptions(precision))
    assert [kernel.schedule for kernel in plan.kernels] == [ROWS, schedule]
    first, last = plan.kernels
    assert last.layout == TILES16
    plan = replace(plan, kernels=(first, replace(last, **constants)))
    return run_on_host(plan, args, edit=edit)
