"""`q4jit selftest`: check every kernel on a GPU or the CPU against its bound."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from q4jit.hip.harness import Bench
from q4jit.tools.cli.arguments import open_device, output_path
from q4jit.tools.cli.parser import epilog
from q4jit.tools.selftest.cpu import CpuBench, run_cpu
from q4jit.tools.selftest.findings import Findings, error_text
from q4jit.tools.selftest.report import report_of, report_text
from q4jit.tools.selftest.run import run_all

_EXAMPLES: Final = """
q4jit selftest
q4jit selftest --device hip:1 --out report
q4jit selftest --device gfx1100 --quick
q4jit selftest --device cpu
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "selftest",
        help="check and time every kernel on this machine's GPU",
        description="Check every schedule, layout, format, precision and dtype on a GPU\n"
        "against its error bound, then time products; or check the kernels of the CPU.\n"
        "The results are in report.txt and report.json; attach report.json to an issue.",
        epilog=epilog(
            _EXAMPLES,
            "all checks passed and all products were timed",
            "a check or timing failed, or an error occurred",
        ),
    )
    command.add_argument(
        "--device",
        default="hip",
        help="hip:0, cuda:0, an arch such as gfx1100, or cpu (default: the first GPU)",
    )
    command.add_argument(
        "--out",
        type=output_path,
        metavar="DIR",
        help="folder for the reports (default: q4jit-selftest-ARCH)",
    )
    command.add_argument(
        "--quick", action="store_true", help="only Q4_0, one layout and one size to time"
    )
    command.set_defaults(run=_selftest)
    return command


def _selftest(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        return _run(CpuBench(), run_cpu, options)
    device = open_device(options.device, "use --device cpu")
    _folder(options, device.arch)  # fails before the work, not after it
    return _run(Bench(device), run_all, options)


def _folder(options: argparse.Namespace, arch: str) -> Path:
    folder: Path = options.out or Path(f"q4jit-selftest-{arch}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(
    opened: Bench | CpuBench,
    run: Callable[[Any, bool, Findings], None],
    options: argparse.Namespace,
) -> int:
    folder = _folder(options, opened.device.arch)
    findings = Findings()
    with opened as bench:
        try:
            run(bench, options.quick, findings)
        except BaseException as error:  # above all KeyboardInterrupt
            findings.ended_by = error_text(error)
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
    sys.stdout.write(f"full report: {folder / 'report.txt'} and report.json\n")
