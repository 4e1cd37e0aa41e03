"""The roofline picture of `q4jit bench`: what a run reached, under what the memory allows."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.errors import TargetError
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.report import Report

_MARKERS: Final = "os^Dv<>PX*"
_FLOAT_BYTES: Final = 4
_SIZE_INCHES: Final = (8.0, 5.5)


def intensity(row: dict[str, Any]) -> float:
    """FLOP per byte: of the weights as they are stored, and x and y in f32."""
    moved = row["weight_bytes"] + _FLOAT_BYTES * row["m"] * (row["k"] + row["n"])
    return float(2 * row["m"] * row["k"] * row["n"] / moved)


def roof(rows: Sequence[dict[str, Any]]) -> float | None:
    """The fastest read that was measured, in bytes per second."""
    rates = [row["gb_per_s"] for row in rows if row["name"] == READ and row["us"] is not None]
    return max(rates) * 1e9 if rates else None


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw TFLOP/s over FLOP per byte, a marker per precision and M; the suffix names the format.

    Raises TargetError without matplotlib, and OSError.
    """
    figure_kind = _figure_kind()
    figure = figure_kind(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for report in reports:
        for run in report["runs"]:
            _draw_run(axes, run)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.minorticks_off()  # their labels lie over each other where there is less than a decade
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path)


def check() -> None:
    """Raise TargetError where `draw` would: before anything is measured."""
    _figure_kind()


def _figure_kind() -> Any:
    try:
        from matplotlib.figure import Figure  # late: an extra's package, and slow to import
    except ImportError as error:
        raise TargetError(f"--plot needs matplotlib: pip install 'q4jit[plot]' ({error})") from None
    return Figure


def _draw_run(axes: Any, run: dict[str, Any]) -> None:
    rows = [r for r in run["rows"] if r["kind"] == "product" and r["own"] and r["us"] is not None]
    rate = roof(run["rows"])
    if not rows or rate is None:
        return
    places = sorted(map(intensity, rows))
    ends = [places[0] / 2, places[-1] * 2]
    about = f"{run['device']}: read at {rate * 1e-9:.0f} GB/s"
    (line,) = axes.plot(ends, [rate * x * 1e-12 for x in ends], label=about)
    kinds = dict.fromkeys((row["precision"], row["m"]) for row in rows)
    markers = dict(zip(dict.fromkeys(m for _, m in kinds), itertools.cycle(_MARKERS)))
    colours = dict(zip(dict.fromkeys(p for p, _ in kinds), itertools.cycle(["C1", "C2", "C3"])))
    for precision, m in kinds:
        members = [row for row in rows if (row["precision"], row["m"]) == (precision, m)]
        axes.plot(
            list(map(intensity, members)),
            [row["tflops"] for row in members],
            linestyle="",
            marker=markers[m],
            color=colours[precision],
            markeredgecolor=line.get_color(),
            label=f"{precision}, M = {m}",
        )
