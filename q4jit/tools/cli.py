"""The command `q4jit`: kernels and weights as files for programs without Python, tests and times.

A problem is one line on standard error (and a line for each compiler that was looked at, where none
serves) and the exit status 1, or 2 where the command line itself is wrong; `--debug` and
Q4JIT_DEBUG=1 show the traceback too.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from q4jit import config
from q4jit.compilers.cache import write_atomically
from q4jit.errors import CompileError, FormatError, Q4JitError, TargetError
from q4jit.frontend.specs import WeightSpec
from q4jit.hip import search, tunings
from q4jit.hip.harness import Bench
from q4jit.hip.limits import check_block_size
from q4jit.plan.options import Tuning
from q4jit.precision import PRECISIONS
from q4jit.progress import progress
from q4jit.runtime.devices import find_device, find_devices
from q4jit.runtime.driver import Device
from q4jit.targets import HIP_ARCHS, Target
from q4jit.tools import aot, ratios, roofline
from q4jit.tools import bench as benchmark
from q4jit.tools.ggml import Ggml, GgmlError
from q4jit.tools.peers import Arena, CpuArena, GpuArena
from q4jit.tools.selftest import add_selftest
from q4jit.weights.formats import FORMATS, Format, find_format
from q4jit.weights.layouts import GGUF, PLANAR

_EXAMPLES: Final = """\
examples:
  q4jit build --k 4096 --n 11008 --format q4_0 --arch gfx1100 --out kernels
  q4jit build --gguf model.gguf --arch gfx1100 --arch gfx942 --m 1 --m 512 --out kernels
  q4jit build --entry generic --format q4_0 --arch gfx1100 --out kernels
  q4jit pack --gguf model.gguf --tensor blk.0.ffn_up.weight --layout planar --out up.bin
  q4jit tune --shape 4096x14336 --format q4_0 --m 1 --m 512
  q4jit bench --shape 4096x14336 --m 1,8 --json bench.json --plot roofline.png
  q4jit bench --target cpu --threads 1,2 --ggml venv/lib/libggml-cpu.so
  q4jit selftest --device hip:0 --out report
"""
_TUNED_SHAPES: Final = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))
_TUNED_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 512, 2048)  # one of each class of M
_PICTURES: Final = (".png", ".svg", ".pdf")
_INTERRUPTED: Final = 130  # as a shell reports SIGINT
_END_S: Final = 10  # that a process may take to write its report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (None: the process's own) and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    debug = options.debug
    try:
        debug = debug or config.debug()
        return int(options.run(options))
    except (Q4JitError, OSError) as error:
        if debug:
            traceback.print_exc()
        told = "\n".join(map(_visible, _lines(error)))
        print(f"q4jit {options.command}: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"q4jit {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _lines(error: Exception) -> list[str]:
    if isinstance(error, TargetError):  # a list of what was looked at, by q4jit alone
        return str(error).splitlines()
    return [_one_line(error)]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, CompileError):
        log = error.log.splitlines() or [""]
        named = next((line for line in log if "error" in line.lower()), log[-1])
        again = (
            f"; to run it again: sh {shlex.quote(f'{error.repro}/repro.sh')}" if error.repro else ""
        )
        return f"{error.compiler} failed: {named.strip()} (--debug shows all{again})"
    return " ".join(str(error).split())


def _visible(text: str) -> str:
    """`text` without what steers a terminal: names come from files that others made."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- the command line ---------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        shape = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=shape, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="q4jit",
        description="Kernels for products with GGUF weights: built ahead of time, or tested here.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"q4jit {aot.version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_build, _add_pack, _add_tune, _add_bench, add_selftest):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(parser=command)
    return parser


