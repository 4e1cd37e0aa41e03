"""`q4jit bench`: q4jit's kernels and every peer that is here, timed in one run."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from q4jit import config
from q4jit.runtime.devices import find_devices
from q4jit.targets import HIP_ARCHS
from q4jit.tools.cli.arguments import (
    block_format,
    check_folder,
    check_shape,
    open_device,
    positives,
    precision_names,
    shapes_in_words,
    thread_counts,
    weight_shape,
)
from q4jit.tools.cli.parser import EXAMPLES
from q4jit.tools.compare import roofline
from q4jit.tools.compare.cpu import CpuArena
from q4jit.tools.compare.ggml import Ggml, GgmlError
from q4jit.tools.compare.gpu import GpuArena
from q4jit.tools.compare.markdown import markdown
from q4jit.tools.compare.part import Part, read_part, run_parts
from q4jit.tools.compare.report import Report, kept, new_report, on_cpu, read_report, run
from q4jit.tools.compare.request import CPU, GPU, BenchRequest
from q4jit.tools.compare.tables import ratio_lines
from q4jit.tools.compare.targets import SpeedTarget, read_targets
from q4jit.weights.formats import FORMATS

_PICTURES: Final = (".png", ".svg", ".pdf")


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the subparsers of the command line."""
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time q4jit's kernels, every peer that is here, and a read of the same bytes",
        description="Run q4jit and other libraries' products in turns on weights that no cache\n"
        "keeps, each checked against float64: µs (medians), GB/s of the weights' bytes,\n"
        "the fraction of a read of as many bytes, TFLOP/s, and how many times faster\n"
        "q4jit is. The exit status is 1 where a result is wrong.",
        epilog=EXAMPLES,
    )
    _add_work(command)
    _add_conditions(command)
    _add_output(command)
    # what `part.run_parts` starts: the request is a file
    command.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    command.set_defaults(run=_bench)
    return command


def _add_work(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--target",
        action="append",
        help="hip:0, cuda:0, an arch as gfx1100, or cpu; may be given again (default: the first "
        "GPU, else the CPU)",
    )
    command.add_argument(
        "--shape",
        type=weight_shape,
        action="append",
        metavar="KxN",
        help="of a weight; may be given again (default, on a GPU: "
        f"{shapes_in_words(GPU.shapes)}; on the CPU: "
        f"{shapes_in_words(CPU.shapes)})",
    )
    command.add_argument(
        "--m", type=positives, help="rows of x (default: 1,8,64,512; on the CPU 1,4,8,512)"
    )
    command.add_argument(
        "--precision",
        type=precision_names,
        help="bounds of q4jit's error (default: f32,f16,i8; on the CPU f32,i8)",
    )
    command.add_argument("--format", type=block_format, help="of the weights (default: Q4_0)")


