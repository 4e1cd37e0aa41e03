"""Render HIP: a planned kernel becomes the text of one translation unit.

The templates hold the C++, and `hip.variables` holds what differs from kernel to kernel. A text
begins with the prelude of its platform; below it AMD, NVIDIA and the host get the same text.
"""

from typing import Final

from q4jit.frontend.specs import WeightSpec
from q4jit.hip.kernel import MAX_GRID_Y, UNIT_ELEMENTS, HipKernel, HipPlan
from q4jit.hip.memory import ELEMENT_STAGE_UNITS, generic_bytes
from q4jit.hip.templates import FRAME, environment, origins
from q4jit.hip.variables import variables
from q4jit.hip.weight import KernelWeight
from q4jit.plan.kernels import Source
from q4jit.targets import Target
from q4jit.weights.formats import Format
from q4jit.weights.layouts import GGUF

SUFFIX: Final = ".hip"


def render(plan: HipPlan, kernel: HipKernel, platform: str | None = None) -> Source:
    """Return the text of a kernel; the same plan always gives the same text.

    platform: the prelude, `amd`, `nvidia` or `host` (None: the target's own).
    """
    arch = plan.target.hip
    context = variables(plan, kernel)
    context["platform"] = platform or ("nvidia" if arch.is_nvidia else "amd")
    text = environment().get_template(FRAME).render(context)
    return Source(kernel.work.symbol, plan.target, text, SUFFIX, lambda: origins(context))


def render_generic(
    fmt: Format, target: Target, block_size: int, platform: str | None = None
) -> Source:
    """Return the text of `<format>_matmul_kernel`, a product on GGUF rows of any M, N and K.

    platform: as for `render`.
    """
    name = fmt.name.lower()
    weight = KernelWeight(WeightSpec(fmt.name, fmt.block_elements, 1), GGUF)  # one block
    context = {
        "platform": platform or ("nvidia" if target.hip.is_nvidia else "amd"),
        "arch": target.hip,
        "symbol": f"{name}_matmul_kernel",
        "argument": f"weights_{name}",
        "weight": weight,
        "unit_elements": UNIT_ELEMENTS,
        "stage_elements": ELEMENT_STAGE_UNITS * UNIT_ELEMENTS,
        "block_size": block_size,
        "lds_bytes": generic_bytes(target.hip, block_size),
        "max_grid_y": MAX_GRID_Y,
        "kernel": {"lanes": 1},
        "schedule": "generic",
        "needs": {
            "block_of_rows": True,
            "sum_of_lanes": True,
            "block_sum": True,
            "long_sums": False,
            "centre": False,
            "byte_pairs": False,
            "table_pairs": False,
            "of_four": False,
            "block_largest": False,
            "block_maximum": False,
            "rolled": False,
            "fours": (),
            "loaded": (),
            "stored": (),
            "unaligned": sorted(weight.unaligned, reverse=True),
        },
    }
    text = environment().get_template("kernel/generic.hip.j2").render(context)
    return Source(f"{name}_matmul_kernel", target, text, SUFFIX)


def render_read(target: Target, block_size: int, ahead: int, platform: str | None = None) -> Source:
    """Return the text of `q4jit_read`, which only reads memory, 16 bytes at a time.

    ahead: loads of a thread that are on their way together. platform: as for `render`.
    """
    symbol = "q4jit_read"
    context = {
        "platform": platform or ("nvidia" if target.hip.is_nvidia else "amd"),
        "arch": target.hip,
        "symbol": symbol,
        "block_size": block_size,
        "ahead": ahead,
    }
    text = environment().get_template("kernel/read.hip.j2").render(context)
    return Source(symbol, target, text, SUFFIX)
