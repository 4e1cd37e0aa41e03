// product for hip:sm_90, gemv_matrix, 4 rows a tile, 64 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_matrix:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 64;
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

constexpr int WAVES_K = 2;  // BLOCK_SIZE / WAVE, waves that share the panel
static_assert(WAVES_K * WAVE == BLOCK_SIZE, "the waves are the whole block");
constexpr int SPLITS = 2;  // blocks of a cluster: each has its own part of K
constexpr int SPLIT_QUADS = 2;  // ⌈QUADS / SPLITS⌉

constexpr int TERMS = 1;  // f16 numbers that make up one x
constexpr int UNIT_ITEMS = 16;  // ROWS · TERMS · UNIT_QUARTERS, of 16 bytes
constexpr int USED_ROWS = 4;  // of an instruction's 8 rows: the others repeat them
constexpr int VALUES = 2;  // rows of the results that a lane holds

constexpr int STAGE_QUADS = 2;  // of x, in shared memory at a time: all of the block
constexpr int STAGE_UNITS = 8;  // STAGE_QUADS · QUAD_UNITS
constexpr int QUARTERS_AHEAD = 2;  // that a thread loads before it splits the first
constexpr int SCALES_AT = 2048;  // STAGE_UNITS · UNIT_ITEMS · 16 bytes
constexpr int ROUGH_AT = 2176;  // SCALES_AT + STAGE_UNITS · ROWS · 4 bytes
constexpr int ROOM_BYTES = 2208;  // ROUGH_AT + STAGE_UNITS · ROWS: x, and later the sums of the waves
constexpr int OWNED = 32;  // ROWS · COLUMNS / SPLITS, results that a block of the cluster stores
constexpr int STAGED_BYTES = 2496;  // ROOM_BYTES + SPLITS · OWNED · 4 + two numbers at multiples of 16
constexpr int LDS_BYTES = 2496;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// A bf16 is the upper half of an f32.
DEVICE float bf16_to_f32(u16 x) { return as_f32((u32)x << 16); }

// Round to nearest, a tie to even; a NaN stays one.
DEVICE u16 f32_to_bf16(float x) {
    constexpr u32 BELOW_TIE = 0x7FFF, QUIET_NAN = 0x40;
    const u32 is_odd = as_u32(x) >> 16 & 1;  // a tie is rounded up where this is
    return (u16)(x != x ? as_u32(x) >> 16 | QUIET_NAN : (as_u32(x) + BELOW_TIE + is_odd) >> 16);
}

// Four neighbouring bf16 numbers; the index of the first is a multiple of 4.
DEVICE f32x4 load_four_bf16(const u16* at) {
    const u64 bits = *(const u64*)at;
    f32x4 four;
    UNROLL for (int i = 0; i < 4; ++i)
        four[i] = bf16_to_f32((u16)(bits >> 16 * i));
    return four;
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
    const u16* x;
    const u8* w;
    u16* output0;
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
    const float x_element = bf16_to_f32(a.x[row * 512 + column]);
    return x_element;
}

// The same for four neighbouring columns, beginning with this one.
DEVICE void x_values(const Arguments& a, i64 row, int column, float* x) {
    const f32x4 x_element_four = load_four_bf16(&a.x[row * 512 + column]);
    UNROLL for (int i = 0; i < 4; ++i) {
        const float x_element = x_element_four[i];
        x[i] = x_element;
    }
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = f32_to_bf16(w_product);
}

// The row of x that a lane's value v belongs to; ROWS or more: to none.
DEVICE int value_row(int v) { return lane_row(v); }
// The same, but the last row for a value that is not stored.
DEVICE int read_row(int v) { return value_row(v) < ROWS ? value_row(v) : ROWS - 1; }

constexpr float LEAST = 0x1p-28f;  // times a unit's largest x: terms of less are denormal

