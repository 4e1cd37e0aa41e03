// residual for hip:gfx1201, gemv_matrix, 4 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = x
// 96 gemv_matrix:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = r + w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int ROWS = 4;  // of x, which share one decoding
constexpr int COLUMNS = 16;  // of the result
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int K = 512;
constexpr int TERMS = 2;  // f16 numbers that make up one x
constexpr int AHEAD = 1;  // quads that a wave loads before their turn
constexpr int WAVES_N = COLUMNS / 16;  // waves beside each other
constexpr int WAVES_K = BLOCK_SIZE / WAVE / WAVES_N;  // waves that share columns
static_assert(WAVES_N * WAVES_K * WAVE == BLOCK_SIZE, "waves share the columns and K evenly");
constexpr int QUADS = (K + 127) / 128;  // of a column: four units that are stored together
constexpr int SPLITS = 1;  // blocks of a cluster: each has its own part of K
constexpr int SPLIT_QUADS = (QUADS + SPLITS - 1) / SPLITS;
// Terms of a row are rows of one instruction where there is room, or else they take turns.
constexpr bool BESIDE = TERMS > 1 && ROWS * TERMS <= TILE_ROWS;
constexpr int TURNS = BESIDE ? 1 : TERMS;
constexpr int ROW_TERMS = BESIDE ? TERMS : 1;
constexpr int STEPS = (ROWS * ROW_TERMS + TILE_ROWS - 1) / TILE_ROWS;  // instructions for all rows
constexpr int USED_ROWS = STEPS > 1 ? TILE_ROWS : ROWS * ROW_TERMS;  // of an instruction's
static_assert(STEPS * USED_ROWS == ROWS * ROW_TERMS, "instructions are full, or it is one");
// Results of a lane in a column, for one instruction; of few rows the first are all that any lane stores.
constexpr int VALUES = (LANE_ROWS < USED_ROWS ? LANE_ROWS : USED_ROWS) / ROW_TERMS;
constexpr int UNIT_ITEMS = TURNS * STEPS * USED_ROWS * 4;  // 16 bytes of eight x each
constexpr int UNIT_BYTES = UNIT_ITEMS * 16 + ROWS * 5;
constexpr int PRODUCTS = 1;
constexpr int RECEIVED_BYTES = 0;
constexpr int ROOM_QUADS = (64512 - RECEIVED_BYTES) / 4 / UNIT_BYTES;
constexpr int ROUND_QUADS = AHEAD * WAVES_K;  // which the waves of a block take together
constexpr int CHUNK_QUADS =  // of x, staged at a time
    ROOM_QUADS < SPLIT_QUADS ? ROOM_QUADS / ROUND_QUADS * ROUND_QUADS : SPLIT_QUADS;
