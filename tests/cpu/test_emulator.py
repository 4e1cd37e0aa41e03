"""The harness that tests the kernels of every CPU, itself tested with tiny kernels."""

import llvmlite.binding as llvm
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.emulator import X86_64_CPUS, KernelCrashError, run_kernel

pytestmark = pytest.mark.emulated

TRIPLES = {"aarch64": "aarch64-unknown-linux-gnu", "x86-64": "x86_64-unknown-linux-gnu"}

# y[i] = s * x[i + shift] for i in 0..n; the slots are y, x, n, shift, s
SCALE = """
define void @scale(ptr %args) {
entry:
  %y = load ptr, ptr %args
  %px = getelementptr i64, ptr %args, i64 1
  %x = load ptr, ptr %px
  %pn = getelementptr i64, ptr %args, i64 2
  %n = load i64, ptr %pn
  %pshift = getelementptr i64, ptr %args, i64 3
  %shift = load i64, ptr %pshift
  %ps = getelementptr i64, ptr %args, i64 4
  %s = load float, ptr %ps
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %from = add i64 %i, %shift
  %pxi = getelementptr float, ptr %x, i64 %from
  %xi = load float, ptr %pxi, align 1
  %yi = fmul float %s, %xi
  %pyi = getelementptr float, ptr %y, i64 %i
  store float %yi, ptr %pyi, align 1
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  ret void
}
"""

# y[0:LANES] += x[0:LANES]: eight lanes use AVX2 if it is allowed, sixteen use AVX-512
ADD = """
define void @add(ptr %args) {
  %y = load ptr, ptr %args
  %px = getelementptr i64, ptr %args, i64 1
  %x = load ptr, ptr %px
  %a = load <LANES x i32>, ptr %y, align 1
  %b = load <LANES x i32>, ptr %x, align 1
  %c = add <LANES x i32> %a, %b
  store <LANES x i32> %c, ptr %y, align 1
  ret void
}
"""

# y = fma(y, y, y), or y = f32(f16 at x): one instruction where the CPU has it
FMA = """
define void @one(ptr %args) {
  %y = load ptr, ptr %args
  %a = load float, ptr %y
  %b = call float @llvm.fma.f32(float %a, float %a, float %a)
  store float %b, ptr %y
  ret void
}
"""
HALF = """
define void @one(ptr %args) {
  %y = load ptr, ptr %args
  %a = load half, ptr %y
  %b = fpext half %a to float
  store float %b, ptr %y
  ret void
}
"""

HANG = """
define void @hang(ptr %args) {
entry:
  br label %loop
loop:
  %v = load volatile i64, ptr %args
  br label %loop
}
"""


def compiled(text: str, target: str, features: str = "") -> bytes:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    with llvm.parse_assembly(text) as module:
        machine = llvm.Target.from_triple(TRIPLES[target]).create_target_machine(
            opt=2, features=features
        )
        with machine:
            code = machine.emit_object(module)
    assert isinstance(code, bytes)
    return code


