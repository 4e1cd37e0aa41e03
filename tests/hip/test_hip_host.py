"""The host prelude and its harness: what they compute, and that they find each kind of fault."""

from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from q4jit.hip.templates import environment
from q4jit.targets import HIP_ARCHS
from tests.support.hip_host import (
    KernelFaultError,
    Parameter,
    Program,
    compile_host,
    declared_parameters,
)

F32: Final = np.float32
WAVES: Final = ("gfx1030", "gfx90a")  # 32 and 64 lanes
MATRIX_ARCHS: Final = ("gfx90a", "gfx1100", "gfx1201", "sm_90")  # one of each matrix unit


def program(body: str, arch: str = "gfx1030") -> Program:
    """Return the kernel `k` of `body` after the host prelude, and the matrix file that it needs."""
    facts = HIP_ARCHS[arch]
    files = ["prelude/host"] + ([f"unit/bf16_{facts.matrix}"] if "fragment" in body else [])
    texts = [environment().get_template(f"{file}.hip.j2").render(arch=facts) for file in files]
    return compile_host("\n".join([*texts, body]), "k")


def f32(*shape: int) -> NDArray[np.float32]:
    return np.empty(shape, F32)


def i32(*shape: int) -> NDArray[np.int32]:
    return np.empty(shape, np.int32)


