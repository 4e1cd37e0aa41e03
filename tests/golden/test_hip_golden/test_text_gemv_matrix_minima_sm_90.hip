// product for hip:sm_90, gemv_matrix, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_matrix:
//   w_product = x_value @ w    Q4_K [512, 96]
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

constexpr int STAGE_QUADS = 4;  // of x, in shared memory at a time: all of the block
constexpr int STAGE_UNITS = 16;  // STAGE_QUADS · QUAD_UNITS
constexpr int STAGE_QUARTERS = 64;  // ROWS · STAGE_UNITS · UNIT_QUARTERS, which threads split into terms
constexpr int SCALES_AT = 2048;  // STAGE_UNITS · UNIT_ITEMS · 16 bytes
constexpr int X_SUMS = 1;  // of the x of a unit and a row
constexpr int X_SUMS_AT = 2112;  // SCALES_AT + STAGE_UNITS · ROWS · 4 bytes
constexpr int ROUGH_AT = 2176;  // X_SUMS_AT + STAGE_UNITS · ROWS · X_SUMS · 4 bytes
constexpr int ROOM_BYTES = 2192;  // ROUGH_AT + STAGE_UNITS · ROWS: x, and later the sums of the waves
constexpr int STAGED_BYTES = 2224;  // ROOM_BYTES + 16 for any_rough
constexpr int LDS_BYTES = 2224;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

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

// Q4_K [512, 96] in the layout `tiles16`.
struct Q4_K_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 256⌉ · 2, of a column
    static constexpr int QUANTS0_BYTES = 64;  // of a quad
    static constexpr i64 SCALES_AT = 24576;  // where its region begins
    static constexpr int SCALES_BYTES = 8;  // of a quad
    static constexpr i64 D_AT = 27648;  // where its region begins
    static constexpr int D_BYTES = 4;  // of a block

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }
    // The number of a quad's block among all blocks of the weight.
    DEVICE u32 block_index(u32 quad) { return quad / (2 * PANEL) * PANEL + quad % PANEL; }

    // What a lane has of a quad: of each quarter of a unit that it has, the planes; the quad's scales.
    struct Part {
        u32x4 quants0[LANE_QUARTERS];
        u32 scales[2];
        u32 d[1];
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + lane_part() * LANE_QUARTERS * 16;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) part.quants0[i] = stream_16(quants0 + i * 16);
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u32*)(w + D_AT + block_index(quad) * D_BYTES);
        return part;
    }

    DEVICE void load_8(const u8* from, u32 (&words)[2]) {
        const u64 both = *(const u64*)from;
        words[0] = (u32)both;
        words[1] = (u32)(both >> 32);
    }

    // Pairs of f16. A code c in the lowest bits of an f16 is c * 2^-24, and four bits higher c * 2^-20: denormal
    // numbers, which a multiplication makes c * 2^-9.
    static constexpr u32 PAIR_OF_2P15 = 0x78007800u;  // 2^15: from 2^-24 to 2^-9
    static constexpr u32 PAIR_OF_2P11 = 0x68006800u;  // 2^11: from 2^-20 to 2^-9

    // The numbers of unit u, times 2^-9: the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19 of a quarter.
    DEVICE void halves(const Part& part, int u, const u32 (&zero)[1], u32x4 (&q)[LANE_QUARTERS]) {
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) {
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 bits0 = part.quants0[i][u] >> (8 * odd);
                q[i][odd] = fma_halves(bits0 & 0x000f000fu, PAIR_OF_2P15, zero[0]);
                q[i][odd + 2] = fma_halves(bits0 & 0x00f000f0u, PAIR_OF_2P11, zero[0]);
            }
        }
    }

    // What the numbers of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u) {
        const u32 four = part.scales[0];
        return half_to_f32((u16)part.d[0]) * byte_minus(four, u, 0.0f);
    }
    // What is added to the elements of unit u.
    DEVICE float minimum(const Part& part, int u) {
        const float m = half_to_f32((u16)(part.d[0] >> 16));
        return -(m * byte_minus(part.scales[1], u, 0.0f));
    }
    // The scale, the code next to 0 as a pair of f16, -2^-9 times the code, and what is added to elements whose code is
    // counted from it. Without this, sums of scale · code and minimum would cancel each other where elements are 0,
    // and a large x there would leave its rounding error.
    DEVICE void centre(const Part& part, int u, float (&scales)[1], float (&rests)[1], u32 (&zeros)[1]) {
        constexpr float WHOLE = 0x1.8p+23f;  // plus and minus it rounds to a whole number
        const float d = scale(part, u), least = minimum(part, u);
        const float zero = clamp(-least * near_reciprocal(d), 0.0f, 15.0f) + WHOLE - WHOLE;
        scales[0] = d;
        rests[0] = fma_f32(zero, d, least);
        zeros[0] = to_halves(zero * -0x1p-9f, zero * -0x1p-9f);
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int u = k / UNIT % QUAD_UNITS, upper = k / (UNIT / 2) % 2, part_of_unit = k / 4 % 4, element = k % 4;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + part_of_unit * 16;
        const int pair0 = element % 2;
        const u32 word0 = ((const u16*)quants0)[u / 1 * 2 + element / 2];
        const u32 code = (word0 >> (pair0 % 1 * 4 + pair0 / 1 * 8 + 4 * upper) & 15u);
        Part part;
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u32*)(w + D_AT + (i64)block_index((u32)quad) * D_BYTES);
        const float number = (float)code;
        return number * scale(part, u) + minimum(part, u);
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.output0 = known_from_here(a.output0);
    start_next_grid();
}

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

