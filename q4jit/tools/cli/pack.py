"""`q4jit pack`: write one tensor of a GGUF file in the layout that kernels read."""

import argparse
from typing import Any, Final

from q4jit.tools.aot.layout import LAYOUTS
from q4jit.tools.aot.pack import pack_tensor
from q4jit.tools.cli.arguments import add_output
from q4jit.tools.cli.parser import epilog
from q4jit.tools.text import counted, visible
from q4jit.weights.layouts import PLANAR

_EXAMPLES: Final = """
q4jit pack --gguf model.gguf --tensor blk.0.ffn_up.weight --out up.bin
q4jit pack --gguf model.gguf --tensor blk.0.ffn_up.weight --layout gguf --out up.bin
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "pack",
        help="write one tensor of a GGUF file in the layout that kernels read",
        description="Write one weight matrix of a GGUF file in the layout that kernels read. Of a\n"
        "tensor with experts, write all their matrices, one after the other.\n"
        "FILE.json, written beside FILE, describes the format, shape and layout.",
        epilog=epilog(_EXAMPLES, "the files were written", "an error occurred"),
    )
    command.add_argument("--gguf", metavar="FILE", required=True, help="the GGUF file to read")
    command.add_argument(
        "--tensor", metavar="NAME", required=True, help="name of the tensor: a matrix, or experts"
    )
    command.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=PLANAR,
        help="order of the bytes, see docs/layouts.md (default: %(default)s)",
    )
    add_output(command, "FILE", "file for the bytes of the weight")
    command.set_defaults(run=_pack)
    return command


def _pack(options: argparse.Namespace) -> int:
    description = pack_tensor(
        options.gguf, options.tensor, options.layout, options.out, force=options.force
    )
    shape, weight = [description["K"], description["N"]], description["weight"]
    experts = description.get("experts")
    times, size = f"{experts} × " if experts else "", weight["size_bytes"] * (experts or 1)
    print(
        f"{options.out}: {visible(options.tensor)}, {times}{description['format']} {shape}, "
        f"layout {weight['layout']}, {counted(size, 'byte')}"
    )
    return 0
