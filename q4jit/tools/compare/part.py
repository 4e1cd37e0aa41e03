"""A part of a comparison on the CPU: one number of threads, in a process of its own.

A process decides on its pool once. The part reads its request from a JSON file and writes a report,
whose runs the parent adds to its own.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from q4jit.checked_json import (
    COUNT,
    FLAG,
    TEXT,
    Rules,
    check_fields,
    list_of,
    one_of,
    or_null,
    read_json,
)
from q4jit.config import MOST_THREADS
from q4jit.precision import PRECISIONS
from q4jit.tools.compare.report import Report, read_report
from q4jit.tools.compare.request import BenchRequest
from q4jit.weights.formats import FORMATS

_END_S: Final = 10  # that a process may take to write its report


@dataclass(frozen=True)
class Part:
    """What a process measures; report: where its report goes.

    ggml: the folder of its libraries. cached: the weight stays in the cache.
    """

    threads: int
    request: BenchRequest
    ggml: Path | None
    cached: bool
    report: Path


def to_json(part: Part) -> str:
    """Return a part as text."""
    paths = {"ggml": part.ggml and str(part.ggml), "report": str(part.report)}
    return json.dumps(dataclasses.asdict(part) | paths)


def read_part(path: Path) -> Part:
    """Return the part that a file holds. Raises FormatError for any other content, and OSError."""
    data = read_json(path, "the request for a part of q4jit bench")
    check_fields(data, str(path), _PART_RULES)
    request = data["request"]
    check_fields(request, f"{path}: request", _REQUEST_RULES)
    lists = {name: request[name] and tuple(request[name]) for name in ("rows", "precisions")}
    shapes = request["shapes"] and tuple((k, n) for k, n in request["shapes"])
    return Part(
        data["threads"],
        BenchRequest(**request | lists | {"shapes": shapes}),
        data["ggml"] and Path(data["ggml"]),
        data["cached"],
        Path(data["report"]),
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(COUNT[0], value))


_PART_RULES: Final[Rules] = {
    "threads": (
        lambda v: COUNT[0](v) and v <= MOST_THREADS,
        f"a whole number from 1 to {MOST_THREADS}",
    ),
    "request": (lambda v: isinstance(v, dict), "what is measured"),
    "ggml": or_null(TEXT),
    "cached": FLAG,
    "report": TEXT,
}
_REQUEST_RULES: Final[Rules] = {
    "format": one_of(FORMATS),
    "shapes": or_null(list_of((_is_shape, "[K, N]"))),
    "rows": or_null(list_of(COUNT)),
    "precisions": or_null(list_of(one_of(PRECISIONS))),
    "fused": FLAG,
    "quick": FLAG,
}


def run_parts(parts: Iterable[Part], report: Report, *, debug: bool) -> bool:
    """Run parts one after the other, and add their runs to a report; whether nothing failed."""
    good = True
    for part in parts:
        request = part.report.with_suffix(".request")
        request.write_text(to_json(part), encoding="utf-8")
        words = [sys.executable, "-m", "q4jit", "bench", "--part", str(request)]
        try:
            status = _wait_for(words + ["--debug"] * debug)
        finally:  # what a part has found before it was ended is kept
            if part.report.is_file():
                report["runs"] += read_report(part.report)["runs"]
        if status < 0:
            raise ChildProcessError(
                f"the part with {part.threads} threads: ended by signal {-status}"
            )
        good = good and status == 0
    return good


def _wait_for(words: Sequence[str]) -> int:
    """The exit status of a command, which ends with this one."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except BaseException:  # Ctrl-C reaches it too: it writes what it knows
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
