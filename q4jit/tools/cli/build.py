"""`q4jit build`: kernels for AMD GPUs as files, with a manifest and a C header."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

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
from q4jit.tools.cli.arguments import add_out, block_format, check_shape, checked, positive
from q4jit.tools.cli.parser import EXAMPLES
from q4jit.tools.text import counted, visible
from q4jit.weights.formats import FORMATS, Format
from q4jit.weights.layouts import GGUF, PLANAR


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "build",
        help="compile kernels for AMD GPUs, with a manifest and a C header",
        description="Compile y = x @ w for weights, GPUs and numbers of rows M. The folder gets\n"
        "each kernel as .hip and .hsaco, manifest.json and q4jit_kernels.h.",
        epilog=EXAMPLES,
    )
    command.add_argument("--gguf", metavar="FILE", help="all weights of this file")
    command.add_argument("--k", type=positive, help="rows of one weight [K, N]")
    command.add_argument("--n", type=positive, help="columns of one weight [K, N]")
    command.add_argument(
        "--format", type=block_format, help=f"its block format: {', '.join(FORMATS).lower()}"
    )
    command.add_argument(
        "--arch",
        type=_target,
        action="append",
        required=True,
        help="a GPU, as gfx1100; may be given again",
    )
    command.add_argument(
        "--m",
        type=positive,
        action="append",
        help="rows of x that must be served; may be given again (default: every M)",
    )
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="upper bound of the error (default: f32)",
    )
    command.add_argument(
        "--block-size", type=positive, help="threads of a block, where a schedule leaves a choice"
    )
    command.add_argument(
        "--layout", choices=(PLANAR, GGUF), help="byte order of the weights (default: planar)"
    )
    command.add_argument(
        "--entry",
        choices=("specialised", "generic"),
        default="specialised",
        help="generic: <format>_matmul_kernel(activations, weights, output, m, n, k) on GGUF's own"
        " blocks, for every shape: takes no --k, --n, --m, --precision",
    )
    add_out(command, "DIR")
    command.set_defaults(run=_build)
    return command


def _target(text: str) -> Target:
    known = [name for name, arch in HIP_ARCHS.items() if not arch.is_nvidia]
    name = text.removeprefix("hip:")
    if name in HIP_ARCHS and name not in known:
        raise argparse.ArgumentTypeError(
            f"{name} is NVIDIA's, and a build holds code objects for AMD GPUs alone, from whose "
            "metadata the manifest is made; for NVIDIA, call a function from Python, or compile "
            f"its inspect_source('hip:{name}') with NVRTC"
        )
    if name not in known:
        raise argparse.ArgumentTypeError(f"unknown arch {text!r}: known are {', '.join(known)}")
    return Target("hip", name)


def _build(options: argparse.Namespace) -> int:
    generic = options.entry == "generic"
    if generic:
        _check_generic(options)
    for target in options.arch:
        checked(options, check_block_size, target, options.block_size)
    weights, left_out = _weights(options, generic)
    for name, reason in left_out.items():
        print(visible(f"q4jit build: left out {name}: {reason}"), file=sys.stderr)
    request = BuildRequest(
        weights,
        tuple(dict.fromkeys(options.arch)),
        tuple(options.m or ()),
        PlanOptions(options.precision or "f32", options.block_size, None, options.layout),
        generic,
        left_out,
    )
    manifest = build(request, options.out, force=options.force, progress=_with_progress)
    archs = ", ".join(manifest["compilers"])
    kernels = sum(len(product["launches"]) for product in manifest["products"])
    print(f"{options.out}: {counted(kernels, 'kernel')} for {archs}, {MANIFEST}, {HEADER}")
    return 0


def _check_generic(options: argparse.Namespace) -> None:
    """Refuse what would change nothing."""
    at_launch = "they take M, N and K with each launch"
    reasons = {
        "--k": (options.k, at_launch),
        "--n": (options.n, at_launch),
        "--m": (options.m, at_launch),
        "--precision": (options.precision, "they multiply in f32"),
    }
    for name, (value, reason) in reasons.items():
        if value is not None:
            options.parser.error(
                f"{name} does not apply to the kernels of --entry generic: {reason}"
            )
    if options.layout == PLANAR:
        options.parser.error(f"--entry generic takes {GGUF}, found --layout {PLANAR}")


def _weights(
    options: argparse.Namespace, generic: bool
) -> tuple[dict[WeightSpec, tuple[str, ...]], dict[str, str]]:
    single = {"--k": options.k, "--n": options.n, "--format": options.format}
    given = [name for name, value in single.items() if value is not None]
    if options.gguf is not None:
        if given:
            options.parser.error(f"found --gguf and {', '.join(given)}: accepted is one of both")
        return weights_in(options.gguf)
    lacking = [name for name in single if name not in given]
    accepted = "--k K --n N --format NAME"
    if generic:
        lacking = [name for name in lacking if name == "--format"]
        accepted = "--format NAME"
    if lacking:
        options.parser.error(
            f"{', '.join(lacking)} missing: accepted are --gguf FILE, or {accepted}"
        )
    fmt: Format = options.format
    k, n = (fmt.block_elements, 1) if generic else (options.k, options.n)
    check_shape(options, fmt, k, n)
    return {WeightSpec(fmt.name, k, n): ()}, {}


def _with_progress(launches: Sequence[Any]) -> Iterable[Any]:
    # elsewhere standard error holds what is wrong, and nothing else
    return progress(launches, "compiling") if sys.stderr.isatty() else launches
