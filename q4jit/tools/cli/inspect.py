"""`q4jit inspect`: what a GGUF file holds, and which kernels would serve it."""

import argparse
import json
from typing import Any, Final

from q4jit.dispatch.policy import CallCost, Place, choose_place
from q4jit.runtime.devices import find_devices
from q4jit.targets import HIP_ARCHS
from q4jit.tools.cli.arguments import positives, precision_names
from q4jit.tools.cli.parser import epilog
from q4jit.tools.inspect import examine, report_lines
from q4jit.tools.text import visible

_ROWS: Final = (1, 8, 512)
_EXAMPLES: Final = """
q4jit inspect model.gguf
q4jit inspect model-00001-of-00003.gguf --target hip:gfx1100 --m 1,512 --precision f32,i8
q4jit inspect model.gguf --json
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what a GGUF file holds, and which kernels would serve it",
        description="Show the architecture of a GGUF file, its formats with tensors and bytes,\n"
        "the kernels that would multiply by its weights, and the tensors that cannot be\n"
        "used, with the reason. Any part of a split model stands for all parts. Only the\n"
        "header is read: scales are taken to be finite.",
        epilog=epilog(_EXAMPLES, "the report was printed", "an error occurred"),
    )
    command.add_argument("file", metavar="FILE", help="the GGUF file to read")
    command.add_argument(
        "--target",
        action="append",
        help="hip:0, cuda:0, an arch such as gfx1100 or cpu:x86-64-v3, or cpu; repeatable "
        "(default: this machine's GPUs and its CPU)",
    )
    command.add_argument(
        "--m",
        type=positives,
        default=_ROWS,
        metavar="M[,M...]",
        help=f"numbers of rows of x (default: {','.join(map(str, _ROWS))})",
    )
    command.add_argument(
        "--precision",
        type=precision_names,
        default=("f32",),
        metavar="P[,P...]",
        help="upper bounds of the error: f32, f16, i8 (default: f32)",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_inspect)
    return command


def _inspect(options: argparse.Namespace) -> int:
    places = [_place(name) for name in dict.fromkeys(options.target or _targets_here())]
    report = examine(options.file, places, options.m, options.precision)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print(*map(visible, report_lines(report)), sep="\n")
    return 0


def _place(name: str) -> Place:
    """Return where calls with a target run. Raises TargetError and DeviceError."""
    target = f"hip:{name}" if name in HIP_ARCHS else name
    return choose_place(target, (), (), lambda: CallCost(0, 0, 0))


def _targets_here() -> list[str]:
    """Return the names of this machine's targets: one GPU of each model, and the CPU."""
    models = {
        (device.name, device.arch): f"hip:{number}"
        for number, device in reversed(list(enumerate(find_devices())))
        if device.arch in HIP_ARCHS
    }
    return [*reversed(models.values()), "cpu"]