// The row of x that the lane's value belongs to; ROWS or more: to none.
DEVICE int value_row() { return lane_row(0) / TERMS; }

constexpr float LEAST = 0x1p-28f;  // times a unit's largest x: terms of less are denormal

// Split a quarter of a unit of x into f16 terms of 11 bits, relative to a power of two that the unit's
// four quarters share, and that neighbouring lanes find together: `scale`. The largest x becomes less
// than 2^15; the least f16 is 2^-24.
// Return whether the unit is rough; then its terms are 0. A unit is rough with Inf, NaN, a largest x that has
// no such scale, or an x less than LEAST of the largest: columns may have zeros for all the others.
// x_sums: of the unit's x; 0 if it is rough.
DEVICE bool split_x(const float (&x)[QUARTER], u32x4 (&terms)[TERMS], float& scale, float (&x_sums)[X_SUMS]) {
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
    // false for NaN; times a weight's scale, below 2^24, results are finite
    const bool in_range = largest >= 0x1p-80f && largest < 0x1p+100f;
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
    UNROLL for (int i = 0; i < X_SUMS; ++i) {
        constexpr int SUMMED = QUARTER / X_SUMS;
        float sum = 0.0f;
        UNROLL for (int j = 0; j < SUMMED; ++j) sum += x[i * SUMMED + j];
        UNROLL for (int mask = 1; mask < UNIT_QUARTERS; mask *= 2) sum += shuffle_xor(sum, mask);
        x_sums[i] = inverse == 0.0f ? 0.0f : sum;
    }
    return loses || !(in_range || largest == 0.0f);
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x is split into f16 terms
// that share a scale in each unit; quants are exact in f16. The sums of a unit are multiplied by
// both scales and added up in f32. The waves divide K.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    SHARED u32x4 staged[ROOM_BYTES / sizeof(u32x4) + 1];  // x in terms: [STAGE_UNITS][ROWS · TERMS][UNIT_QUARTERS]
    float* const x_scales = (float*)((u8*)staged + SCALES_AT);  // [STAGE_UNITS][ROWS]
    float* const x_sums = (float*)((u8*)staged + X_SUMS_AT);  // [STAGE_UNITS][ROWS][X_SUMS]
    u32x4* const zeros = staged + ROOM_BYTES / sizeof(u32x4);  // instead of the x of a unit that is not the lane's
    u8* const x_rough = (u8*)staged + ROUGH_AT;  // [STAGE_UNITS][ROWS]
    SHARED int any_rough;
    const int thread = thread_index();
    const int wave_k = wave_index();
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = block_x() * COLUMNS;
    const int end_quad = at_run_time(QUADS);
    if (thread == 0) any_rough = 0;
    if (thread == 0) *zeros = u32x4{};

    const int panel = column0 / PANEL;
    int columns[LANE_COLUMNS];
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) columns[c] = panel * PANEL + lane_column(c);

    // --- load ahead: the weights of the wave's first quad ---
    u32 w_index[LANE_COLUMNS];  // of quad 0 in the lane's columns
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        w_index[c] = Q4_K_512x96::quad_index(panel * PANEL, 0) + lane_column(c);
    Q4_K_512x96::Part w_ahead[LANE_COLUMNS];
    const auto load_w = [&](Q4_K_512x96::Part (&part)[LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
            part[c] = Q4_K_512x96::load_part(a.w, w_index[c] + quad * PANEL);
    };
    load_w(w_ahead, wave_k);

    await_kernels_before(a);

    // --- load ahead: x, each thread a quarter of the stage ---
    const i64 row = row0 < m ? row0 : m - 1;
    // Load a quarter of the stage from quad `first` on: four x of each half of its unit, like a weight's word.
    const auto load_quarter = [&](int index, int first, float (&eight)[QUARTER]) {
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int k = first * QUAD + unit * UNIT + half * (UNIT / 2) + quarter * (QUARTER / 2);
            UNROLL for (int j = 0; j < QUARTER / 2; ++j) eight[half * (QUARTER / 2) + j] = 0.0f;
            if (index < STAGE_QUARTERS) x_values(a, row, k, eight + half * (QUARTER / 2));
        }
    };
    float quarters[QUARTER];
    load_quarter(thread, 0, quarters);

    // Store a quarter's terms, and its unit's scale, for all waves.
    const auto stage_quarter = [&](int index, const float (&eight)[QUARTER]) {
        u32x4 terms[TERMS];
        float scale;
        float sums[X_SUMS];
        const bool rough = split_x(eight, terms, scale, sums);
        if (index >= STAGE_QUARTERS) return;  // only now: lanes of a wave split x together
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS;
        UNROLL for (int t = 0; t < TERMS; ++t)
            staged[unit * UNIT_ITEMS + t * UNIT_QUARTERS + quarter] = terms[t];
        if (quarter > 0) return;
        x_scales[unit] = scale;
        UNROLL for (int i = 0; i < X_SUMS; ++i) x_sums[(unit) * X_SUMS + i] = sums[i];
        x_rough[unit] = rough;
        if (rough) any_rough = 1;
    };

    float w_sums[LANE_COLUMNS] = {};

    // One turn. Without the loop NVIDIA's compiler loads the quarters one after the other, not all ahead: a row
    // of K = 14336 in f16 took 1.27 times as long on an H200.
    ROLLED for (int first = 0; first < end_quad; first += STAGE_QUADS) {
        // --- stage x: threads split quarters into terms, for all waves to read ---
        block_barrier();  // any_rough is 0, and nobody reads the x before
        if (first > 0)
            load_quarter(thread, first, quarters);
        stage_quarter(thread, quarters);
        block_barrier();

        // --- multiply: each wave its quads of the stage ---
        const int local_quad = wave_k, quad = first + local_quad;
        const int first_unit = local_quad * QUAD_UNITS;
        const int own_unit = first_unit + lane_part();
        const u32x4* const own_x = staged + (first_unit + lane_x_row() / 2) * UNIT_ITEMS
                                   + lane_x_row() % 2 * UNIT_QUARTERS + lane_part();
        float w_d[LANE_COLUMNS][1];
        float w_rests[LANE_COLUMNS][1];
        u32 w_zeros[LANE_COLUMNS][1];
        lane_sums w_dots[1] = {};
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            Q4_K_512x96::centre(w_ahead[c], lane_part(), w_d[c], w_rests[c], w_zeros[c]);
        }
        UNROLL for (int u = 0; u < QUAD_UNITS; ++u) {
            u32x4 x[LANE_QUARTERS];
            x[0] = *(lane_x_row() / 2 == u ? own_x : zeros);
            u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                const u32 unit_zeros[1] = {of_four(w_zeros[c][0], u)};
                Q4_K_512x96::halves(w_ahead[c], u, unit_zeros, w_quants[c]);
            }
            multiply_unit(x, w_quants, w_dots[0]);
        }
        const float x_scale = x_scales[own_unit];
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            const lane_sums& dots = w_dots[0];
            const float dot = fma_f32(REST_STEP, dots[c * LANE_ROWS + 1], dots[c * LANE_ROWS]);
            float& sum = w_sums[c];
            sum = fma_f32(w_d[c][0] * x_scale, dot, sum);
            sum = fma_f32(w_rests[c][0], x_sums[own_unit], sum);
        }
        load_w(w_ahead, quad + WAVES_K);

        // --- rough units: their terms are 0, so what they stand for is added here ---
        if (any_rough) {
            ROLLED for (int unit = 0; unit < STAGE_UNITS; ++unit) {
                const int k0 = first * QUAD + unit * UNIT;
                if (unit / QUAD_UNITS % WAVES_K != wave_k) continue;
                if (lane_part() > 0) continue;
                if (!x_rough[unit]) continue;
                ROLLED for (int k = k0; k < k0 + UNIT; ++k) {
                    const float x = x_value(a, row, k);
                    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                        w_sums[c] = fma_f32(
                            x, Q4_K_512x96::value(a.w, columns[c], k), w_sums[c]);
                }
            }
        }
    }

    // --- reduce: add the sums of the waves that share a panel ---
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
        UNROLL for (int mask = 1; mask < QUAD_UNITS; mask *= 2) w_sums[c] += shuffle_xor(w_sums[c], mask);
    }
    block_barrier();  // x may still be read
    float* const w_shared = (float*)staged;  // [WAVES_K][ROWS][COLUMNS]
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
        const int to = wave_k * COLUMNS + lane_column(c);
        if (value_row() < ROWS) w_shared[to] = w_sums[c];
    }
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