def _add_build(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "build",
        help="compile kernels for AMD GPUs, with a manifest and a C header",
        description="Compile y = x @ w for weights, GPUs and numbers of rows M. The folder gets\n"
        "each kernel as .hip and .hsaco, manifest.json and q4jit_kernels.h.",
        epilog=_EXAMPLES,
    )
    command.add_argument("--gguf", metavar="FILE", help="all weights of this file")
    command.add_argument("--k", type=_positive, help="rows of one weight [K, N]")
    command.add_argument("--n", type=_positive, help="columns of one weight [K, N]")
    command.add_argument(
        "--format", type=_format, help=f"its block format: {', '.join(FORMATS).lower()}"
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
        type=_positive,
        action="append",
        help="rows of x that must be served; may be given again (default: every M)",
    )
    command.add_argument(
        "--precision",
        choices=("f32", "f16", "i8"),
        help="upper bound of the error (default: f32)",
    )
    command.add_argument(
        "--block-size", type=_positive, help="threads of a block, where a schedule leaves a choice"
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
    _add_out(command, "DIR")
    command.set_defaults(run=_build)
    return command


def _add_pack(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "pack",
        help="write a tensor of a GGUF file in the byte order of a layout",
        description="Write a matrix of a GGUF file in a layout, and what it is to FILE.json.",
        epilog=_EXAMPLES,
    )
    command.add_argument("--gguf", metavar="FILE", required=True)
    command.add_argument("--tensor", metavar="NAME", required=True)
    command.add_argument("--layout", choices=aot.LAYOUTS, default=PLANAR)
    _add_out(command, "FILE")
    command.set_defaults(run=_pack)
    return command


def _add_tune(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="search for the fastest kernels on this machine's GPU, or exchange what was found",
        description="Compile, check and time the candidates for products [M, K] @ [K, N]. What\n"
        "was tried is kept beside the compiled kernels; calls use the fastest from then\n"
        "on, and a second search measures only what is new.",
        epilog=_EXAMPLES,
    )
    command.add_argument(
        "--device", help="hip:0, cuda:0 or an arch as gfx1100 (default: the first)"
    )
    command.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="KxN",
        help=f"of a weight; may be given again (default: {', '.join(_told(_TUNED_SHAPES))})",
    )
    command.add_argument(
        "--format", type=_format, help="block format of the weights (default: Q4_0)"
    )
    command.add_argument("--gguf", metavar="FILE", help="instead: all weights of this file")
    command.add_argument(
        "--m",
        type=_positives,
        action="extend",
        help=f"rows of x, of which those of a class share kernels; may be given again (default: "
        f"{','.join(map(str, _TUNED_ROWS))})",
    )
    command.add_argument(
        "--precision",
        choices=("f32", "f16", "i8"),
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


def _add_bench(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time q4jit's kernels, every peer that is here, and a read of the same bytes",
        description="Run q4jit and other libraries' products in turns on weights that no cache\n"
        "keeps, each checked against float64: µs (medians), GB/s of the weights' bytes,\n"
        "the fraction of a read of as many bytes, TFLOP/s, and how many times faster\n"
        "q4jit is. The exit status is 1 where a result is wrong.",
        epilog=_EXAMPLES,
    )
    command.add_argument(
        "--target",
        action="append",
        help="hip:0, cuda:0, an arch as gfx1100, or cpu; may be given again (default: the first "
        "GPU, else the CPU)",
    )
    command.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="KxN",
        help="of a weight; may be given again (default, on a GPU: "
        f"{', '.join(_told(benchmark.GPU.shapes))}; on the CPU: "
        f"{', '.join(_told(benchmark.CPU.shapes))})",
    )
    command.add_argument(
        "--m", type=_positives, help="rows of x (default: 1,8,64,512; on the CPU 1,4,8,512)"
    )
    command.add_argument(
        "--precision",
        type=_precisions,
        help="bounds of q4jit's error (default: f32,f16,i8; on the CPU f32,i8)",
    )
    command.add_argument("--format", type=_format, help="of the weights (default: Q4_0)")
    command.add_argument(
        "--threads",
        type=_threads,
        help="of the CPU, for everyone: a number, or several with a comma between them, each in a "
        "process of its own (default: as for a call)",
    )
    command.add_argument(
        "--ggml",
        type=Path,
        metavar="PATH",
        help="the folder of libggml-cpu.so, as llama-cpp-python has one",
    )
    command.add_argument(
        "--cached",
        action="store_true",
        help="on the CPU: one copy of the weight, which stays in the cache where it fits",
    )
    command.add_argument(
        "--fused",
        action="store_true",
        help="also what bias and SiLU gating cost over the bare products",
    )
    command.add_argument("--quick", action="store_true", help="one weight, M = 1 and 8, few rounds")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    command.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a roofline picture (needs matplotlib)"
    )
    command.add_argument(
        "--markdown", action="store_true", help="print the tables as docs/performance.md has them"
    )
    command.add_argument(
        "--from",
        type=Path,
        action="append",
        metavar="FILE",
        dest="reports",
        help="measure nothing: --markdown or --plot of a file of --json; may be given again",
    )
    command.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # no tables
    command.set_defaults(run=_bench)
    return command


