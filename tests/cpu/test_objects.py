"""Properties of every generated text and object: its symbols, its bytes, its offsets."""

import ctypes
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit import QuantizedTensor, quantize, specialize
from q4jit.compilers import llvm
from q4jit.cpu.lanes import tail_mask
from q4jit.cpu.llvm_text import Function, Module
from q4jit.cpu.schedule import CpuPlan, digits_bytes, layout, make_plan
from q4jit.frontend.specs import WeightSpec, array_spec
from q4jit.frontend.trace import trace
from q4jit.runtime.cpu import LoadedObject, undefined_symbols
from q4jit.targets import find_target, runs_here
from tests.support import child
from tests.support.cpu_cases import TARGETS, digest, kernels, texts
from tests.support.emulator import run_kernel
from tests.support.kernels import (
    F32,
    assert_contract,
    object_of,
    random_x,
    weight,
)

every_target = pytest.mark.parametrize("target", TARGETS)

# functions that LLVM calls without being asked to, and that every C library has
ALLOWED = {"memcpy", "memmove", "memset"}
# intrinsics that become instructions on every CPU; those of libm's functions would become calls
INTRINSICS = {"fabs", "sqrt", "fma", "fmuladd", "masked", "prefetch", "vector", "smin", "smax"}


@every_target
def test_objects_need_nothing_from_outside(target: str) -> None:
    for name, plan, kernel in kernels(target):
        undefined = undefined_symbols(object_of(plan, kernel))
        assert undefined <= ALLOWED, f"{name} for {target} needs {sorted(undefined)}"


def test_the_check_detects_an_undefined_symbol() -> None:
    text = (
        'target triple = "x86_64-unknown-linux-gnu"\n'
        "declare float @expf(float)\n"
        "define float @f(float %x) {\n  %y = call float @expf(float %x)\n  ret float %y\n}\n"
    )
    assert undefined_symbols(llvm.compile_object(text, find_target("cpu:x86-64"))) == {"expf"}


@every_target
def test_texts_call_their_own_functions_and_instructions(target: str) -> None:
    for text in texts(target):
        declared = set(re.findall(r"^declare .*?@([\w.]+)\(", text, re.MULTILINE))
        for name in declared:
            first, kind, *_ = name.split(".")
            assert first == "llvm", name
            assert kind in INTRINSICS or name.startswith(("llvm.x86.", "llvm.aarch64.neon.")), name
        defined = set(re.findall(r"^define .*?@([\w.]+)\(", text, re.MULTILINE))
        called = set(re.findall(r"call .*?@([\w.]+)\(", text))
        assert called <= declared | defined
        if target == "cpu:x86-64":  # each of these would become a call for every lane
            assert "llvm.fma." not in text
            assert "fpext" not in text


@every_target
def test_offsets_have_64_bits(target: str) -> None:
    for text in texts(target):
        steps = re.findall(r"getelementptr .*", text)
        assert steps
        # an i32 may only be a constant, which names a field of a struct
        index = r"(, i64 \S+|, i32 \d+)"
        assert [step for step in steps if not re.search(rf", ptr %\S+?{index}+$", step)] == []
        # sizes are multiplied in 64 bits, not multiplied in 32 bits and then widened
        assert not re.search(r"(sext|zext) i32 \S+ to i64", text)


HASHES = """
    from tests.support.cpu_cases import TARGETS, digest
    print(*map(digest, TARGETS))
"""


def test_texts_are_the_same_in_every_process() -> None:
    here = " ".join(map(digest, TARGETS))
    for seed in ("1", "2"):
        assert child.run(HASHES, prelude="", PYTHONHASHSEED=seed).strip() == here


# --- beyond 4 GB ----------------------------------------------------------------------------------


def last_columns(x: Any, w: Any) -> Any:
    return (x @ w)[..., -16:]


def last_five(x: Any, w: Any) -> Any:
    return (x @ w)[..., -5:]


