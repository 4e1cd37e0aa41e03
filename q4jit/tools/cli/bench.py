"""`q4jit bench`: time q4jit's kernels and other libraries' products in one run."""

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.errors import expected
from q4jit.floats import FloatType
from q4jit.runtime.devices import find_devices
from q4jit.targets import HIP_ARCHS
from q4jit.tools.cli.arguments import (
    block_formats,
    check_output_file,
    check_shape,
    dtype_names,
    open_device,
    output_path,
    positives,
    precision_names,
    shapes_in_words,
    thread_counts,
    weight_shape,
)
from q4jit.tools.cli.parser import epilog
from q4jit.tools.compare import roofline
from q4jit.tools.compare.child import ChildRequest, read_child_request, run_children
from q4jit.tools.compare.cpu import CpuArena
from q4jit.tools.compare.ggml import Ggml, GgmlError
from q4jit.tools.compare.gpu import GpuArena
from q4jit.tools.compare.markdown import markdown
from q4jit.tools.compare.report import (
    Report,
    cpu_runs,
    grouped_cpu_runs,
    new_report,
    read_report,
    run,
    saved,
)
from q4jit.tools.compare.request import CPU, GPU, BenchRequest
from q4jit.tools.compare.speed_targets import SpeedTarget, read_speed_targets
from q4jit.tools.compare.tables import ratio_lines
from q4jit.weights.formats import FORMATS, Format

_PICTURES: Final = (".png", ".svg", ".pdf")
_ON_CPU: Final = "use --target cpu"
_EXAMPLES: Final = """
q4jit bench --quick
q4jit bench --shape 4096x14336 --m 1,8 --json bench.json --plot roofline.png
q4jit bench --m 1,8 --dtype f32,bf16
q4jit bench --target cpu --threads 1,2 --ggml venv/lib/libggml-cpu.so
q4jit bench --from bench.json --markdown
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time q4jit's kernels, other libraries and a read of the same bytes",
        description="Time q4jit's kernels, the products of installed libraries, and a read of the\n"
        "weight's bytes, in turns. Weights come from memory, not from a cache, and every\n"
        "result is checked against float64. For each: the median time in µs, GB/s of\n"
        "weight bytes, the fraction of the read's speed, TFLOP/s, and how many times\n"
        "faster q4jit is.",
        epilog=epilog(
            _EXAMPLES,
            "all results are correct",
            "an error occurred, a result is wrong, or q4jit could not be timed",
        ),
    )
    _add_work(command)
    _add_conditions(command)
    _add_output(command)
    # `child.run_children` starts the command with this option only
    command.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    command.set_defaults(run=_bench)
    return command


def _add_work(command: argparse.ArgumentParser) -> None:
    work = command.add_argument_group("products")
    work.add_argument(
        "--target",
        action="append",
        help="hip:0, cuda:0, an arch such as gfx1100, or cpu; repeatable (default: the first GPU, "
        "or the CPU without one)",
    )
    work.add_argument(
        "--shape",
        type=weight_shape,
        action="append",
        metavar="KxN",
        help="shape of a weight; repeatable (default on a GPU: "
        f"{shapes_in_words(GPU.shapes)}; on the CPU: "
        f"{shapes_in_words(CPU.shapes)})",
    )
    work.add_argument(
        "--m",
        type=positives,
        metavar="M[,M...]",
        help="numbers of rows of x (default on a GPU: 1,8,64,512; on the CPU: 1,4,8,512)",
    )
    work.add_argument(
        "--precision",
        type=precision_names,
        metavar="P[,P...]",
        help="precisions of q4jit's kernels (default on a GPU: f32,f16,i8; on the CPU: f32,i8)",
    )
    work.add_argument(
        "--format",
        type=block_formats,
        metavar="F[,F...]",
        help="block formats of the weights (default: Q4_0)",
    )
    work.add_argument(
        "--dtype",
        type=dtype_names,
        metavar="D[,D...]",
        help="float types of x and of the results: f32, f16, bf16; each is a run of its own "
        "(default: f32)",
    )
    work.add_argument(
        "--fused",
        action="store_true",
        help="also measure the cost of bias and SiLU gating over two bare products",
    )
    work.add_argument("--quick", action="store_true", help="one shape, M = 1 and 8, fewer rounds")


def _add_conditions(command: argparse.ArgumentParser) -> None:
    conditions = command.add_argument_group("CPU only")
    conditions.add_argument(
        "--threads",
        type=thread_counts,
        metavar="T[,T...]",
        help="numbers of threads, for q4jit and all others; several numbers run in a process each "
        "(default: as many as a call uses)",
    )
    conditions.add_argument(
        "--ggml",
        type=Path,
        metavar="PATH",
        help="libggml-cpu.so or its folder, for example lib/ of llama-cpp-python",
    )
    conditions.add_argument(
        "--cached",
        action="store_true",
        help="use one copy of the weight, which stays in the cache if it fits",
    )
    conditions.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help="report which speed targets in FILE, such as docs/targets.json, are met",
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument("--json", type=output_path, metavar="FILE", help="write a report")
    output.add_argument(
        "--plot", type=output_path, metavar="FILE", help="draw a roofline plot (needs matplotlib)"
    )
    output.add_argument(
        "--markdown", action="store_true", help="print Markdown tables, as in docs/performance.md"
    )
    output.add_argument(
        "--from",
        type=Path,
        action="append",
        metavar="FILE",
        dest="reports",
        help="measure nothing; apply --markdown or --plot to a report of --json; repeatable",
    )


def _bench(options: argparse.Namespace) -> int:
    if options.child is not None:
        return _run_child(options)
    _check_output(options)
    targets = () if options.targets is None else read_speed_targets(options.targets)
    if options.reports:
        _refuse_measuring(options)
        reports = [read_report(path) for path in options.reports]
        _check_targets(options, any(map(cpu_runs, reports)))
        _show(options, reports, targets)
        return 0
    requests = _requests(options)
    names = _target_names(options)
    _check_targets(options, "cpu" in names)
    report = new_report(["q4jit", *options.arguments])
    succeeded = True
    with saved(report, options.json):
        for name, request in itertools.product(names, requests):
            succeeded = _measure(name, options, request, report) and succeeded
    for runs in () if options.markdown else grouped_cpu_runs(report):
        print("", *ratio_lines(runs, targets), sep="\n")
    _show(options, [report], targets)
    return 0 if succeeded else 1


# --- options --------------------------------------------------------------------------------------


def _check_output(options: argparse.Namespace) -> None:
    check_output_file(options, "json")
    check_output_file(options, "plot")
    if options.plot is not None:
        if options.plot.suffix not in _PICTURES:
            options.parser.error(
                expected(
                    f"a name that ends in {', '.join(_PICTURES)}", str(options.plot), where="--plot"
                )
            )
        roofline.check()


def _refuse_measuring(options: argparse.Namespace) -> None:
    names = ("target", "shape", "m", "precision", "format", "dtype", "threads", "ggml", "json")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    given += [f"--{name}" for name in ("cached", "fused", "quick") if getattr(options, name)]
    if given:
        options.parser.error(
            f"{', '.join(given)} cannot be combined with --from, which measures nothing"
        )
    if not options.markdown and options.plot is None:
        options.parser.error("--from requires --markdown or --plot")


def _check_targets(options: argparse.Namespace, has_cpu: bool) -> None:
    """End the command if --targets is given and no table would show the speed targets."""
    if options.targets is not None and not (has_cpu and (options.markdown or not options.reports)):
        options.parser.error(
            "--targets requires runs on the CPU and, together with --from, --markdown"
        )


def _requests(options: argparse.Namespace) -> list[BenchRequest]:
    """Return what to measure, one request per format and dtype."""
    formats: tuple[Format, ...] = options.format or (FORMATS["Q4_0"],)
    for fmt, (k, n) in itertools.product(formats, options.shape or ()):
        check_shape(options, fmt, k, n)
    shapes = tuple(options.shape) if options.shape else None
    work = shapes, options.m, options.precision, options.fused, options.quick
    dtypes: tuple[FloatType, ...] = options.dtype or ("f32",)
    pairs = itertools.product(formats, dtypes)
    return [BenchRequest(fmt.name, *work, dtype) for fmt, dtype in pairs]


def _target_names(options: argparse.Namespace) -> list[str]:
    """Return the names of the targets to measure, after checking that each of them exists."""
    if options.ggml is not None:
        _check_ggml(options)
    names: list[str] = options.target or [_first_target()]
    if options.cached and set(names) != {"cpu"}:
        options.parser.error(
            expected("only cpu together with --cached", ", ".join(names), where="--target")
        )
    for name in set(names) - {"cpu"}:
        if name.startswith("cpu"):
            options.parser.error(expected("cpu (this machine's) or a GPU", name, where="--target"))
        open_device(name, _ON_CPU)
    return names


def _check_ggml(options: argparse.Namespace) -> None:
    """End the command before anything is measured if ggml's library cannot be loaded."""
    try:
        Ggml(options.ggml)
    except GgmlError as error:
        options.parser.error(f"--ggml {options.ggml}: {error}")