def _positives(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(_positive, text.split(","))))


def _threads(text: str) -> tuple[int, ...]:
    numbers = _positives(text)
    if max(numbers) > config.MOST_THREADS:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are 1 to {config.MOST_THREADS} threads"
        )
    return numbers


def _precisions(text: str) -> tuple[str, ...]:
    given = tuple(dict.fromkeys(text.split(",")))
    if not set(given) <= set(PRECISIONS):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are {', '.join(PRECISIONS)}, with a comma between them"
        )
    return given


def _told(shapes: Iterable[tuple[int, int]]) -> list[str]:
    return [f"{k}x{n}" for k, n in shapes]


def _shape(text: str) -> tuple[int, int]:
    k, _, n = text.lower().partition("x")
    try:
        return _positive(k), _positive(n)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"found {text!r}, accepted are K and N as 4096x14336"
        ) from None


def _add_out(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--out", type=Path, metavar=what, required=True)
    command.add_argument(
        "--force", action="store_true", help="replace files that q4jit did not write"
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 1 << 63:
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted are whole numbers from 1")
    return int(text)


def _format(text: str) -> Format:
    try:
        return find_format(text.upper())
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


# --- build --------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    generic = options.entry == "generic"
    if generic:
        _check_generic(options)
    for target in options.arch:
        _checked(options, check_block_size, target, options.block_size)
    weights, left_out = _weights(options, generic)
    for name, reason in left_out.items():
        print(_visible(f"q4jit build: left out {name}: {reason}"), file=sys.stderr)
    request = aot.Request(
        weights,
        tuple(dict.fromkeys(options.arch)),
        tuple(options.m or ()),
        Tuning(options.precision or "f32", options.block_size, None, options.layout),
        generic,
        left_out,
    )
    manifest = aot.build(request, options.out, force=options.force, progress=_with_progress)
    archs = ", ".join(manifest["compilers"])
    kernels = sum(len(product["launches"]) for product in manifest["products"])
    counted = aot.counted(kernels, "kernel")
    print(f"{options.out}: {counted} for {archs}, {aot.MANIFEST}, {aot.HEADER}")
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
        return aot.weights_in(options.gguf)
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
    _checked(options, aot.check_shape, fmt, k, n)
    return {WeightSpec(fmt.name, k, n): ()}, {}


def _checked(options: argparse.Namespace, check: Any, *arguments: Any) -> None:
    """A number that does not fit is a wrong command line."""
    try:
        check(*arguments)
    except (FormatError, TargetError) as error:
        options.parser.error(str(error))


def _with_progress(launches: Sequence[Any]) -> Iterable[Any]:
    # elsewhere standard error holds what is wrong, and nothing else
    return progress(launches, "compiling") if sys.stderr.isatty() else launches


# --- pack ---------------------------------------------------------------------------------------


def _pack(options: argparse.Namespace) -> int:
    found = aot.pack_tensor(
        options.gguf, options.tensor, options.layout, options.out, force=options.force
    )
    shape, weight = f"[{found['K']}, {found['N']}]", found["weight"]
    tensor = _visible(options.tensor)
    print(
        f"{options.out}: {tensor}, {found['format']} {shape}, layout {weight['layout']}, "
        f"{weight['size_bytes']} bytes"
    )
    return 0


# --- tune ---------------------------------------------------------------------------------------


def _tune(options: argparse.Namespace) -> int:
    _check_folder(options, "export")
    exchange = options.export is not None or options.merge is not None
    if exchange:
        _refuse_search(options)
        return _exchange(options)
    if options.winners:
        options.parser.error("--winners does not apply without --export")
    weights = _tuned_weights(options)
    name = options.device or "hip"
    device = _device(name)
    with Bench(device) as bench:
        keys = {
            search.key_for(bench.target, spec.k, spec.n, (spec.format,), m, precision)
            for spec in weights
            for m in options.m or _TUNED_ROWS
            for precision in options.precision or ("f32",)
        }
        print(f"{device}, {bench.fingerprint}: {aot.counted(len(keys), 'product')}")
        found = search.search(bench, keys)
    print(search.table(found))
    print(f"kept in {tunings.path() or 'no file: there is no cache directory'}")
    return 0 if all(tunings.best(trials) for trials in found.values()) else 1


def _tuned_weights(options: argparse.Namespace) -> list[WeightSpec]:
    if options.gguf is not None:
        if options.shape or options.format:
            options.parser.error("found --gguf and --shape or --format: accepted is one of both")
        weights, left_out = aot.weights_in(options.gguf)
        for name, reason in left_out.items():
            print(_visible(f"q4jit tune: left out {name}: {reason}"), file=sys.stderr)
        return [WeightSpec(spec.format, spec.k, spec.n) for spec in weights]
    fmt: Format = options.format or FORMATS["Q4_0"]
    shapes = options.shape or _TUNED_SHAPES
    for k, n in shapes:
        _checked(options, aot.check_shape, fmt, k, n)
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
        print(f"{tunings.path()}: {_counted(more)} of {options.merge} added")
    if options.export is not None:
        known = tunings.stored()
        if options.winners:
            best = {place: tunings.best(trials) for place, trials in known.items()}
            known = {place: (trial,) for place, trial in best.items() if trial is not None}
        write_atomically(options.export, tunings.to_text(known).encode())
        print(f"{options.export}: {_counted(known)}")
    return 0


def _check_folder(options: argparse.Namespace, name: str) -> None:
    """What is measured for minutes shall find the place where it goes."""
    path: Path | None = getattr(options, name)
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        options.parser.error(f"--{name} {path}: accepted is a file in a folder that can be written")


def _counted(found: tunings.Tunings) -> str:
    trials = sum(map(len, found.values()))
    return f"{aot.counted(len(found), 'product')}, {aot.counted(trials, 'trial')}"


# --- bench --------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    _check_folder(options, "json")
    _check_folder(options, "plot")
    if options.plot is not None:
        if options.plot.suffix not in _PICTURES:
            options.parser.error(f"--plot {options.plot}: accepted are {', '.join(_PICTURES)}")
        roofline.check()
    if options.reports:
        _refuse_measuring(options)
        return _show(options, [benchmark.read_report(path) for path in options.reports])
    request = benchmark.Request(
        options.format.name if options.format else "Q4_0",
        tuple(options.shape) if options.shape else None,
        options.m,
        options.precision,
        options.fused,
        options.quick,
    )
    for k, n in request.shapes or ():
        _checked(options, aot.check_shape, options.format or FORMATS["Q4_0"], k, n)
    if options.ggml is not None:
        _check_ggml(options)
    names = options.target or [_first_target()]
    if options.cached and set(names) != {"cpu"}:
        options.parser.error(f"--cached found with {', '.join(names)}, accepted with the CPU alone")
    for name in set(names) - {"cpu"}:
        if name.startswith("cpu"):
            options.parser.error(f"--target {name}: of CPUs accepted is cpu, this machine's")
        _device(name)  # before anything is measured
    report = benchmark.new_report(["q4jit", *options.arguments])
    good = True
    try:
        for name in names:
            if name == "cpu" and len(options.threads or ()) > 1:
                good = _bench_in_parts(options, report) and good
            else:
                good = _bench_on(name, options, request, report) and good
    except BaseException as error:  # Ctrl-C, above all: what is known by then is written
        report["ended_by"] = type(error).__name__
        raise
    finally:
        if options.json is not None and report["runs"]:
            write_atomically(options.json, benchmark.to_json(report).encode())
    if runs := benchmark.on_cpu(report):
        _show_ratios(options, runs)
    _show(options, [report])
    return 0 if good else 1


def _check_ggml(options: argparse.Namespace) -> None:
    """End the command where the library that it names is none: before all is measured without."""
    try:
        Ggml(options.ggml)
    except GgmlError as error:
        options.parser.error(f"--ggml {options.ggml}: {error}")


def _show_ratios(options: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    if not options.part and not options.markdown:
        print("", *ratios.text(runs), sep="\n")


def _bench_in_parts(options: argparse.Namespace, report: benchmark.Report) -> bool:
    """Each number of threads in a process of its own, as one decides on its pool once."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            path = Path(folder) / f"{threads}.json"
            try:
                status = _wait_for([sys.executable, "-m", "q4jit", *_part(options, threads, path)])
            finally:  # what a part has found before it was ended is kept
                if path.is_file():
                    report["runs"] += benchmark.read_report(path)["runs"]
            if status < 0:
                raise ChildProcessError(
                    f"the part with {threads} threads: ended by signal {-status}"
                )
            good = good and status == 0
    return good


def _part(options: argparse.Namespace, threads: int, path: Path) -> list[str]:
    """The command line for a number of threads."""
    words = ["bench", "--part", "--target", "cpu", "--threads", str(threads), "--json", str(path)]
    for shape in _told(options.shape or ()):
        words += ["--shape", shape]
    if options.m:
        words += ["--m", ",".join(map(str, options.m))]
    if options.precision:
        words += ["--precision", ",".join(options.precision)]
    if options.format:
        words += ["--format", options.format.name]
    if options.ggml:
        words += ["--ggml", str(options.ggml)]
    flags = ("cached", "fused", "quick", "debug")
    return words + [f"--{name}" for name in flags if getattr(options, name)]


def _wait_for(words: Sequence[str]) -> int:
    """The exit status of a command, which ends with this one."""
    process = subprocess.Popen(words)
    try:
        return process.wait()
    except BaseException:  # Ctrl-C reaches it too: it writes what it knows
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _bench_on(
    name: str, options: argparse.Namespace, request: benchmark.Request, report: benchmark.Report
) -> bool:
    on_cpu = name == "cpu"
    if not on_cpu:
        device = _device(name)
    elif options.threads is not None:
        os.environ["Q4JIT_NUM_THREADS"] = str(options.threads[0])  # read at the first call
    arena: Arena
    if on_cpu:
        arena = CpuArena(config.num_threads(), options.ggml, options.cached)
    else:
        arena = GpuArena(device)
    with contextlib.closing(arena):
        default = benchmark.CPU if on_cpu else benchmark.GPU
        return benchmark.run(report, arena, request, default)


def _device(name: str) -> Device:
    return find_device(f"hip:{name}" if name in HIP_ARCHS else name)


def _first_target() -> str:
    return "hip" if any(device.arch in HIP_ARCHS for device in find_devices()) else "cpu"


def _show(options: argparse.Namespace, reports: Sequence[benchmark.Report]) -> int:
    if options.markdown:
        print(benchmark.markdown(reports))
    if options.plot is not None:
        roofline.draw(reports, options.plot)
    return 0


def _refuse_measuring(options: argparse.Namespace) -> None:
    names = ("target", "shape", "m", "precision", "format", "threads", "ggml", "json")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    given += [f"--{name}" for name in ("cached", "fused", "quick") if getattr(options, name)]
    if given:
        options.parser.error(f"{', '.join(given)} found with --from, which measures nothing")
    if not options.markdown and options.plot is None:
        options.parser.error("--from without --markdown or --plot: there is nothing to do")
