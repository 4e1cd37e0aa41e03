"""Reports: made as rows come, written as JSON, read again."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.cache import write_atomically
from q4jit.errors import FormatError
from q4jit.tools.compare.arena import Arena
from q4jit.tools.compare.request import BenchRequest, Defaults
from q4jit.tools.compare.rows import measure, place_of
from q4jit.tools.compare.tables import compiler_name, table_lines
from q4jit.tools.provenance import about_code, about_system

Report = dict[str, Any]
_VERSION: Final = 1


def new_report(command: Sequence[str]) -> Report:
    """A report without runs. command: as it was given."""
    return {
        "bench_version": _VERSION,
        **about_code(),
        "command": list(command),
        **about_system(),
        "ended_by": "",
        "runs": [],
    }


def run(report: Report, arena: Arena, request: BenchRequest, default: Defaults) -> bool:
    """Measure on an arena; rows go to the terminal and into the report as they come.

    Returns whether nothing failed.
    """
    rows: list[dict[str, Any]] = []
    about = {"target": arena.target, **arena.about, "format": request.format}
    report["runs"].append({**about, "absent": arena.absent, "rows": rows})
    _say(f"{place_of(arena)}: {about['device']}, {compiler_name(about['compiler'])}")
    good, is_first = True, True
    for found in measure(arena, request, default):
        if is_first:
            for name, reason in arena.absent.items():
                _say(f"{name}: not present: {reason}")
        for line in table_lines(found, heading=is_first):
            _say(line)
        is_first = False
        rows.extend(dataclasses.asdict(row) for row in found)
        good = good and not any(row.failed for row in found)
    return good


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")  # a progress bar may stand in this line
        sys.stderr.flush()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def kept(report: Report, path: Path | None) -> Iterator[None]:
    """Write a report to `path`, even if the run is interrupted."""
    try:
        yield
    except BaseException as error:  # Ctrl-C, above all
        report["ended_by"] = type(error).__name__
        raise
    finally:
        if path is not None and report["runs"]:
            write_atomically(path, to_json(report).encode())


def to_json(report: Report) -> str:
    """A report as text."""
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """A report from a file. Raises FormatError for a file that is none, and OSError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} is no report of q4jit bench: {error}") from None
    version = found.get("bench_version") if isinstance(found, dict) else None
    if version != _VERSION:
        raise FormatError(
            f"{path}: found bench_version {version!r}, accepted is a file that q4jit bench --json "
            f"of version {_VERSION} wrote"
        )
    return dict(found)


def on_cpu(report: Report) -> list[dict[str, Any]]:
    """The runs of a report on the CPU, one for each number of threads, that have rows."""
    return [run for run in report["runs"] if "threads" in run and run["rows"]]