# --- what the names mean ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", WAVES)
def test_every_thread_of_every_block_runs_once_and_knows_its_place(arch: str) -> None:
    kernel = program(
        """
        KERNEL(128) void k(i32* y) {
            const int block = (block_z() * 3 + block_y()) * 2 + block_x();
            i32* const mine = y + (block * 128 + thread_index()) * 4;
            mine[0] = block;
            mine[1] = thread_index();
            mine[2] = lane_index();
            mine[3] = wave_index();
        }""",
        arch,
    )
    (y,) = kernel.run((2, 3, 4), 128, [i32(24, 128, 4)])
    thread, wave = np.arange(128), HIP_ARCHS[arch].wave
    np.testing.assert_array_equal(y[..., 0], np.arange(24)[:, None].repeat(128, 1))
    for i, wanted in enumerate((thread, thread % wave, thread // wave), 1):
        np.testing.assert_array_equal(y[..., i], np.broadcast_to(wanted, (24, 128)))


REVERSE: Final = """
KERNEL(1024) void k(const float* x, float* y) {
    SHARED float parts[1024];
    parts[thread_index()] = x[block_x() * 1024 + thread_index()];
    block_barrier();
    y[block_x() * 1024 + thread_index()] = parts[1023 - thread_index()];
}"""


def test_a_barrier_orders_shared_memory_of_the_largest_block() -> None:
    x = np.arange(3 * 1024, dtype=F32).reshape(3, 1024)
    (y,) = program(REVERSE).run((3,), 1024, [x, f32(3, 1024)], seeds=range(5))
    np.testing.assert_array_equal(y, x[:, ::-1])


@pytest.mark.parametrize("arch", WAVES)
def test_a_shuffle_takes_the_value_of_the_lane_across_the_mask(arch: str) -> None:
    kernel = program(
        """
        KERNEL(128) void k(const float* x, float* y) {
            UNROLL for (int mask = 1; mask < WAVE; ++mask)
                y[mask * 128 + thread_index()] = shuffle_xor(x[thread_index()], mask);
            y[thread_index()] = shuffle_xor(x[thread_index()], 0);
        }""",
        arch,
    )
    wave = HIP_ARCHS[arch].wave
    x = np.arange(128, dtype=F32)
    (y,) = kernel.run((1,), 128, [x, f32(wave, 128)])
    np.testing.assert_array_equal(y, x[np.arange(128) ^ np.arange(wave)[:, None]])


MULTIPLY: Final = """
KERNEL(WAVE) void k(const u32x4* x, const u32x4* w, float* y, int steps) {
    constexpr int STRIDE = 24;  // 16 k and padding
    SHARED u16 x_tile[16 * STRIDE];
    SHARED u16 w_tile[16 * STRIDE];
    accumulator c = zero_accumulator();
    for (int step = 0; step < steps; ++step) {
        block_barrier();
        for (int i = thread_index(); i < 32; i += WAVE) {
            *(u32x4*)(x_tile + i / 2 * STRIDE + i % 2 * 8) = x[step * 32 + i];
            *(u32x4*)(w_tile + i / 2 * STRIDE + i % 2 * 8) = w[step * 32 + i];
        }
        block_barrier();
        const fragment part = load_fragment(x_tile, STRIDE);
        c = multiply_add(part, load_fragment(w_tile, STRIDE), c);
    }
    UNROLL for (int i = 0; i < ACCUMULATOR_ELEMENTS; ++i)
        y[accumulator_row(i) * 16 + accumulator_column(i)] = c[i];
}"""


def bf16(x: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Return f32 numbers as bf16, their upper halves, and the values of these."""
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(F32).astype(np.float64)


@pytest.mark.parametrize("arch", MATRIX_ARCHS)
def test_each_matrix_unit_multiplies(arch: str) -> None:
    random = np.random.default_rng(1)
    x, x_exact = bf16(random.standard_normal((3, 16, 16), F32))
    w, w_exact = bf16(random.standard_normal((3, 16, 16), F32))
    (y,) = program(MULTIPLY, arch).run((1,), HIP_ARCHS[arch].wave, [x, w, f32(16, 16), 3])
    np.testing.assert_allclose(y, np.einsum("smk,snk->mn", x_exact, w_exact), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", MATRIX_ARCHS)
@pytest.mark.parametrize("name", ["accumulator_row(i)", "accumulator_column(i)"])
def test_a_wrong_layout_of_the_result_shows(arch: str, name: str) -> None:
    x = bf16(np.random.default_rng(2).standard_normal((1, 16, 16), F32))[0]
    wrong = program(MULTIPLY.replace(f"{name}", f"({name} ^ 1)"), arch)
    right = program(MULTIPLY, arch)
    wave = HIP_ARCHS[arch].wave
    (y,) = wrong.run((1,), wave, [x, x[:, ::-1], f32(16, 16), 1])
    (z,) = right.run((1,), wave, [x, x[:, ::-1], f32(16, 16), 1])
    assert not np.array_equal(y, z)


def test_every_half_is_its_f32() -> None:
    kernel = program("""
        KERNEL(256) void k(const u16* x, float* y) {
            const int i = block_x() * 256 + thread_index();
            y[i] = half_to_f32(x[i]);
        }""")
    x = np.arange(65536, dtype=np.uint16)
    (y,) = kernel.run((256,), 256, [x, f32(65536)])
    wanted = x.view(np.float16).astype(F32)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(wanted))


def test_f32_is_rounded_to_half_as_ieee_says() -> None:
    kernel = program("""
        KERNEL(256) void k(const float* x, u16* y) {
            const int i = block_x() * 256 + thread_index();
            y[i] = f32_to_half(x[i]);
        }""")
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(F32)
    finite = halves[np.isfinite(halves)]
    ties = np.sort(finite)[:-1] + np.diff(np.sort(finite)) / 2
    edges = np.array([65519.996, 65520, 2.0**-25, 2.0**-24, 1e-40, 3e38], F32)
    values = np.concatenate([ties, edges, -edges]).astype(F32)
    near = [np.nextafter(values, F32(np.inf)), np.nextafter(values, F32(-np.inf))]
    x = np.concatenate([halves, values, *near, np.full(1024, np.nan, F32)])
    x = x[: len(x) // 256 * 256]
    arguments = [x, np.empty(len(x), np.uint16)]
    (y,) = kernel.run((len(x) // 256,), 256, arguments, complete=False)  # the result may be any NaN
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    is_nan = np.isnan(wanted)
    np.testing.assert_array_equal(y[~is_nan], wanted.view(np.uint16)[~is_nan])
    assert np.isnan(y.view(np.float16)[is_nan]).all()


def test_dot4_adds_four_products_of_signed_bytes() -> None:
    kernel = program("""
        KERNEL(64) void k(const i32* a, const i32* b, i32* y) {
            y[thread_index()] = dot4(a[thread_index()], b[thread_index()], -5);
        }""")
    a, b = np.random.default_rng(3).integers(-128, 128, (2, 64, 4)).astype(np.int8)
    a[0], b[0] = -128, -128
    (y,) = kernel.run((1,), 64, [a.view(np.int32), b.view(np.int32), i32(64)])
    np.testing.assert_array_equal(y, (a.astype(int) * b).sum(1) - 5)


def test_the_other_functions() -> None:
    kernel = program("""
        KERNEL(32) void k(const u32x4* words, float* y, float scale, int n, i64 big) {
            const u32x4 word = stream_16(words);
            float* const mine = y + thread_index() * 9;
            for (int b = 0; b < 4; ++b) mine[b] = byte_minus(word[1], b, 0.0f);
            mine[4] = fma_f32(scale, scale, -scale);
            mine[5] = abs_f32(-scale);
            mine[6] = sqrt_f32(scale);
            mine[7] = as_f32(as_u32(scale) + 1u) + as_f32(as_i32(scale) - 1);
            mine[8] = (float)(big >> 32) + (float)n;
        }""")
    words = np.array([0, 0x80FF017F, 0, 0], np.uint32)
    scale = F32(1.1)
    (y,) = kernel.run((1,), 32, [words, f32(32, 9), scale, -7, 3 << 32])
    exact = np.float64(scale)
    wanted = np.array([127, 1, 255, 128, exact * exact - exact, exact, np.sqrt(exact)], F32)
    np.testing.assert_array_equal(y[:, :7], np.broadcast_to(wanted, (32, 7)))
    np.testing.assert_array_equal(
        y[:, 7], np.nextafter(scale, F32(2)) + np.nextafter(scale, F32(0))
    )
    np.testing.assert_array_equal(y[:, 8], np.full(32, -4, F32))


# --- what a kernel may not do ----------------------------------------------------------------


COPY: Final = """
KERNEL(64) void k(const float* x, float* y, int n) {
    const int i = block_x() * 64 + thread_index();
    if (i < n) y[i] = x[i];
}"""


def copy(n: int, size: int, **options: Any) -> NDArray[np.float32]:
    """Copy x of `size` elements to y, by a kernel whose argument is `n`."""
    x = np.arange(size, dtype=F32)
    (y,) = program(COPY).run((2,), 64, [x, f32(size), n], **options)
    np.testing.assert_array_equal(y, x)
    return y


@pytest.mark.parametrize("low_guard", [False, True])
@pytest.mark.parametrize("size", [64, 99, 100])
def test_a_kernel_may_use_all_of_its_arrays(size: int, low_guard: bool) -> None:
    copy(size, size, low_guard=low_guard)


def test_a_read_beyond_the_end() -> None:
    with pytest.raises(KernelFaultError, match=r"reads at byte 400 of x, which has 400"):
        copy(101, 100)


@pytest.mark.parametrize("guard", [{}, {"alignments": {"x": 4}}])
def test_a_read_between_the_end_and_the_alignment(guard: dict[str, Any]) -> None:
    """99 floats end 4 bytes before the guard, unless they may begin at any multiple of 4."""
    kernel = program(COPY.replace("y[i] = x[i]", "y[i] = x[i + 1]"))
    arguments: list[Any] = [np.zeros(99, F32), f32(99), 99]
    if guard:
        with pytest.raises(KernelFaultError, match="reads at byte 396 of x"):
            kernel.run((2,), 64, arguments, **guard)
    else:
        (y,) = kernel.run((2,), 64, arguments)
        assert np.isnan(y[98])


def fails(
    message: str, body: str, arguments: list[Any], arch: str = "gfx1030", **options: Any
) -> None:
    """Check that one block of 64 threads of `body` ends with `message`."""
    with pytest.raises(KernelFaultError, match=message):
        program(body, arch).run((1,), 64, arguments, **options)


def test_a_read_before_the_start() -> None:
    body = COPY.replace("x[i]", "x[i - 1]")
    message = r"block \(0, 0, 0\), thread 0: reads at byte -4 of x, which has 256"
    fails(message, body, [np.zeros(64, F32), f32(64), 64], low_guard=True)


def test_a_write_beyond_the_end() -> None:
    body = COPY.replace("y[i]", "y[i + 4]")
    fails(r"writes at byte 2\d\d of y, which has 256", body, [np.zeros(64, F32), f32(64), 64])


def test_a_write_between_the_end_and_the_alignment() -> None:
    body = COPY.replace("i < n) y[i]", "i <= n) y[i]")
    fails(r"wrote at byte 244 of y, which has 244", body, [np.zeros(64, F32), f32(61), 61])


def test_a_write_to_an_input() -> None:
    body = COPY.replace("y[i] = x[i]", "((float*)x)[i] = y[i] = 1.0f")
    fails(r"writes at byte \d+ of x, which is an input", body, [np.zeros(64, F32), f32(64), 64])


def test_an_output_that_is_not_written() -> None:
    message = r"3 of 8 elements of y were never written, first \[1, 1\]"
    fails(message, COPY, [np.zeros(64, F32), f32(2, 4), 5])
    (y,) = program(COPY).run((1,), 64, [np.zeros(64, F32), f32(2, 4), 5], complete=False)
    assert np.isnan(y[1, 1:]).all()


def test_a_missing_barrier() -> None:
    body = REVERSE.replace("block_barrier();", "")
    x = np.arange(1024, dtype=F32)
    with pytest.raises(KernelFaultError, match=r"of y depends on the order of threads"):
        program(body).run((1,), 1024, [x, f32(1024)])
    (y,) = program(body).run((1,), 1024, [x, f32(1024)], seeds=(1,))
    assert 0 < np.isnan(y).sum() < 1024


def test_a_missing_barrier_before_shared_memory_is_used_again() -> None:
    body = """
    KERNEL(64) void k(float* y) {
        SHARED float parts[64];
        float sum = 0.0f;
        for (int step = 0; step < 3; ++step) {
            parts[thread_index()] = (float)(step * 64 + thread_index());
            block_barrier();
            sum += parts[63 - thread_index()];
            FENCE;
        }
        y[thread_index()] = sum;
    }"""
    fails("depends on the order of threads", body.replace("FENCE", ""), [f32(64)])
    (y,) = program(body.replace("FENCE", "block_barrier()")).run((1,), 64, [f32(64)])
    np.testing.assert_array_equal(y, np.arange(63, -1, -1) * 3 + 192)


def test_blocks_that_depend_on_each_other() -> None:
    body = "KERNEL(32) void k(int* y) { if (thread_index() == 0) y[0] = block_x(); }"
    with pytest.raises(KernelFaultError, match="of y depends on the order of threads"):
        program(body).run((50,), 32, [i32(1)])


def test_shared_memory_holds_nothing_at_the_start_of_a_block() -> None:
    body = """
    KERNEL(32) void k(float* y) {
        SHARED float parts[32];
        y[block_x() * 32 + thread_index()] = parts[thread_index()];
        block_barrier();
        parts[thread_index()] = 1.0f;
    }"""
    (y,) = program(body).run((3,), 32, [f32(3, 32)])
    assert np.isnan(y).all()


# Each thread copies 16 bytes, which another one reads.
COPIES = """
KERNEL(32) void k(const float* x, float* y) {
    SHARED u32x4 parts[32];
    Copy copy;
    begin_copy(copy, &parts[thread_index()], (const u32x4*)x + thread_index());
    end_copy(copy, &parts[thread_index()]);
    close_copies();
    await_copies<0>();
    block_barrier();
    ((u32x4*)y)[thread_index()] = parts[31 - thread_index()];
}"""


@pytest.mark.parametrize("arch", ["gfx1100", "sm_80"])
def test_copies_are_there_once_they_are_awaited(arch: str) -> None:
    x = np.arange(128, dtype=F32).reshape(32, 4)
    (y,) = program(COPIES, arch).run((1,), 32, [x, f32(32, 4)], seeds=range(5))
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    await_copies<0>();\n", "", "it ended and did not await what it copies"),
        ("    close_copies();\n", "", "it ended and did not await what it copies"),
        ("await_copies<0>", "await_copies<1>", "it ended and did not await what it copies"),
        (
            "await_copies<0>();\n    block_barrier();",
            "block_barrier();\n    await_copies<0>();",
            "depends on the order of threads|NaN",
        ),
    ],
)
def test_faults_of_copies(old: str, new: str, message: str) -> None:
    assert old in COPIES
    kernel = program(COPIES.replace(old, new), "sm_80")
    with pytest.raises(KernelFaultError, match=message):
        kernel.run((1,), 32, [np.zeros((32, 4), F32), f32(32, 4)], seeds=range(9))


# The sum of one number from each of four blocks; every block stores it for another thread.
CLUSTER = """
extern "C" {
extern const int host_cluster_blocks;
const int host_cluster_blocks = 4;
}
KERNEL(32) CLUSTER(4) void k(const float* x, float* y) {
    SHARED float received[4];
    SHARED u64 arrived;
    begin_cluster(&arrived, 3 * 4);
    const int rank = block_x() % 4;
    await_cluster();
    if (thread_index() < 4) {
        if (thread_index() == rank) received[rank] = x[block_x()];
        else send(received + rank, &arrived, thread_index(), x[block_x()]);
    }
    block_barrier();
    await_sent(&arrived);
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += received[i];
    y[block_x() * 32 + thread_index()] = sum;
}"""


def test_blocks_of_a_cluster_send_each_other_numbers() -> None:
    x = np.arange(8, dtype=F32) ** 2
    (y,) = program(CLUSTER, "sm_90").run((8, 2), 32, [x, f32(8, 32)], seeds=range(5))
    np.testing.assert_array_equal(y, np.repeat(x.reshape(2, 4).sum(1), 128).reshape(8, 32))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3 * 4)", "4 * 4)", "waits in await_sent at line .* for 16 bytes; 12 have arrived"),
        ("3 * 4)", "2 * 4)", "send at line .* of more than the 8 bytes that block . expects"),
        ("    await_cluster();", "", "which expects nothing yet"),
        ("begin_cluster(&arrived", "if (block_x() > 0) begin_cluster(&arrived", "not all threads"),
        (
            "&arrived, thread_index(), x",
            "&arrived, 1 + thread_index(), x",
            "to block 4 of a cluster",
        ),
        ("    await_sent(&arrived);", "", "depends on the order of threads|NaN"),
    ],
)
def test_faults_of_clusters(old: str, new: str, message: str) -> None:
    assert old in CLUSTER
    x = np.arange(4, dtype=F32)
    kernel = program(CLUSTER.replace(old, new), "sm_90")
    with pytest.raises(KernelFaultError, match=message):
        kernel.run((4,), 32, [x, f32(4, 32)], seeds=range(9))


def test_a_grid_is_whole_clusters() -> None:
    kernel = program(CLUSTER, "sm_90")
    with pytest.raises(KernelFaultError, match="6 blocks on its x axis is no whole number"):
        kernel.run((6,), 32, [np.zeros(6, F32), f32(6, 32)])


def test_an_index_beyond_a_shared_array() -> None:
    body = REVERSE.replace("parts[1023 -", "parts[1024 -")
    fails(r"line \d+, column \d+: an index beyond its array", body.replace("1024)", "64)"),
          [np.zeros(1024, F32), f32(1024)])  # fmt: skip


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        ("float* const", "an access beyond the array that a pointer came from"),
        ("float* volatile", "reads beyond the end of shared memory"),  # the array is not known
    ],
)
def test_a_pointer_beyond_shared_memory(pointer: str, message: str) -> None:
    body = """
    KERNEL(64) void k(float* y, int distance) {
        SHARED float parts[64];
        POINTER at = parts;
        y[thread_index()] = at[thread_index() + distance];
    }"""
    fails(message, body.replace("POINTER", pointer), [f32(64), 1024])


def test_a_divergent_shuffle() -> None:
    body = "KERNEL(64) void k(float* y) { if (thread_index() % 2) y[0] = shuffle_xor(1.0f, 1); }"
    fails(r"waits in shuffle_xor at line \d+, but thread \d+ has ended", body, [f32(1)])


@pytest.mark.parametrize("arch", WAVES)
def test_one_shuffle_on_two_ways(arch: str) -> None:
    """Check that both branches call the same function, so that the line is the same."""
    body = """
    DEVICE float neighbour(float x) { return shuffle_xor(x, 1); }
    KERNEL(64) void k(const float* x, float* y) {
        const int i = thread_index();
        if (x[i] > 0.0f) y[i] = neighbour(x[i]); else y[i] = neighbour(-x[i]);
    }"""
    x = np.ones(64, F32)
    (y,) = program(body, arch).run((1,), 64, [x, f32(64)])  # waves agree
    np.testing.assert_array_equal(y, x)
    x[1] = -1
    fails("in shuffle_xor at line .*, reached another way", body, [x, f32(64)], arch)


def test_lanes_that_shuffle_across_different_masks() -> None:
    body = "KERNEL(64) void k(float* y) { y[0] = shuffle_xor(1.0f, thread_index() % 2); }"
    fails(r"shuffle_xor at line \d+ with a mask of [01], but thread \d+ with [01]", body, [f32(1)])


def test_a_mask_of_another_wave() -> None:
    body = "KERNEL(64) void k(float* y) { y[0] = shuffle_xor(1.0f, 32); }"
    fails("with a mask of 32 in a wave of 32", body, [f32(1)])


def test_a_matrix_product_that_not_all_lanes_reach() -> None:
    body = MULTIPLY.replace("c = multiply_add", "if (lane_index() < 40) c = multiply_add")
    x = np.zeros((1, 16, 16), np.uint16)
    fails("waits in multiply_add", body, [x, x, f32(16, 16), 1], "gfx90a")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("if (i < 60) block_barrier();", "waits in block_barrier .* but thread 6[0-3] has ended"),
        ("if (i == 7) return; block_barrier();", "waits in block_barrier .* thread 7 has ended"),
        ("if (i < 9) block_barrier(); else {\nblock_barrier(); }", "in block_barrier at line"),
        ("if (i < 32) shuffle_xor(0, 1); else block_barrier();", "in block_barrier at line"),
    ],
)
def test_a_barrier_that_not_all_threads_reach(way: str, message: str) -> None:
    body = f"KERNEL(64) void k(int* y) {{ const int i = thread_index(); y[i] = i; {way} }}"
    fails(message, body, [i32(64)])


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("(int)stream_16((const u8*)x + 4)[0]", "alignment"),
        ("x[0] << (n - 3)", "a shift"),
        ("x[0] + n * 0x10000000", "a signed product overflows"),
        ("x[0] / (n - 35)", "a division by zero"),
        ("(int)(1e10f * (float)n)", "a float that its integer type cannot hold"),
    ],
)
def test_undefined_behaviour(expression: str, what: str) -> None:
    body = f"KERNEL(64) void k(const i32* x, int* y, int n) {{\n y[0] = {expression}; }}"
    fails(rf"line \d+, column \d+: .*{what}", body, [np.zeros(64, np.int32), i32(1), 35])


def test_a_local_variable_that_is_not_set() -> None:
    body = """
    KERNEL(64) void k(float* y, int n) {
        float x[2];
        for (int i = 0; i < n; ++i) x[i] = 0.0f;
        y[thread_index()] = x[1];
    }"""
    (y,) = program(body).run((1,), 64, [f32(64), 1])
    assert np.isnan(y).all()


def test_a_stack_overflow() -> None:
    body = """
    KERNEL(64) void k(int* y, int n) {
        volatile int big[20000];
        for (int i = 0; i < 20000; ++i) big[i] = n;
        y[thread_index()] = big[n];
    }"""
    fails("its stack of 64 KiB is full", body, [i32(64), 3])


def test_an_address_of_nothing() -> None:
    body = "KERNEL(64) void k(int* y, i64 at) { y[0] = *(const int*)at; }"
    fails("reads at 0x1000, which is in no argument", body, [i32(1), 4096])


def test_a_kernel_without_end() -> None:
    body = "KERNEL(64) void k(volatile int* y) { for (;;) y[0] = 1; }"
    fails("did not end within 0.5 s", body, [i32(1)], timeout_s=0.5)


def test_a_launch_that_the_kernel_is_not_made_for() -> None:
    with pytest.raises(KernelFaultError, match="with 32 threads per block, but made for 64"):
        program(COPY).run((1,), 32, [np.zeros(1, F32), f32(1), 1])
    body = COPY.replace("64", "48")
    with pytest.raises(KernelFaultError, match="48 threads are no whole number of waves of 32"):
        program(body).run((1,), 48, [np.zeros(1, F32), f32(1), 1])


# --- the harness itself ----------------------------------------------------------------------


def test_parameters_are_read_from_the_definition() -> None:
    text = "void k(int a);\nKERNEL(64) void k(\n    const u8* __restrict__ w, float*y,\n  i64 m) {}"
    assert declared_parameters(text, "k") == (
        Parameter("const u8*", "w"),
        Parameter("float*", "y"),
        Parameter("i64", "m"),
    )
    with pytest.raises(ValueError, match=r"no kernel `void other\(...\)`"):
        declared_parameters(text, "other")


def test_a_trampoline_in_the_text_is_used() -> None:
    call = "k(*(const float**)a[0], *(float**)a[1], 1);"
    body = f'{COPY}\nextern "C" void k_host(void** a) {{ {call} }}'
    (y,) = program(body).run((2,), 64, [np.ones(2, F32), f32(2), 2], complete=False)
    assert y[0] == 1
    assert np.isnan(y[1])


def test_arguments_must_be_what_the_kernel_takes() -> None:
    kernel = program(COPY)
    with pytest.raises(ValueError, match="2 arguments for 3 parameters"):
        kernel.run((1,), 64, [f32(1), f32(1)])
    with pytest.raises(TypeError, match="n is a int of the kernel, not an array"):
        kernel.run((1,), 64, [f32(1), f32(1), f32(1)])
    with pytest.raises(TypeError, match="y is an array of the kernel, not 3"):
        kernel.run((1,), 64, [f32(1), 3, 1])


def test_text_that_does_not_compile_or_warns_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unused variable"):
        program("KERNEL(64) void k(int* y) { int z; y[0] = 1; }")
