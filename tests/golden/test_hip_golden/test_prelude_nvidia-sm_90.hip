// Prelude for HIP's NVIDIA platform: the names that every kernel uses. NVRTC knows CUDA's built-in
// functions, but has neither _Float16 nor clang's vector types.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

#undef KERNEL
#undef DEVICE
#undef SHARED
#undef UNROLL
#undef WAVE
#define KERNEL(...) extern "C" __global__ __launch_bounds__(__VA_ARGS__)
#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define SHARED __shared__ __align__(16)
#undef SHARED_AT_512
#define SHARED_AT_512 __shared__ __align__(512)
#define UNROLL _Pragma("unroll")

// The alignment makes the compiler load and store 16 bytes at a time.
template <typename element, int size>
struct alignas(16) vector {
    element elements[size];
    __device__ __forceinline__ element& operator[](int i) { return elements[i]; }
    __device__ __forceinline__ const element& operator[](int i) const { return elements[i]; }
};
typedef vector<u32, 4> u32x4;
typedef vector<float, 4> f32x4;

constexpr int WAVE = 32;

DEVICE int thread_index() { return (int)threadIdx.x; }
DEVICE int lane_index() { return thread_index() & (WAVE - 1); }
DEVICE int wave_index() { return thread_index() / WAVE; }
DEVICE int block_x() { return (int)blockIdx.x; }
DEVICE int block_y() { return (int)blockIdx.y; }
DEVICE int block_z() { return (int)blockIdx.z; }

DEVICE void block_barrier() { __syncthreads(); }

// Programmatic dependent launch: kernels of a stream that were launched so that they overlap.
DEVICE void await_grids_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void start_next_grid() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The same address: the compiler loads nothing from it above this line.
template <typename element>
DEVICE element* known_from_here(element* at) {
    asm volatile("" : "+l"(at) : : "memory");
    return at;
}

