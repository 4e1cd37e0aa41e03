"""docs/amd.md: the table of what AMD's GPUs would need, and that it is current."""

import importlib.metadata
import itertools
from typing import Final

import pytest

from q4jit.hip.kernel import HipPlan
from q4jit.hip.render import render
from q4jit.plan.options import PlanOptions
from q4jit.targets import HIP_ARCHS
from tests.support.amd_table import CARDS, Needs, main_loop, needs
from tests.support.golden import check_golden
from tests.support.hip import hip_plan
from tests.support.hip_cases import product, tensor, zeros
from tests.support.hip_objects import assembly, in_parallel, pinned
from tests.support.paths import ROOT
from tests.support.tools import lack

pytestmark = pytest.mark.ratchet

DOCUMENT: Final = ROOT / "docs" / "amd.md"
K, N = 4096, 14336  # of a large model's feed-forward layer
M_CLASSES: Final = (1, 2, 4, 8, 16, 32, 512)
ENOUGH: Final = 1.5  # of memory time by issue time, at M = 1

HEADER: Final = (
    "arch | M | precision | schedule | instructions | vector | matrix or dot | LDS bytes | VGPRs"
    " | spills | waves | memory : issue"
)

Row = tuple[str, int, str, str]  # arch, M, precision, schedule


def plans() -> dict[Row, HipPlan]:
    """The kernels that are chosen, each once: `i8` may be served by those of `f16`."""
    found: dict[Row, HipPlan] = {}
    for arch, precision, m in itertools.product(CARDS, ("f32", "f16", "i8"), M_CLASSES):
        args = [zeros(m, K), tensor("Q4_0", K, N)]
        plan = hip_plan(product, f"hip:{arch}", args, PlanOptions(precision))
        kernel = plan.kernels[-1]
        found.setdefault((arch, m, kernel.precision, kernel.schedule), plan)
    return found


def measured(plan: HipPlan) -> Needs:
    kernel = plan.kernels[-1]
    source = render(plan, kernel)
    return needs(source, kernel, assembly(source))


def document(table: dict[Row, Needs]) -> str:
    """The Markdown text."""
    lines = [_HEAD.format(version=pinned(), k=K, n=N, enough=ENOUGH, header=f"| {HEADER} |")]
    for (arch, m, precision, schedule), found in table.items():
        per_block = HIP_ARCHS[arch].wave / found.blocks
        cells = [
            arch,
            str(m),
            precision,
            schedule,
            f"{found.instructions * per_block:.0f}",
            f"{found.vector * per_block:.0f}",
            str(found.matrix or found.dot or "–"),
            str(found.lds_bytes),
            str(found.vgprs),
            str(found.spills),
            str(found.waves),
            f"{found.ratio(CARDS[arch]):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Figures that the estimates stand on:", "", "| arch | card | CUs | GHz | GB/s |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {arch} | {card.name} | {card.compute_units} | {card.clock_ghz} | {card.gigabytes_s:g} |"
        for arch, card in CARDS.items()
    ]
    return "\n".join([*lines, ""])


_HEAD: Final = """\
# AMD GPUs: what the code objects say

Made by `pytest tests/hip/test_amd_table.py --update-golden` with the clang of ziglang {version};
nothing here was measured on a card. One product by Q4_0, K = {k}, N = {n}. These are the kernels
that calls from Python get (`q4jit build` has those of the layout `planar`); where those of `f16`
serve `i8` too, they stand here once.

- *instructions*, *vector*: issued for a lane's share of the main loop, per block of 18 bytes (of a
  wave's instructions, one per lane and block; what all lanes of a wave repeat counts fully).
- *matrix or dot*: such instructions in a round of the loop.
- *waves*: per SIMD, as far as registers and LDS allow.
- *memory : issue*: the time to read the blocks at the card's bandwidth, divided by the time that
  its vector units need to issue the loop's vector and matrix instructions at its clock, all compute
  units busy, no dual issue on RDNA 3 and 4, matrix instructions beside vector ones on CDNA only.
  Above 1 the memory is the limit; {enough} is wanted at M = 1. What is before, behind and around
  the loop, latency, and bandwidth below the published figure are not in it. `gemv_matrix` splits x
  around the loop; where shared memory holds no more of x than one round of the waves, there is one
  loop, and the split and the path of rough x are counted: then the figure is too low. Tiles
  (M ≥ 17) decode a block once for 32 or 64 rows: there the multiplication is the limit.

{header}
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def test_the_table_is_current(request: pytest.FixtureRequest) -> None:
    found = importlib.metadata.version("ziglang")
    if found != pinned():
        lack(f"the table is of ziglang {pinned()}, here is {found}: pip install it")
    todo = plans()
    table = dict(zip(todo, in_parallel(measured, todo.values()), strict=True))
    assert not [row for row, each in table.items() if each.spills]
    check_golden(
        DOCUMENT, document(table), update=bool(request.config.getoption("--update-golden"))
    )


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("n", [4096, N])
def test_memory_is_the_limit_of_one_row(n: int, arch: str) -> None:
    args = [zeros(1, 4 * K), tensor("Q4_0", 4 * K, n)]
    found = measured(hip_plan(product, f"hip:{arch}", args))
    assert found.spills == 0
    assert found.waves >= 2
    assert found.ratio(CARDS[arch]) >= ENOUGH


def test_the_main_loop_is_the_smallest_that_loads_16_bytes() -> None:
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
    assert main_loop(text) == ["v_mul_f32", "global_load_b128", "s_cbranch_scc1"]
    multiplies = text.replace("v_add_f32 v0", "v_mfma_f32_16x16x16_f16 v0", 1)
    assert "v_mfma_f32_16x16x16_f16" in main_loop(multiplies)
    with pytest.raises(ValueError, match="no loop of the kernel"):
        main_loop("\ts_endpgm\n")
