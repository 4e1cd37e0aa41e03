"""The limits of a CPU: generated code that only reads, or only multiplies and adds.

Each function runs on one thread. For the limit of a machine, run it on all threads.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from q4jit.backends import find_backend
from q4jit.compilers import cache
from q4jit.cpu.llvm_text import INTS, Function
from q4jit.cpu.schedule import find_dot
from q4jit.runtime.cpu import LoadedObject, function
from q4jit.targets import Target

# (runs of bytes that a thread reads side by side, prefetch distance in bytes)
READ_VARIANTS: Final = ((1, 0), (1, 4096), (2, 1024), (8, 0))
_VECTORS: Final = 8  # loads in flight per thread
_VECTOR_BYTES: Final = 64
CHUNK_BYTES: Final = _VECTORS * _VECTOR_BYTES
"""A read is a multiple of this size."""

_loaded: list[LoadedObject] = []  # keeps the code until the process ends


def _load(target: Target, symbol: str, text: str, *argument_types: Any) -> Callable[..., None]:
    compiler = find_backend(target).compiler(target)
    code = cache.fetch(target, compiler, symbol, text).object_bytes
    loaded = LoadedObject(code, (symbol,), target)
    _loaded.append(loaded)
    loaded_function: Callable[..., None] = function(loaded.addresses[symbol], *argument_types)
    return loaded_function


def _repeat(f: Function, counter: str, step: int, stop: str, body: str, after: str) -> None:
    """End the block `body` with a branch back to it while counter + step is below `stop`.

    `Function.loop` tests at the head of the loop, which would add a jump to every measured round.
    """
    following = f.let("next", f"add i64 {counter}, {step}")
    more = f.let("more", f"icmp ult i64 {following}, {stop}")
    f.do(f"br i1 {more}, label %{body}, label %{after}")


def _module(title: str, target: Target, f: Function, *lines: str) -> str:
    """Return the text of a module with one function; `lines` are its declarations."""
    declarations = "".join(f"{line}\n" for line in lines)
    return f'; {title}\ntarget triple = "{target.triple}"\n{f.text()}{declarations}'


# --- reads ----------------------------------------------------------------------------------------


@functools.cache
def reader(target: Target, runs: int, ahead: int) -> Callable[[int, int, int, int], None]:
    """Return a function that reads memory and stores the exclusive or of its words.

    It takes the address, the size in bytes (a multiple of CHUNK_BYTES), the number of passes, and
    the address of the result.
    """
    types = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return _load(target, "q4jit_read", _reader_text(target, runs, ahead), *types)


def _reader_text(target: Target, runs: int, ahead: int) -> str:
    """Return the text of a loop of loads; each vector has its own xor, so that no load waits.

    runs: ranges of the bytes that are read side by side. ahead: the prefetch distance in bytes; 0
    for no prefetches. A CPU's own prefetcher stops at the end of a page.
    """
    f = Function("void @q4jit_read(ptr %data, i64 %bytes, i64 %passes, ptr %result)")
    per_run, numbers = _VECTORS // runs, range(_VECTORS)
    run_bytes = f.let("run.bytes", f"udiv i64 %bytes, {runs}")
    f.do("br label %pass")
    f.label("pass")
    done = f.let("done", "phi i64 [ 0, %entry ], [ %count, %passed ]")
    for i in numbers:
        f.let(f"o{i}", f"phi {INTS} [ zeroinitializer, %entry ], [ %t{i}, %passed ]")
    f.do("br label %loop")
    f.label("loop")
    at = f.let("at", "phi i64 [ 0, %pass ], [ %next, %loop ]")
    for i in numbers:
        f.let(f"s{i}", f"phi {INTS} [ %o{i}, %pass ], [ %t{i}, %loop ]")
    _read_vectors(f, run_bytes, at, per_run, ahead)
    _repeat(f, at, _VECTOR_BYTES * per_run, run_bytes, "loop", "passed")
    f.label("passed")
    count = f.let("count", f"add i64 {done}, 1")
    again = f.let("again", f"icmp ult i64 {count}, %passes")
    f.do(f"br i1 {again}, label %pass, label %end")
    f.label("end")
    merged = f.let("m0", f"xor {INTS} %t0, zeroinitializer")
    for i in numbers[1:]:
        merged = f.let(f"m{i}", f"xor {INTS} {merged}, %t{i}")
    word = f.let("word", f"call i32 @llvm.vector.reduce.xor.v16i32({INTS} {merged})")
    f.do(f"store i32 {word}, ptr %result, align 4")
    f.do("ret void")
    return _module(
        f"q4jit_read for {target}: reads a multiple of {CHUNK_BYTES} bytes",
        target,
        f,
        f"declare i32 @llvm.vector.reduce.xor.v16i32({INTS})",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
    )


def _read_vectors(f: Function, run_bytes: str, at: str, per_run: int, ahead: int) -> None:
    """Combine the vectors at offset `at` of each run with their xors."""
    for i in range(_VECTORS):
        run, vector_of_run = divmod(i, per_run)
        run_at = f.let(f"run{i}", f"mul i64 {run_bytes}, {run}")
        start = f.let(f"at{i}", f"add i64 {run_at}, {at}")
        start = f.let(f"from{i}", f"add i64 {start}, {_VECTOR_BYTES * vector_of_run}")
        address = f.at("%data", "i8", start, f"p{i}")
        vector = f.let(f"v{i}", f"load {INTS}, ptr {address}, align 4")
        f.let(f"t{i}", f"xor {INTS} %s{i}, {vector}")
        if ahead:
            prefetched = f.at(address, "i8", ahead, f"a{i}")
            f.do(f"call void @llvm.prefetch.p0(ptr {prefetched}, i32 0, i32 3, i32 1)")


# --- multiply-adds --------------------------------------------------------------------------------

_REPEATS: Final = 1 << 19  # sums stay exact in f32, and a run takes some milliseconds


@dataclass(frozen=True)
class Instruction:
    """An instruction that adds products of two vectors of factors to a vector of sums.

    Attributes:
        intrinsic: LLVM's name for it.
        sums: the LLVM type of the sums.
        factors: the LLVM type of the factors.
        lanes: the number of sums.
        products: the products that are added to each sum.
        last: whether the sums are the intrinsic's last argument, not its first.
    """

    intrinsic: str
    sums: str
    factors: str
    lanes: int
    products: int = 1
    last: bool = False


@dataclass(frozen=True)
class Peak:
    """A loop of independent multiply-adds.

    Attributes:
        operations: the operations of a run, two per multiply-add.
    """

    operations: int
    _instruction: Instruction
    _vectors: int
    _kernel: Callable[..., None]

    def run(self) -> tuple[float, bool]:
        """Run on this thread; return the seconds, and whether the sums are right."""
        lanes, products = self._instruction.lanes, self._instruction.products
        dtypes = (np.float32, np.float32) if products == 1 else (np.int32, np.int8)
        begin = np.arange(self._vectors * lanes, dtype=dtypes[0])
        factors = np.ones(lanes * products, dtypes[1])
        sums = begin.copy()
        start = time.perf_counter()
        self._kernel(sums.ctypes.data, factors.ctypes.data, _REPEATS)
        seconds = time.perf_counter() - start
        return seconds, np.array_equal(sums, begin + _REPEATS * products)


@functools.cache
def peak(target: Target, precision: str) -> Peak | None:
    """Return the peak of f32, or of int8; None if no instruction sums products of int8."""
    kind = instruction(target, precision)
    return None if kind is None else _peak(target, kind)


def instruction(target: Target, precision: str) -> Instruction | None:
    """Return the instruction to measure; None if no instruction sums products of int8."""
    return _f32(target) if precision == "f32" else _i8(target)


def _f32(target: Target) -> Instruction:
    lanes = target.vector_bytes // 4
    floats = f"<{lanes} x float>"
    # without FMA, LLVM would move a product of two factors out of the loop, so the sums are
    # multiplied; with FMA the sums are added, because aarch64 would otherwise copy the factors
    fused = target.has("fma") or target.family == "aarch64"
    name = f"llvm.{'fma' if fused else 'fmuladd'}.v{lanes}f32"
    return Instruction(name, floats, floats, lanes, last=fused)


def _i8(target: Target) -> Instruction | None:
    dot = find_dot(target)
    if dot is None or dot.instruction.pairs:
        return None
    summing = dot.instruction
    return Instruction(summing.intrinsic, summing.sums, summing.factors, summing.lanes, products=4)


def _peak(target: Target, kind: Instruction) -> Peak:
    vectors = target.vector_registers * 3 // 4  # enough to hide the latency, without spills
    text = peak_text(target, kind, vectors)
    kernel = _load(target, "q4jit_peak", text, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    operations = 2 * kind.lanes * kind.products * vectors * _REPEATS
    return Peak(operations, kind, vectors, kernel)


def peak_text(target: Target, kind: Instruction, vectors: int) -> str:
    """Return the text of a loop of multiply-adds.

    Each sum starts with another number; otherwise LLVM would compute one sum for all.
    """
    f = Function("void @q4jit_peak(ptr %sums, ptr %factors, i64 %steps) #0")
    sums, numbers = kind.sums, range(vectors)
    factor = f.let("f", f"load {kind.factors}, ptr %factors, align 4")
    pair = f"{kind.factors} {factor}, {kind.factors} {factor}"
    pointers = [f.let(f"p{i}", f"getelementptr {sums}, ptr %sums, i64 {i}") for i in numbers]
    begin = [f.let(f"b{i}", f"load {sums}, ptr {at}, align 4") for i, at in enumerate(pointers)]
    f.do("br label %loop")
    f.label("loop")
    step = f.let("step", "phi i64 [ 0, %entry ], [ %next, %loop ]")
    for i in numbers:
        f.let(f"s{i}", f"phi {sums} [ {begin[i]}, %entry ], [ %t{i}, %loop ]")
    for i in numbers:
        operands = f"{pair}, {sums} %s{i}" if kind.last else f"{sums} %s{i}, {pair}"
        f.let(f"t{i}", f"call {sums} @{kind.intrinsic}({operands})")
    _repeat(f, step, 1, "%steps", "loop", "end")
    f.label("end")
    for i, at in enumerate(pointers):
        f.do(f"store {sums} %t{i}, ptr {at}, align 4")
    f.do("ret void")
    width = 8 * target.vector_bytes
    wide = f'"prefer-vector-width"="{width}" "min-legal-vector-width"="{width}"'
    return _module(
        f"q4jit_peak for {target}: {vectors} sums, factors of 1",
        target,
        f,
        f"declare {sums} @{kind.intrinsic}({sums}, {kind.factors}, {kind.factors})",
        f"attributes #0 = {{ nounwind {wide} }}",
    )
