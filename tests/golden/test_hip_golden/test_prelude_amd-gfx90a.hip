// Prelude for AMD: the names that every kernel uses, made from compiler builtins alone.
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

// hiprtc defines macros of its own.
#undef KERNEL
#undef DEVICE
#undef SHARED
#undef UNROLL
#undef WAVE
// With the exact size of a block the compiler uses all registers that its threads can have.
#define KERNEL(block_size)                    \
    extern "C" __attribute__((global))        \
    __attribute__((amdgpu_flat_work_group_size(block_size, block_size)))
#define DEVICE [[maybe_unused]] static inline __attribute__((device, always_inline))
#define SHARED __attribute__((shared, aligned(16)))
#define UNROLL _Pragma("clang loop unroll(full)")

constexpr int WAVE = 64;

DEVICE int thread_index() { return (int)__builtin_amdgcn_workitem_id_x(); }
DEVICE int lane_index() { return thread_index() & (WAVE - 1); }
// The same value in all lanes: the scalar unit computes and loads what depends on it alone.
DEVICE int wave_index() { return __builtin_amdgcn_readfirstlane(thread_index() / WAVE); }
DEVICE int block_x() { return (int)__builtin_amdgcn_workgroup_id_x(); }
DEVICE int block_y() { return (int)__builtin_amdgcn_workgroup_id_y(); }
DEVICE int block_z() { return (int)__builtin_amdgcn_workgroup_id_z(); }

// s_barrier does not order memory; the fences do.
DEVICE void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

DEVICE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
DEVICE i32 as_i32(float x) { return __builtin_bit_cast(i32, x); }
DEVICE float as_f32(u32 x) { return __builtin_bit_cast(float, x); }
DEVICE float as_f32(i32 x) { return __builtin_bit_cast(float, x); }

// DPP (data-parallel primitives) moves data inside a row of 16 lanes with the vector ALU. Where it cannot,
// lanes exchange through the LDS crossbar, which takes several times as long.
enum : int {
    // of four lanes: the lane that each one reads, two bits for each
    DPP_QUAD_1_0_3_2 = 1 | 0 << 2 | 3 << 4 | 2 << 6,
    DPP_QUAD_2_3_0_1 = 2 | 3 << 2 | 0 << 4 | 1 << 6,
    DPP_QUAD_3_2_1_0 = 3 | 2 << 2 | 1 << 4 | 0 << 6,
    DPP_ROW_ROTATED_BY_8 = 0x128,
    DPP_HALF_ROW_MIRRORED = 0x141,  // lane l reads lane l ^ 7
    DPP_ALL = 0xF,  // no row and no bank of lanes is left out
};
// Controls must be literals: the switch is on a constant mask and leaves one case.
DEVICE float shuffle_xor(float value, int mask) {
    const i32 x = as_i32(value);
    switch (mask) {
        case 1: return as_f32(__builtin_amdgcn_mov_dpp(x, DPP_QUAD_1_0_3_2, DPP_ALL, DPP_ALL, true));
        case 2: return as_f32(__builtin_amdgcn_mov_dpp(x, DPP_QUAD_2_3_0_1, DPP_ALL, DPP_ALL, true));
        case 4: {  // l ^ 7 ^ 3
            const i32 mirrored = __builtin_amdgcn_mov_dpp(x, DPP_HALF_ROW_MIRRORED, DPP_ALL, DPP_ALL, true);
            return as_f32(__builtin_amdgcn_mov_dpp(mirrored, DPP_QUAD_3_2_1_0, DPP_ALL, DPP_ALL, true));
        }
        case 8: return as_f32(__builtin_amdgcn_mov_dpp(x, DPP_ROW_ROTATED_BY_8, DPP_ALL, DPP_ALL, true));
        case 16: {
            constexpr int XOR_16 = 16 << 10 | 0x1F;  // of the lane's bits: five that are kept, then those flipped
            return as_f32(__builtin_amdgcn_ds_swizzle(x, XOR_16));
        }
        default: return as_f32(__builtin_amdgcn_ds_bpermute((lane_index() ^ mask) * 4, x));
    }
}

DEVICE float fma_f32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float abs_f32(float x) { return __builtin_fabsf(x); }
// Correctly rounded, with every compiler alike. v_sqrt_f32 errs by up to 1 ulp and takes denormals for 0:
// so x is scaled, and the residuals, which fma gives exactly, choose among the neighbours of the root.
DEVICE float sqrt_f32(float x) {
    const bool small = x < 0x1p-96f;
    const float scaled = small ? x * 0x1p+32f : x;
    const float near = __builtin_amdgcn_sqrtf(scaled);
    const float below = as_f32(as_u32(near) - 1);
    const float above = as_f32(as_u32(near) + 1);
    float root = fma_f32(-below, near, scaled) <= 0.0f ? below : near;
    root = fma_f32(-above, near, scaled) > 0.0f ? above : root;
    return small ? root * 0x1p-16f : root;
}

