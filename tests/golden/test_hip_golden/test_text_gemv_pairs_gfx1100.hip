// product for hip:gfx1100, gemv_matrix, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_matrix:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a column
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int ROWS = 1;  // of x, which a block computes
constexpr int COLUMNS = 16;  // of the result, which a block computes

constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int UNIT_QUARTERS = 4;
constexpr int QUARTER = 8;  // UNIT / UNIT_QUARTERS: elements that a lane splits into terms
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUAD = 128;  // QUAD_UNITS · UNIT, elements
constexpr int QUADS = 4;  // ⌈K / QUAD⌉, of a column
static_assert(QUADS == (K + QUAD - 1) / QUAD, "the last quad of a column may be a part");

constexpr int WAVES_K = 4;  // BLOCK_SIZE / WAVE, waves that share the panel
static_assert(WAVES_K * WAVE == BLOCK_SIZE, "the waves are the whole block");

constexpr int TERMS = 2;  // f16 numbers that make up one x
constexpr int UNIT_ITEMS = 8;  // ROWS · TERMS · UNIT_QUARTERS, of 16 bytes

constexpr int STAGE_UNITS = 16;  // QUADS · QUAD_UNITS: shared memory holds all the x of a block
constexpr int STAGE_QUARTERS = 64;  // ROWS · STAGE_UNITS · UNIT_QUARTERS, which threads split into terms
constexpr int SCALES_AT = 2048;  // STAGE_UNITS · UNIT_ITEMS · 16 bytes
constexpr int ROUGH_AT = 2112;  // SCALES_AT + STAGE_UNITS · ROWS · 4 bytes
constexpr int ROOM_BYTES = 2128;  // ROUGH_AT + STAGE_UNITS · ROWS: x, and later the sums of the waves
constexpr int STAGED_BYTES = 2144;  // ROOM_BYTES + 16 for any_rough
constexpr int LDS_BYTES = 2144;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Four neighbouring floats at any float's address: one load where they are aligned.
DEVICE f32x4 load_four(const float* at) {
    if ((u64)at % 16 == 0) return *(const f32x4*)at;
    return f32x4{at[0], at[1], at[2], at[3]};
}

// Q4_0 [512, 96] in the layout `tiles16`.
struct Q4_0_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 128⌉, of a column
    static constexpr int QUAD_BYTES = 64;  // QUAD_UNITS · UNIT / 2, of quants
    static constexpr int QUAD_SCALES_BYTES = 8;  // QUAD_UNITS · 2
    static constexpr i64 D_AT = 24576;  // where its region begins

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }

    // What a lane has of a quad: words[i][u] is word lane_part() * LANE_QUARTERS + i of unit u. Word j of a unit has
    // elements 4 j…4 j + 3 in its low nibbles and 16 + 4 j…16 + 4 j + 3 in its high ones.
    struct Part {
        u32x4 words[LANE_QUARTERS];
        u32 d[2];  // the scales of the four units, as f16
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const words = w + quad * QUAD_BYTES + lane_part() * LANE_QUARTERS * 16;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) part.words[i] = stream_16(words + i * 16);
        const u64 d = *(const u64*)(w + D_AT + quad * QUAD_SCALES_BYTES);
        part.d[0] = (u32)d;
        part.d[1] = (u32)(d >> 32);
        return part;
    }

    // Pairs of f16. A nibble n in the lowest bits of an f16 is n * 2^-24, and in the next four bits n * 2^-20:
    // denormal numbers, which a multiplication makes n * 2^-9.
    static constexpr u32 LOW_NIBBLES = 0x000F000Fu;
    static constexpr u32 HIGH_NIBBLES = 0x00F000F0u;
    static constexpr u32 PAIR_OF_2P15 = 0x78007800u;  // 2^15: from 2^-24 to 2^-9
    static constexpr u32 PAIR_OF_2P11 = 0x68006800u;  // 2^11: from 2^-20 to 2^-9
    static constexpr u32 PAIR_OF_MINUS_8 = 0xA400A400u;  // -8 · 2^-9 = -2^-6: the code of 0 is 8

    // The quants of unit u, times 2^-9. A word's elements become the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19.
    DEVICE void halves(const Part& part, int u, u32x4 (&q)[LANE_QUARTERS]) {
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i)
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 word = part.words[i][u] >> (8 * odd);
                q[i][odd] = fma_halves(word & LOW_NIBBLES, PAIR_OF_2P15, PAIR_OF_MINUS_8);
                q[i][odd + 2] = fma_halves(word & HIGH_NIBBLES, PAIR_OF_2P11, PAIR_OF_MINUS_8);
            }
    }

    // The scale of unit u.
    DEVICE float scale(const Part& part, int u) { return half_to_f32((u16)(part.d[u / 2] >> (16 * (u % 2)))); }

    // A single value.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int unit = k / UNIT % QUAD_UNITS;
        // Byte b of word j of a unit has elements 4 j + b and 16 + 4 j + b; words j of the four units are adjacent.
        const u32 byte = w[quad * QUAD_BYTES + k % 16 / 4 * 16 + unit * 4 + k % 4];
        const u32 code = byte >> (k % UNIT / 16 * 4) & 15;  // low nibble or high nibble
        return (float)((i32)code - 8) * half_to_f32(((const u16*)(w + D_AT))[quad * QUAD_UNITS + unit]);
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[column];
    return x_element;
}

