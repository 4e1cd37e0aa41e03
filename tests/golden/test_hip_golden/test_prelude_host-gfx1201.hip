// Prelude for tests without a GPU. Every GPU thread is a coroutine of the program that links this text
// and defines the functions called host_…. Faults that a GPU would hide are errors here.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;
typedef u32 u32x4 __attribute__((ext_vector_type(4)));
typedef float f32x4 __attribute__((ext_vector_type(4)));

#define KERNEL(block_size)                             \
    extern "C" {                                       \
    extern const int host_block_size;                  \
    const int host_block_size = block_size;            \
    }                                                  \
    extern "C"
#define DEVICE [[maybe_unused]] static inline __attribute__((always_inline))
// In a section of its own, which is poisoned before each block.
#define SHARED static __attribute__((section("host_shared"), aligned(16)))
#define UNROLL
// A call where lanes meet: the optimiser may neither copy it nor merge it with another.
#define MEETING __attribute__((convergent, nomerge))

constexpr int WAVE = 32;

extern "C" {
extern const int host_wave;
const int host_wave = WAVE;
extern int host_thread, host_block[3];
MEETING void host_barrier(int line);
MEETING float host_shuffle_xor(float value, int mask, int line);
}

DEVICE int thread_index() { return host_thread; }
DEVICE int lane_index() { return host_thread % WAVE; }
DEVICE int wave_index() { return host_thread / WAVE; }
DEVICE int block_x() { return host_block[0]; }
DEVICE int block_y() { return host_block[1]; }
DEVICE int block_z() { return host_block[2]; }

DEVICE void block_barrier(int line = __builtin_LINE()) { host_barrier(line); }

DEVICE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
DEVICE i32 as_i32(float x) { return __builtin_bit_cast(i32, x); }
DEVICE float as_f32(u32 x) { return __builtin_bit_cast(float, x); }
DEVICE float as_f32(i32 x) { return __builtin_bit_cast(float, x); }

DEVICE float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
    return host_shuffle_xor(value, mask, line);
}

DEVICE float fma_f32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float abs_f32(float x) { return __builtin_fabsf(x); }
DEVICE float sqrt_f32(float x) { return __builtin_sqrtf(x); }

// f16 and f32 in integers, because not every CPU can convert. The mantissas differ by 13 bits and the
// biases of the exponents by 112.
constexpr u32 F16_SIGN = 0x8000, F16_INFINITY = 0x7C00, F16_QUIET_NAN = 0x7E00, F16_MANTISSA = 0x3FF;
constexpr u32 F32_SIGN = 0x80000000u, F32_INFINITY = 0x7F800000u;
DEVICE float half_to_f32(u16 x) {
    const u32 sign = (x & F16_SIGN) << 16;
    const u32 magnitude = (x & ~F16_SIGN) << 13;
    if (magnitude >= F16_INFINITY << 13) return as_f32(sign | F32_INFINITY | magnitude);
    return as_f32(sign | as_u32(as_f32(magnitude) * 0x1p112f));
}
DEVICE u16 f32_to_half(float x) {
    const u32 sign = as_u32(x) >> 16 & F16_SIGN;
    const u32 magnitude = as_u32(x) & ~F32_SIGN;
    if (magnitude > F32_INFINITY) return (u16)(sign | F16_QUIET_NAN | (magnitude >> 13 & F16_MANTISSA));
    if (as_f32(magnitude) >= 65520.0f) return (u16)(sign | F16_INFINITY);  // rounds to more than the largest f16
    if (as_f32(magnitude) < 0x1p-14f)  // denormal: adding 1/2 rounds to multiples of 2^-24
        return (u16)(sign | (as_u32(as_f32(magnitude) + 0.5f) - as_u32(0.5f)));
    const u32 is_odd = magnitude >> 13 & 1;  // a tie is rounded up where this is
    return (u16)(sign | (magnitude - (112u << 23) + 0xFFF + is_odd) >> 13);
}
DEVICE float byte_minus(u32 word, int b, float zero) { return (float)(word >> 8 * b & 0xFF) - zero; }