static_assert(CHUNK_QUADS > 0, "shared memory holds what the waves load ahead");
constexpr int CHUNK_UNITS = 4 * CHUNK_QUADS;
constexpr int SHARES = ROWS * CHUNK_UNITS * 4;  // eight x each
constexpr int MOST_SHARES = (SHARES + BLOCK_SIZE - 1) / BLOCK_SIZE;
constexpr int SHARES_AT_A_TIME = 2;  // registers of more would cost waves
constexpr int THREAD_SHARES = MOST_SHARES < SHARES_AT_A_TIME ? MOST_SHARES : SHARES_AT_A_TIME;
constexpr int SCALES_AT = CHUNK_UNITS * UNIT_ITEMS * 16;
constexpr int ROUGH_AT = SCALES_AT + CHUNK_UNITS * ROWS * 4;
constexpr int CHUNK_BYTES = ROUGH_AT + CHUNK_UNITS * ROWS;
constexpr int SUMS_BYTES = PRODUCTS * WAVES_K * ROWS * COLUMNS * 4;
constexpr int ROOM_BYTES = ((CHUNK_BYTES > SUMS_BYTES ? CHUNK_BYTES : SUMS_BYTES) + 15) / 16 * 16;
constexpr int STAGED_BYTES = ROOM_BYTES + RECEIVED_BYTES + 32;
constexpr int LDS_BYTES = 8544;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 65536, "gfx1201 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop of few rounds would be unrolled whole, at the price of registers.
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

    // What a lane has of a quad: words[i][u] is a word of unit u. Word i of a unit, 0…3, has elements
    // 4 i…4 i + 3 in its low nibbles and 16 + 4 i…16 + 4 i + 3 in its high ones.
    struct Part {
        u32x4 words[4 / PARTS];
        u32 d[2];  // the scales of the four units, as f16
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const words = w + quad * QUAD_BYTES + lane_part() * (4 / PARTS) * 16;
        UNROLL for (int i = 0; i < 4 / PARTS; ++i) part.words[i] = stream_16(words + i * 16);
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
    static constexpr u32 PAIR_OF_MINUS_ZERO = 0xA400A400u;  // -2^-6: the quant of 0 is 8, times 2^-9

    // The quants of unit u minus 8, times 2^-9. A word's elements become the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19.
    DEVICE void halves(const Part& part, int u, u32x4 (&q)[4 / PARTS]) {
        UNROLL for (int i = 0; i < 4 / PARTS; ++i)
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 word = part.words[i][u] >> (8 * odd);
                q[i][odd] = fma_halves(word & LOW_NIBBLES, PAIR_OF_2P15, PAIR_OF_MINUS_ZERO);
                q[i][odd + 2] = fma_halves(word & HIGH_NIBBLES, PAIR_OF_2P11, PAIR_OF_MINUS_ZERO);
            }
    }

    // What the elements of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u) { return half_to_f32((u16)(part.d[u / 2] >> (16 * (u % 2)))); }

    // A single value.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int unit = k / UNIT % QUAD_UNITS;
        // A unit's word i, of 4 bytes, has elements 4 i…4 i + 3 and 16 more; words i of the four units are adjacent.
        const u32 byte = w[quad * QUAD_BYTES + k % 16 / 4 * 16 + unit * 4 + k % 4];
        const u32 quant = byte >> (k % UNIT / 16 * 4) & 15;  // low nibble or high nibble
        return (float)((i32)quant - 8) * half_to_f32(((const u16*)(w + D_AT))[quad * QUAD_UNITS + unit]);
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    const float* r;
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
    const float r_element = a.r[row * 96 + column];
    const float sum1 = r_element + w_product;
    a.output0[row * 96 + column] = sum1;
}

// Of a lane's value v in a step: its row of x.
DEVICE int value_row(int step, int v) {
    const int row = (step * TILE_ROWS + lane_row(v * ROW_TERMS)) / ROW_TERMS;
    return row < ROWS ? row : ROWS - 1;  // beyond them nothing is stored
}

constexpr float LEAST = 0x1p-28f;  // of a unit's largest x: below, terms are denormal

