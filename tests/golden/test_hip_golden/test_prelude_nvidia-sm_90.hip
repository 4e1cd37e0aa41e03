// Prelude for HIP's NVIDIA platform: the names that every kernel stands on. NVRTC knows CUDA's
// built-in functions, but has neither _Float16 nor vector types of the language.
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
#define KERNEL(block_size) extern "C" __global__ __launch_bounds__(block_size)
#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define SHARED __shared__ __align__(16)
#define UNROLL _Pragma("unroll")

// Alignment makes the compiler load and store one in pieces of 16 bytes.
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

// Neighbouring blocks of a cluster run at the same time and read each other's shared memory.
#define CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
DEVICE float cluster_load(const float* shared, int block) {
    float x;
    asm volatile("{.reg .u32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at];}"
                 : "=f"(x)
                 : "r"((u32)__cvta_generic_to_shared(shared)), "r"(block)
                 : "memory");
    return x;
}

DEVICE u32 as_u32(float x) { return __float_as_uint(x); }
DEVICE i32 as_i32(float x) { return __float_as_int(x); }
DEVICE float as_f32(u32 x) { return __uint_as_float(x); }
DEVICE float as_f32(i32 x) { return __int_as_float(x); }

DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFF, value, mask);
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
// Byte b of a word, 0 the lowest, minus a small whole number. Conversions run at a quarter of the
// rate of other instructions: put the byte at the end of 2^23 as a float and subtract that too.
DEVICE float byte_minus(u32 word, int b, float zero) {
    return as_f32(__byte_perm(word, 0x4B000000u, 0x7440u | (u32)b)) - (8388608.0f + zero);
}

// Two f16 numbers in a word, the first is the low half.
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

// Whatever is loaded below is loaded after `value` is known: what is loaded ahead costs registers.
DEVICE void settle(float& value) { asm volatile("" : "+f"(value) : : "memory"); }

// 16 bytes that are read once: they need not push others out of the L1 cache.
DEVICE u32x4 stream_16(const void* p) {
    u32x4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 { %0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "l"(__cvta_generic_to_global(p)));
    return x;
}

typedef vector<float, 8> f32x8;
// Four 8x8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
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

// mma.sync of 16x8x16, a warp of 32. The four 8x8 quarters of an input are its fragment: rows 0…7
// and 8…15 at k 0…7, then both at k 8…15. In a quarter lane l holds row l / 4 at 2 (l % 4) + 0, 1.
// w's quarters of one row half are the instruction's second operand: two of them make 16 columns.
typedef u32x4 fragment;
typedef f32x8 accumulator;
constexpr int ACCUMULATOR_ELEMENTS = 8;

DEVICE fragment load_fragment(const u16* tile, int stride) {
    // Lanes 8 i … 8 i + 7 name the rows of quarter i.
    return load_quarters(tile + lane_index() % 16 * stride + lane_index() / 16 * 8);
}

DEVICE accumulator zero_accumulator() { return accumulator{}; }

// c[m][n] += sum over k of x[m][k] w[n][k]
DEVICE accumulator multiply_add(fragment x, fragment w, accumulator c) {
    const f32x4 left = mma_16x8x16(x, w[0], w[2], f32x4{c[0], c[1], c[2], c[3]});
    const f32x4 right = mma_16x8x16(x, w[1], w[3], f32x4{c[4], c[5], c[6], c[7]});
    return accumulator{left[0],  left[1],  left[2],  left[3],
                       right[0], right[1], right[2], right[3]};
}

DEVICE int accumulator_row(int i) { return lane_index() / 4 + i / 2 % 2 * 8; }
DEVICE int accumulator_column(int i) { return i / 4 * 8 + lane_index() % 4 * 2 + i % 2; }