def call(plan: CpuPlan, values: dict[str, int]) -> None:
    """Run a plan's only kernel; `values` are addresses and numbers by the kind of their slot."""
    (kernel,) = plan.kernels
    code = LoadedObject(object_of(plan, kernel), (kernel.work.symbol,), plan.target)
    slots = [values[slot.kind] for slot in kernel.slots()]
    entry = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(code.addresses[kernel.work.symbol])
    entry(struct.pack(f"<{len(slots)}Q", *slots))


@pytest.mark.parametrize("function", [last_columns, last_five])
def test_a_weight_of_more_than_4_gb(function: Callable[..., Any], tmp_path: Path) -> None:
    # a sparse file takes no space: only the last columns are written, and only they are read
    n = 1 << 28
    w, x = weight("Q4_0", 32, 16), random_x(1, 32)
    plan = make_plan(
        trace(function, (array_spec(x.shape), WeightSpec("Q4_0", 32, n))), find_target("cpu"), 1
    )
    (section,) = plan.kernels[0].work.sections
    end = w.tensor._resident.blocks(layout(section))
    size_bytes = n // 16 * end.nbytes
    assert size_bytes > 1 << 32
    path = tmp_path / "weight"
    with path.open("wb") as file:
        file.seek(size_bytes - end.nbytes)
        file.write(end.tobytes())
    many: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
    scratch = np.zeros(64, F32)
    y = np.full((1, section.width), np.nan, F32)
    addresses: dict[str, NDArray[Any]] = {
        "array": x,
        "weight": many,
        "output": y,
        "x": scratch,
        "row_factors": scratch[48:],
        "digits": np.zeros(digits_bytes(32, 3), np.uint8),
    }
    call(plan, {"pool": 0, "m": 1, **{slot: a.ctypes.data for slot, a in addresses.items()}})
    columns = w.values[:, -section.width :]
    assert_contract(y, x, type(w)(w.tensor, columns))


@pytest.mark.parametrize(
    ("width", "first", "lanes"),
    [(37, 0, 16), (37, 32, 5), (37, 48, 0), (2**31 + 5, 0, 16), (2**33 + 5, 2**33, 5)],
)
def test_the_mask_of_the_last_columns(width: int, first: int, lanes: int) -> None:
    module = Module(find_target("cpu:x86-64"))
    f = Function("void @mask(ptr %args)")
    out = f.let("out", "load ptr, ptr %args")
    start = f.let("first", f"load i64, ptr {f.at('%args', 'i64', 1, 'first_slot')}")
    wide = f.let("wide", f"zext <16 x i1> {tail_mask(f, start, width)} to <16 x i8>")
    f.do(f"store <16 x i8> {wide}, ptr {out}, align 1")
    f.do("ret void")
    module.add("mask", f)
    code = llvm.compile_object(module.text(""), module.target)
    native = None if runs_here(module.target) else "max"
    (mask,) = run_kernel("x86-64", code, "mask", [np.zeros(16, np.uint8), first], cpu=native)
    assert mask.tolist() == [1] * lanes + [0] * (16 - lanes)


def test_no_mask_where_16_divides_the_width() -> None:
    assert tail_mask(Function("void @f()"), "%first", 4096) is None


@pytest.mark.parametrize("name", ["parallel_for", "multiply_add", "memset", "syscall", "main"])
def test_a_function_may_have_a_name_that_the_text_or_libc_uses(name: str) -> None:
    def function(x: NDArray[np.float32], w: QuantizedTensor) -> Any:
        return np.exp(x @ w)

    function.__name__ = name
    _check_names(specialize(function))


def test_arguments_may_have_names_that_the_text_uses() -> None:
    _check_names(specialize(lambda entry, args: np.exp(entry @ args)))
    _check_names(specialize(lambda m, pool: np.exp(m @ pool)))


def _check_names(function: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64), dtype=np.float32)
    w = quantize(rng.standard_normal((64, 48)) / 8, "Q4_0")
    np.testing.assert_allclose(function(x, w), function.py_func(x, w), rtol=1e-5)
