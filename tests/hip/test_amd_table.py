"""The table of estimates for AMD GPUs in docs/amd.md is current."""

import importlib.metadata
import itertools
from dataclasses import replace
from typing import Final

import pytest

from q4jit.hip.gemv_matrix_sizes import sizes_of
from q4jit.hip.kernel import QUAD_UNITS, HipPlan
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.targets import HIP_ARCHS
from tests.support.amd_table import CARDS, Counts, Needs, loops_of, main_loop, needs
from tests.support.golden import check_golden
from tests.support.hip import hip_plan
from tests.support.hip_cases import product, tensor, zeros
from tests.support.hip_objects import assembly, in_parallel, pinned
from tests.support.paths import ROOT
from tests.support.tools import lack

pytestmark = pytest.mark.ratchet

DOCUMENT: Final = ROOT / "docs" / "amd.md"
K, N = 4096, 14336  # a feed-forward layer of a large model
M_CLASSES: Final = (1, 2, 4, 8, 16, 32, 512)
ENOUGH: Final = 1.5  # memory time / issue time at M = 1
# What CDNA reaches with K = 16384, by arch and N: every thread block splits all of x, and for
# N = 4096 it has only 16 or 48 columns to multiply it by. On gfx90a with N = 14336 a wave also
# keeps a second set of sums (`hip/long_sums.py`), which the precision contract needs.
SHORT_OF_ENOUGH: Final = {
    ("gfx90a", 4096): 1.02,
    ("gfx90a", 14336): 1.07,
    ("gfx942", 4096): 0.86,
    ("gfx942", 14336): 1.39,
}

HEADER: Final = (
    "arch | M | precision | schedule | instructions | vector | of the loop | matrix or dot"
    " | LDS bytes | VGPRs | spills | waves | memory : issue"
)

Row = tuple[str, int, str, str]  # arch, M, precision, schedule


def plans() -> dict[Row, HipPlan]:
    """Return the kernels that the schedules choose, each once: `i8` may have those of `f16`."""
    by_row: dict[Row, HipPlan] = {}
    for arch, precision, m in itertools.product(CARDS, ("f32", "f16", "i8"), M_CLASSES):
        args = [zeros(m, K), tensor("Q4_0", K, N)]
        plan = hip_plan(product, f"hip:{arch}", args, PlanOptions(precision))
        kernel = plan.kernels[-1]
        by_row.setdefault((arch, m, kernel.precision, kernel.schedule), plan)
    return by_row


def counted(plan: HipPlan, m: int) -> Needs:
    kernel = plan.kernels[-1]
    source = render(plan, kernel)
    return needs(source, plan, kernel, m, assembly(source))


def document(table: dict[Row, Needs]) -> str:
    """Return the text of the page."""
    lines = [_HEAD.format(version=pinned(), k=K, n=N, enough=ENOUGH, header=f"| {HEADER} |")]
    for (arch, m, precision, schedule), each in table.items():
        cells = [
            arch,
            str(m),
            precision,
            schedule,
            f"{each.whole.instructions * each.per_block:.0f}",
            f"{each.whole.vector * each.per_block:.0f}",
            f"{each.loop.instructions / each.loop_blocks:.0f}",
            f"{each.loop.matrix or each.loop.dot or '–'}",
            str(each.lds_bytes),
            str(each.vgprs),
            str(each.spills),
            str(each.waves),
            f"{each.ratio(CARDS[arch], HIP_ARCHS[arch].wave):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Published figures that the estimates use:",
        "",
        "| arch | card | CUs | GHz | GB/s |",
    ]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {arch} | {card.name} | {card.compute_units} | {card.clock_ghz} | {card.gigabytes_s:g} |"
        for arch, card in CARDS.items()
    ]
    return "\n".join([*lines, ""])