DEVICE int at_run_time(int number) { return number; }  // on NVIDIA: hidden from the compiler

struct Copy { u32x4 held; };
DEVICE void begin_copy(Copy& copy, u32x4*, const u32x4* from) { copy.held = *from; }
DEVICE void end_copy(const Copy& copy, u32x4* shared) { *shared = copy.held; }
DEVICE void close_copies() {}
template <int LATER>
DEVICE void await_copies() {}

// Two f16 numbers in a word: the first one is the low half.
DEVICE u32 to_halves(float first, float second) {
    return f32_to_half(first) | (u32)f32_to_half(second) << 16;
}
// The sum is rounded to f32 before it becomes f16: for whole numbers below 2^24 that changes nothing.
DEVICE float fma_half(u32 a, u32 b, u32 c) {
    return fma_f32(half_to_f32((u16)a), half_to_f32((u16)b), half_to_f32((u16)c));
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    return to_halves(fma_half(a, b, c), fma_half(a >> 16, b >> 16, c >> 16));
}

DEVICE i32 dot4(i32 a, i32 b, i32 c) {
    for (int i = 0; i < 4; ++i) c += (i8)(a >> 8 * i) * (i8)(b >> 8 * i);
    return c;
}

// The compiler loads what is used below after `value` is known: what it loads earlier takes registers.
DEVICE void settle(float& value) { asm volatile("" : "+m"(value) : : "memory"); }

DEVICE u32x4 stream_16(const void* p) { return *(const u32x4*)p; }

typedef short bf16x8 __attribute__((ext_vector_type(8)));
typedef float f32x8 __attribute__((ext_vector_type(8)));
extern "C" MEETING void host_wmma_gfx12_16x16x16(const void* a, const void* b, void* c, int line);
DEVICE f32x8 wmma_16x16x16(bf16x8 a, bf16x8 b, f32x8 c, int line = __builtin_LINE()) {
    host_wmma_gfx12_16x16x16(&a, &b, &c, line);
    return c;
}
extern "C" MEETING void host_wmma_gfx12_16x16x16_f16(const void* a, const void* b, void* c, int line);
DEVICE f32x8 wmma_16x16x16_f16(u32x4 a, u32x4 b, f32x8 c, int line = __builtin_LINE()) {
    host_wmma_gfx12_16x16x16_f16(&a, &b, &c, line);
    return c;
}

// WMMA of RDNA 4 on f16, by a wave of 32. Two instructions multiply a unit. Which lane has what:
//
//          x, and w with its columns             the result
//          for rows: quarters of a unit          columns of the panel
//             0, 1    2, 3                          0    1  …  15
//    row  0      0      16              rows  0…7   0    1  …  15
//    row  1      1      17                    8…15 16   17  …  31
//       …
//    row 15     15      31
//
// Quarter q of a unit is k = 4 q … 4 q + 3 and 16 + 4 q … 16 + 4 q + 3: the nibbles of one word of Q4_0.
// The order of k does not matter, as x and w agree.
constexpr int TILE_ROWS = 16;  // of x, in one instruction
constexpr int LANE_COLUMNS = 1;  // of a panel
constexpr int LANE_ROWS = 8;  // of the result, in each of these columns
constexpr int PARTS = 2;  // lanes that share a unit
typedef f32x8 lane_sums;

DEVICE int lane_part() { return lane_index() / 16; }
DEVICE int lane_column(int) { return lane_index() % 16; }
DEVICE int lane_row(int v) { return lane_index() / 16 * 8 + v; }
DEVICE int lane_x_row() { return lane_index() % 16; }

// sums += x w over a unit
DEVICE void multiply_unit(const u32x4 (&x)[2], const u32x4 (&w)[1][2], lane_sums& sums) {
    UNROLL for (int q = 0; q < 2; ++q) sums = wmma_16x16x16_f16(x[q], w[0][q], sums);
}