// Split a quarter of a unit of x into f16 terms of 11 bits, relative to a power of two that the unit's
// four quarters share, and that neighbouring lanes find together: `scale`. The largest x becomes less
// than 2^15; the least f16 is 2^-24.
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
    }
    return loses || !(in_range || largest == 0.0f);
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x is split into f16 terms
// that share a scale in each unit; quants are exact in f16. The sums of a unit are multiplied by
// both scales and added up in f32. The waves divide K.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    SHARED u32x4 staged[ROOM_BYTES / sizeof(u32x4)];  // x in terms: [STAGE_UNITS][ROWS · TERMS][UNIT_QUARTERS]
    float* const x_scales = (float*)((u8*)staged + SCALES_AT);  // [STAGE_UNITS][ROWS]
    u8* const x_rough = (u8*)staged + ROUGH_AT;  // [STAGE_UNITS][ROWS]
    SHARED int any_rough;
    SHARED float received[SPLITS * OWNED];  // sums, from each block of the cluster
    SHARED u64 arrived;
    begin_cluster(&arrived, (SPLITS - 1) * OWNED * sizeof(float));
    const int thread = thread_index();
    const int wave_k = wave_index();
    const i64 row0 = block_of_rows() * ROWS;
    const int split = block_x() % SPLITS;
    const int column0 = block_x() / SPLITS * COLUMNS;
    const int first_quad = split * SPLIT_QUADS;
    const int end_quad = at_run_time(first_quad + SPLIT_QUADS < QUADS ? first_quad + SPLIT_QUADS : QUADS);
    if (thread == 0) any_rough = 0;

    const int panel = column0 / PANEL;
    int columns[LANE_COLUMNS];
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) columns[c] = panel * PANEL + lane_column(c);

    // --- load ahead: the weights of the wave's first quad ---
    u32 w_index[LANE_COLUMNS];  // of quad 0 in the lane's columns
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        w_index[c] = Q4_0_512x96::quad_index(panel * PANEL, 0) + lane_column(c);
    Q4_0_512x96::Part w_ahead[LANE_COLUMNS];
    const auto load_w = [&](Q4_0_512x96::Part (&part)[LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
            part[c] = Q4_0_512x96::load_part(a.w, w_index[c] + quad * PANEL);
    };
    load_w(w_ahead, first_quad + wave_k);

    await_kernels_before(a);

    // --- load ahead: x, each thread its first quarters of the stage ---
    const auto row_of = [&](int r) { return row0 + r < m ? row0 + r : m - 1; };  // rows beyond the last repeat it
    // Load a quarter of the stage from quad `first` on: four x of each half of its unit, like a weight's word.
    const auto load_quarter = [&](int index, int first, float (&eight)[QUARTER]) {
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS % STAGE_UNITS;
        const int r = index / UNIT_QUARTERS / STAGE_UNITS;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int k = first * QUAD + unit * UNIT + half * (UNIT / 2) + quarter * (QUARTER / 2);
            x_values(a, row_of(r), k, eight + half * (QUARTER / 2));
        }
    };
    float quarters[QUARTERS_AHEAD][QUARTER];
    UNROLL for (int i = 0; i < QUARTERS_AHEAD; ++i)
        load_quarter(thread + i * BLOCK_SIZE, first_quad, quarters[i]);

    // Store a quarter's terms, and its unit's scale, for all waves.
    const auto stage_quarter = [&](int index, const float (&eight)[QUARTER]) {
        u32x4 terms[TERMS];
        float scale;
        const bool rough = split_x(eight, terms, scale);
        const int quarter = index % UNIT_QUARTERS, unit = index / UNIT_QUARTERS % STAGE_UNITS;
        const int r = index / UNIT_QUARTERS / STAGE_UNITS;
        staged[unit * UNIT_ITEMS + r * UNIT_QUARTERS + quarter] = terms[0];
        if (quarter > 0) return;
        x_scales[unit * ROWS + r] = scale;
        x_rough[unit * ROWS + r] = rough;
        if (rough) any_rough = 1;
    };

    float w_sums[LANE_COLUMNS][VALUES] = {};

    // One turn. Without the loop NVIDIA's compiler loads the quarters one after the other, not all ahead: a row
    // of K = 14336 in f16 took 1.27 times as long on an H200.
    ROLLED for (int first = first_quad; first < end_quad; first += STAGE_QUADS) {
        // --- stage x: threads split quarters into terms, for all waves to read ---
        block_barrier();  // any_rough is 0, and nobody reads the x before
        if (first > first_quad)
            UNROLL for (int i = 0; i < QUARTERS_AHEAD; ++i)
                load_quarter(thread + i * BLOCK_SIZE, first, quarters[i]);
        UNROLL for (int i = 0; i < QUARTERS_AHEAD; ++i)
            stage_quarter(thread + i * BLOCK_SIZE, quarters[i]);
        block_barrier();

        // --- multiply: each wave its quads of the stage ---
        const int local_quad = wave_k, quad = first + local_quad;
        UNROLL for (int u = 0; u < QUAD_UNITS; ++u) {
            const int unit = local_quad * QUAD_UNITS + u;
            u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
            float w_d[LANE_COLUMNS];
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                Q4_0_512x96::halves(w_ahead[c], u, w_quants[c]);
                w_d[c] = Q4_0_512x96::scale(w_ahead[c], u);
            }
            const int x_item = unit * UNIT_ITEMS + lane_part();
            u32x4 x[LANE_QUARTERS];
            x[0] = staged[x_item + lane_x_row() % USED_ROWS * UNIT_QUARTERS];
            float x_scale[VALUES];
            UNROLL for (int v = 0; v < VALUES; ++v) x_scale[v] = x_scales[unit * ROWS + read_row(v)];
            lane_sums w_dots = {};
            multiply_unit(x, w_quants, w_dots);
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < VALUES; ++v) {
                    float& w_sum = w_sums[c][v];
                    w_sum = fma_f32(w_d[c] * x_scale[v], w_dots[c * LANE_ROWS + v], w_sum);
                }
        }
        load_w(w_ahead, quad + WAVES_K);

        // --- rough units: their terms are 0, so what they stand for is added here ---
        if (any_rough) {
            ROLLED for (int unit = 0; unit < STAGE_UNITS; ++unit) {
                const int k0 = first * QUAD + unit * UNIT;
                if (unit / QUAD_UNITS % WAVES_K != wave_k) continue;
                UNROLL for (int v = 0; v < VALUES; ++v) {
                    const int r = read_row(v);
                    if (!x_rough[unit * ROWS + r]) continue;
                    ROLLED for (int k = k0; k < k0 + UNIT; ++k) {
                        const float x = x_value(a, row_of(r), k);
                        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                            w_sums[c][v] = fma_f32(
                                x, Q4_0_512x96::value(a.w, columns[c], k), w_sums[c][v]);
                    }
                }
            }
        }
    }

    // --- reduce: add the sums of the waves that share a panel ---
    block_barrier();  // x may still be read
    float* const w_shared = (float*)staged;  // [WAVES_K][ROWS][COLUMNS]
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        UNROLL for (int v = 0; v < VALUES; ++v) {
            const int row = value_row(v);
            const int to = (wave_k * ROWS + row) * COLUMNS + lane_column(c);
            if (row < ROWS) w_shared[to] = w_sums[c][v];
        }
    block_barrier();

    // --- exchange: each block of the cluster stores a part of the results, the others send it their sums ---
    await_cluster();
    for (int i = thread; i < ROWS * COLUMNS; i += BLOCK_SIZE) {
        const int owner = i / OWNED;
        float w = 0.0f;
        UNROLL for (int wave = 0; wave < WAVES_K; ++wave) w += w_shared[wave * ROWS * COLUMNS + i];
        float* const w_to = received + split * OWNED + i % OWNED;
        if (owner == split) *w_to = w;
        else send(w_to, &arrived, owner, w);
    }
    block_barrier();
    await_sent(&arrived);

    // --- epilogue ---
    for (int i = thread; i < OWNED; i += BLOCK_SIZE) {
        const int at = split * OWNED + i;
        float w = 0.0f;
        UNROLL for (int source = 0; source < SPLITS; ++source) w += received[source * OWNED + i];
        const i64 row = row0 + at / COLUMNS;
        const int column = column0 + at % COLUMNS;
        if (row < m && column < WIDTH) epilogue(a, row, column, w);
    }
}

KERNEL(BLOCK_SIZE) CLUSTER(SPLITS) void q4jit_product(
    const u16* __restrict__ x,
    const u8* __restrict__ w,
    u16* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
