"""What a CPU's runs of `q4jit bench` come to: limits, and how many times faster q4jit is.

A run is that of a report: rows for one number of threads. Tables are lists of cells, the heads
first.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from q4jit.tools.compare.arena import LIMITS, PEAKS, READ
from q4jit.tools.text import counted

Run = dict[str, Any]
Row = dict[str, Any]
Table = list[list[str]]


def limits(run: Run) -> str:
    """The fastest that was seen of each limit."""
    best: dict[str, float] = {}
    for row in run["rows"]:
        if row["name"] in LIMITS and row["us"] is not None:
            speed = row["gb_per_s"] if row["name"] == READ else 1e3 * row["tflops"]
            best[row["name"]] = max(speed, best.get(row["name"], 0.0))
    units = {READ: "GB/s", PEAKS["f32"]: "GFLOP/s", PEAKS["i8"]: "GOP/s"}
    told = ", ".join(f"{name} {speed:.4g} {units[name]}" for name, speed in best.items())
    return f"{counted(run['threads'], 'thread')}: {told}"


def products(run: Run) -> list[Row]:
    """Return the rows of a run that are of products alone."""
    return [row for row in run["rows"] if row["kind"] == "product"]


def _names(runs: Sequence[Run], *, own: bool) -> list[str]:
    rows = itertools.chain.from_iterable(map(products, runs))
    found = dict.fromkeys(row["name"] for row in rows if row["own"] == own)
    return [name for name in found if name not in LIMITS]


def table(runs: Sequence[Run]) -> Table:
    """A line per number of threads, weight and M."""
    own, peers = _names(runs, own=True), _names(runs, own=False)
    heads = ["threads", "K, N", "M"]
    for name in own:
        heads += [f"{name.split()[-1]} µs", "read", "peak"]
    lines = [heads + peers]
    for run in runs:
        for place, here in itertools.groupby(products(run), _place):
            rows = {row["name"]: row for row in here}
            k, n, m = place
            cells = [str(run["threads"]), f"{k}, {n}", str(m)]
            for name in own:
                cells += _own_cells(rows.get(name))
            cells += [
                " / ".join(_ratio(rows.get(name), peer, ".2f") for name in own) for peer in peers
            ]
            lines.append(cells)
    return lines


def _place(row: Row) -> tuple[int, int, int]:
    return row["k"], row["n"], row["m"]


def _own_cells(row: Row | None) -> list[str]:
    if row is None or row["us"] is None:
        return ["wrong" if row and row["wrong"] else "-", "-", "-"]
    us = f"{row['us']:.3g}" if row["us"] < 100 else f"{row['us']:.0f}"
    return [us, _ratio(row, READ, ".0%"), _ratio(row, PEAKS.get(row["precision"], ""), ".0%")]


def times_as_fast(row: Row | None, other: str) -> float | None:
    """Return how many times as fast as a peer or a limit a row is; None where it is not known."""
    if row is None:
        return None
    if other in LIMITS:
        # reports of earlier versions have no peak
        return row["of_read"] if other == READ else row.get("of_peak")
    return row["ratios"].get(other)  # type: ignore[no-any-return]


def _ratio(row: Row | None, other: str, form: str) -> str:
    ratio = times_as_fast(row, other)
    return "-" if ratio is None else format(ratio, form)


def explained(runs: Sequence[Run]) -> str:
    """Return what the columns of `table` hold."""
    order = " / ".join(name.split()[-1] for name in _names(runs, own=True))
    return (
        "read, peak: q4jit's fraction of their speed; other columns: how many times faster q4jit "
        f"is ({order})"
    )
