"""`q4jit pack`: a tensor of a GGUF file in the byte order of a layout."""

import argparse
from typing import Any

from q4jit.tools.aot.layout import LAYOUTS
from q4jit.tools.aot.pack import pack_tensor
from q4jit.tools.cli.arguments import add_out
from q4jit.tools.cli.parser import EXAMPLES
from q4jit.tools.text import visible
from q4jit.weights.layouts import PLANAR


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "pack",
        help="write a tensor of a GGUF file in the byte order of a layout",
        description="Write a matrix of a GGUF file in a layout, and what it is to FILE.json.",
        epilog=EXAMPLES,
    )
    command.add_argument("--gguf", metavar="FILE", required=True)
    command.add_argument("--tensor", metavar="NAME", required=True)
    command.add_argument("--layout", choices=LAYOUTS, default=PLANAR)
    add_out(command, "FILE")
    command.set_defaults(run=_pack)
    return command


def _pack(options: argparse.Namespace) -> int:
    found = pack_tensor(
        options.gguf, options.tensor, options.layout, options.out, force=options.force
    )
    shape, weight = f"[{found['K']}, {found['N']}]", found["weight"]
    tensor = visible(options.tensor)
    print(
        f"{options.out}: {tensor}, {found['format']} {shape}, layout {weight['layout']}, "
        f"{weight['size_bytes']} bytes"
    )
    return 0
