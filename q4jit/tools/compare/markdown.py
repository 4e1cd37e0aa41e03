"""Markdown tables, as in docs/performance.md."""

import itertools
from collections.abc import Iterator, Sequence

from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import LIMITS, READ
from q4jit.tools.compare.ratios import Run, Stored
from q4jit.tools.compare.report import Report, grouped_cpu_runs
from q4jit.tools.compare.speed_targets import SpeedTarget, verdicts
from q4jit.tools.compare.tables import compiler_name
from q4jit.tools.text import counted


def markdown(reports: Sequence[Report], targets: Sequence[SpeedTarget]) -> str:
    """Return the tables of reports as Markdown."""
    lines: list[str] = []
    for report in reports:
        for gpu_run in _gpu_runs(report):
            lines += [*_about(report, gpu_run), "", *_products(gpu_run["rows"])]
            lines += [*_fused(gpu_run), ""]
        for runs in grouped_cpu_runs(report):
            lines += [*_about(report, runs[0]), *_ratios(runs, targets)]
            lines += [*itertools.chain.from_iterable(map(_fused, runs)), ""]
    return "\n".join(lines)


def _ratios(runs: Sequence[Run], targets: Sequence[SpeedTarget]) -> Iterator[str]:
    yield from (f"- {ratios.limits(run)}" for run in runs)
    yield ""
    yield f"{ratios.legend(runs)}:"
    for lines in (ratios.table(runs), verdicts(runs, targets)):
        if len(lines) > 1:
            yield ""
            yield from map(_line, [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _gpu_runs(report: Report) -> list[Run]:
    return [run for run in report["runs"] if "threads" not in run]


def _about(report: Report, run: Run) -> Iterator[str]:
    commit = (report["commit"] or "unknown")[:12]
    cached = ", weight in the cache" if run.get("cached") else ""
    yield f"{run['device']} (`{run['target']}`), {ratios.weights_and_arrays(run)}{cached}"
    yield ""
    yield f"- date {report['date']}, commit {commit}, q4jit {report['q4jit']}"
    yield f"- driver {run['driver']}; compiler {compiler_name(run['compiler'])}"
    yield f"- `{' '.join(report['command'])}`"
    for name, reason in run["absent"].items():
        yield f"- {name}: not available: {reason}"


def _products(measurements: Sequence[Stored]) -> Iterator[str]:
    products = [stored for stored in measurements if stored["kind"] == "product"]
    own = list(dict.fromkeys(stored["name"] for stored in products if stored["own"]))
    names = dict.fromkeys(s["name"] for s in products if s["name"] not in LIMITS)
    peers = [name for name in names if name not in own]
    headings = ["K, N", "M", "read", *(f"{name} (of read; error)" for name in own)]
    headings += [f"{name} (× {', '.join(o.split()[-1] for o in own)})" for name in peers]
    yield "Times in µs. In brackets: the fraction of the read's speed and the error, or how many"
    yield "times faster q4jit is, by precision:"
    yield ""
    yield from _heading(headings)
    for k, n, m in dict.fromkeys((s["k"], s["n"], s["m"]) for s in products):
        by_name = {s["name"]: s for s in products if (s["k"], s["n"], s["m"]) == (k, n, m)}
        cells = [f"{k}, {n}", str(m), _cell(by_name.get(READ))]
        cells += [_own_cell(by_name.get(name)) for name in own]
        cells += [_peer_cell(by_name.get(name), own) for name in peers]
        yield _line(cells)


def _fused(run: Run) -> Iterator[str]:
    gated = [stored for stored in run["rows"] if stored["kind"] == "gated"]
    if not gated:
        return
    threads = f" ({counted(run['threads'], 'thread')})" if "threads" in run else ""
    yield ""
    yield f"The cost of bias and SiLU gating over the two bare products{threads}:"
    yield ""
    yield from _heading(["K, N", "M", "kernels", "µs", "cost", "error"])
    for stored in gated:
        cost = "-" if stored["cost"] is None else f"{stored['cost']:+.1%}"
        error = "-" if stored["error"] is None else f"{stored['error']:.1e}"
        product = [f"{stored['k']}, {stored['n']}", str(stored["m"]), stored["name"]]
        yield _line([*product, _cell(stored), cost, error])


def _heading(headings: Sequence[str]) -> Iterator[str]:
    yield _line(headings)
    yield "|" + "---|" * len(headings)


def _cell(stored: Stored | None) -> str:
    if stored is None:
        return "-"
    if stored["us"] is None:
        return "wrong" if stored["wrong"] else "-"
    return f"{stored['us']:.3g}" if stored["us"] < 100 else f"{stored['us']:.0f}"


def _own_cell(stored: Stored | None) -> str:
    if stored is None or stored["us"] is None:
        return _cell(stored)
    of_read = "-" if stored["of_read"] is None else f"{stored['of_read']:.0%}"
    return f"{_cell(stored)} ({of_read}; {stored['error']:.1e})"


def _peer_cell(stored: Stored | None, own: Sequence[str]) -> str:
    if stored is None or stored["us"] is None:
        return _cell(stored)
    relative_us = stored["ratios"]  # q4jit's time over the peer's
    shown = [f"{1 / relative_us[name]:.2f}" if name in relative_us else "-" for name in own]
    return f"{_cell(stored)} ({', '.join(shown)})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
