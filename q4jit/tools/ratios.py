"""What a CPU's runs of `q4jit bench` come to: limits, how many times faster q4jit is, targets.

A run is that of a report: rows for one number of threads. Tables are lists of cells, the heads
first.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from q4jit.tools.peers import LIMITS, PEAKS, READ

Run = dict[str, Any]
Row = dict[str, Any]
Table = list[list[str]]

# precision, M, what it is held against, and at least how many times as fast, with 1 and 2 threads
_TARGETS: Final = (
    ("i8", 1, "ggml", 1.5, 1.1),
    ("i8", 4, "ggml", 3.0, 2.4),
    ("i8", 8, "ggml", 4.0, 3.4),
    ("i8", 512, "ggml", 2.7, 2.6),
    ("f32", 1, "ggml", 1.5, 1.1),
    ("f32", 4, "ggml", 1.3, 1.3),
    ("f32", 8, "ggml", 1.3, 1.3),
    ("f32", 512, "ggml", 1.0, 1.0),
    ("f32", 512, "numpy f32", 2.2, 2.2),
    ("f32", 512, PEAKS["f32"], 1.10, 1.10),
    ("i8", 512, PEAKS["i8"], 0.75, 0.75),
    ("f32", 1, READ, 0.92, 0.92),
    ("i8", 1, READ, 0.92, 0.92),
)
_CACHED_TARGETS: Final = (("i8", 1, "ggml", 3.0, 3.0),)
_LARGE: Final = 4096  # K and N, at least, of weights whose time the read's target speaks of


def limits(run: Run) -> str:
    """The fastest that was seen of each limit."""
    best: dict[str, float] = {}
    for row in run["rows"]:
        if row["name"] in LIMITS and row["us"] is not None:
            speed = row["gb_per_s"] if row["name"] == READ else 1e3 * row["tflops"]
            best[row["name"]] = max(speed, best.get(row["name"], 0.0))
    units = {READ: "GB/s", PEAKS["f32"]: "GFLOP/s", PEAKS["i8"]: "GOP/s"}
    told = ", ".join(f"{name} {speed:.4g} {units[name]}" for name, speed in best.items())
    return f"{threads(run)}: {told}"


def threads(run: Run) -> str:
    """How many, in words."""
    return f"{run['threads']} thread{'' if run['threads'] == 1 else 's'}"


def _products(run: Run) -> list[Row]:
    return [row for row in run["rows"] if row["kind"] == "product"]


def _names(runs: Sequence[Run], *, own: bool) -> list[str]:
    rows = itertools.chain.from_iterable(map(_products, runs))
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
        for place, here in itertools.groupby(_products(run), _place):
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


def _speed(row: Row | None, other: str) -> float | None:
    """How many times as fast as a peer or a limit."""
    if row is None:
        return None
    if other in LIMITS:
        # reports of earlier versions have no peak
        return row["of_read"] if other == READ else row.get("of_peak")
    return row["ratios"].get(other)  # type: ignore[no-any-return]


def _ratio(row: Row | None, other: str, form: str) -> str:
    speed = _speed(row, other)
    return "-" if speed is None else format(speed, form)


def targets(runs: Sequence[Run]) -> Table:
    """What is aimed at, what was found for each weight, and whether all reach it."""
    lines = [["precision", "M", "against", "threads", "target", "found", "verdict"]]
    for run in runs:
        for precision, m, other, *wanted in _CACHED_TARGETS if run.get("cached") else _TARGETS:
            found = [
                _speed(row, other)
                for row in _products(run)
                if (row["name"], row["m"]) == (f"q4jit {precision}", m)
                and (other != READ or min(row["k"], row["n"]) >= _LARGE)
            ]
            if found and run["threads"] <= len(wanted):
                least = wanted[run["threads"] - 1]
                shown = " ".join("-" if speed is None else f"{speed:.2f}" for speed in found)
                place = [precision, str(m), other, str(run["threads"]), f"{least:.2f}"]
                lines.append([*place, shown, _verdict(found, least)])
    return lines


def _verdict(found: Sequence[float | None], least: float) -> str:
    if any(speed is not None and speed < least for speed in found):
        return "missed"
    return "not measured" if None in found else "met"


def text(runs: Sequence[Run]) -> Iterator[str]:
    """All of it, for a terminal."""
    yield from map(limits, runs)
    yield ""
    yield _explained(runs)
    yield from _aligned(table(runs))
    aims = targets(runs)
    if len(aims) > 1:
        yield ""
        yield from _aligned(aims)


def _explained(runs: Sequence[Run]) -> str:
    order = " / ".join(name.split()[-1] for name in _names(runs, own=True))
    return (
        "read, peak: q4jit's fraction of their speed; other columns: how many times faster q4jit "
        f"is ({order})"
    )


def _aligned(lines: Table) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        yield "  ".join(map(str.rjust, cells, widths)).rstrip()


def markdown(runs: Sequence[Run]) -> Iterator[str]:
    """All of it, as docs/performance.md holds it."""
    yield from (f"- {limits(run)}" for run in runs)
    yield ""
    yield f"{_explained(runs)}:"
    for lines in (table(runs), targets(runs)):
        if len(lines) > 1:
            yield ""
            yield from map(markdown_row, [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def markdown_row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
