// product for hip:gfx90a, gemv_matrix, 4 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_matrix:
//   w_product = x_value @ w    Q6_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a column
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int ROWS = 4;  // of x, which a block computes
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
constexpr int UNIT_ITEMS = 32;  // ROWS · TERMS · UNIT_QUARTERS, of 16 bytes
constexpr int USED_ROWS = 8;  // of an instruction's 16 rows: the others repeat them
constexpr int VALUES = 2;  // rows of the results that a lane holds

constexpr int STAGE_UNITS = 16;  // QUADS · QUAD_UNITS: shared memory holds all the x of a block
constexpr int SCALES_AT = 8192;  // STAGE_UNITS · UNIT_ITEMS · 16 bytes
constexpr int ROUGH_AT = 8448;  // SCALES_AT + STAGE_UNITS · ROWS · 4 bytes
constexpr int ROOM_BYTES = 8512;  // ROUGH_AT + STAGE_UNITS · ROWS: x, and later the sums of the waves
constexpr int STAGED_BYTES = 8528;  // ROOM_BYTES + 16 for any_rough
constexpr int LDS_BYTES = 8528;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

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

// Q6_K [512, 96] in the layout `tiles16`.
struct Q6_K_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 256⌉ · 2, of a column
    static constexpr int QUANTS0_BYTES = 64;  // of a quad
    static constexpr i64 QUANTS1_AT = 24576;  // where its region begins
    static constexpr int QUANTS1_BYTES = 32;  // of a quad
    static constexpr i64 SCALES_AT = 36864;  // where its region begins
    static constexpr int SCALES_BYTES = 8;  // of a quad
    static constexpr i64 D_AT = 39936;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }
    // The number of a quad's block among all blocks of the weight.
    DEVICE u32 block_index(u32 quad) { return quad / (2 * PANEL) * PANEL + quad % PANEL; }

    // What a lane has of a quad: of each quarter of a unit that it has, the planes; the quad's scales.
    struct Part {
        u32x4 quants0[LANE_QUARTERS];
        u32 quants1[LANE_QUARTERS][2];
        u32 scales[2];
        u32 d[1];
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + lane_part() * LANE_QUARTERS * 16;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) part.quants0[i] = stream_16(quants0 + i * 16);
        const u8* const quants1 = w + QUANTS1_AT + quad * QUANTS1_BYTES + lane_part() * LANE_QUARTERS * 8;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) load_8(quants1 + i * 8, part.quants1[i]);
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u16*)(w + D_AT + block_index(quad) * D_BYTES);
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
    static constexpr u32 PAIR_OF_ZERO = 0xac00ac00u;  // -32 · 2^-9
    // Of plane 1, the bits of pair `odd` of unit u: those of the lower elements where they belong in the code.
    DEVICE u32 plane1(const Part& part, int i, int u, int odd) {
        const u32 word = part.quants1[i][u / 2];
        const int pair = 2 * (u % 2) + odd;
        const int by = pair % 2 * 2 + pair / 2 * 8 - 4;
        return by < 0 ? word << -by : word >> by;
    }

    // The numbers of unit u, times 2^-9: the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19 of a quarter.
    DEVICE void halves(const Part& part, int u, u32x4 (&q)[LANE_QUARTERS]) {
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) {
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 bits0 = part.quants0[i][u] >> (8 * odd);
                const u32 bits1 = plane1(part, i, u, odd);
                q[i][odd] = fma_halves((bits0 & 0x000f000fu) | (bits1 & 0x00300030u), PAIR_OF_2P15, PAIR_OF_ZERO);
                q[i][odd + 2] = fma_halves((bits0 & 0x00f000f0u) | (bits1 & 0x03000300u), PAIR_OF_2P11, PAIR_OF_ZERO);
            }
        }
    }

    // What the numbers of sub-block `half` of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u, int half) {
        const u32 four = (u < 2 ? part.scales[0] : part.scales[1]);
        return half_to_f32((u16)part.d[0]) * byte_minus(four, u % 2 * 2 + half, 128.0f);
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int u = k / UNIT % QUAD_UNITS, upper = k / (UNIT / 2) % 2, part_of_unit = k / 4 % 4, element = k % 4;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + part_of_unit * 16;
        const int pair0 = element % 2;
        const u32 word0 = ((const u16*)quants0)[u / 1 * 2 + element / 2];
        u32 code = (word0 >> (pair0 % 1 * 4 + pair0 / 1 * 8 + 4 * upper) & 15u);
        const u8* const quants1 = w + QUANTS1_AT + quad * QUANTS1_BYTES + part_of_unit * 8;
        const int pair1 = 2 * (u % 2) + element % 2;
        const u32 word1 = ((const u16*)quants1)[u / 2 * 2 + element / 2];
        code |= (word1 >> (pair1 % 2 * 2 + pair1 / 2 * 8 + 4 * upper) & 3u) << 4;
        Part part;
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u16*)(w + D_AT + (i64)block_index((u32)quad) * D_BYTES);
        const float number = (float)code - 32.0f;
        return number * scale(part, u, upper);
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
    const float x_element = a.x[row * 512 + column];
    return x_element;
}

// The same for four neighbouring columns, beginning with this one.
DEVICE void x_values(const Arguments& a, i64 row, int column, float* x) {
    const f32x4 x_element_four = load_four(&a.x[row * 512 + column]);
    UNROLL for (int i = 0; i < 4; ++i) {
        const float x_element = x_element_four[i];
        x[i] = x_element;
    }
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = w_product;
}

