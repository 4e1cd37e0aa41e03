"""The roofline plot of `q4jit bench`: measured TFLOP/s below the speed that memory allows."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.errors import TargetError
from q4jit.floats import FLOAT_BYTES
from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import READ
from q4jit.tools.compare.ratios import Run, Stored
from q4jit.tools.compare.report import Report

_MARKERS: Final = "os^Dv<>PX*"
_SIZE_INCHES: Final = (8.0, 5.5)


def intensity(product: Stored) -> float:
    """Return FLOP per byte of the stored weights and of x and y."""
    m, k, n = product["m"], product["k"], product["n"]
    array_bytes = FLOAT_BYTES[ratios.dtype_of(product)] * m * (k + n)
    return float(2 * m * k * n / (product["weight_bytes"] + array_bytes))


def roof(measurements: Sequence[Stored]) -> float | None:
    """Return the speed of the fastest measured read in bytes per second."""
    reads = [each for each in measurements if each["name"] == READ and each["us"] is not None]
    rates = [read["gb_per_s"] for read in reads]
    return max(rates) * 1e9 if rates else None


def draw(reports: Sequence[Report], path: Path) -> None:
    """Draw TFLOP/s over FLOP per byte, with one marker per precision and M.

    The suffix of `path` selects the picture's format. Raises TargetError without matplotlib, and
    OSError.
    """
    figure_kind = _figure_kind()
    figure = figure_kind(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for report in reports:
        for run in report["runs"]:
            _draw_run(axes, run)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.minorticks_off()  # their labels would overlap on an axis of less than a decade
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path)


def check() -> None:
    """Raise TargetError without matplotlib, before anything is measured."""
    _figure_kind()


def _figure_kind() -> Any:
    try:
        from matplotlib.figure import Figure  # late: optional, and slow to import
    except ImportError as error:
        raise TargetError(f"--plot needs matplotlib: pip install 'q4jit[plot]' ({error})") from None
    return Figure


def _draw_run(axes: Any, run: Run) -> None:
    own = [s for s in ratios.products(run) if s["own"] and s["us"] is not None]
    rate = roof(run["rows"])
    if not own or rate is None:
        return
    intensities = sorted(map(intensity, own))
    ends = [intensities[0] / 2, intensities[-1] * 2]
    label = f"{run['device']}, {ratios.dtype_of(run)} arrays: read at {rate * 1e-9:.0f} GB/s"
    (line,) = axes.plot(ends, [rate * x * 1e-12 for x in ends], label=label)
    kinds = dict.fromkeys((stored["precision"], stored["m"]) for stored in own)
    markers = dict(zip(dict.fromkeys(m for _, m in kinds), itertools.cycle(_MARKERS)))
    colours = dict(zip(dict.fromkeys(p for p, _ in kinds), itertools.cycle(["C1", "C2", "C3"])))
    for precision, m in kinds:
        members = [s for s in own if (s["precision"], s["m"]) == (precision, m)]
        axes.plot(
            list(map(intensity, members)),
            [stored["tflops"] for stored in members],
            linestyle="",
            marker=markers[m],
            color=colours[precision],
            markeredgecolor=line.get_color(),
            label=f"{precision}, M = {m}",
        )