def _first_target() -> str:
    return "hip" if any(device.arch in HIP_ARCHS for device in find_devices()) else "cpu"


# --- measuring ------------------------------------------------------------------------------------


def _measure(name: str, options: argparse.Namespace, request: BenchRequest, report: Report) -> bool:
    """Measure on a target, and return whether nothing failed."""
    if name != "cpu":
        with contextlib.closing(GpuArena(open_device(name, _ON_CPU))) as gpu:
            return run(report, gpu, request, GPU)
    threads: tuple[int, ...] = options.threads or ()
    if len(threads) < 2:
        return _measure_cpu(
            next(iter(threads), None), options.ggml, options.cached, request, report
        )
    with tempfile.TemporaryDirectory() as folder:
        children = [
            ChildRequest(
                number, request, options.ggml, options.cached, Path(folder) / f"{number}.json"
            )
            for number in threads
        ]
        return run_children(children, report, debug=options.debug)


def _run_child(options: argparse.Namespace) -> int:
    child = read_child_request(options.child)
    report = new_report(["q4jit", *options.arguments])
    with saved(report, child.report):
        succeeded = _measure_cpu(child.threads, child.ggml, child.cached, child.request, report)
    return 0 if succeeded else 1


def _measure_cpu(
    threads: int | None, ggml: Path | None, cached: bool, request: BenchRequest, report: Report
) -> bool:
    if threads is not None:
        os.environ["Q4JIT_NUM_THREADS"] = str(threads)  # the first call reads it
    with contextlib.closing(CpuArena(config.num_threads(), ggml, cached)) as cpu:
        return run(report, cpu, request, CPU)


# --- output ---------------------------------------------------------------------------------------


def _show(
    options: argparse.Namespace, reports: Sequence[Report], targets: Sequence[SpeedTarget]
) -> None:
    if options.markdown:
        print(markdown(reports, targets))
    if options.plot is not None:
        roofline.draw(reports, options.plot)