// The same for four neighbouring columns, beginning with this one.
DEVICE void x_values(const Arguments& a, i64 row, int column, float* x) {
    const f32x4 x_element_four = load_four(&a.x[column]);
    UNROLL for (int i = 0; i < 4; ++i) {
        const float x_element = x_element_four[i];
        x[i] = x_element;
    }
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[column] = w_product;
}

constexpr float LEAST = 0x1p-20f;  // times a unit's largest x: a second term errs by 2^-40 of that

// Split a quarter of a unit of x into f16 terms of 11 bits, relative to a power of two that the unit's
// four quarters share, and that neighbouring lanes find together: `scale`. The largest x becomes less
// than 2^15; the least f16 is 2^-14, denormal ones are lost.
// Return whether the unit is rough; then its terms are 0. A unit is rough with Inf, NaN, a largest x that has
// no such scale, or an x less than LEAST of the largest: columns may have zeros for all the others.
DEVICE bool split_x(const float (&x)[QUARTER], u32x4 (&terms)[TERMS], float& scale) {
    // Bits order magnitudes, NaN last. The bits of 0, minus 1, wrap to the largest u32: 0 is never the least.
    u32 largest_bits = 0, least_bits = 0xFFFFFFFFu;
    UNROLL for (int j = 0; j < QUARTER; ++j) {
        const u32 bits = as_u32(abs_f32(x[j]));
        if (bits > largest_bits) largest_bits = bits;
        if (bits - 1 < least_bits) least_bits = bits - 1;
    }
    UNROLL for (int mask = 1; mask < UNIT_QUARTERS; mask *= 2) {
        const u32 other = as_u32(shuffle_xor(as_f32(largest_bits), mask));
        if (other > largest_bits) largest_bits = other;
        const u32 least = as_u32(shuffle_xor(as_f32(least_bits), mask));
        if (least < least_bits) least_bits = least;
    }
    const float largest = as_f32(largest_bits);
    // false for NaN; times a weight's scale, below 2^16, scale is finite
    const bool in_range = largest >= 0x1p-80f && largest < 0x1p+117f;
    const bool loses = largest_bits > 0 && as_f32(least_bits + 1) < largest * LEAST;

    // An f32's exponent e is stored as e + 127, above 23 bits of fraction. Of the largest x:
    const u32 exponent = largest_bits & 0x7F800000u;
    float inverse = as_f32(((2u * 127u + 14u) << 23) - exponent);  // 2^(14 - e)
    scale = as_f32(exponent - ((14u - 9u) << 23));  // 2^(e - 14) · 2^9: quants come times 2^-9
    if (!in_range || loses) scale = inverse = 0.0f;
    UNROLL for (int i = 0; i < 4; ++i) {
        const int j = i / 2 * 4 + i % 2;  // elements 0, 2 · 1, 3 · 4, 6 · 5, 7: the order of a weight's pairs
        float even = x[j] * inverse, odd = x[j + 2] * inverse;
        if (inverse == 0.0f) even = odd = 0.0f;  // Inf and NaN
        terms[0][i] = to_halves(even, odd);
        const float rest_even = even - half_to_f32((u16)terms[0][i]);
        const float rest_odd = odd - half_to_f32((u16)(terms[0][i] >> 16));
        terms[1][i] = to_halves(rest_even / REST_STEP, rest_odd / REST_STEP);
    }
    return loses || !(in_range || largest == 0.0f);
}

