"""`q4jit tune`: find the fastest kernels by measurement, and exchange files of tunings."""

import argparse
import itertools
from pathlib import Path
from typing import Any, Final

from q4jit.errors import expected
from q4jit.files import write_atomically
from q4jit.frontend.specs import WeightSpec
from q4jit.hip import search, tunings
from q4jit.hip.harness import Bench
from q4jit.precision import PRECISIONS
from q4jit.tools.aot.request import weights_in
from q4jit.tools.cli.arguments import (
    block_formats,
    check_output_file,
    check_shape,
    open_device,
    output_path,
    positives,
    report_left_out,
    shapes_in_words,
    weight_shape,
)
from q4jit.tools.cli.parser import epilog
from q4jit.tools.text import counted
from q4jit.weights.formats import FORMATS, Format

_DEFAULT_SHAPES: Final = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
_DEFAULT_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 512, 2048)  # one in each class of M
_EXAMPLES: Final = """
q4jit tune --shape 4096x14336 --format q4_0 --m 1,512
q4jit tune --gguf model.gguf --m 1 --precision f32 --precision i8
q4jit tune --export tunings.json --winners
q4jit tune --merge tunings.json
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find the fastest kernels for this machine's GPU",
        description="Compile, check and time the candidate kernels for products [M, K] @ [K, N].\n"
        "The results are stored beside the compiled kernels. Later calls use the fastest\n"
        "kernel, and a later search measures only candidates that are new.",
        epilog=epilog(
            _EXAMPLES,
            "every product has a fastest kernel",
            "an error occurred, or a product has no correct candidate",
        ),
    )
    _add_search(command)
    _add_exchange(command)
    command.set_defaults(run=_tune)
    return command


def _add_search(command: argparse.ArgumentParser) -> None:
    work = command.add_argument_group("search")
    work.add_argument(
        "--device", help="hip:0, cuda:0 or an arch such as gfx1100 (default: the first GPU)"
    )
    work.add_argument(
        "--shape",
        type=weight_shape,
        action="append",
        metavar="KxN",
        help=f"shape of a weight; repeatable (default: {shapes_in_words(_DEFAULT_SHAPES)})",
    )
    work.add_argument(
        "--format",
        type=block_formats,
        metavar="F[,F...]",
        help="block formats of the weights (default: Q4_0)",
    )
    work.add_argument(
        "--gguf", metavar="FILE", help="all weights of this file, instead of --shape and --format"
    )
    work.add_argument(
        "--m",
        type=positives,
        action="extend",
        metavar="M[,M...]",
        help="numbers of rows of x; all M of a class share kernels; repeatable (default: "
        f"{','.join(map(str, _DEFAULT_ROWS))})",
    )
    work.add_argument(
        "--precision",
        choices=PRECISIONS,
        action="append",
        help="upper bound of the error; repeatable (default: f32)",
    )


def _add_exchange(command: argparse.ArgumentParser) -> None:
    exchange = command.add_argument_group("exchange (no search)")
    exchange.add_argument(
        "--export", type=output_path, metavar="FILE", help="write all stored trials to a file"
    )
    exchange.add_argument(
        "--winners", action="store_true", help="with --export: only the fastest trial per product"
    )
    exchange.add_argument(
        "--merge", type=Path, metavar="FILE", help="add the trials of another file"
    )


def _tune(options: argparse.Namespace) -> int:
    check_output_file(options, "export")
    if options.winners and options.export is None:
        options.parser.error("--winners requires --export")
    if options.export is not None or options.merge is not None:
        _refuse_search(options)
        return _exchange(options)
    weights = _tuned_weights(options)
    device = open_device(options.device or "hip", "there is nothing to tune on a CPU")
    with Bench(device) as bench:
        keys = {
            search.key_for(bench.target, spec.k, spec.n, (spec.format,), m, precision)
            for spec in weights
            for m in options.m or _DEFAULT_ROWS
            for precision in options.precision or ("f32",)
        }
        print(f"{device}, {bench.fingerprint}: {counted(len(keys), 'product')}")
        trials_by_key = search.search(bench, keys)
    print(search.table(trials_by_key))
    path = tunings.path()
    print(f"stored in {path}" if path else "not stored: there is no cache directory")
    return 0 if all(tunings.best(trials) for trials in trials_by_key.values()) else 1


def _tuned_weights(options: argparse.Namespace) -> list[WeightSpec]:
    if options.gguf is not None:
        if options.shape or options.format:
            options.parser.error(
                expected("either --gguf, or --shape and --format", "options of both")
            )
        weights, left_out = weights_in(options.gguf)
        report_left_out("tune", left_out)
        return [WeightSpec(spec.format, spec.k, spec.n) for spec in weights]
    formats: tuple[Format, ...] = options.format or (FORMATS["Q4_0"],)
    pairs = list(itertools.product(formats, options.shape or _DEFAULT_SHAPES))
    for fmt, (k, n) in pairs:
        check_shape(options, fmt, k, n)
    return [WeightSpec(fmt.name, k, n) for fmt, (k, n) in pairs]


def _refuse_search(options: argparse.Namespace) -> None:
    """End the command if an option of the search is given and there is no search."""
    names = ("device", "shape", "format", "gguf", "m", "precision")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        options.parser.error(
            f"{', '.join(given)} cannot be combined with --export or --merge: they do not search"
        )


def _exchange(options: argparse.Namespace) -> int:
    if options.merge is not None:
        added = tunings.merge_file(options.merge)
        print(f"{tunings.path()}: added {_size(added)} from {options.merge}")
    if options.export is not None:
        exported = tunings.stored()
        if options.winners:
            best = {key: tunings.best(trials) for key, trials in exported.items()}
            exported = {key: (trial,) for key, trial in best.items() if trial is not None}
        write_atomically(options.export, tunings.to_text(exported).encode())
        print(f"{options.export}: {_size(exported)}")
    return 0


def _size(trials_by_key: tunings.Tunings) -> str:
    trials = sum(map(len, trials_by_key.values()))
    return f"{counted(len(trials_by_key), 'product')}, {counted(trials, 'trial')}"
