"""The remarks of `explain()` about a plan for a GPU."""

from q4jit.hip.kernel import HipPlan
from q4jit.pipeline import Remark
from q4jit.plan.options import PlanOptions


def origins(plan: HipPlan) -> list[Remark]:
    """Return a remark for each kernel with products: where its constants come from."""
    return [
        Remark("constants", f"{kernel.work.name}: {_origin(kernel.origin)}")
        for kernel in plan.kernels
        if kernel.multiplied
    ]


def _origin(measured: str) -> str:
    return f"measured constants ({measured})" if measured else "constants from the rules"


def remarks(plan: HipPlan, plan_options: PlanOptions) -> list[Remark]:
    """Return a remark for each plan option that does not apply to a kernel."""
    products = [kernel for kernel in plan.kernels if kernel.multiplied]
    precisions = [
        Remark(
            "precision",
            f"precision={plan_options.precision!r} is an upper bound: {kernel.schedule} computes "
            f"{kernel.work.name} in the more exact {kernel.precision!r}",
        )
        for kernel in products
        if kernel.precision != plan_options.precision
    ]
    block_sizes = [
        Remark(
            "block_size",
            f"block_size={plan_options.block_size} does not apply to {kernel.work.name}: "
            f"{kernel.schedule} has {kernel.block_size} threads",
        )
        for kernel in products
        if plan_options.block_size not in {None, kernel.block_size}
    ]
    return precisions + block_sizes
