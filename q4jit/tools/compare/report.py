"""Reports of `q4jit bench`: filled while measuring, written as JSON and read again."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.checked_json import read_json
from q4jit.errors import FormatError, expected
from q4jit.files import write_atomically
from q4jit.tools.compare import ratios
from q4jit.tools.compare.arena import Arena
from q4jit.tools.compare.measurements import arena_name, measure
from q4jit.tools.compare.ratios import Run, Stored
from q4jit.tools.compare.request import BenchRequest, Defaults
from q4jit.tools.compare.tables import compiler_name, table_lines
from q4jit.tools.provenance import about_code, about_system

Report = dict[str, Any]
_VERSION: Final = 1


def new_report(command: Sequence[str]) -> Report:
    """Return a report without runs. command: the words of the command line."""
    return {
        "bench_version": _VERSION,
        **about_code(),
        "command": list(command),
        **about_system(),
        "ended_by": "",
        "runs": [],
    }


def run(report: Report, arena: Arena, request: BenchRequest, default: Defaults) -> bool:
    """Measure on an arena, and return whether nothing failed.

    Each measurement is printed and added to the report at once.
    """
    measured: list[Stored] = []
    about = {"target": arena.target, **arena.about, "format": request.format}
    about["dtype"] = request.dtype
    report["runs"].append({**about, "absent": arena.absent, "rows": measured})
    _print(f"{arena_name(arena)}: {about['device']}, {compiler_name(about['compiler'])}")
    succeeded, is_first = True, True
    for measurements in measure(arena, request, default):
        if is_first:
            for name, reason in arena.absent.items():
                _print(f"{name}: not available: {reason}")
        for line in table_lines(measurements, heading=is_first):
            _print(line)
        is_first = False
        measured.extend(map(dataclasses.asdict, measurements))
        succeeded = succeeded and not any(each.failed for each in measurements)
    return succeeded


def _print(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")  # erase the line, which may show a progress bar
        sys.stderr.flush()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def saved(report: Report, path: Path | None) -> Iterator[None]:
    """Write a report to `path` at the end, even if the run is interrupted."""
    try:
        yield
    except BaseException as error:  # above all KeyboardInterrupt
        report["ended_by"] = type(error).__name__
        raise
    finally:
        if path is not None and report["runs"]:
            write_atomically(path, to_json(report).encode())


def to_json(report: Report) -> str:
    """Return a report as JSON."""
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Return the report in a file. Raises FormatError for any other content, and OSError."""
    data = read_json(path, "a report of q4jit bench")
    version = data.get("bench_version") if isinstance(data, dict) else None
    if version != _VERSION:
        raise FormatError(
            expected(
                f"bench_version {_VERSION}",
                repr(version),
                where=str(path),
                cure="use a file that q4jit bench --json wrote",
            )
        )
    return dict(data)


def cpu_runs(report: Report) -> list[Run]:
    """Return the runs of a report on the CPU that have measurements."""
    return [run for run in report["runs"] if "threads" in run and run["rows"]]


def grouped_cpu_runs(report: Report) -> list[list[Run]]:
    """Return the runs of `cpu_runs`, those with the same block format and dtype together."""
    groups: dict[str, list[Run]] = {}
    for run in cpu_runs(report):
        groups.setdefault(ratios.weights_and_arrays(run), []).append(run)
    return list(groups.values())
