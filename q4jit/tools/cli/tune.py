"""`q4jit tune`: the search for the fastest kernels, and files of what was found."""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

from q4jit.compilers.cache import write_atomically
from q4jit.frontend.specs import WeightSpec
from q4jit.hip import search, tunings
from q4jit.hip.harness import Bench
from q4jit.precision import PRECISIONS
from q4jit.tools.aot.request import weights_in
from q4jit.tools.cli.arguments import (
    block_format,
    check_folder,
    check_shape,
    open_device,
    positives,
    shapes_in_words,
    weight_shape,
)
from q4jit.tools.cli.parser import EXAMPLES
from q4jit.tools.text import counted, visible
from q4jit.weights.formats import FORMATS, Format

_TUNED_SHAPES: Final = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
_TUNED_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 512, 2048)  # one of each class of M


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="search for the fastest kernels on this machine's GPU, or exchange what was found",
        description="Compile, check and time the candidates for products [M, K] @ [K, N]. What\n"
        "was tried is kept beside the compiled kernels; calls use the fastest from then\n"
        "on, and a second search measures only what is new.",
        epilog=EXAMPLES,
    )
    command.add_argument(
        "--device", help="hip:0, cuda:0 or an arch as gfx1100 (default: the first)"
    )
    command.add_argument(
        "--shape",
        type=weight_shape,
        action="append",
        metavar="KxN",
        help=f"of a weight; may be given again (default: {shapes_in_words(_TUNED_SHAPES)})",
    )
    command.add_argument(
        "--format", type=block_format, help="block format of the weights (default: Q4_0)"
    )
    command.add_argument("--gguf", metavar="FILE", help="instead: all weights of this file")
    command.add_argument(
        "--m",
        type=positives,
        action="extend",
        help=f"rows of x, of which those of a class share kernels; may be given again (default: "
        f"{','.join(map(str, _TUNED_ROWS))})",
    )
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        action="append",
        help="upper bound of the error; may be given again (default: f32)",
    )
    command.add_argument(
        "--export", type=Path, metavar="FILE", help="measure nothing: write all that is known"
    )
    command.add_argument(
        "--winners", action="store_true", help="with --export: the fastest candidates alone"
    )
    command.add_argument(
        "--merge", type=Path, metavar="FILE", help="measure nothing: add what another file knows"
    )
    command.set_defaults(run=_tune)
    return command


def _tune(options: argparse.Namespace) -> int:
    check_folder(options, "export")
    exchange = options.export is not None or options.merge is not None
    if exchange:
        _refuse_search(options)
        return _exchange(options)
    if options.winners:
        options.parser.error("--winners does not apply without --export")
    weights = _tuned_weights(options)
    name = options.device or "hip"
    device = open_device(name)
    with Bench(device) as bench:
        keys = {
            search.key_for(bench.target, spec.k, spec.n, (spec.format,), m, precision)
            for spec in weights
            for m in options.m or _TUNED_ROWS
            for precision in options.precision or ("f32",)
        }
        print(f"{device}, {bench.fingerprint}: {counted(len(keys), 'product')}")
        found = search.search(bench, keys)
    print(search.table(found))
    print(f"kept in {tunings.path() or 'no file: there is no cache directory'}")
    return 0 if all(tunings.best(trials) for trials in found.values()) else 1


def _tuned_weights(options: argparse.Namespace) -> list[WeightSpec]:
    if options.gguf is not None:
        if options.shape or options.format:
            options.parser.error("found --gguf and --shape or --format: accepted is one of both")
        weights, left_out = weights_in(options.gguf)
        for name, reason in left_out.items():
            print(visible(f"q4jit tune: left out {name}: {reason}"), file=sys.stderr)
        return [WeightSpec(spec.format, spec.k, spec.n) for spec in weights]
    fmt: Format = options.format or FORMATS["Q4_0"]
    shapes = options.shape or _TUNED_SHAPES
    for k, n in shapes:
        check_shape(options, fmt, k, n)
    return [WeightSpec(fmt.name, k, n) for k, n in shapes]


def _refuse_search(options: argparse.Namespace) -> None:
    """Refuse what only a search heeds, where nothing is measured."""
    names = ("device", "shape", "format", "gguf", "m", "precision")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        options.parser.error(
            f"{', '.join(given)} found with --export or --merge: accepted is a search, or these"
        )
    if options.winners and options.export is None:
        options.parser.error("--winners does not apply without --export")


def _exchange(options: argparse.Namespace) -> int:
    if options.merge is not None:
        more = tunings.merge_file(options.merge)
        print(f"{tunings.path()}: {_size(more)} of {options.merge} added")
    if options.export is not None:
        known = tunings.stored()
        if options.winners:
            best = {place: tunings.best(trials) for place, trials in known.items()}
            known = {place: (trial,) for place, trial in best.items() if trial is not None}
        write_atomically(options.export, tunings.to_text(known).encode())
        print(f"{options.export}: {_size(known)}")
    return 0


def _size(found: tunings.Tunings) -> str:
    trials = sum(map(len, found.values()))
    return f"{counted(len(found), 'product')}, {counted(trials, 'trial')}"
