"""Tables for a terminal."""

from collections.abc import Iterator, Sequence
from typing import Final

from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import LIMITS
from q4jit.tools.compare.measurements import Measurement
from q4jit.tools.compare.ratios import Run, Table
from q4jit.tools.compare.speed_targets import SpeedTarget, verdicts

_TITLE: Final = 50  # width of the first column
_KINDS: Final = {"product": "", "bare": ", two products", "gated": ", bias and SiLU gating"}


def table_lines(measurements: Sequence[Measurement], *, heading: bool) -> Iterator[str]:
    """Yield the aligned lines of one weight and M; `×` columns: how many times faster q4jit is."""
    own = [each.name for each in measurements if each.own and each.kind != "bare"]
    if heading:
        columns = "".join(f"{'× ' + name.split()[-1]:>8}" for name in own)
        yield f"{'':{_TITLE}}{'µs':>10}{'GB/s':>8}{'of read':>9}{'TFLOP/s':>9}{'error':>9}{columns}"
    first = measurements[0]
    yield f"{first.format} [{first.k}, {first.n}], M = {first.m}, {first.dtype} arrays"
    for each in measurements:
        note = f" ({each.note})" if each.note and each.name not in LIMITS else ""
        title = f"  {each.name}{_KINDS[each.kind]}"
        if len(title + note) <= _TITLE:
            title, note = title + note, ""
        if each.us is None:
            yield f"{title:{_TITLE}}  {each.message}"
            continue
        speed = (
            f"{each.us:10.2f}{_number(each.gb_per_s, '.0f', 8)}{_number(each.of_read, '.0%', 9)}"
        )
        error = None if each.name in LIMITS else each.error
        work = f"{_number(each.tflops, '.3g', 9)}{_number(error, '.1e', 9)}"
        cost = "" if each.cost is None else f"  {each.cost:+.1%} over two products"
        yield f"{title:{_TITLE}}{speed}{work}{_times_faster(each, own)}{cost}{note}"


def _times_faster(measurement: Measurement, own: Sequence[str]) -> str:
    """Return the `×` columns of a peer: how many times its time is q4jit's."""
    if measurement.own or measurement.name in LIMITS:
        return ""
    relative_us = measurement.ratios  # q4jit's time over the peer's
    return "".join(
        _number(1 / relative_us[name] if name in relative_us else None, ".2f", 8) for name in own
    )


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def compiler_name(compiler: str) -> str:
    """Return the name and version of a compiler, without its options."""
    return compiler.split(" -")[0]


def ratio_lines(runs: Sequence[Run], targets: Sequence[SpeedTarget]) -> Iterator[str]:
    """Yield the lines of limits, ratios and verdicts of grouped CPU runs."""
    yield ratios.weights_and_arrays(runs[0])
    yield from map(ratios.limits, runs)
    yield ""
    yield ratios.legend(runs)
    yield from _aligned(ratios.table(runs))
    lines = verdicts(runs, targets)
    if len(lines) > 1:
        yield ""
        yield from _aligned(lines)


def _aligned(lines: Table) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(map(str.rjust, cells, widths)).rstrip()
