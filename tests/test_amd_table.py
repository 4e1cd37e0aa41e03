"""docs/amd.md: the table of what AMD's GPUs would need, and that it is current."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from q4jit.render import render
from q4jit.schedule_hip import GEMV_MATRIX, HipPlan, Tuning
from q4jit.targets import HIP_ARCHS
from tests.amd_table import CARDS, Needs, main_loop, needs
from tests.conftest import check_golden
from tests.hip import hip_plan
from tests.hip_cases import product, tensor, zeros
from tests.test_hip_objects import assembly, in_parallel, pinned
from tests.tools import lack

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "amd.md"
K = N = 4096
ENOUGH: Final = 1.5  # of memory time by issue time, at M = 1

HEADER: Final = (
    "arch | M | precision | schedule | instructions | vector | matrix or dot | LDS bytes | VGPRs"
    " | spills | waves | memory : issue"
)

Row = tuple[str, int, str, str]  # arch, M, precision, schedule


def plans() -> dict[Row, HipPlan]:
    """The kernels that are chosen, and those on matrix units where they are not."""
    found = {}
    for arch in CARDS:
        args = {m: [zeros(m, K), tensor("Q4_0", K, N)] for m in (1, 2, 4, 8, 16)}
        for m, precision in [*((m, "f32") for m in args), (1, "f16"), (1, "i8"), (16, "i8")]:
            plan = hip_plan(product, f"hip:{arch}", args[m], Tuning(precision))
            found[arch, m, precision, plan.kernels[-1].schedule] = plan
            if HIP_ARCHS[arch].matrix is not None and precision != "i8":
                found[arch, m, precision, GEMV_MATRIX] = on_matrix_units(arch, m, precision)
    return found


def on_matrix_units(arch: str, m: int, precision: str) -> HipPlan:
    tuning = Tuning(precision, 4 * HIP_ARCHS[arch].wave, GEMV_MATRIX)
    plan = hip_plan(product, f"hip:{arch}", [zeros(m, K), tensor("Q4_0", K, N)], tuning)
    constants = {"columns": 16, "ahead": 1, "splits": 1}
    return replace(plan, kernels=tuple(replace(k, **constants) for k in plan.kernels))  # type: ignore[arg-type]  # all are numbers


def measured(plan: HipPlan) -> Needs:
    kernel = plan.kernels[-1]
    source = render(plan, kernel)
    return needs(source, kernel, assembly(source))


def document(table: dict[Row, Needs]) -> str:
    """The Markdown text."""
    lines = [_HEAD.format(version=pinned(), enough=ENOUGH, header=f"| {HEADER} |")]
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

Made by `pytest tests/test_amd_table.py --update-golden` with the clang of ziglang {version};
nothing here was measured on a card. Q4_0, K = N = 4096, one product. Where `gemv_matrix` is not
what q4jit chooses by itself it stands beside the choice, with 4 waves and nothing loaded ahead.

- *instructions*, *vector*: issued for a lane's share of the main loop, per block of 18 bytes (of a
  wave's instructions, one per lane and block; what all lanes of a wave repeat counts fully).
- *matrix or dot*: such instructions in a round of the loop.
- *waves*: per SIMD, as far as registers and LDS allow.
- *memory : issue*: the time to read the blocks at the card's bandwidth, divided by the time that
  its vector units need to issue the loop's vector and matrix instructions at its clock, all compute
  units busy, no dual issue on RDNA 3 and 4, matrix instructions beside vector ones on CDNA only.
  Above 1 the memory is the limit; {enough} is wanted at M = 1. What is before and behind the loop,
  latency, and bandwidth below the published figure are not in it. Loops count as they stand,
  paths that are rarely taken included: with f32 at M = 16 `gemv_matrix` stages x in each round, so
  the split of x and the path of rough units are counted, and the figure is too low.

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


def test_the_main_loop_is_the_smallest_that_loads_16_bytes() -> None:
    text = (
        ".LBB0_1:\n\ts_nop 0\n.LBB0_2:\n\tglobal_load_b128 v[0:3], v4, off\n"
        "\tv_mul_f32 v0, v0, v0\n"
        "\ts_cbranch_scc1 .LBB0_2\n\ts_branch .LBB0_1\n.LBB0_3:\n\ts_branch .LBB0_3\n"
    )
    assert main_loop(text) == ["global_load_b128", "v_mul_f32", "s_cbranch_scc1"]
    with pytest.raises(ValueError, match="no loop of the kernel"):
        main_loop("\ts_endpgm\n")
