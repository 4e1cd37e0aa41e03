"""The table of estimates for AMD GPUs in docs/amd.md is current."""

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
K, N = 4096, 14336  # a feed-forward layer of a large model
M_CLASSES: Final = (1, 2, 4, 8, 16, 32, 512)
ENOUGH: Final = 1.5  # memory time / issue time at M = 1

HEADER: Final = (
    "arch | M | precision | schedule | instructions | vector | matrix or dot | LDS bytes | VGPRs"
    " | spills | waves | memory : issue"
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


def counted(plan: HipPlan) -> Needs:
    kernel = plan.kernels[-1]
    source = render(plan, kernel)
    return needs(source, kernel, assembly(source))


def document(table: dict[Row, Needs]) -> str:
    """Return the text of the page."""
    lines = [_HEAD.format(version=pinned(), k=K, n=N, enough=ENOUGH, header=f"| {HEADER} |")]
    for (arch, m, precision, schedule), each in table.items():
        per_block = HIP_ARCHS[arch].wave / each.blocks
        cells = [
            arch,
            str(m),
            precision,
            schedule,
            f"{each.instructions * per_block:.0f}",
            f"{each.vector * per_block:.0f}",
            str(each.matrix or each.dot or "–"),
            str(each.lds_bytes),
            str(each.vgprs),
            str(each.spills),
            str(each.waves),
            f"{each.ratio(CARDS[arch]):.2f}",
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

- *instructions*, *vector*: instructions of a lane in the main loop, and vector instructions among
  them, per block of 18 bytes. Instructions that all lanes of a wave repeat count fully.
- *matrix or dot*: matrix or dot-product instructions in a round of the loop.
- *waves*: waves per SIMD that registers and shared memory allow.
- *memory : issue*: the time to read the blocks at the card's bandwidth, divided by the time in
  which its vector units issue the loop's vector and matrix instructions. Above 1 the memory is the
  limit; the goal at M = 1 is {enough}. The estimate assumes that all compute units are busy, that
  RDNA 3 and 4 never issue two instructions at a time, and that only CDNA runs matrix instructions
  beside vector instructions. It leaves out the work before and after the loop, latency, and
  bandwidth below the published figure. `gemv_matrix` splits x around the loop. If shared memory has
  room for only one round of x, there is a single loop; it then includes the split and the path of
  rough x, and the figure is too low. Tiles (M ≥ 17) decode a block once for 32 or 64 rows, so the
  multiplication is their limit.

{header}
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def test_the_table_is_current(request: pytest.FixtureRequest) -> None:
    installed = importlib.metadata.version("ziglang")
    if installed != pinned():
        lack(f"the table needs ziglang {pinned()}, got {installed}: pip install it")
    by_row = plans()
    table = dict(zip(by_row, in_parallel(counted, by_row.values()), strict=True))
    assert not [row for row, each in table.items() if each.spills]
    check_golden(
        DOCUMENT, document(table), update=bool(request.config.getoption("--update-golden"))
    )


@pytest.mark.parametrize("arch", CARDS)
@pytest.mark.parametrize("n", [4096, N])
def test_memory_limits_one_row(n: int, arch: str) -> None:
    args = [zeros(1, 4 * K), tensor("Q4_0", 4 * K, n)]
    each = counted(hip_plan(product, f"hip:{arch}", args))
    assert each.spills == 0
    assert each.waves >= 2
    assert each.ratio(CARDS[arch]) >= ENOUGH


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
    assert main_loop(text) == ["v_mul_f32", "global_load_b128", "s_cbranch_scc1"]
    multiplies = text.replace("v_add_f32 v0", "v_mfma_f32_16x16x16_f16 v0", 1)
    assert "v_mfma_f32_16x16x16_f16" in main_loop(multiplies)
    with pytest.raises(ValueError, match="no loop of the kernel"):
        main_loop("\ts_endpgm\n")
