"""`q4jit doctor`: what q4jit finds on this machine, and what is missing."""

import argparse
import json
from typing import Any, Final

from q4jit.tools.cli.parser import epilog
from q4jit.tools.doctor import examine, report_lines
from q4jit.tools.text import visible

_EXAMPLES: Final = """
q4jit doctor
q4jit doctor --json
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="show what q4jit finds on this machine, and what is missing",
        description="Show Python and its packages, the CPU, ROCm and CUDA, the compilers and the\n"
        "archs that they know, the GPUs and the kernel cache; and for each missing piece\n"
        "the command that installs it.",
        epilog=epilog(_EXAMPLES, "the report was printed", "an error occurred"),
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_doctor)
    return command


def _doctor(options: argparse.Namespace) -> int:
    report = examine()
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(*map(visible, report_lines(report)), sep="\n")
    return 0
