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

constexpr int WAVE = 32;

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
        case 16:  // lane l of a row of 16 reads lane l of the other row: a nibble for each l
            return as_f32(
                (i32)__builtin_amdgcn_permlanex16(x, x, 0x76543210, 0xFEDCBA98, false, false));
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
    return __builtin_amdgcn_sudot4(true, a, true, b, c, false);
}

// The compiler loads what is used below after `value` is known: what it loads earlier takes registers.
DEVICE void settle(float& value) { asm volatile("" : "+v"(value) : : "memory"); }

// 16 bytes that are read once, so that caches need not keep them.
DEVICE u32x4 stream_16(const void* p) { return __builtin_nontemporal_load((const u32x4*)p); }

typedef short bf16x16 __attribute__((ext_vector_type(16)));
typedef float f32x8 __attribute__((ext_vector_type(8)));
DEVICE f32x8 wmma_16x16x16(bf16x16 a, bf16x16 b, f32x8 c) {
    return __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(a, b, c);
}
typedef u32 u32x8 __attribute__((ext_vector_type(8)));
DEVICE u32x8 join_words(u32x4 first, u32x4 second) {
    return __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7);
}
DEVICE f32x8 wmma_16x16x16_f16(u32x8 a, u32x8 b, f32x8 c) {
    typedef _Float16 f16x16 __attribute__((ext_vector_type(16)));
    return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(
        __builtin_bit_cast(f16x16, a), __builtin_bit_cast(f16x16, b), c);
}
// c + the sum of two products of f16; the instruction takes denormals for 0.
DEVICE float dot2_halves(u32 a, u32 b, float c) {
    return __builtin_amdgcn_fdot2(__builtin_bit_cast(f16x2, a), __builtin_bit_cast(f16x2, b), c, false);
}

// WMMA of RDNA 3 on f16, by a wave of 32. Two instructions multiply a unit. A lane has whole units:
// lanes 16…31 repeat what 0…15 have. Which lane has what:
//
//    x, and w with its columns for rows               the result
//    (w's keep their order)                           columns of the panel
//      the instruction's row    x's row    lanes         0    1  …  15
//               0                  0       0, 16
//               1                  8       1, 17      rows of x
//               2                  1       2, 18       0…7   0    1  …  15   (the instruction's even rows)
//               …                                     8…15  16   17  …  31   (its odd rows)
//              15                 15      15, 31
//
// x's rows change places so that a lane's results are of neighbouring rows.
constexpr int TILE_ROWS = 16;  // of x, in one instruction
constexpr int LANE_COLUMNS = 1;  // of a panel
constexpr int LANE_ROWS = 8;  // of the result, in each of these columns
constexpr int PARTS = 1;  // lanes that share a unit
typedef f32x8 lane_sums;

DEVICE int lane_part() { return 0; }
DEVICE int lane_column(int) { return lane_index() % 16; }
DEVICE int lane_row(int v) { return lane_index() / 16 * 8 + v; }
DEVICE int lane_x_row() { return lane_index() % 2 * 8 + lane_index() % 16 / 2; }

// sums += x w over a unit
DEVICE void multiply_unit(const u32x4 (&x)[4], const u32x4 (&w)[1][4], lane_sums& sums) {
    UNROLL for (int q = 0; q < 4; q += 2)
        sums = wmma_16x16x16_f16(join_words(x[q], x[q + 1]), join_words(w[0][q], w[0][q + 1]), sums);
}
