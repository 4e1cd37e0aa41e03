"""What `explain` tells of a plan for a GPU."""

from q4jit.hip.kernel import HipPlan
from q4jit.pipeline import Remark
from q4jit.plan.options import PlanOptions


def origins(plan: HipPlan) -> list[Remark]:
    """Who chose the constants of the products, a line per kernel."""
    return [
        Remark(
            "constants",
            f"{kernel.work.name}: constants {kernel.origin or 'by the rules of the schedule'}",
        )
        for kernel in plan.kernels
        if kernel.work.sections
    ]


def remarks(plan: HipPlan, plan_options: PlanOptions) -> list[Remark]:
    """What the kernels of a plan do not follow of a plan_options, a line each."""
    products = [kernel for kernel in plan.kernels if kernel.work.sections]
    precisions = [
        Remark(
            "precision",
            f"precision={plan_options.precision!r} is an upper bound: {kernel.work.name} is "
            f"computed by {kernel.schedule} in the more exact {kernel.precision!r}",
        )
        for kernel in products
        if kernel.precision != plan_options.precision
    ]
    block_sizes = [
        Remark(
            "block_size",
            f"block_size={plan_options.block_size}: tiles have {kernel.block_size} threads, "
            f"{kernel.work.name} too",
        )
        for kernel in products
        if plan_options.block_size not in {None, kernel.block_size}
    ]
    return precisions + block_sizes