DEVICE float half_to_f32(u16 x) { return (float)__builtin_bit_cast(_Float16, x); }
DEVICE u16 f32_to_half(float x) { return __builtin_bit_cast(u16, (_Float16)x); }
// Byte b of a word, 0 the lowest, minus a whole number. One instruction converts the byte. If this were
// arithmetic, LLVM would move masks and subtractions of callers before the conversion, which takes one
// or two instructions more for each byte.
DEVICE float byte_minus(u32 word, int b, float zero) {
    float x;
    switch (b) {
        case 0: asm("v_cvt_f32_ubyte0 %0, %1" : "=v"(x) : "v"(word)); break;
        case 1: asm("v_cvt_f32_ubyte1 %0, %1" : "=v"(x) : "v"(word)); break;
        case 2: asm("v_cvt_f32_ubyte2 %0, %1" : "=v"(x) : "v"(word)); break;
        default: asm("v_cvt_f32_ubyte3 %0, %1" : "=v"(x) : "v"(word)); break;
    }
    return x - zero;
}

DEVICE int at_run_time(int number) { return number; }  // on NVIDIA: hidden from the compiler

// Copies into shared memory, which run while the code between their begin and their end does.
struct Copy { u32x4 held; };
DEVICE void begin_copy(Copy& copy, u32x4*, const u32x4* from) { copy.held = *from; }
DEVICE void end_copy(const Copy& copy, u32x4* shared) { *shared = copy.held; }
DEVICE void close_copies() {}
template <int LATER>
DEVICE void await_copies() {}

// Two f16 numbers in a word: the first one is the low half.
typedef _Float16 f16x2 __attribute__((ext_vector_type(2)));
DEVICE u32 to_halves(float first, float second) {
    return __builtin_bit_cast(u32, f16x2{(_Float16)first, (_Float16)second});
}
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
#pragma clang fp contract(fast)
    return __builtin_bit_cast(
        u32, __builtin_bit_cast(f16x2, a) * __builtin_bit_cast(f16x2, b) + __builtin_bit_cast(f16x2, c));
}

// c + the sum of four products of signed bytes.
DEVICE i32 dot4(i32 a, i32 b, i32 c) {
    return __builtin_amdgcn_sdot4(a, b, c, false);
}

// The compiler loads what is used below after `value` is known: what it loads earlier takes registers.
DEVICE void settle(float& value) { asm volatile("" : "+v"(value) : : "memory"); }

// 16 bytes that are read once, so that caches need not keep them.
DEVICE u32x4 stream_16(const void* p) { return __builtin_nontemporal_load((const u32x4*)p); }

typedef short bf16x4 __attribute__((ext_vector_type(4)));
DEVICE f32x4 mfma_16x16x16(bf16x4 a, bf16x4 b, f32x4 c) {
    return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a, b, c, 0, 0, 0);
}
typedef u32 u32x2 __attribute__((ext_vector_type(2)));
DEVICE f32x4 mfma_16x16x16_f16(u32x2 a, u32x2 b, f32x4 c) {
    typedef _Float16 f16x4 __attribute__((ext_vector_type(4)));
    return __builtin_amdgcn_mfma_f32_16x16x16f16(
        __builtin_bit_cast(f16x4, a), __builtin_bit_cast(f16x4, b), c, 0, 0, 0);
}

// MFMA of 16x16x16 on f16, by a wave of 64. Two instructions multiply a unit. Which lane has what:
//
//          x, and w with its columns             the result
//          for rows: quarters of a unit          columns of the panel
//             0    1    2    3                      0    1  …  15
//    row  0   0   16   32   48          rows  0…3   0    1  …  15
//    row  1   1   17   33   49                4…7  16   17  …  31
//       …                                     8…11 32   33  …  47
//    row 15  15   31   47   63               12…15 48   49  …  63
//
// Quarter q of a unit is k = 4 q … 4 q + 3 and 16 + 4 q … 16 + 4 q + 3: the nibbles of one word of Q4_0.
// The order of k does not matter, as x and w agree.
constexpr int TILE_ROWS = 16;  // of x, in one instruction
constexpr int LANE_COLUMNS = 1;  // of a panel
constexpr int LANE_ROWS = 4;  // of the result, in each of these columns
constexpr int PARTS = 4;  // lanes that share a unit
typedef f32x4 lane_sums;

DEVICE int lane_part() { return lane_index() / 16; }
DEVICE int lane_column(int) { return lane_index() % 16; }
DEVICE int lane_row(int v) { return lane_index() / 16 * 4 + v; }
DEVICE int lane_x_row() { return lane_index() % 16; }

// sums += x w over a unit
DEVICE void multiply_unit(const u32x4 (&x)[1], const u32x4 (&w)[1][1], lane_sums& sums) {
    UNROLL for (int i = 0; i < 4; i += 2)
        sums = mfma_16x16x16_f16(u32x2{x[0][i], x[0][i + 1]}, u32x2{w[0][0][i], w[0][0][i + 1]}, sums);
}

// The second term of x is multiplied by 2^11, so that it is seldom a denormal f16, which are lost here.
constexpr float REST_STEP = 0x1p-11f;