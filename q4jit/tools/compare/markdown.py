"""Tables as docs/performance.md holds them."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import LIMITS, READ
from q4jit.tools.compare.report import Report, on_cpu
from q4jit.tools.compare.tables import compiler_name
from q4jit.tools.compare.targets import SpeedTarget, verdicts
from q4jit.tools.text import counted


def markdown(reports: Sequence[Report], targets: Sequence[SpeedTarget]) -> str:
    """The tables of reports, as docs/performance.md holds them."""
    lines: list[str] = []
    for report in reports:
        for found in _on_gpus(report):
            lines += [*_about(report, found), "", *_products(found["rows"])]
            lines += [*_fused(found), ""]
        if runs := on_cpu(report):
            lines += [*_about(report, runs[0]), *_ratios(runs, targets)]
            lines += [*itertools.chain.from_iterable(map(_fused, runs)), ""]
    return "\n".join(lines)


def _ratios(runs: Sequence[dict[str, Any]], targets: Sequence[SpeedTarget]) -> Iterator[str]:
    yield from (f"- {ratios.limits(run)}" for run in runs)
    yield ""
    yield f"{ratios.explained(runs)}:"
    for lines in (ratios.table(runs), verdicts(runs, targets)):
        if len(lines) > 1:
            yield ""
            yield from map(_row, [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _on_gpus(report: Report) -> list[dict[str, Any]]:
    return [run for run in report["runs"] if "threads" not in run]


def _about(report: Report, found: dict[str, Any]) -> Iterator[str]:
    commit_ = (report["commit"] or "unknown")[:12]
    cached = ", the weight in the cache" if found.get("cached") else ""
    yield f"{found['device']} (`{found['target']}`), {found['format']}{cached}"
    yield ""
    yield f"- date {report['date']}, commit {commit_}, q4jit {report['q4jit']}"
    yield f"- driver {found['driver']}; compiler {compiler_name(found['compiler'])}"
    yield f"- `{' '.join(report['command'])}`"
    for name, reason in found["absent"].items():
        yield f"- {name}: not present: {reason}"


def _products(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    products = [row for row in rows if row["kind"] == "product"]
    own = list(dict.fromkeys(row["name"] for row in products if row["own"]))
    names = dict.fromkeys(row["name"] for row in products if row["name"] not in LIMITS)
    peers = [name for name in names if name not in own]
    heads = ["K, N", "M", "read", *(f"{name} (of read; error)" for name in own)]
    heads += [f"{name} (× {', '.join(o.split()[-1] for o in own)})" for name in peers]
    yield "µs; in brackets the fraction of the read's speed and the error, or how many times"
    yield "faster q4jit is, by precision:"
    yield ""
    yield from _head(heads)
    for k, n, m in dict.fromkeys((row["k"], row["n"], row["m"]) for row in products):
        here = {r["name"]: r for r in products if (r["k"], r["n"], r["m"]) == (k, n, m)}
        cells = [f"{k}, {n}", str(m), _cell(here.get(READ))]
        cells += [_own_cell(here.get(name)) for name in own]
        cells += [_peer_cell(here.get(name), own) for name in peers]
        yield _row(cells)


def _fused(run: dict[str, Any]) -> Iterator[str]:
    found = [row for row in run["rows"] if row["kind"] == "gated"]
    if not found:
        return
    on = f" ({counted(run['threads'], 'thread')})" if "threads" in run else ""
    yield ""
    yield f"Bias and SiLU gating, over the two bare products{on}:"
    yield ""
    yield from _head(["K, N", "M", "kernels", "µs", "cost", "error"])
    for row in found:
        cost = "-" if row["cost"] is None else f"{row['cost']:+.1%}"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        place = [f"{row['k']}, {row['n']}", str(row["m"]), row["name"]]
        yield _row([*place, _cell(row), cost, error])


def _head(heads: Sequence[str]) -> Iterator[str]:
    yield _row(heads)
    yield "|" + "---|" * len(heads)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["us"] is None:
        return "wrong" if row["wrong"] else "-"
    return f"{row['us']:.3g}" if row["us"] < 100 else f"{row['us']:.0f}"


def _own_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["us"] is None:
        return _cell(row)
    of_read = "-" if row["of_read"] is None else f"{row['of_read']:.0%}"
    return f"{_cell(row)} ({of_read}; {row['error']:.1e})"


def _peer_cell(row: dict[str, Any] | None, own: Sequence[str]) -> str:
    if row is None or row["us"] is None:
        return _cell(row)
    shown = [f"{1 / row['ratios'][name]:.2f}" if name in row["ratios"] else "-" for name in own]
    return f"{_cell(row)} ({', '.join(shown)})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
