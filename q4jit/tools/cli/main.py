"""The entry point of the command line: it runs one command and turns errors into exit statuses.

An error is one line on standard error and exit status 1, or 2 if the command line is invalid. If no
compiler works, one more line per compiler says why. `--debug` and Q4JIT_DEBUG=1 add the
traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from q4jit import config
from q4jit.errors import Q4JitError
from q4jit.tools.cli import bench, build, cache, doctor, inspect, pack, selftest, tune
from q4jit.tools.cli.errors import error_lines
from q4jit.tools.cli.parser import INTERRUPTED, Parser, epilog
from q4jit.tools.text import visible
from q4jit.version import version

_EXAMPLES: Final = """
q4jit build --k 4096 --n 11008 --format q4_0 --arch gfx1100 --out kernels
q4jit pack --gguf model.gguf --tensor blk.0.ffn_up.weight --out up.bin
q4jit inspect model.gguf
q4jit tune --shape 4096x14336 --m 1,512
q4jit bench --quick
q4jit selftest
q4jit doctor
q4jit cache ls
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (None: that of the process) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown:  # reported by the command, whose --help lists its options
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.arguments = arguments
    debug = options.debug
    try:
        debug = debug or config.debug()
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except (Q4JitError, OSError) as error:
        if debug:
            traceback.print_exc()
        message = "\n".join(map(visible, error_lines(error)))
        print(f"q4jit {options.command}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"q4jit {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with one subparser per command."""
    parser = Parser(
        prog="q4jit",
        description="Build, tune, time and test kernels for matrix products with GGUF weights.\n"
        "Run `q4jit COMMAND --help` for the options of a command.",
        epilog=epilog(_EXAMPLES, "the command succeeded", "the command failed"),
    )
    parser.add_argument("--version", action="version", version=f"q4jit {version()}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for module in (build, pack, inspect, tune, bench, selftest, doctor, cache):
        command = module.add_command(commands)
        command.add_argument("--debug", action="store_true", help="print the traceback of an error")
        command.set_defaults(parser=command)
    return parser
