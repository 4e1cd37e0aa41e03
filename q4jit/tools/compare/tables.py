"""Tables for a terminal."""

from collections.abc import Iterator, Sequence
from typing import Final

from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import LIMITS
from q4jit.tools.compare.ratios import Run, Table
from q4jit.tools.compare.rows import Row
from q4jit.tools.compare.targets import SpeedTarget, verdicts

_TITLE: Final = 50  # letters of its column
_KINDS: Final = {"product": "", "bare": ", two products", "gated": ", bias and SiLU gating"}


def table_lines(rows: Sequence[Row], *, heading: bool) -> Iterator[str]:
    """The rows of a weight and M, aligned; `×` columns: how many times faster q4jit is."""
    own = [row.name for row in rows if row.own and row.kind != "bare"]
    if heading:
        columns = "".join(f"{'× ' + name.split()[-1]:>8}" for name in own)
        yield f"{'':{_TITLE}}{'µs':>10}{'GB/s':>8}{'of read':>9}{'TFLOP/s':>9}{'error':>9}{columns}"
    first = rows[0]
    yield f"{first.format} [{first.k}, {first.n}], M = {first.m}"
    for row in rows:
        note = f" ({row.note})" if row.note and row.name not in LIMITS else ""
        title = f"  {row.name}{_KINDS[row.kind]}"
        if len(title + note) <= _TITLE:
            title, note = title + note, ""
        if row.us is None:
            yield f"{title:{_TITLE}}  {row.message}"
            continue
        speed = f"{row.us:10.2f}{_number(row.gb_per_s, '.0f', 8)}{_number(row.of_read, '.0%', 9)}"
        error = None if row.name in LIMITS else row.error
        work = f"{_number(row.tflops, '.3g', 9)}{_number(error, '.1e', 9)}"
        # the other way round than row.ratios: how many times its time is q4jit's
        shown = (
            ""
            if row.own or row.name in LIMITS
            else "".join(
                _number(1 / row.ratios[name] if name in row.ratios else None, ".2f", 8)
                for name in own
            )
        )
        cost = "" if row.cost is None else f"  costs {row.cost:+.1%}"
        yield f"{title:{_TITLE}}{speed}{work}{shown}{cost}{note}"


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def compiler_name(compiler: str) -> str:
    """A compiler without its options, which the report holds."""
    return compiler.split(" -")[0]


def ratio_lines(runs: Sequence[Run], targets: Sequence[SpeedTarget]) -> Iterator[str]:
    """Yield what the CPU's runs come to, and whether they reach targets."""
    yield from map(ratios.limits, runs)
    yield ""
    yield ratios.explained(runs)
    yield from _aligned(ratios.table(runs))
    lines = verdicts(runs, targets)
    if len(lines) > 1:
        yield ""
        yield from _aligned(lines)


def _aligned(lines: Table) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(map(str.rjust, cells, widths)).rstrip()
