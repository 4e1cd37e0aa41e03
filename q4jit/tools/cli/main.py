"""The command line `q4jit`: which commands there are, and how they end.

A problem is one line on standard error (and a line for each compiler that was looked at, where none
serves) and the exit status 1, or 2 where the command line itself is wrong; `--debug` and
Q4JIT_DEBUG=1 show the traceback too.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from q4jit import config
from q4jit.errors import Q4JitError
from q4jit.tools.cli import bench, build, pack, selftest, tune
from q4jit.tools.cli.errors import lines_of
from q4jit.tools.cli.parser import EXAMPLES, Parser
from q4jit.tools.provenance import version
from q4jit.tools.text import visible

_INTERRUPTED: Final = 130  # as a shell reports SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (None: the process's own) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_args(arguments)
    options.arguments = arguments
    debug = options.debug
    try:
        debug = debug or config.debug()
        return int(options.run(options))
    except (Q4JitError, OSError) as error:
        if debug:
            traceback.print_exc()
        told = "\n".join(map(visible, lines_of(error)))
        print(f"q4jit {options.command}: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"q4jit {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a parser for each command."""
    parser = Parser(
        prog="q4jit",
        description="Kernels for products with GGUF weights: built ahead of time, or tested here.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"q4jit {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (build, pack, tune, bench, selftest):
        command = module.add_command(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(parser=command)
    return parser
