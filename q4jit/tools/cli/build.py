"""`q4jit build`: compile kernels for AMD GPUs to files, with a manifest and a C header."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from q4jit.errors import expected
from q4jit.frontend.specs import WeightSpec
from q4jit.hip.limits import check_block_size
from q4jit.plan.options import PlanOptions
from q4jit.precision import PRECISIONS
from q4jit.progress import progress
from q4jit.targets import HIP_ARCHS, Target
from q4jit.tools.aot.build import build
from q4jit.tools.aot.header import HEADER
from q4jit.tools.aot.manifest import MANIFEST
from q4jit.tools.aot.request import BuildRequest, weights_in
from q4jit.tools.cli.arguments import (
    add_output,
    block_format,
    check_shape,
    checked,
    positive,
    positives,
    report_left_out,
)
from q4jit.tools.cli.parser import LEFT_OUT, epilog
from q4jit.tools.text import counted
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import GGUF, PLANAR

_EXAMPLES: Final = """
q4jit build --k 4096 --n 11008 --format q4_0 --arch gfx1100 --out kernels
q4jit build --gguf model.gguf --arch gfx1100 --arch gfx942 --m 1,512 --out kernels
q4jit build --entry generic --format q4_0 --arch gfx1100 --out kernels
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "build",
        help="compile kernels for AMD GPUs to files, with a manifest and a C header",
        description="Compile kernels of y = x @ w for AMD GPUs. The output folder contains each\n"
        "kernel as .hip and .hsaco, manifest.json and q4jit_kernels.h. Give the weights by\n"
        "--gguf, or one weight by --k, --n and --format.",
        epilog=epilog(
            _EXAMPLES,
            "all files were written",
            "an error occurred",
            {LEFT_OUT: "all files were written, but some matrices of the file got no kernel"},
        ),
    )
    _add_weights(command)
    _add_kernels(command)
    add_output(command, "DIR", "folder for the kernels; created if it does not exist")
    command.set_defaults(run=_build)
    return command


def _add_weights(command: argparse.ArgumentParser) -> None:
    weights = command.add_argument_group("weights")
    weights.add_argument("--gguf", metavar="FILE", help="build for all weights of this GGUF file")
    weights.add_argument("--k", type=positive, help="K of one weight [K, N]")
    weights.add_argument("--n", type=positive, help="N of one weight [K, N]")
    weights.add_argument(
        "--format",
        type=block_format,
        help=f"block format of this weight: {', '.join(FORMATS).lower()}",
    )


def _add_kernels(command: argparse.ArgumentParser) -> None:
    kernels = command.add_argument_group("kernels")
    kernels.add_argument(
        "--arch",
        type=_target,
        action="append",
        required=True,
        help="arch of the GPU, such as gfx1100; repeatable",
    )
    kernels.add_argument(
        "--m",
        type=positives,
        action="extend",
        metavar="M[,M...]",
        help="numbers of rows of x to support; repeatable (default: every M)",
    )
    kernels.add_argument(
        "--precision", choices=PRECISIONS, help="upper bound of the error (default: f32)"
    )
    kernels.add_argument(
        "--block-size",
        type=positive,
        metavar="THREADS",
        help="threads per thread block, for schedules that support several sizes",
    )
    kernels.add_argument(
        "--layout", choices=(PLANAR, GGUF), help="layout of the weights (default: planar)"
    )
    kernels.add_argument(
        "--entry",
        choices=("specialised", "generic"),
        default="specialised",
        help="specialised: kernels for given K and N. generic: one kernel\n"
        "<format>_matmul_kernel(activations, weights, output, m, n, k) for every shape, on GGUF's "
        "own blocks; takes no --k, --n, --m or --precision (default: %(default)s)",
    )


def _target(text: str) -> Target:
    amd = [name for name, arch in HIP_ARCHS.items() if not arch.is_nvidia]
    name = text.removeprefix("hip:")
    if name in HIP_ARCHS and name not in amd:
        raise argparse.ArgumentTypeError(
            expected(
                "an AMD arch, because the manifest is made from the metadata of AMD code objects",
                f"NVIDIA's {name}",
                cure="call the function from Python, or compile the text that "
                f"its inspect_source('hip:{name}') returns with NVRTC",
            )
        )
    if name not in amd:
        raise argparse.ArgumentTypeError(expected(f"one of {', '.join(amd)}", repr(text)))
    return Target("hip", name)


def _build(options: argparse.Namespace) -> int:
    generic = options.entry == "generic"
    if generic:
        _check_generic(options)
    for target in options.arch:
        checked(options, check_block_size, target, options.block_size)
    weights, left_out = _weights(options, generic)
    report_left_out("build", left_out)
    request = BuildRequest(
        weights,
        tuple(dict.fromkeys(options.arch)),
        tuple(dict.fromkeys(options.m or ())),
        PlanOptions(options.precision or "f32", options.block_size, None, options.layout),
        generic,
        left_out,
    )
    manifest = build(request, options.out, force=options.force, progress=_with_progress)
    archs = ", ".join(manifest["compilers"])
    kernels = sum(len(product["launches"]) for product in manifest["products"])
    print(f"{options.out}: {counted(kernels, 'kernel')} for {archs}, {MANIFEST}, {HEADER}")
    return LEFT_OUT if left_out else 0


def _check_generic(options: argparse.Namespace) -> None:
    """End the command if an option is given that generic kernels would ignore."""
    at_launch = "its kernels take M, N and K at each launch"
    reasons = {
        "--k": (options.k, at_launch),
        "--n": (options.n, at_launch),
        "--m": (options.m, at_launch),
        "--precision": (options.precision, "its kernels multiply in f32"),
    }
    for name, (value, reason) in reasons.items():
        if value is not None:
            options.parser.error(f"{name} cannot be combined with --entry generic: {reason}")
    if options.layout == PLANAR:
        options.parser.error(expected(f"{GGUF} for --entry generic", PLANAR, where="--layout"))


def _weights(
    options: argparse.Namespace, generic: bool
) -> tuple[dict[WeightSpec, tuple[str, ...]], dict[str, str]]:
    single = {"--k": options.k, "--n": options.n, "--format": options.format}
    given = [name for name, value in single.items() if value is not None]
    if options.gguf is not None:
        if given:
            options.parser.error(f"--gguf cannot be combined with {', '.join(given)}")
        return weights_in(options.gguf)
    needed = ["--format"] if generic else list(single)
    missing = [name for name in needed if name not in given]
    if missing:
        accepted = "--format NAME" if generic else "--k K --n N --format NAME"
        options.parser.error(expected(f"--gguf FILE or {accepted}", f"no {', '.join(missing)}"))
    fmt: Format = options.format
    k, n = (fmt.block_elements, 1) if generic else (options.k, options.n)
    check_shape(options, fmt, k, n)
    return {WeightSpec(fmt.name, k, n): ()}, {}


def _with_progress(launches: Sequence[Any]) -> Iterable[Any]:
    # without a terminal, standard error is for errors and warnings only
    return progress(launches, "compiling") if sys.stderr.isatty() else launches
