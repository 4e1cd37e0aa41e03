"""The report of a self-test, as data and as text."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from q4jit.hip.harness import Bench
from q4jit.tools.provenance import about_code, about_system, driver_version
from q4jit.tools.selftest.cpu import CpuBench
from q4jit.tools.selftest.findings import Findings, attempt
from q4jit.tools.text import counted

_SHOWN_LETTERS: Final = 100  # of a message in the shortened text


def report_of(bench: Bench | CpuBench, findings: Findings) -> dict[str, Any]:
    """Return the report of all findings so far."""
    failed = sum(o.passed is False for o in findings.cases)
    failed += sum(t.us is None for t in findings.timings)
    failed += findings.copy["gb_per_s"] is None and not isinstance(bench, CpuBench)
    return {
        "selftest_version": 1,
        **about_code(),
        "seconds": round(time.perf_counter() - findings.start, 1),
        "ended_by": findings.ended_by,
        "device": dataclasses.asdict(bench.device),
        "driver": driver_version(bench.device.platform),
        "compiler": bench.fingerprint,
        **about_system(),
        "cases": [dataclasses.asdict(outcome) for outcome in findings.cases],
        "failed": failed,
        "not_run": sum(outcome.passed is None for outcome in findings.cases),
        "copy": findings.copy,
        "timings": [dataclasses.asdict(timing) for timing in findings.timings],
        "kernels": list(_kernels(bench)),
    }


def _kernels(bench: Bench | CpuBench) -> Iterator[dict[str, Any]]:
    """Yield each compiled kernel, on AMD with the resources that its code object declares."""
    for label, symbol, future in bench.compiled():
        description: dict[str, Any] = {"kernel": label, "symbol": symbol}
        if not future.done():  # the run was interrupted
            yield description | {"message": "not compiled yet"}
            continue
        entry = attempt(future.result)
        if isinstance(entry, Exception):
            description["message"] = str(entry)
        else:
            description |= {"key": entry.key, "code_bytes": len(entry.object_bytes)}
            description |= {"origin": entry.origin, "seconds": round(entry.seconds, 3)}
            if bench.device.platform == "amd":
                description |= _resources(entry.object_bytes, symbol)
        yield description


def _resources(code: bytes, symbol: str) -> dict[str, Any]:
    from q4jit.compilers.codeobject import kernel_infos  # late: needs optional packages

    infos = attempt(lambda: kernel_infos(code))
    if isinstance(infos, Exception):  # above all a missing msgpack
        return {"message": str(infos)}
    info = dataclasses.asdict(infos[symbol])
    return {name: value for name, value in info.items() if isinstance(value, int)}


def report_text(report: dict[str, Any], *, shortened: bool = False) -> str:
    """Return a report as text; if `shortened`, with long messages cut and without the kernels."""
    device = report["device"]
    commit = report["commit"] or "unknown"
    memory = f"{device['memory_bytes'] / 2**30:.0f} GiB"
    device_line = (
        f"{device['name']}, {memory}, {counted(device['compute_units'], 'thread')}"
        if device["platform"] == "cpu"
        else f"{device['name']} ({device['arch']}, {device['platform']} device {device['index']}, "
        f"{memory}, {device['compute_units']} compute units)"
    )
    summary = (
        f"{counted(len(report['cases']), 'case')}, {counted(len(report['timings']), 'timing')}, "
        f"{report['failed']} failed, {report['not_run']} not run, {report['seconds']} s"
    )
    lines = [
        f"q4jit {report['q4jit']} selftest, {report['date']}, commit {commit}",
        device_line,
        f"driver: {report['driver']}",
        f"compiler: {report['compiler']}",
        f"Python {report['python']}, NumPy {report['numpy']}, {report['system']}",
        "",
        *_case_lines(report["cases"]),
        "",
        *_failure_lines(report, shortened),
        *_timing_lines(report),
        *([] if shortened else _kernel_lines(report)),
        *([f"INCOMPLETE: stopped by {report['ended_by']}"] if report["ended_by"] else []),
        summary,
    ]
    return "\n".join(lines) + "\n"


def _case_lines(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'cases':28}{'total':>8}{'failed':>8}{'not run':>9}{'max error':>11}{'bound':>9}"
    for group in dict.fromkeys(case["group"] for case in cases):
        members = [case for case in cases if case["group"] == group]
        errors = [case["error"] for case in members if case["error"] is not None]
        largest = f"{max(errors):.1e}" if errors else "-"
        failed = sum(case["passed"] is False for case in members)
        not_run = sum(case["passed"] is None for case in members)
        bound = f"{members[0]['bound']:.0e}" if members[0]["bound"] else "0"
        yield f"{group:28}{len(members):8}{failed:8}{not_run:9}{largest:>11}{bound:>9}"


def _failure_lines(report: dict[str, Any], shortened: bool) -> Iterator[str]:
    cases = report["cases"]
    failures = [(c["case"], c["message"]) for c in cases if c["passed"] is False]
    failures += [(_title(t), t["message"]) for t in report["timings"] if t["us"] is None]
    for title, message in failures:
        yield f"FAILED {title}: {_short(message) if shortened else message}"
    not_run = [case for case in cases if case["passed"] is None]
    for case in not_run:
        yield f"{case['case']}: {case['message']}"
    if failures or not_run:
        yield ""


def _short(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= _SHOWN_LETTERS else line[: _SHOWN_LETTERS - 1] + "…"


def _title(timing: dict[str, Any]) -> str:
    schedule, precision = timing["schedule"], timing["precision"]
    return f"{schedule} {precision}, M = {timing['m']}, [{timing['k']}, {timing['n']}]"


def _timing_lines(report: dict[str, Any]) -> Iterator[str]:
    rate = report["copy"]["gb_per_s"]
    if rate is None:
        yield f"nothing was timed: {_short(report['copy']['message'])}"
        return
    yield f"a copy within device memory reads and writes {rate:.0f} GB/s"
    yield f"{'Q4_0':44}{'µs':>10}{'GB/s':>8}{'of copy':>9}"
    for timing in report["timings"]:
        if timing["us"] is not None:
            fraction = f"{timing['fraction']:.0%}"
            speed = f"{timing['us']:10.1f}{timing['gb_per_s']:8.0f}{fraction:>9}"
            yield f"{_title(timing):44}{speed}"
    yield ""


def _kernel_lines(report: dict[str, Any]) -> Iterator[str]:
    yield "kernels"
    for kernel in report["kernels"]:
        facts = ", ".join(f"{name} {value}" for name, value in kernel.items() if name != "key")
        yield f"  {facts}"
    yield ""