// Splits eight of a unit's 32 x, which four lanes share, into f16 terms of 11 bits, relative to a
// power of two: `scale`. The largest x becomes less than 2^15; the least f16 is 2^-24.
// Returns whether the unit is rough: then its terms are 0. So it is for Inf, NaN and a largest x that
// has no such scale, and where one x is less than LEAST of it: columns may have zeros for all others.
DEVICE bool split_x(const float (&x)[8], u32x4 (&terms)[TERMS], float& scale) {
    // Magnitudes are ordered as their bits are, NaN above all; 0 minus 1 is above them, too.
    u32 largest_bits = 0, least_bits = 0xFFFFFFFFu;
    UNROLL for (int j = 0; j < 8; ++j) {
        const u32 bits = as_u32(abs_f32(x[j]));
        if (bits > largest_bits) largest_bits = bits;
        if (bits - 1 < least_bits) least_bits = bits - 1;
    }
    UNROLL for (int mask = 1; mask < 4; mask *= 2) {
        const u32 other = as_u32(shuffle_xor(as_f32(largest_bits), mask));
        if (other > largest_bits) largest_bits = other;
        const u32 least = as_u32(shuffle_xor(as_f32(least_bits), mask));
        if (least < least_bits) least_bits = least;
    }
    const float largest = as_f32(largest_bits);
    const bool usual = largest >= 0x1p-80f && largest < 0x1p+117f;  // false for NaN; scales of a weight reach 2^16
    const bool loses = largest_bits > 0 && as_f32(least_bits + 1) < largest * LEAST;
    const u32 exponent = largest_bits & 0x7F800000u;
    scale = as_f32(exponent - (5u << 23));  // 2^9 more: quants come times 2^-9
    float inverse = as_f32((268u << 23) - exponent);
    if (!usual || loses) scale = inverse = 0.0f;
    UNROLL for (int i = 0; i < 4; ++i) {
        const int j = i / 2 * 4 + i % 2;  // elements 0, 2 · 1, 3 · 4, 6 · 5, 7: in the order of a weight's
        float even = x[j] * inverse, odd = x[j + 2] * inverse;
        if (inverse == 0.0f) even = odd = 0.0f;  // Inf and NaN
        terms[0][i] = to_halves(even, odd);
        const float rest_even = even - half_to_f32((u16)terms[0][i]);
        const float rest_odd = odd - half_to_f32((u16)(terms[0][i] >> 16));
        terms[1][i] = to_halves(rest_even / REST_STEP, rest_odd / REST_STEP);
    }
    return loses || !(usual || largest == 0.0f);
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x is split into f16 terms that share
// a scale in each unit, quants are f16 numbers exactly. The sums of a unit are multiplied by both
// scales and added up in f32. Waves beside each other have 16 columns each, others other quads of K.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED u32x4 staged[ROOM_BYTES / 16];
    SHARED int any_rough;
    float* const x_scales = (float*)((u8*)staged + SCALES_AT);
    u8* const x_rough = (u8*)staged + ROUGH_AT;
    const int thread = thread_index();
    const int wave_k = wave_index() / WAVES_N;
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = block_x() / SPLITS * COLUMNS;
    const int first_quad = block_x() % SPLITS * SPLIT_QUADS;
    const int end_quad = at_run_time(first_quad + SPLIT_QUADS < QUADS ? first_quad + SPLIT_QUADS : QUADS);
    if (thread == 0) any_rough = 0;

    const int wanted_tile = column0 / 16 + wave_index() % WAVES_N;
    const int tile = WIDTH % COLUMNS == 0 || wanted_tile < (WIDTH + 15) / 16 ? wanted_tile : (WIDTH - 1) / 16;
    int columns[LANE_COLUMNS];
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
        const int column = tile * 16 + lane_column(c);
        columns[c] = WIDTH % 16 == 0 || column < WIDTH ? column : WIDTH - 1;
    }
    // Four lanes share a unit of a row of x.
    const auto load_share = [&](int share, int first, float (&x)[8]) {
        const int part = share % 4, unit = share / 4 % CHUNK_UNITS, r = share / 4 / CHUNK_UNITS;
        const i64 row = row0 + r < m ? row0 + r : m - 1;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int k = first * 128 + unit * 32 + half * 16 + part * 4;
            UNROLL for (int j = 0; j < 4; ++j) x[half * 4 + j] = 0.0f;
            if (share < SHARES && k < K) x_values(a, row, k, x + half * 4);
        }
    };
    float x_ahead[THREAD_SHARES][8];
    UNROLL for (int i = 0; i < THREAD_SHARES; ++i)
        load_share(thread + i * BLOCK_SIZE, first_quad, x_ahead[i]);
    u32 w_at[LANE_COLUMNS];  // quad 0 of the lane's columns
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        w_at[c] = Q4_0_512x96::quad_index(tile * 16, 0) + lane_column(c);
    Q4_0_512x96::Part w_ahead[AHEAD][LANE_COLUMNS];
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        const int quad = first_quad + i * WAVES_K + wave_k;
        if (quad >= end_quad) break;
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
            w_ahead[i][c] = Q4_0_512x96::load_part(a.w, w_at[c] + quad * 16);
    }
    float w_sums[STEPS][LANE_COLUMNS][VALUES] = {};
    ROLLED for (int first = first_quad; first < end_quad; first += CHUNK_QUADS) {
        block_barrier();  // any_rough is 0, and nobody reads the x before
        ROLLED for (int share0 = thread; share0 - thread < SHARES; share0 += THREAD_SHARES * BLOCK_SIZE) {
            if (share0 > thread || first > first_quad)
                UNROLL for (int i = 0; i < THREAD_SHARES; ++i)
                    load_share(share0 + i * BLOCK_SIZE, first, x_ahead[i]);
            UNROLL for (int i = 0; i < THREAD_SHARES; ++i) {
                const int share = share0 + i * BLOCK_SIZE;
                const int part = share % 4, unit = share / 4 % CHUNK_UNITS, r = share / 4 / CHUNK_UNITS;
                u32x4 terms[TERMS];
                float scale;
                const bool rough = split_x(x_ahead[i], terms, scale);
                if (share >= SHARES) continue;  // only now: lanes of a wave split x together
                UNROLL for (int t = 0; t < TERMS; ++t) {
                    const int item = BESIDE ? (r * TERMS + t) * 4 : (t * ROWS + r) * 4;
                    staged[unit * UNIT_ITEMS + item + part] = terms[t];
                }
                if (part == 0) {
                    x_scales[unit * ROWS + r] = scale;
                    x_rough[unit * ROWS + r] = rough;
                    if (rough) any_rough = 1;
                }
            }
        }
        block_barrier();
        ROLLED for (int round = 0; round < CHUNK_QUADS; round += ROUND_QUADS)
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            const int local_quad = round + i * WAVES_K + wave_k;
            const int quad = first + local_quad;
            if (local_quad >= CHUNK_QUADS || quad >= end_quad) break;
            UNROLL for (int u = 0; u < 4; ++u) {
                const int unit = local_quad * 4 + u;
                u32x4 w_quants[LANE_COLUMNS][4 / PARTS];
                float w_d[LANE_COLUMNS];
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                    Q4_0_512x96::halves(w_ahead[i][c], u, w_quants[c]);
                    w_d[c] = Q4_0_512x96::scale(w_ahead[i][c], u);
                }
                UNROLL for (int step = 0; step < STEPS; ++step) {
                    u32x4 x[TURNS][4 / PARTS];
                    UNROLL for (int t = 0; t < TURNS; ++t)
                        UNROLL for (int p = 0; p < 4 / PARTS; ++p)
                            x[t][p] = staged[unit * UNIT_ITEMS + (t * STEPS + step) * USED_ROWS * 4 +
                                             lane_x_row() % USED_ROWS * 4 + lane_part() * (4 / PARTS) + p];
                    float x_scale[VALUES];
                    UNROLL for (int v = 0; v < VALUES; ++v) x_scale[v] = x_scales[unit * ROWS + value_row(step, v)];
                    lane_sums w_dots = {};
                    UNROLL for (int t = TURNS - 1; t >= 0; --t) {
                        multiply_unit(x[t], w_quants, w_dots);
                        if (t > 0) w_dots *= REST_STEP;
                    }
                    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                        UNROLL for (int v = 0; v < VALUES; ++v) {
                            float dot = lane_sum(w_dots, c, v * ROW_TERMS);
                            if (BESIDE) dot += REST_STEP * lane_sum(w_dots, c, v * ROW_TERMS + 1);
                            float& sum = w_sums[step][c][v];
                            sum = fma_f32(w_d[c] * x_scale[v], dot, sum);
                            settle(sum);  // x of units ahead would take half of the registers
                        }
                }
            }
            if (quad + ROUND_QUADS < end_quad) {
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                    w_ahead[i][c] = Q4_0_512x96::load_part(
                        a.w, w_at[c] + (quad + ROUND_QUADS) * 16);
            }
        }
        if (any_rough) {  // their terms are 0: what they stand for is added here
            ROLLED for (int unit = 0; unit < CHUNK_UNITS; ++unit) {
                const int k0 = first * 128 + unit * 32;
                if (unit / 4 % WAVES_K != wave_k || first + unit / 4 >= end_quad || k0 >= K) continue;
                UNROLL for (int step = 0; step < STEPS; ++step)
                    UNROLL for (int v = 0; v < VALUES; ++v) {
                        const int r = value_row(step, v);
                        if (!x_rough[unit * ROWS + r]) continue;
                        const i64 row = row0 + r < m ? row0 + r : m - 1;
                        ROLLED for (int k = k0; k < k0 + 32; ++k) {
                            const float x = x_value(a, row, k);
                            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                                w_sums[step][c][v] = fma_f32(
                                    x, Q4_0_512x96::value(a.w, columns[c], k),
                                    w_sums[step][c][v]);
                        }
                    }
            }
        }
    }

    block_barrier();  // x may still be read
    float* const sums = (float*)staged;
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
            UNROLL for (int v = 0; v < VALUES; ++v) {
                const int row = (step * TILE_ROWS + lane_row(v * ROW_TERMS)) / ROW_TERMS;
                const int column = wave_index() % WAVES_N * 16 + lane_column(c);
                if (row < ROWS)
                    sums[((0 * WAVES_K + wave_k) * ROWS + row) * COLUMNS + column] =
                        w_sums[step][c][v];
            }
    block_barrier();
    for (int at = thread; at < ROWS * COLUMNS; at += BLOCK_SIZE) {
        float w = 0.0f;
        UNROLL for (int part = 0; part < WAVES_K; ++part)
            w += sums[(0 * WAVES_K + part) * ROWS * COLUMNS + at];
        const i64 row = row0 + at / COLUMNS;
        const int column = column0 + at % COLUMNS;
        if (row < m && column < WIDTH)
            epilogue(a, row, column, w);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_residual(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    const float* __restrict__ r,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, r, output0, m});
}
