"""Run `q4jit bench` for several numbers of threads: a child process for each.

A process fixes the size of its thread pool once. A child reads its request from a JSON file and
writes a report; the parent adds the runs of that report to its own.
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
from q4jit.floats import FLOAT_BYTES
from q4jit.precision import PRECISIONS
from q4jit.tools.compare.report import Report, read_report
from q4jit.tools.compare.request import BenchRequest
from q4jit.tools.text import counted
from q4jit.weights.formats import FORMATS

_END_S: Final = 10  # for an interrupted child to write its report


@dataclass(frozen=True)
class ChildRequest:
    """What a child process measures.

    Attributes:
        threads: the number of threads.
        request: the products to measure.
        ggml: ggml's library or its folder.
        cached: whether the weight stays in the cache.
        report: where the child writes its report.
    """

    threads: int
    request: BenchRequest
    ggml: Path | None
    cached: bool
    report: Path


def to_json(child: ChildRequest) -> str:
    """Return a request as JSON."""
    paths = {"ggml": child.ggml and str(child.ggml), "report": str(child.report)}
    return json.dumps(dataclasses.asdict(child) | paths)


def read_child_request(path: Path) -> ChildRequest:
    """Return the request in a file. Raises FormatError for any other content, and OSError."""
    data = read_json(path, "a request for a child process of q4jit bench")
    check_fields(data, str(path), _CHILD_RULES)
    request = data["request"]
    check_fields(request, f"{path}: request", _REQUEST_RULES)
    lists = {name: request[name] and tuple(request[name]) for name in ("rows", "precisions")}
    shapes = request["shapes"] and tuple((k, n) for k, n in request["shapes"])
    return ChildRequest(
        data["threads"],
        BenchRequest(**request | lists | {"shapes": shapes}),
        data["ggml"] and Path(data["ggml"]),
        data["cached"],
        Path(data["report"]),
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(COUNT[0], value))


_CHILD_RULES: Final[Rules] = {
    "threads": (
        lambda v: COUNT[0](v) and v <= MOST_THREADS,
        f"a whole number from 1 to {MOST_THREADS}",
    ),
    "request": (lambda v: isinstance(v, dict), "the products to measure"),
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
    "dtype": one_of(FLOAT_BYTES),
}


def run_children(children: Iterable[ChildRequest], report: Report, *, debug: bool) -> bool:
    """Run children one after the other, add their runs to `report`; return whether all succeeded.

    Raises ChildProcessError if a signal ended a child.
    """
    succeeded = True
    for child in children:
        request = child.report.with_suffix(".request")
        request.write_text(to_json(child), encoding="utf-8")
        command = [sys.executable, "-m", "q4jit", "bench", "--child", str(request)]
        try:
            status = _wait_for(command + ["--debug"] * debug)
        finally:  # keep what an interrupted child measured
            if child.report.is_file():
                report["runs"] += read_report(child.report)["runs"]
        if status < 0:
            threads = counted(child.threads, "thread")
            raise ChildProcessError(f"the child process with {threads} ended by signal {-status}")
        succeeded = succeeded and status == 0
    return succeeded


def _wait_for(command: Sequence[str]) -> int:
    """Run a command and return its exit status; an exception here ends it too."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:  # Ctrl-C reaches the child too, which then writes its report
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
