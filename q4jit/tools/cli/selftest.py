"""`q4jit selftest`: every kernel held to its bound on this machine's GPU, then timed."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from q4jit.hip.harness import Bench
from q4jit.tools.cli.arguments import open_device
from q4jit.tools.selftest.findings import Findings, told
from q4jit.tools.selftest.report import report_of, report_text
from q4jit.tools.selftest.run import run_all


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "selftest",
        help="test and time every kernel on this machine's GPU, with a report",
        description="Hold every schedule, layout, format and precision to its bound on a GPU,\n"
        "time them, and write report.txt and report.json, which can be attached to an issue.",
    )
    command.add_argument(
        "--device", default="hip", help="hip:0, cuda:0 or an arch as gfx1100 (default: the first)"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="for the reports (default: q4jit-selftest-ARCH)"
    )
    command.add_argument("--quick", action="store_true", help="Q4_0 alone, in one layout, one size")
    command.set_defaults(run=_selftest)
    return command


def _selftest(options: argparse.Namespace) -> int:
    device = open_device(options.device)
    folder: Path = options.out or Path(f"q4jit-selftest-{device.arch}")
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before the work
    findings = Findings()
    with Bench(device) as bench:
        try:
            run_all(bench, options.quick, findings)
        except BaseException as error:  # Ctrl-C, above all
            findings.ended_by = told(error)
            raise
        finally:
            report = report_of(bench, findings)
            _write(report, folder)
    return 1 if report["failed"] else 0


def _write(report: dict[str, Any], folder: Path) -> None:
    (folder / "report.txt").write_text(report_text(report), encoding="utf-8")
    data = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "report.json").write_text(data + "\n", encoding="utf-8")
    sys.stdout.write(report_text(report, shortened=True))
    sys.stdout.write(f"{folder / 'report.txt'} and report.json hold all of it\n")