// Copies into shared memory, which run while the code between their begin and their end does. They are
// complete once they have been awaited.
struct Copy {};
DEVICE void begin_copy(Copy&, u32x4* shared, const u32x4* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((u32)__cvta_generic_to_shared(shared)), "l"(__cvta_generic_to_global(from))
                 : "memory");
}
DEVICE void end_copy(const Copy&, u32x4*) {}
// The copies begun since the last close are a group; all groups but the LATER last ones are awaited.
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATER>
DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory"); }
// Before a barrier: shows matrix units what this thread wrote into shared memory. They read by a path of
// their own, which a barrier does not order.
DEVICE void show_matrix_units() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The blocks of a cluster run at the same time and send numbers into each other's shared memory;
// `arrived` counts their bytes. (A barrier of the cluster that orders memory took 1 us on an H100: it
// waits for all loads and stores of a thread.)
#define CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
DEVICE u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE void begin_cluster(u64* arrived, u32 bytes) {
    if (thread_index() == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
                     "fence.mbarrier_init.release.cluster;\n\t"
                     "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :
                     : "r"(shared_address(arrived)), "r"(bytes)
                     : "memory");
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void await_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Another meeting of all threads of the cluster. It does not order memory: values read before are used.
DEVICE void meet_cluster() {
    block_barrier();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
DEVICE void send(float* to, u64* arrived, int block, float x) {
    asm volatile("{\n\t.reg .u32 there, count;\n\t"
                 "mapa.shared::cluster.u32 there, %0, %2;\n\t"
                 "mapa.shared::cluster.u32 count, %1, %2;\n\t"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [count];\n\t}"
                 :
                 : "r"(shared_address(to)), "r"(shared_address(arrived)), "r"(block), "r"(__float_as_uint(x))
                 : "memory");
}
DEVICE void await_sent(u64* arrived) {
    u32 done = 0;
    while (!done)
        asm volatile("{\n\t.reg .pred all;\n\t"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 all, [%1], 0;\n\t"
                     "selp.u32 %0, 1, 0, all;\n\t}"
                     : "=r"(done)
                     : "r"(shared_address(arrived))
                     : "memory");
}

DEVICE u32 as_u32(float x) { return __float_as_uint(x); }
DEVICE i32 as_i32(float x) { return __float_as_int(x); }
DEVICE float as_f32(u32 x) { return __uint_as_float(x); }
DEVICE float as_f32(i32 x) { return __int_as_float(x); }

DEVICE float shuffle_xor(float value, int mask) {
    constexpr u32 ALL_LANES = 0xFFFFFFFFu;
    return __shfl_xor_sync(ALL_LANES, value, mask);
}

DEVICE float fma_f32(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float abs_f32(float x) { return fabsf(x); }
DEVICE float sqrt_f32(float x) { return __fsqrt_rn(x); }

DEVICE float half_to_f32(u16 x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
DEVICE u16 f32_to_half(float x) {
    u16 narrow;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    return narrow;
}
// Byte b of a word, 0 the lowest, minus a whole number. Conversions run at a quarter of the rate of other
// instructions. So the byte becomes the lowest one of 2^23 as a float, and 2^23 is subtracted, too.
DEVICE float byte_minus(u32 word, int b, float zero) {
    constexpr u32 BITS_OF_2P23 = 0x4B000000u;
    constexpr u32 TOP_THREE_AND_BYTE = 0x7440u;  // bytes 7, 4, 4 of {word, 2^23}, and byte b as the lowest
    return as_f32(__byte_perm(word, BITS_OF_2P23, TOP_THREE_AND_BYTE | (u32)b)) - (0x1p+23f + zero);
}

// Two f16 numbers in a word: the first one is the low half.
DEVICE u32 to_halves(float first, float second) {
    u32 halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    return halves;
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 halves;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(halves) : "r"(a), "r"(b), "r"(c));
    return halves;
}

// c + the sum of four products of signed bytes.
DEVICE i32 dot4(i32 a, i32 b, i32 c) {
    i32 sum;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// The same number, hidden from the compiler: it unrolled loops whose length it knew, whatever their
// pragma said, to more than the instruction cache holds.
DEVICE int at_run_time(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// The compiler loads what is used below after `value` is known: what it loads earlier takes registers.
DEVICE void settle(float& value) { asm volatile("" : "+f"(value) : : "memory"); }

// 16 bytes that are read once, so that the L1 cache need not keep them.
DEVICE u32x4 stream_16(const void* p) {
    u32x4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 { %0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "l"(__cvta_generic_to_global(p)));
    return x;
}

typedef vector<float, 8> f32x8;
// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE u32x4 load_quarters(const u16* row) {
    u32x4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 { %0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
    return x;
}
DEVICE f32x4 mma_16x8x16(u32x4 a, u32 b0, u32 b1, f32x4 c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{ %0, %1, %2, %3}, { %4, %5, %6, %7}, { %8, %9}, { %0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    return c;
}
DEVICE f32x4 mma_16x8x16_f16(u32x4 a, u32 b0, u32 b1, f32x4 c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{ %0, %1, %2, %3}, { %4, %5, %6, %7}, { %8, %9}, { %0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    return c;
}

// mma.sync of 16x8x16 on f16, by a warp of 32: w has the place of the larger matrix. Two instructions
// multiply a unit. Which lane has what:
//
//          x: quarters of a unit     w: quarters of a unit      the result: rows of x
//             0    1    2    3          0    1    2    3          0, 1  2, 3  4, 5  6, 7
//    row  0   0    1    2    3          0    1    2    3          0     1     2     3    columns 0, 8
//    row  1   4    5    6    7          4    5    6    7          4     5     6     7            1, 9
//       …
//    row  7  28   29   30   31         28   29   30   31         28    29    30    31            7, 15
//
// Quarter q of a unit is k = 4 q … 4 q + 3 and 16 + 4 q … 16 + 4 q + 3: the nibbles of one word of Q4_0.
// The order of k does not matter, as x and w agree.
constexpr int TILE_ROWS = 8;  // of x, in one instruction
constexpr int LANE_COLUMNS = 2;  // of a panel
constexpr int LANE_ROWS = 2;  // of the result, in each of these columns
constexpr int PARTS = 4;  // lanes that share a unit
typedef f32x4 lane_sums;

DEVICE int lane_part() { return lane_index() % 4; }
DEVICE int lane_column(int c) { return lane_index() / 4 + 8 * c; }
DEVICE int lane_row(int v) { return lane_index() % 4 * 2 + v; }
DEVICE int lane_x_row() { return lane_index() / 4; }

// sums += x w over a unit
DEVICE void multiply_unit(const u32x4 (&x)[1], const u32x4 (&w)[2][1], lane_sums& sums) {
    UNROLL for (int i = 0; i < 4; i += 2)
        sums = mma_16x8x16_f16(
            u32x4{w[0][0][i], w[1][0][i], w[0][0][i + 1], w[1][0][i + 1]}, x[0][i], x[0][i + 1], sums);
}
