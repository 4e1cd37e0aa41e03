"""Evaluate the CPU runs of `q4jit bench`: the limits, and how many times faster q4jit is.

A run is the part of a report for one number of threads. A table is a list of lines of cells,
beginning with the headings.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from q4jit.floats import FloatType
from q4jit.tools.compare.arena import LIMITS, PEAKS, READ
from q4jit.tools.text import counted

Run = dict[str, Any]
Stored = dict[str, Any]
"""A Measurement as a report stores it."""
Table = list[list[str]]


def dtype_of(run: Run | Stored) -> FloatType:
    """Return the float type of the arrays of a run or measurement."""
    dtype: FloatType = run.get("dtype", "f32")  # reports of earlier versions name none
    return dtype


def weights_and_arrays(run: Run) -> str:
    """Return the weights' block format and the arrays' float type of a run, in words."""
    return f"{run['format']}, {dtype_of(run)} arrays"


def limits(run: Run) -> str:
    """Return the fastest measured speed of each limit, in words."""
    best: dict[str, float] = {}
    for stored in run["rows"]:
        if stored["name"] in LIMITS and stored["us"] is not None:
            speed = stored["gb_per_s"] if stored["name"] == READ else 1e3 * stored["tflops"]
            best[stored["name"]] = max(speed, best.get(stored["name"], 0.0))
    units = {READ: "GB/s", PEAKS["f32"]: "GFLOP/s", PEAKS["i8"]: "GOP/s"}
    speeds = ", ".join(f"{name} {speed:.4g} {units[name]}" for name, speed in best.items())
    return f"{counted(run['threads'], 'thread')}: {speeds}"


def products(run: Run) -> list[Stored]:
    """Return the measurements of a run that are of single products."""
    return [stored for stored in run["rows"] if stored["kind"] == "product"]


def _names(runs: Sequence[Run], *, own: bool) -> list[str]:
    measured = itertools.chain.from_iterable(map(products, runs))
    names = dict.fromkeys(stored["name"] for stored in measured if stored["own"] == own)
    return [name for name in names if name not in LIMITS]


def table(runs: Sequence[Run]) -> Table:
    """Return a table with one line per number of threads, weight and M."""
    own, peers = _names(runs, own=True), _names(runs, own=False)
    headings = ["threads", "K, N", "M"]
    for name in own:
        headings += [f"{name.split()[-1]} µs", "read", "peak"]
    lines = [headings + peers]
    for run in runs:
        for (k, n, m), group in itertools.groupby(products(run), _shape):
            by_name = {stored["name"]: stored for stored in group}
            cells = [str(run["threads"]), f"{k}, {n}", str(m)]
            for name in own:
                cells += _own_cells(by_name.get(name))
            cells += [
                " / ".join(_ratio(by_name.get(name), peer, ".2f") for name in own) for peer in peers
            ]
            lines.append(cells)
    return lines


def _shape(stored: Stored) -> tuple[int, int, int]:
    return stored["k"], stored["n"], stored["m"]


def _own_cells(stored: Stored | None) -> list[str]:
    if stored is None or stored["us"] is None:
        return ["wrong" if stored and stored["wrong"] else "-", "-", "-"]
    us = f"{stored['us']:.3g}" if stored["us"] < 100 else f"{stored['us']:.0f}"
    peak = PEAKS.get(stored["precision"], "")
    return [us, _ratio(stored, READ, ".0%"), _ratio(stored, peak, ".0%")]


def times_as_fast(stored: Stored | None, other: str) -> float | None:
    """Return the speed of a measurement relative to a peer or limit; None if it is unknown."""
    if stored is None:
        return None
    if other in LIMITS:
        # reports of earlier versions have no peak
        return stored["of_read"] if other == READ else stored.get("of_peak")
    return stored["ratios"].get(other)  # type: ignore[no-any-return]


def _ratio(stored: Stored | None, other: str, form: str) -> str:
    ratio = times_as_fast(stored, other)
    return "-" if ratio is None else format(ratio, form)


def legend(runs: Sequence[Run]) -> str:
    """Return what the columns of `table` mean."""
    order = " / ".join(name.split()[-1] for name in _names(runs, own=True))
    return (
        "read, peak: q4jit's fraction of their speed; other columns: how many times faster q4jit "
        f"is ({order})"
    )