// The row of x that a lane's value v belongs to; ROWS or more: to none.
DEVICE int value_row(int v) { return lane_row(v * TERMS) / TERMS; }
// The same, but the last row for a value that is not stored.
DEVICE int read_row(int v) { return value_row(v) < ROWS ? value_row(v) : ROWS - 1; }

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
    return loses || !(in_range || largest == 0.0f);
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x is split into f16 terms
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
    const auto row_of = [&](int r) { return row0 + r < m ? row0 + r : m - 1; };  // rows beyond the last repeat it
    // Load a quarter of the stage: four x of each half of its unit, like a weight's word.
    const auto load_quarter = [&](int index, float (&eight)[QUARTER]) {
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS % STAGE_UNITS;
        const int r = index / UNIT_QUARTERS / STAGE_UNITS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int k = unit * UNIT + half * (UNIT / 2) + quarter * (QUARTER / 2);
            x_values(a, row_of(r), k, eight + half * (QUARTER / 2));
        }
    };
    float quarters[QUARTER];
    load_quarter(thread, quarters);

    // --- load ahead: the weights of the wave's first quad ---
    const u32 w_index = Q6_K_512x96::quad_index(panel * PANEL, 0) + lane_column(0);  // of the column's quad 0
    Q6_K_512x96::Part w_ahead;
    const auto load_w = [&](Q6_K_512x96::Part& part, int quad) {
        if (quad >= end_quad) return;
        part = Q6_K_512x96::load_part(a.w, w_index + quad * PANEL);
    };
    load_w(w_ahead, wave_k);

    // Store a quarter's terms, and its unit's scale, for all waves.
    const auto stage_quarter = [&](int index, const float (&eight)[QUARTER]) {
        u32x4 terms[TERMS];
        float scale;
        const bool rough = split_x(eight, terms, scale);
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS % STAGE_UNITS;
        const int r = index / UNIT_QUARTERS / STAGE_UNITS;
        UNROLL for (int t = 0; t < TERMS; ++t)
            staged[unit * UNIT_ITEMS + (r * TERMS + t) * UNIT_QUARTERS + quarter] = terms[t];
        if (quarter > 0) return;
        x_scales[unit * ROWS + r] = scale;
        x_rough[unit * ROWS + r] = rough;
        if (rough) any_rough = 1;
    };

    float w_sums[VALUES] = {};

    // --- stage x: threads split quarters into terms, for all waves to read ---
    block_barrier();  // any_rough is 0
    stage_quarter(thread, quarters);
    block_barrier();

    // --- multiply: each wave its quads of the stage ---
    const int quad = wave_k;
    UNROLL for (int u = 0; u < QUAD_UNITS; ++u) {
        const int unit = quad * QUAD_UNITS + u;
        u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
        float w_d[LANE_COLUMNS][2];
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            Q6_K_512x96::halves(w_ahead, u, w_quants[c]);
            UNROLL for (int half = 0; half < 2; ++half)
                w_d[c][half] = Q6_K_512x96::scale(w_ahead, u, half);
        }
        const int x_item = unit * UNIT_ITEMS + lane_part();
        u32x4 x[LANE_QUARTERS];
        x[0] = staged[x_item + lane_x_row() % USED_ROWS * UNIT_QUARTERS];
        float x_scale[VALUES];
        UNROLL for (int v = 0; v < VALUES; ++v) x_scale[v] = x_scales[unit * ROWS + read_row(v)];
        UNROLL for (int half = 0; half < 2; ++half) {
            lane_sums w_dots = {};
            multiply_half(x, w_quants, half, w_dots);
            UNROLL for (int v = 0; v < VALUES; ++v) {
                const float w_dot = fma_f32(REST_STEP, w_dots[v * TERMS + 1], w_dots[v * TERMS]);
                float w_sum = w_sums[v];
                w_sum = fma_f32(w_d[0][half] * x_scale[v], w_dot, w_sum);
                w_sums[v] = w_sum;
            }
        }
    }

    // --- rough units: their terms are 0, so what they stand for is added here ---
    if (any_rough) {
        ROLLED for (int unit = 0; unit < STAGE_UNITS; ++unit) {
            const int k0 = unit * UNIT;
            if (unit / QUAD_UNITS % WAVES_K != wave_k) continue;
            UNROLL for (int v = 0; v < VALUES; ++v) {
                const int r = read_row(v);
                if (!x_rough[unit * ROWS + r]) continue;
                ROLLED for (int k = k0; k < k0 + UNIT; ++k) {
                    const float x = x_value(a, row_of(r), k);
                    w_sums[v] = fma_f32(
                        x, Q6_K_512x96::value(a.w, column, k), w_sums[v]);
                }
            }
        }
    }

    // --- reduce: add the sums of the waves that share a panel ---
    block_barrier();  // x may still be read
    float* const w_shared = (float*)staged;  // [WAVES_K][ROWS][COLUMNS]
    UNROLL for (int v = 0; v < VALUES; ++v) {
        const int row = value_row(v);
        const int to = (wave_k * ROWS + row) * COLUMNS + lane_column(0);
        if (row < ROWS) w_shared[to] = w_sums[v];
    }
    block_barrier();

    // --- epilogue ---
    if (const int at = thread; at < ROWS * COLUMNS) {
        float w = 0.0f;
        UNROLL for (int wave = 0; wave < WAVES_K; ++wave) w += w_shared[wave * ROWS * COLUMNS + at];
        const i64 row = row0 + at / COLUMNS;
        const int column = column0 + at % COLUMNS;
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