// A block computes COLUMNS columns for ROWS rows by dot products of two. x is split into f16 terms
// that share a scale in each unit; quants are exact in f16. The sums of a unit are multiplied by
// both scales and added up in f32. The waves divide K.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED u32x4 staged[ROOM_BYTES / sizeof(u32x4)];  // x in terms: [STAGE_UNITS][ROWS · TERMS][UNIT_QUARTERS]
    float* const x_scales = (float*)((u8*)staged + SCALES_AT);  // [STAGE_UNITS][ROWS]
    u8* const x_rough = (u8*)staged + ROUGH_AT;  // [STAGE_UNITS][ROWS]
    SHARED int any_rough;
    const int thread = thread_index();
    const int wave_k = wave_index();
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = block_x() * COLUMNS;
    const int end_quad = QUADS;
    if (thread == 0) any_rough = 0;

    const int panel = column0 / PANEL;
    const int column = panel * PANEL + lane_column(0);

    // --- load ahead: x, each thread a quarter of the stage ---
    const i64 row = row0 < m ? row0 : m - 1;
    // Load a quarter of the stage: four x of each half of its unit, like a weight's word.
    const auto load_quarter = [&](int index, float (&eight)[QUARTER]) {
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int k = unit * UNIT + half * (UNIT / 2) + quarter * (QUARTER / 2);
            UNROLL for (int j = 0; j < QUARTER / 2; ++j) eight[half * (QUARTER / 2) + j] = 0.0f;
            if (index < STAGE_QUARTERS) x_values(a, row, k, eight + half * (QUARTER / 2));
        }
    };
    float quarters[QUARTER];
    load_quarter(thread, quarters);

    // --- load ahead: the weights of the wave's first quad ---
    const u32 w_index = Q4_0_512x96::quad_index(panel * PANEL, 0) + lane_column(0);  // of the column's quad 0
    Q4_0_512x96::Part w_ahead;
    const auto load_w = [&](Q4_0_512x96::Part& part, int quad) {
        if (quad >= end_quad) return;
        part = Q4_0_512x96::load_part(a.w, w_index + quad * PANEL);
    };
    load_w(w_ahead, wave_k);

    // Store a quarter's terms, and its unit's scale, for all waves.
    const auto stage_quarter = [&](int index, const float (&eight)[QUARTER]) {
        u32x4 terms[TERMS];
        float scale;
        const bool rough = split_x(eight, terms, scale);
        if (index >= STAGE_QUARTERS) return;  // only now: lanes of a wave split x together
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS;
        UNROLL for (int t = 0; t < TERMS; ++t)
            staged[unit * UNIT_ITEMS + t * UNIT_QUARTERS + quarter] = terms[t];
        if (quarter > 0) return;
        x_scales[unit] = scale;
        x_rough[unit] = rough;
        if (rough) any_rough = 1;
    };

    float w_sums = {};

    // --- stage x: threads split quarters into terms, for all waves to read ---
    block_barrier();  // any_rough is 0
    stage_quarter(thread, quarters);
    block_barrier();

    // --- multiply: each wave its quads of the stage ---
    const int quad = wave_k;
    UNROLL for (int u = 0; u < QUAD_UNITS; ++u) {
        const int unit = quad * QUAD_UNITS + u;
        u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
        Q4_0_512x96::halves(w_ahead, u, w_quants[0]);
        const float w_d = Q4_0_512x96::scale(w_ahead, u);
        const int x_item = unit * UNIT_ITEMS + lane_part() * LANE_QUARTERS;
        u32x4 x[TERMS][LANE_QUARTERS];
        UNROLL for (int t = 0; t < TERMS; ++t)
            UNROLL for (int q = 0; q < LANE_QUARTERS; ++q)
                x[t][q] = staged[x_item + t * UNIT_QUARTERS + q];
        const float x_scale = x_scales[unit];
        lane_sums w_dots = {};
        multiply_unit(x[1], w_quants, w_dots);
        w_dots *= REST_STEP;
        multiply_unit(x[0], w_quants, w_dots);
        w_sums = fma_f32(w_d * x_scale, w_dots, w_sums);
        settle(w_sums);  // x of units ahead would take half of the registers
    }

    // --- rough units: their terms are 0, so what they stand for is added here ---
    if (any_rough) {
        ROLLED for (int unit = 0; unit < STAGE_UNITS; ++unit) {
            const int k0 = unit * UNIT;
            if (unit / QUAD_UNITS % WAVES_K != wave_k) continue;
            if (lane_part() > 0) continue;
            if (!x_rough[unit]) continue;
            ROLLED for (int k = k0; k < k0 + UNIT; ++k) {
                const float x = x_value(a, row, k);
                w_sums = fma_f32(
                    x, Q4_0_512x96::value(a.w, column, k), w_sums);
            }
        }
    }

    // --- reduce: add the sums of the waves that share a panel ---
    UNROLL for (int mask = PANEL; mask < WAVE; mask *= 2) w_sums += shuffle_xor(w_sums, mask);
    block_barrier();  // x may still be read
    float* const w_shared = (float*)staged;  // [WAVES_K][ROWS][COLUMNS]
    const int to = wave_k * COLUMNS + lane_column(0);
    w_shared[to] = w_sums;
    block_barrier();

    // --- epilogue ---
    if (const int at = thread; at < ROWS * COLUMNS) {
        float w = 0.0f;
        UNROLL for (int wave = 0; wave < WAVES_K; ++wave) w += w_shared[wave * ROWS * COLUMNS + at];
        const i64 row = row0;
        const int column = column0 + at;
        if (row < m && column < WIDTH) epilogue(a, row, column, w);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