def _add_conditions(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads",
        type=thread_counts,
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


def _add_output(command: argparse.ArgumentParser) -> None:
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
    command.add_argument(
        "--targets",
        type=Path,
        metavar="FILE",
        help="on the CPU: report which targets in FILE, such as docs/targets.json, are met",
    )


def _bench(options: argparse.Namespace) -> int:
    if options.part is not None:
        return _measure_part(options)
    _check_output(options)
    targets = () if options.targets is None else read_targets(options.targets)
    if options.reports:
        _refuse_measuring(options)
        reports = [read_report(path) for path in options.reports]
        _check_targets(options, any(map(on_cpu, reports)))
        return _show(options, reports, targets)
    request = _request(options)
    names = _target_names(options)
    _check_targets(options, "cpu" in names)
    report = new_report(["q4jit", *options.arguments])
    good = True
    with kept(report, options.json):
        for name in names:
            good = _measure(name, options, request, report) and good
    if not options.markdown and (runs := on_cpu(report)):
        print("", *ratio_lines(runs, targets), sep="\n")
    _show(options, [report], targets)
    return 0 if good else 1


# --- what is asked for ----------------------------------------------------------------------------


def _check_output(options: argparse.Namespace) -> None:
    check_folder(options, "json")
    check_folder(options, "plot")
    if options.plot is not None:
        if options.plot.suffix not in _PICTURES:
            options.parser.error(f"--plot {options.plot}: accepted are {', '.join(_PICTURES)}")
        roofline.check()


def _refuse_measuring(options: argparse.Namespace) -> None:
    names = ("target", "shape", "m", "precision", "format", "threads", "ggml", "json")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    given += [f"--{name}" for name in ("cached", "fused", "quick") if getattr(options, name)]
    if given:
        options.parser.error(f"{', '.join(given)} found with --from, which measures nothing")
    if not options.markdown and options.plot is None:
        options.parser.error("--from without --markdown or --plot: there is nothing to do")


def _check_targets(options: argparse.Namespace, has_cpu: bool) -> None:
    """End the command where its targets would be read and not reported."""
    if options.targets is not None and not (has_cpu and (options.markdown or not options.reports)):
        options.parser.error(
            "--targets: expected runs on the CPU, and --markdown if --from is given, got none"
        )


def _request(options: argparse.Namespace) -> BenchRequest:
    fmt = options.format or FORMATS["Q4_0"]
    for k, n in options.shape or ():
        check_shape(options, fmt, k, n)
    return BenchRequest(
        fmt.name,
        tuple(options.shape) if options.shape else None,
        options.m,
        options.precision,
        options.fused,
        options.quick,
    )


def _target_names(options: argparse.Namespace) -> list[str]:
    """Return the names of the targets to measure, after checking that each of them exists."""
    if options.ggml is not None:
        _check_ggml(options)
    names: list[str] = options.target or [_first_target()]
    if options.cached and set(names) != {"cpu"}:
        options.parser.error(f"--cached found with {', '.join(names)}, accepted with the CPU alone")
    for name in set(names) - {"cpu"}:
        if name.startswith("cpu"):
            options.parser.error(f"--target {name}: of CPUs accepted is cpu, this machine's")
        open_device(name)
    return names


def _check_ggml(options: argparse.Namespace) -> None:
    """End the command before anything is measured if ggml's library cannot be loaded."""
    try:
        Ggml(options.ggml)
    except GgmlError as error:
        options.parser.error(f"--ggml {options.ggml}: {error}")


def _first_target() -> str:
    return "hip" if any(device.arch in HIP_ARCHS for device in find_devices()) else "cpu"


# --- what is measured -----------------------------------------------------------------------------


def _measure(name: str, options: argparse.Namespace, request: BenchRequest, report: Report) -> bool:
    """Measure on a target; whether nothing failed."""
    if name != "cpu":
        with contextlib.closing(GpuArena(open_device(name))) as gpu:
            return run(report, gpu, request, GPU)
    threads: tuple[int, ...] = options.threads or ()
    if len(threads) < 2:
        return _measure_cpu(
            next(iter(threads), None), options.ggml, options.cached, request, report
        )
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            Part(number, request, options.ggml, options.cached, Path(folder) / f"{number}.json")
            for number in threads
        ]
        return run_parts(parts, report, debug=options.debug)


def _measure_part(options: argparse.Namespace) -> int:
    part = read_part(options.part)
    report = new_report(["q4jit", *options.arguments])
    with kept(report, part.report):
        good = _measure_cpu(part.threads, part.ggml, part.cached, part.request, report)
    return 0 if good else 1


def _measure_cpu(
    threads: int | None, ggml: Path | None, cached: bool, request: BenchRequest, report: Report
) -> bool:
    if threads is not None:
        os.environ["Q4JIT_NUM_THREADS"] = str(threads)  # read at the first call
    with contextlib.closing(CpuArena(config.num_threads(), ggml, cached)) as cpu:
        return run(report, cpu, request, CPU)


# --- what is shown --------------------------------------------------------------------------------


def _show(
    options: argparse.Namespace, reports: Sequence[Report], targets: Sequence[SpeedTarget]
) -> int:
    if options.markdown:
        print(markdown(reports, targets))
    if options.plot is not None:
        roofline.draw(reports, options.plot)
    return 0
