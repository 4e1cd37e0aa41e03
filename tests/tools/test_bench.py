"""`q4jit bench` without a GPU: turns, rows, tables, what is wrong, and the CPU for real."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q4jit.backends import find_backend
from q4jit.errors import DeviceError, FormatError, TargetError
from q4jit.hip.render import render_read
from q4jit.precision import BOUNDS
from q4jit.targets import Target, find_target
from q4jit.tools import bench as benchmark
from q4jit.tools import cli, limits, peers, ratios, roofline
from q4jit.tools.bench import Request, contest, measure, table_lines
from q4jit.tools.cli import main
from q4jit.tools.ggml import Ggml
from q4jit.tools.peers import LIMITS, PEAKS, READ, AbsentError, Entrant, GpuArena, Running, Work
from q4jit.weights.reference import random_weight
from tests.runtime.test_devices import PRELUDE
from tests.support import child, fake_gpu
from tests.support.hip_host import compile_host
from tests.support.paths import ROOT
from tests.support.tools import lack, require_tool

K, N = 64, 37
Fault = Callable[[str, list[np.ndarray[Any, Any]]], None]


class FakeArena:
    """Entrants that NumPy stands for, and times by name; `fault` may spoil what came out."""

    target = "hip:fake"

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault, self.turns, self.poisoned = fault, list[str](), list[str]()
        self.about = {"device": "Fake", "driver": "-", "compiler": "fake 1.0 -O3"}
        self.absent = {"torch int4": "not today"}
        self.begun: list[tuple[Any, str]] = []
        self.times = {READ: 2.0, "q4jit f32": 4.0, "q4jit f16": 2.5, "peer": 8.0}
        self.peak_names: tuple[str, ...] = ()

    def begin(self, work: Work, precision: str) -> None:
        self.begun.append((work.function, precision))

    def entrant(self, name: str, precision: str, *, own: bool = False) -> Entrant:
        return Entrant(name, precision, lambda work: self._open(name, work), own)

    def own(self, precision: str) -> Entrant:
        return self.entrant(f"q4jit {precision}", precision, own=True)

    def read(self) -> Entrant:
        return self.entrant(READ, "f32")

    def peaks(self) -> list[Entrant]:
        return [self.entrant(PEAKS[p], p) for p in self.peak_names]

    def peers(self) -> list[Entrant]:
        return [self.entrant("peer", "i8")]

    def rotated_bytes(self) -> int:
        return 4000

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _open(self, name: str, work: Work) -> Iterator[Running]:
        results: list[np.ndarray[Any, Any]] = []

        def poison() -> None:
            self.poisoned.append(name)
            results[:] = [np.full((len(work.x), N), np.nan)]

        def us() -> float:
            self.turns.append(name)
            values = [w.dequantize().astype(np.float64) for w in work.weights]
            made = work.function(work.x, *values, *work.others)
            results[:] = made if isinstance(made, tuple) else [made]
            if self.fault is not None:
                self.fault(name, results)
            return self.times[name] * (1.5 if work.function is benchmark.gated else 1)

        yield Running(us, poison, lambda: 0.0 if name in LIMITS else work.error(results), "how")


def rows_of(arena: FakeArena, **options: Any) -> list[benchmark.Row]:
    request = Request(shapes=((K, N),), rows=(3,), precisions=("f32", "f16"), **options)
    return [row for group in measure(arena, request, benchmark.GPU) for row in group]


# --- turns, and what is wrong -----------------------------------------------------------------


def test_everyone_is_checked_first_and_then_runs_in_turns() -> None:
    arena = FakeArena()
    rows = rows_of(arena, quick=True)
    names = [READ, "q4jit f32", "q4jit f16", "peer"]
    assert [row.name for row in rows] == arena.poisoned == names
    assert arena.turns == names * 4  # the check, and three rounds
    assert all(len(row.rounds_us) == 3 and not row.failed for row in rows)
    assert [f.__name__ for f, _ in arena.begun] == ["product"] * 2


def test_a_row_holds_what_follows_from_the_times() -> None:
    read, exact, half, peer = rows_of(FakeArena())
    bytes_ = random_weight("Q4_0", K, N).nbytes
    assert (exact.us, exact.of_read, exact.weight_bytes) == (4.0, 0.5, bytes_)
    assert exact.gb_per_s == pytest.approx(bytes_ / 4e-6 * 1e-9)
    assert exact.tflops == pytest.approx(2 * 3 * K * N / 4e-6 * 1e-12)
    assert exact.ratios == {"q4jit f16": 2.5 / 4, "peer": 2.0}
    assert peer.ratios == {"q4jit f32": 0.5, "q4jit f16": 2.5 / 8}
    assert (read.tflops, read.ratios, read.of_read) == (None, {}, 1.0)
    assert half.bound == BOUNDS["f16"]
    assert exact.error is not None
    assert exact.error < BOUNDS["f32"]


def at(wanted: str, change: Callable[[Any], None]) -> Fault:
    def fault(name: str, results: list[np.ndarray[Any, Any]]) -> None:
        if name == wanted:
            change(results[0])

    return fault


def one_wrong(y: Any) -> None:
    y[-1, -1] += 1


def one_missing(y: Any) -> None:
    y[-1, -1] = np.nan


@pytest.mark.parametrize("change", [one_wrong, one_missing])
@pytest.mark.parametrize("name", ["q4jit f32", "peer"])
def test_what_is_wrong_has_no_time(name: str, change: Any) -> None:
    rows = {row.name: row for row in rows_of(FakeArena(at(name, change)))}
    wrong = rows.pop(name)
    assert wrong.wrong
    assert wrong.failed
    assert (wrong.us, wrong.gb_per_s, wrong.of_read, wrong.tflops) == (None,) * 4
    assert wrong.message.startswith("wrong: ")
    for row in rows.values():
        assert row.us is not None
        assert name not in row.ratios


def test_what_turns_wrong_later_loses_its_times() -> None:
    arena = FakeArena()
    arena.fault = lambda name, ys: one_wrong(ys[0]) if arena.turns.count(name) > 5 else None
    rows = rows_of(arena)
    assert [row.wrong for row in rows] == [False, True, True, True]
    assert all(row.us is None for row in rows[1:])


@pytest.mark.parametrize(
    ("error", "told", "failed"),
    [
        (DeviceError("lost\nfor good"), "DeviceError: lost for good", True),
        (RuntimeError("out of memory"), "RuntimeError: out of memory", True),
        (AbsentError("takes Q4_0"), "not present: takes Q4_0", True),
    ],
)
def test_an_error_is_told_and_the_others_run(error: Exception, told: str, failed: bool) -> None:
    def fault(name: str, _: Any) -> None:
        if name == "q4jit f32":
            raise error

    rows = {row.name: row for row in rows_of(FakeArena(fault))}
    assert rows["q4jit f32"].message == told
    assert rows["q4jit f32"].failed is failed
    assert not rows["peer"].failed
    assert rows["peer"].us == 8.0


def test_an_error_that_nobody_expects_is_raised() -> None:
    def fault(name: str, _: Any) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError):
        rows_of(FakeArena(fault))


def test_a_peer_without_a_time_is_no_failure_of_ours() -> None:
    (outcome,) = contest(
        [(Entrant("peer", "i8", _refusing), benchmark._Shape("Q4_0", K, N, (1,), 0).product(1), 1)],
        1,
    )
    assert outcome.message == "not present: no such product"
    assert not outcome.wrong


def _refusing(work: Work) -> Any:
    raise AbsentError("no such product")


def test_gating_is_held_against_the_bare_products() -> None:
    arena = FakeArena()
    rows = [row for row in rows_of(arena, fused=True) if row.kind != "product"]
    assert [(row.kind, row.name) for row in rows] == [
        (kind, f"q4jit {p}") for kind in ("bare", "gated") for p in ("f32", "f16")
    ]
    assert [row.cost for row in rows] == [None, None, 0.5, 0.5]
    assert not any(row.failed for row in rows)
    assert {f.__name__ for f, _ in arena.begun} == {"product", "bare", "gated"}


@pytest.mark.parametrize("function", ["bare", "gated"])
def test_wrong_gating_is_found(function: str) -> None:
    shape = benchmark._Shape("Q4_0", K, N, (3,), 0)
    work = getattr(shape, function)(3)
    values = [w.dequantize().astype(np.float64) for w in work.weights]
    made = work.function(work.x.astype(np.float64), *values, *work.others)
    results = [np.array(y) for y in (made if isinstance(made, tuple) else (made,))]
    error = work.error(results)
    assert error is not None
    assert error < 1e-12
    results[-1][0, 0] += 1
    error = work.error(results)
    assert error is not None
    assert error > 1e-3
    results[-1][0, 0] = np.inf
    assert work.error(results) is None


def test_copies_have_memory_of_their_own() -> None:
    shape = benchmark._Shape("Q4_0", K, N, (1,), 5000)
    copies = shape.product(1).copies
    assert sum(w.nbytes for (w,) in copies) > 5000
    assert len({w.raw.ctypes.data for (w,) in copies}) == len(copies)
    assert len(benchmark._Shape("Q4_0", K, N, (1,), 1).product(1).copies) == 2
    assert len(benchmark._Shape("Q4_0", K, N, (1,), 0).product(1).copies) == 1  # it stays in cache


# --- what is shown ------------------------------------------------------------------------------


def test_the_table_is_aligned_and_says_how_many_times_faster() -> None:
    lines = list(table_lines(rows_of(FakeArena(at("q4jit f16", one_wrong))), heading=True))
    head, place, read, exact, half, peer = lines
    assert place == f"Q4_0 [{K}, {N}], M = 3"
    assert head.split() == "µs GB/s of read TFLOP/s error × f32 × f16".split()
    assert read.split() == ["read", "2.00", "1", "100%", "-", "-"]
    assert exact.split()[:4] == ["q4jit", "f32", "(how)", "4.00"]
    assert "wrong: error" in half
    assert peer.split()[-2:] == ["2.00", "-"]  # f16 has no time to compare with
    assert len(head) == len(peer)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    found = benchmark.new_report(["q4jit", "bench"])
    request = Request(shapes=((K, N), (K, 2 * N)), rows=(1, 8), precisions=("f32", "f16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_QUICK_ROUNDS", 1)
        arena = FakeArena()
        assert benchmark.run(found, arena, dataclasses.replace(request, fused=True), benchmark.GPU)
    path = tmp_path / "report.json"
    path.write_text(benchmark.to_json(found), encoding="utf-8")
    return path


def test_a_report_becomes_markdown(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["bench", "--from", str(report), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "Fake (`hip:fake`), Q4_0\n" in out
    assert "compiler fake 1.0\n" in out
    assert "- torch int4: not present: not today\n" in out
    lines = [line for line in out.splitlines() if line.startswith(f"| {K}, {N} | 8 ")]
    product, *fused = lines
    assert re.fullmatch(
        r"\| 64, 37 \| 8 \| 2 \| 4 \(50%; \d.\de.\d\d\) \| 2.5 \(80%; \d.\de.\d\d\) "
        r"\| 8 \(2.00, 3.20\) \|",
        product,
    )
    assert [line.split(" | ")[4] for line in fused] == ["+50.0%"] * 2
    tables = [line for line in out.splitlines() if line.startswith("|")]
    heads = {line.count("|") for line in tables}
    assert heads == {7}


@pytest.mark.parametrize("text", ["{", "[]", '{"bench_version": 2}', "\xff"])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"x\.json"):
        benchmark.read_report(path)


def test_a_picture_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert main(["bench", "--from", str(report), "--plot", "a.png"]) == 1
    assert "pip install 'q4jit[plot]'" in capsys.readouterr().err
    with pytest.raises(TargetError):
        roofline.check()


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(report: Path, tmp_path: Path, suffix: str) -> None:
    try:
        roofline.check()
    except TargetError as error:
        lack(str(error))
    path = tmp_path / f"roof{suffix}"
    assert main(["bench", "--from", str(report), "--plot", str(path)]) == 0
    data = path.read_bytes()
    assert len(data) > 5000
    if suffix == ".svg":
        labels = {"f32, M = 1", "f32, M = 8", "f16, M = 1", "f16, M = 8", "Fake: read at 1 GB/s"}
        assert labels <= set(re.findall(r"<!-- (.*?) -->", data.decode()))


def test_a_roof_and_the_places_under_it() -> None:
    row = {"weight_bytes": 1000, "m": 10, "k": 64, "n": 32, "us": 1.0, "name": READ}
    assert roofline.intensity(row) == 2 * 10 * 64 * 32 / (1000 + 4 * 10 * 96)
    rows = [{**row, "gb_per_s": 2.0}, {**row, "gb_per_s": 3.0}, {**row, "us": None}]
    assert roofline.roof(rows) == 3e9
    assert roofline.roof(rows[2:]) is None


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shape", "63x5"], "63"),
        (["--precision", "f64"], "accepted are f32, f16, i8"),
        (["--m", "1,,2"], "whole numbers from 1"),
        (["--threads", "1025"], "accepted are 1 to 1024 threads"),
        (["--threads", "1,0"], "whole numbers from 1"),
        (["--cached", "--target", "cpu", "--target", "hip:0"], "accepted with the CPU alone"),
        (["--json", "no/a.json"], "--json no/a.json: accepted is a file in a folder"),
        (["--json", "."], "--json .: accepted is a file in a folder"),
        (["--plot", "no/a.png"], "--plot no/a.png: accepted is a file in a folder"),
        (["--plot", "a.txt"], "accepted are .png, .svg, .pdf"),
        (["--from", "x", "--shape", "64x5", "--fused"], "--shape, --fused found with --from"),
        (["--from", "x", "--cached"], "--cached found with --from"),
        (["--from", "x"], "nothing to do"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(roofline, "check", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["bench", *options])
    out, err = capsys.readouterr()
    assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err


def test_the_exit_status_and_the_report_tell_of_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena = FakeArena(at("q4jit f32", one_wrong))
    monkeypatch.setattr(cli, "CpuArena", lambda *given: arena)
    path = tmp_path / "b.json"
    options = ["bench", "--target", "cpu", "--shape", f"{K}x{N}", "--m", "1", "--json", str(path)]
    assert main([*options, "--precision", "f32"]) == 1
    found = json.loads(path.read_text("utf-8"))
    assert found["command"] == ["q4jit", *options, "--precision", "f32"]
    assert [row["wrong"] for row in found["runs"][0]["rows"]] == [False, True, False]
    arena.fault = None
    assert main([*options, "--precision", "f32"]) == 0


def test_what_was_measured_before_an_interrupt_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arena = FakeArena()

    def fault(name: str, _: Any) -> None:
        if len(arena.turns) > 40:
            raise KeyboardInterrupt

    arena.fault = fault
    monkeypatch.setattr(cli, "CpuArena", lambda *given: arena)
    path = tmp_path / "b.json"
    options = ["--shape", f"{K}x{N}", "--m", "1,2,3", "--precision", "f32", "--json", str(path)]
    assert main(["bench", "--target", "cpu", *options]) == 130
    found = json.loads(path.read_text("utf-8"))
    assert found["ended_by"] == "KeyboardInterrupt"
    assert [row["m"] for row in found["runs"][0]["rows"]] == [1] * 3


# --- reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", "gfx942"])
def test_a_read_reads_all(arch: str) -> None:
    target = Target("hip", arch)
    source = render_read(target, 128, 2, "host")
    program = compile_host(source.text, source.symbol)
    for units, blocks in ((1, 1), (1000, 3), (257, 5)):
        data = np.random.default_rng(units).integers(0, 1 << 32, 4 * units, np.uint32)
        found = np.zeros(blocks * 128 // target.hip.wave, np.uint32)
        (words,) = program.run((blocks,), 128, [data, found, units, blocks])
        assert np.bitwise_xor.reduce(words) == np.bitwise_xor.reduce(data)


def test_a_read_loads_16_bytes_at_a_time_and_all_before_it_waits() -> None:
    target = Target("hip", "sm_90")
    compiler = find_backend(target).compiler(target)
    text = compiler.compile_assembly(render_read(target, 256, 8).text, target)
    loads = [i for i, line in enumerate(text.splitlines()) if "ld.global.nc" in line]
    assert len(loads) == 8
    assert all("v4" in text.splitlines()[i] for i in loads)


@pytest.mark.parametrize("way", limits.READ_WAYS)
def test_the_cpus_read_reads_all(way: tuple[int, int]) -> None:
    load = limits.reader(find_target("cpu"), *way)
    data = np.random.default_rng(0).integers(0, 1 << 32, 3 * limits.STEP_BYTES // 4, np.uint32)
    found = np.zeros(1, np.uint32)
    for passes, wanted in (
        (1, np.bitwise_xor.reduce(data)),
        (2, 0),
        (3, np.bitwise_xor.reduce(data)),
    ):
        load(data.ctypes.data, data.nbytes, passes, found.ctypes.data)
        assert found[0] == wanted


# --- peaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["f32", "i8"])
def test_a_peak_computes_what_it_says(precision: str) -> None:
    peak = limits.peak(find_target("cpu"), precision)
    if peak is None:
        lack("an instruction that sums products of int8")
    assert peak.run()[1]
    broken = dataclasses.replace(peak, _kernel=lambda sums, factors, steps: None)
    assert not broken.run()[1]


@pytest.mark.parametrize(
    ("name", "more", "precision", "instruction", "vectors"),
    [
        ("cpu:x86-64-v4", "", "f32", r"vfmadd231ps\t%zmm", 24),
        ("cpu:x86-64-v4", "avx512vnni", "i8", r"vpdpbusd\t%zmm", 24),
        ("cpu:x86-64-v3", "", "f32", r"vfmadd\d+ps\t%ymm", 12),
        ("cpu:x86-64-v3", "avxvnni", "i8", r"vpdpbusd\t%ymm", 12),
        ("cpu:x86-64", "", "f32", r"mulps", 12),
        ("cpu:aarch64", "", "f32", r"fmla", 24),
        ("cpu:aarch64", "dotprod", "i8", r"sdot", 24),
    ],
)
def test_a_peak_is_multiply_adds_alone(
    name: str, more: str, precision: str, instruction: str, vectors: int
) -> None:
    """Of its innermost loop: nothing is loaded, nothing copied, nothing left out."""
    target = find_target(name)
    target = dataclasses.replace(target, features=target.features | set(more.split()))
    found = limits.instruction(target, precision)
    assert found is not None
    text = limits.peak_text(target, found, vectors)
    assembly = find_backend(target).compiler(target).compile_assembly(text, target)
    blocks = re.split(r"^\.LBB.*:.*$", assembly, flags=re.MULTILINE)
    loop = next(part for part in reversed(blocks) if len(re.findall(instruction, part)) >= vectors)
    lines = [line.strip() for line in loop.splitlines() if re.match(r"\t[^.]", line)]
    body = list(itertools.takewhile(lambda line: not re.match(r"j|b\.", line), lines))
    counted = [line for line in body if re.match(rf"({{vex}}\t)?{instruction}", line)]
    assert len(counted) % vectors == 0
    rest = {line.split()[0] for line in body if line not in counted}
    assert rest <= {*"addps incq decq cmpq addq subs add cmp".split()}


def test_no_peak_where_nothing_sums_products_of_int8() -> None:
    assert limits.peak(find_target("cpu:x86-64-v3"), "i8") is None


def test_products_are_held_against_their_peak() -> None:
    arena = FakeArena()
    arena.peak_names = ("f32", "i8")
    arena.times |= {"FMA peak": 3.0, "dot peak": 1.0, "q4jit i8": 2.0}
    request = Request(shapes=((K, N),), rows=(3,), precisions=("f32", "i8", "f16"))
    (rows,) = measure(arena, request, benchmark.GPU)
    of_peak = {row.name: row.of_peak for row in rows}
    assert of_peak.pop("q4jit f32") == 0.75
    assert of_peak.pop("q4jit i8") == 0.5
    assert set(of_peak.values()) == {None}
    peak = next(row for row in rows if row.name == "FMA peak")
    assert (peak.gb_per_s, peak.of_read, peak.ratios) == (None, None, {})
    assert peak.tflops == pytest.approx(2 * 3 * K * N / 3e-6 * 1e-12)
    assert not any(set(row.ratios) & LIMITS for row in rows)


# --- the CPU --------------------------------------------------------------------------------------


@pytest.fixture
def quick_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is meant to be true."""
    monkeypatch.setattr(peers, "_CPU_CALLS_S", 1e-3)
    monkeypatch.setattr(peers, "_CPU_REST_S", 0.0)
    monkeypatch.setattr(peers, "cache_bytes", lambda: 4 << 10)