_HEAD: Final = """\
# AMD GPUs: estimates from the code objects

`pytest tests/hip/test_amd_table.py --update-golden` writes this page with the clang of ziglang
{version}. Nothing here was measured on a card. The table has one product with a Q4_0 weight,
K = {k}, N = {n}, and the kernels that calls from Python get (`q4jit build` has kernels for the
layout `planar`). If `i8` has the kernel of `f16`, only `f16` is listed.

- *instructions*, *vector*: instructions of a whole thread block, from its first to its last, per
  block of 18 bytes that it multiplies, and vector instructions among them. They include loading and
  splitting x, staging, the sums across waves, and the epilogue. Instructions that all lanes of a
  wave repeat count fully.
- *of the loop*: the same count for the main loop alone.
- *matrix or dot*: matrix or dot-product instructions in a round of the loop.
- *waves*: waves per SIMD that registers and shared memory allow.
- *memory : issue*: the time to read the weight at the card's bandwidth, divided by the time in
  which the busiest SIMD issues the vector and matrix instructions of its waves. Above 1 the memory
  is the limit; the goal at M = 1 is {enough}.

The count takes each loop of the assembly and multiplies its instructions by its turns, which follow
from K and the kernel's constants: the stages of x, the turns in which threads split or load x, and
the mean turns of a wave in the main loop. Both sides of a branch count. Loops for rough x count as
0, because normal x never enters them. Tiles (M ≥ 17) find x split by a launch before, which is not
counted; they decode a block once for 32 or 64 rows, so the multiplication is their limit.

The estimate gives each compute unit its share of the N columns, in whole thread blocks, and each
SIMD its share of their waves. It assumes that RDNA 3 and 4 never issue two instructions at a time,
and that only CDNA runs matrix instructions beside vector instructions. It leaves out latency,
barriers, the launch, and bandwidth below the published figure. There was no AMD GPU to measure on:
the count is the only evidence for the constants of AMD.

On gfx942, M = 1, f32, a block had 15 waves before whole blocks were counted: 142 instructions per
18 bytes and a ratio of 1.42. With 12 waves, three on each SIMD, these are 133 and 1.61. No other
number of columns had a better ratio: fewer columns split x more often, more columns leave compute
units idle.

{header}
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def test_the_table_is_current(request: pytest.FixtureRequest) -> None:
    installed = importlib.metadata.version("ziglang")
    if installed != pinned():
        lack(f"the table needs ziglang {pinned()}, got {installed}: pip install it")
    by_row = plans()
    counts = in_parallel(lambda row: counted(by_row[row], row[1]), by_row)
    table = dict(zip(by_row, counts, strict=True))
    assert not [row for row, each in table.items() if each.spills]
    check_golden(
        DOCUMENT, document(table), update=bool(request.config.getoption("--update-golden"))
    )


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("n", [4096, N])
def test_memory_limits_one_row(n: int, arch: str) -> None:
    args = [zeros(1, 4 * K), tensor("Q4_0", 4 * K, n)]
    each = counted(hip_plan(product, f"hip:{arch}", args), 1)
    assert each.spills == 0
    assert each.waves >= 2
    enough = SHORT_OF_ENOUGH.get((arch, n), ENOUGH)
    assert each.ratio(CARDS[arch], HIP_ARCHS[arch].wave) >= enough


def test_a_whole_block_counts_every_loop_as_often_as_it_runs() -> None:
    args = [zeros(4, K), tensor("Q4_0", K, N)]
    plan = hip_plan(product, "hip:gfx942", args)
    kernel, arch = plan.kernels[-1], HIP_ARCHS["gfx942"]
    sizes = sizes_of(arch, kernel)
    assert (sizes.stages, sizes.steps, sizes.turns) == (2, 1, 1)
    each = counted(plan, 4)
    # a wave has a quarter of the quads, and two matrix instructions for each of their units
    assert sizes.waves_k == 4
    assert each.whole.matrix == sizes.quads / sizes.waves_k * QUAD_UNITS * 2
    text = assembly(render(plan, kernel))
    once = Counts.of([name for loop in loops_of(text) for name in loop.body])
    assert each.whole.instructions > once.instructions
    assert each.whole.instructions * each.per_block > each.loop.instructions / each.loop_blocks


def test_memory_time_is_compared_with_the_busiest_simd() -> None:
    card = CARDS["gfx942"]
    each = counted(hip_plan(product, "hip:gfx942", [zeros(1, K), tensor("Q4_0", K, N)]), 1)
    full = replace(each, grid=card.compute_units)
    one_more = replace(each, grid=card.compute_units + 1)
    assert full.ratio(card, 64) > 1.9 * one_more.ratio(card, 64)
    uneven = replace(each, threads=each.threads + 64)  # one SIMD has a wave more
    assert each.ratio(card, 64) > uneven.ratio(card, 64)


def test_the_main_loop_is_the_smallest_loop_with_16_byte_loads() -> None:
    text = """\
.LBB0_1:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
\tglobal_load_b128 v[0:3], v4, off
\ts_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=2
\tv_mul_f32 v0, v0, v0
.LBB0_3:                                ;   Parent Loop BB0_1 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tglobal_load_b128 v[0:3], v4, off
; %bb.4:                                ;   in Loop: Header=BB0_3 Depth=2
\ts_cbranch_scc1 .LBB0_2
; %bb.5:                                ;   in Loop: Header=BB0_1 Depth=1
\tv_add_f32 v0, v0, v0
\tv_add_f32 v0, v0, v0
\ts_cbranch_scc1 .LBB0_1
; %bb.6:
\ts_endpgm
"""
    assert main_loop(text).body == ["v_mul_f32", "global_load_b128", "s_cbranch_scc1"]
    multiplies = text.replace("v_add_f32 v0", "v_mfma_f32_16x16x16_f16 v0", 1)
    assert "v_mfma_f32_16x16x16_f16" in main_loop(multiplies).body
    with pytest.raises(ValueError, match="no loop of the kernel"):
        main_loop("\ts_endpgm\n")