@pytest.fixture(params=["aarch64", "x86-64"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scale(
    target: str, y: NDArray[np.float32], x: NDArray[np.float32], shift: int, gap_bytes: int = 0
) -> list[NDArray[np.float32]]:
    code = compiled(SCALE, target)
    return run_kernel(target, code, "scale", [y, x, len(y), shift, 2.5], gap_bytes=gap_bytes)


@pytest.mark.parametrize("gap_bytes", [0, 1, 64])
def test_runs_and_returns_changed_copies(target: str, gap_bytes: int) -> None:
    x = np.arange(37, dtype=np.float32)
    y = np.zeros(37, np.float32)
    got_y, got_x = scale(target, y, x, 0, gap_bytes)
    np.testing.assert_array_equal(got_y, x * np.float32(2.5))
    np.testing.assert_array_equal(got_x, x)
    assert not y.any(), "the caller's array must not change"


def test_takes_strided_and_empty_arrays(target: str) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::-1]
    got_y, got_x, _ = run_kernel(
        target,
        compiled(SCALE, target),
        "scale",
        [np.zeros(12, np.float32), x, np.int64(12), 0, np.float32(1), np.empty(0, np.uint8)],
    )
    np.testing.assert_array_equal(got_x, x)
    np.testing.assert_array_equal(got_y, x.ravel())


@pytest.mark.parametrize(("shift", "byte"), [(1, 4096), (-2048, -8192)])
def test_a_read_outside_an_array_is_caught(target: str, shift: int, byte: int) -> None:
    x = np.ones(1024, np.float32)
    with pytest.raises(KernelCrashError, match=f"slot 1: access at byte {byte} of .* 4096 bytes"):
        scale(target, np.zeros(1024, np.float32), x, shift)


def test_a_read_just_before_an_array_gives_nan(target: str) -> None:
    got_y, _ = scale(target, np.zeros(4, np.float32), np.ones(4, np.float32), -1)
    np.testing.assert_array_equal(got_y, [np.nan, 2.5, 2.5, 2.5])


def test_a_write_beyond_an_array_is_caught(target: str) -> None:
    code = compiled(SCALE, target)
    y, x = np.zeros(4, np.float32), np.ones(5, np.float32)
    with pytest.raises(KernelCrashError, match="slot 0: access at byte 16 of"):
        run_kernel(target, code, "scale", [y, x, 5, 0, 1.0])
    with pytest.raises(KernelCrashError, match="slot 0: write at byte 16 of"):
        run_kernel(target, code, "scale", [y, x, 5, 0, 1.0], gap_bytes=8)


def test_a_null_pointer_is_caught(target: str) -> None:
    with pytest.raises(KernelCrashError, match="near no array"):
        run_kernel(target, compiled(SCALE, target), "scale", [0, 0, 1, 0, 1.0])


def test_a_kernel_that_does_not_end_is_stopped(target: str) -> None:
    with pytest.raises(KernelCrashError, match="did not end"):
        run_kernel(target, compiled(HANG, target), "hang", [0], timeout_s=1)


def test_a_symbol_that_is_no_name_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="is not the symbol"):
        run_kernel(target, b"", "a=b -o c", [])


def test_a_call_into_a_library_is_refused(target: str) -> None:
    code = compiled(HALF.replace("half", "fp128").replace("fpext", "fptrunc"), target)
    with pytest.raises(RuntimeError, match="undefined reference to `__trunctfsf2'"):
        run_kernel(target, code, "one", [np.zeros(16, np.uint8)])


def add(lanes: int, features: str, cpu: str | None) -> None:
    code = compiled(ADD.replace("LANES", str(lanes)), "x86-64", features)
    y, x = np.arange(lanes, dtype=np.int32), np.full(lanes, 5, np.int32)
    got, _ = run_kernel("x86-64", code, "add", [y, x], cpu=cpu)
    np.testing.assert_array_equal(got, y + x)


@pytest.mark.parametrize("level", X86_64_CPUS)
def test_x86_models_run_their_own_level(level: str) -> None:
    add(8, "+avx2" if level == "x86-64-v3" else "+sse2", X86_64_CPUS[level])


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v2"])
@pytest.mark.parametrize(("text", "features"), [(FMA, "+fma"), (HALF, "+f16c")])
def test_x86_models_have_fma_and_f16c_from_v3_on(level: str, text: str, features: str) -> None:
    code = compiled(text, "x86-64", features)
    y = np.array([0x3C00], np.uint32).view(np.float32)
    run_kernel("x86-64", code, "one", [y], cpu=X86_64_CPUS["x86-64-v3"])
    with pytest.raises(KernelCrashError, match="SIGILL"):
        run_kernel("x86-64", code, "one", [y], cpu=X86_64_CPUS[level])


@pytest.mark.parametrize(
    ("lanes", "features", "level"),
    [(8, "+avx2", "x86-64"), (8, "+avx2", "x86-64-v2"), (16, "+avx512f", "x86-64-v3")],
)
def test_x86_models_refuse_newer_vectors(lanes: int, features: str, level: str) -> None:
    with pytest.raises(KernelCrashError, match="SIGILL"):
        add(lanes, features, X86_64_CPUS[level])


def test_aarch64_model_refuses_newer_instructions() -> None:
    sdot = """
declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
define void @one(ptr %args) {
  %y = load ptr, ptr %args
  %a = load <16 x i8>, ptr %y
  %b = call <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(
    <4 x i32> zeroinitializer, <16 x i8> %a, <16 x i8> %a)
  store <4 x i32> %b, ptr %y
  ret void
}
"""
    code = compiled(sdot, "aarch64", "+dotprod")
    y = np.full(16, 3, np.int8)
    (got,) = run_kernel("aarch64", code, "one", [y], cpu="max")
    np.testing.assert_array_equal(got.view(np.int32), 36)
    with pytest.raises(KernelCrashError, match="SIGILL"):
        run_kernel("aarch64", code, "one", [y])