@pytest.mark.usefixtures("quick_cpu")
@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_the_cpu_is_measured(fmt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--shape", "128x64", "--m", "1,5"]
    options += ["--fused", "--quick", "--format", fmt, "--json", str(path)]
    assert main(["bench", *options]) == 0
    out = capsys.readouterr().out
    assert "ggml: not present: no library is given" in out
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    timed = {(r["k"], r["m"], r["kind"], r["name"]) for r in run["rows"] if r["us"] is not None}
    wanted = {("product", name) for name in (READ, "q4jit f32", "dequantise + matmul")}
    wanted |= {("bare", "q4jit f32"), ("gated", "q4jit f32")}
    assert {(k, m, *each) for k in (64, 128) for m in (1, 5) for each in wanted} <= timed
    for row in run["rows"]:
        if row["us"] is not None:
            assert math.isfinite(row["us"])
            assert row["us"] > 0
            assert row["error"] <= row["bound"]
    assert "q4jit f32, bias and SiLU gating" in out


def test_a_library_that_is_no_ggml_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["bench", "--target", "cpu", "--shape", "64x37", "--m", "1", "--ggml"]
    base, cpu = tmp_path / "libggml-base.so", tmp_path / "libggml-cpu.so"

    def told(path: Path) -> str:
        with pytest.raises(SystemExit) as end:
            main([*options, str(path)])
        out, err = capsys.readouterr()
        assert (end.value.code, out, len(err.splitlines())) == (2, "", 1)
        assert f"--ggml {path}: found " in err
        return err

    accepted = "accepted is a folder with libggml-base.so and libggml-cpu.so, or a file in it"
    assert f"found nothing, {accepted}" in told(tmp_path / "no" / "folder")
    assert f"found nothing, {accepted}" in told(cpu)
    wanted = f"found a folder without libggml-base.so and libggml-cpu.so, {accepted}"
    assert wanted in told(tmp_path)
    base.write_text("no library")
    assert f"found a folder without libggml-cpu.so, {accepted}" in told(tmp_path)
    assert f"found a file without libggml-cpu.so beside it, {accepted}" in told(base)
    cpu.write_text("no library")
    assert "found libraries that cannot be loaded: " in told(cpu)


def test_threads_are_those_that_are_asked_for(tmp_path: Path) -> None:
    """In a process of its own: the pool of this one has begun."""
    path = tmp_path / "t.json"
    child.run(
        f"""
        from q4jit import config
        from q4jit.tools import peers
        from q4jit.tools.cli import main
        peers._CPU_CALLS_S, peers._CPU_REST_S = 1e-3, 0.0
        peers.cache_bytes = lambda: 4 << 10
        options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "3", "--quick"]
        assert main(["bench", *options, "--json", {str(path)!r}]) == 0
        assert config.num_threads() == 3
        assert sum(t.name.startswith("q4jit-") for t in threading.enumerate()) == 2
        """
    )
    assert json.loads(path.read_text("utf-8"))["runs"][0]["threads"] == 3


QUICK = """
from q4jit.tools import peers
peers._CPU_CALLS_S, peers._CPU_REST_S = 1e-3, 0.0
peers.cache_bytes = lambda: 4 << 10
"""


def begin_with(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python run a program first in every child."""
    (folder / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")


def test_several_numbers_of_threads_are_one_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(QUICK, tmp_path, monkeypatch)
    path = tmp_path / "t.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1,5", "--threads", "1,2", "--quick"]
    assert main(["bench", *options, "--precision", "f32", "--json", str(path)]) == 0
    out, _ = capfd.readouterr()
    report = json.loads(path.read_text("utf-8"))
    assert report["command"] == [
        "q4jit",
        "bench",
        *options,
        "--precision",
        "f32",
        "--json",
        str(path),
    ]
    assert [run["threads"] for run in report["runs"]] == [1, 2]
    assert {(r["k"], r["n"], r["m"]) for run in report["runs"] for r in run["rows"]} == {
        (64, 37, 1),
        (64, 37, 5),
    }
    heads = [line.split() for line in out.splitlines() if line.startswith("threads ")]
    assert [head[:7] for head in heads] == [["threads", "K,", "N", "M", "f32", "µs", "read"]]
    table = re.findall(r"^ +([12])  64, 37  ([15]) ", out, re.MULTILINE)
    assert table == [("1", "1"), ("1", "5"), ("2", "1"), ("2", "5")]
    assert main(["bench", "--from", str(path), "--markdown"]) == 0
    out, _ = capfd.readouterr()
    assert re.findall(r"^\| ([12]) \| 64, 37 \| ([15]) \| ", out, re.MULTILINE) == table
    for threads in ("1 thread", "2 threads"):
        assert re.search(rf"^- {threads}: read [\d.]+ GB/s, FMA peak \d", out, re.MULTILINE)


def test_a_part_that_is_wrong_makes_the_whole_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = QUICK + "from q4jit import benchmark\nbenchmark.BOUNDS['f32'] = 0.0\n"
    begin_with(spoilt, tmp_path, monkeypatch)
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "1,2", "--quick"]
    assert main(["bench", *options, "--precision", "f32"]) == 1
    assert capfd.readouterr().out.count("wrong: error") >= 2


def test_a_part_that_is_killed_is_an_error_and_what_was_found_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = "import os, signal, sys\nif '2' in sys.argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    begin_with(killed + QUICK, tmp_path, monkeypatch)
    path = tmp_path / "t.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--threads", "1,2", "--quick"]
    assert main(["bench", *options, "--json", str(path)]) == 1
    assert "the part with 2 threads: ended by signal 9" in capfd.readouterr().err
    report = json.loads(path.read_text("utf-8"))
    assert report["ended_by"] == "ChildProcessError"
    assert [run["threads"] for run in report["runs"]] == [1]


def test_a_part_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches both: the part may write what it knows, and one that hangs is killed."""

    def interrupted(process: Any, timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        begun.append(process)
        raise KeyboardInterrupt

    begun: list[Any] = []
    wait = subprocess.Popen.wait
    monkeypatch.setattr(cli, "_END_S", 0.1)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli._wait_for([sys.executable, "-c", "import time; time.sleep(60)"])
    assert begun[0].returncode == -signal.SIGKILL


@pytest.mark.usefixtures("quick_cpu")
def test_a_weight_that_stays_in_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    on_cpu = peers._on_cpu

    def counted(calls: Sequence[Callable[[], object]], *rest: Any) -> Running:
        counts.append(len(calls))
        return on_cpu(calls, *rest)

    monkeypatch.setattr(peers, "_on_cpu", counted)
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--quick", "--json", str(path)]
    assert main(["bench", *options]) == 0
    assert min(counts) > 1
    counts.clear()
    assert main(["bench", *options, "--cached", "--markdown"]) == 0
    assert set(counts) == {1}
    assert "Q4_0, the weight in the cache\n" in capsys.readouterr().out
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    assert run["cached"]
    assert not any(row["wrong"] for row in run["rows"])


@pytest.mark.usefixtures("quick_cpu")
def test_a_more_exact_kernel_that_serves_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    options = ["--target", "cpu", "--shape", "64x37", "--m", "1", "--quick", "--format", "F16"]
    assert main(["bench", *options, "--precision", "f32,i8", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    notes = {row["name"]: row["note"] for row in run["rows"] if row["own"]}
    assert notes["q4jit f32"] == ""
    assert notes["q4jit i8"].startswith("precision='i8' is an upper bound")


def run_of(threads: int, cached: bool = False, **speeds: Any) -> ratios.Run:
    """A run of q4jit i8 and f32 at M = 1 and two weights, the second of which is small."""
    base = {"kind": "product", "m": 1, "own": True, "us": 10.0, "wrong": False, "of_peak": None}
    rows = [
        {**base, "name": f"q4jit {p}", "precision": p, "k": k, "n": k, **speeds}
        for k in (4096, 576)
        for p in ("f32", "i8")
    ]
    return {"threads": threads, "cached": cached, "rows": rows}


def test_targets_are_met_by_all_weights_or_missed() -> None:
    runs = [run_of(t, ratios={"ggml": 1.3}, of_read=0.95) for t in (1, 2, 3)]
    _, *lines = ratios.targets(runs)
    found = {(p, against, threads): line for p, _, against, threads, *line in lines}
    assert found["f32", "ggml", "1"] == ["1.50", "1.30 1.30", "missed"]
    assert found["f32", "ggml", "2"] == ["1.10", "1.30 1.30", "met"]
    assert found["i8", "read", "1"] == ["0.92", "0.95", "met"]  # of the large one alone
    assert {threads for _, _, threads in found} == {"1", "2"}
    runs[1]["rows"][0]["ratios"] = {}
    _, *lines = ratios.targets(runs[1:2])
    assert ["f32", "1", "ggml", "2", "1.10", "- 1.30", "not measured"] in lines
    _, *lines = ratios.targets([run_of(1, cached=True, ratios={"ggml": 3.1}, of_read=0.5)])
    assert lines == [["i8", "1", "ggml", "1", "3.00", "3.10 3.10", "met"]]


def test_the_table_of_ratios() -> None:
    run = run_of(2, ratios={"ggml": 1.3}, of_read=0.954)
    run["rows"][1] |= {"us": None, "wrong": True, "ratios": {}, "of_read": None}
    peer = {**run["rows"][0], "name": "ggml", "own": False}
    read = {**peer, "name": READ, "gb_per_s": 20.0}
    run["rows"][2:] = [peer, read, {**read, "gb_per_s": 30.0}]
    run["rows"].append({**peer, "name": "dot peak", "tflops": 0.5})
    heads, line = ratios.table([run])
    assert heads == "threads|K, N|M|f32 µs|read|peak|i8 µs|read|peak|ggml".split("|")
    assert line == "2|4096, 4096|1|10|95%|-|wrong|-|-|1.30 / -".split("|")
    assert ratios.limits(run) == "2 threads: read 30 GB/s, dot peak 500 GOP/s"


# --- a GPU that is none ---------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["amd", "nvidia"])
def test_kernels_that_write_nothing_are_wrong(platform: str, tmp_path: Path) -> None:
    """The driver's calls are real, and so are kernels' texts; the runtime runs none of them."""
    folder = str(fake_gpu.build(tmp_path, platform))
    path = tmp_path / "b.json"
    child.run(
        f"""
        import gc
        start()
        os.environ.pop("ROCM_PATH", None)  # where the fake is, and no compiler
        from q4jit.tools import peers
        from q4jit.tools.cli import main
        peers.GpuArena.rotated_bytes = lambda arena: 4000
        options = ["--shape", "64x37", "--m", "1,17", "--fused", "--quick"]
        assert main(["bench", *options, "--json", {str(path)!r}]) == 1
        assert fake["launches"] > 100 and fake["replays"] > 0
        gc.collect()
        assert fake["streams"] == fake["graphs"] == fake["events"] == 0
        """,
        prelude=PRELUDE,
        FAKE_PLATFORM=platform,
        FAKE_FOLDER=folder,
        ROCM_PATH=folder,
        Q4JIT_CACHE_DIR=str(tmp_path / "cache"),
    )
    (run,) = json.loads(path.read_text("utf-8"))["runs"]
    names = {row["name"] for row in run["rows"]}
    assert names == {READ, "q4jit f32", "q4jit f16", "q4jit i8", "q4jit element"}
    assert all(row["wrong"] and row["us"] is None for row in run["rows"])
    assert all("NaN" in row["message"] for row in run["rows"])
    assert {row["note"] for row in run["rows"] if row["name"] == "q4jit i8"} == {
        "gemv_matrix in f16",
        "tile_halves in f16",
    }


def test_weights_take_turns_and_the_graphs_own_result_counts() -> None:
    """The first call, which is not part of a graph, writes results too: they are spoiled again."""
    poisoned: list[Any] = []
    launched: list[Any] = []

    class Launch:
        def prepare(self, args: Any) -> None:
            pass

        def __call__(self, args: Any, out: Any) -> None:
            launched.append(args[1])

    @contextlib.contextmanager
    def replays(calls_on: Any) -> Iterator[Callable[[], float]]:
        for call in calls_on(3):
            call()
        yield lambda: 1.0

    graph = types.SimpleNamespace(returns_tuple=False)
    plan = types.SimpleNamespace(kernels=(), graph=graph)
    arena = GpuArena.__new__(GpuArena)
    arena._tuned = lambda key: None
    arena.bench = types.SimpleNamespace(  # type: ignore[assignment]  # what is asked of it
        build=lambda *args: types.SimpleNamespace(plan=plan),
        upload=lambda args, stream: args,
        outputs=lambda built, args: ["y"],
        bind=lambda built, args: Launch(),
        poison=poisoned.extend,
        replays=replays,
    )
    work = benchmark._Shape("Q4_0", K, N, (1,), 5000).product(1)
    with arena.own("f32").open(work) as running:
        assert poisoned == []
        running.poison()
    assert poisoned == ["y"]
    assert launched == [w for (w,) in work.copies]


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "F16"])
# 37: not of whole groups of columns; 90 MB: more weights than ggml's own graphs hold
@pytest.mark.parametrize(("n", "total_bytes"), [(64, 200_000), (37, 200_000), (64, 90_000_000)])
def test_ggmls_products_are_right(fmt: str, n: int, total_bytes: int) -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama_cpp is a peer, which no test installs")
    library = Ggml(Path(spec.origin).parent / "lib")
    work = benchmark._Shape(fmt, 512, n, (5,), total_bytes).product(5)
    weights = [w for (w,) in work.copies]
    with library.product(work.x, weights, 2 * len(weights), 1) as made:
        made.poison()
        assert work.error([made.result()]) is None
        made.compute()
        error = work.error([made.result()])
    assert error is not None
    assert error < BOUNDS["i8"]


@pytest.mark.parametrize("make", [peers._dense_fp16, peers._dequantise])
def test_products_of_pytorch_are_right(make: Any) -> None:
    """On PyTorch's CPU: the same calls are made on a GPU."""
    torch = pytest.importorskip("torch", reason="a peer, which no test installs")
    work = benchmark._Shape("Q4_0", 256, 64, (5,), 0).product(5)
    calls: Sequence[Callable[[], Any]] = make(torch, "cpu", work, 200_000)
    assert len(calls) > 2
    for call in calls:
        error = work.error([call().float().numpy()])
        assert error is not None
        assert error < (5e-4 if make is peers._dense_fp16 else 2e-6)


def test_quants_for_others_are_those_of_the_reference() -> None:
    w = random_weight("Q4_0", K, N)
    quants = peers._Quants.of(w)
    values = (quants.q.astype(np.float32) - 8) * np.repeat(quants.d.astype(np.float32), 32, axis=1)
    assert np.array_equal(values, w.dequantize().T)
    with pytest.raises(AbsentError, match="Q8_0"):
        peers._Quants.of(random_weight("Q8_0", K, N))


def test_a_ggml_says_for_what_it_was_not_built() -> None:
    library = Ggml.__new__(Ggml)
    library.__dict__ |= {"ggml_cpu_has_avx2": lambda: 1, "ggml_cpu_has_avx512_vnni": lambda: 0}
    assert library.lacks({"avx2", "avx512vnni", "sse2"}) == ["avx512vnni"]


# --- the documentation ----------------------------------------------------------------------------


def test_the_documentation_knows_every_peer_and_option() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    source = (ROOT / "q4jit" / "peers.py").read_text("utf-8")
    named = set(re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)) - {"f32", "f16", "i8"}
    for name in named:
        assert f'"{name}"' in source
    assert len(named) == 6
    for name in LIMITS - {READ}:
        assert f"`{name}`" in text
    aims = text[text.index("| | M = 1 | M = 4 | M = 8 | M = 512 |") :]
    for precision in ("i8", "f32"):
        targets = [each for each in ratios._TARGETS if each[0] == precision and each[2] == "ggml"]
        assert [m for _, m, *_ in targets] == [1, 4, 8, 512]
        shown = " | ".join(f"{one} / {two}" for *_, one, two in targets)
        assert f"| `{precision}` | {shown} |" in aims
    parser = cli._parser()
    for line in re.findall(r"^\$ q4jit (.*)$", text, re.MULTILINE):
        assert parser.parse_args(line.split()).run
    assert len(peers._READ_TEXTS) * len(peers._READ_BLOCKS) == 35  # as it says


def test_make_bench_is_a_command() -> None:
    lines = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", "")
    (words,) = re.findall(r"-m q4jit (bench .*?) \$\$RUN_ARGS", lines)
    options = cli._parser().parse_args(words.replace('"$$1"', "lib").split())
    assert (options.target, options.threads, options.ggml) == (["cpu"], (1, 2), Path("lib"))
    done = subprocess.run(
        [require_tool("make", "make"), "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.search(r"^bench +compare with ggml", done.stdout, re.MULTILINE)
