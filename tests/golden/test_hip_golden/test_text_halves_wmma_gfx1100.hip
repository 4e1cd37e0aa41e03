// gated for hip:gfx1100, tile_halves, 32 rows a tile, 256 threads, made by q4jit
// rows:
//   v0 = x
// 96 tile_halves:
//   v2 = v0 @ gate    Q4_0 [512, 96]
//   v9 = v0 @ up    Q4_0 [512, 96]
//   v3 = v2 + bias
//   output0 = v3 / (1 + exp(-v3)) * v9

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int ROWS = 32;  // of x
constexpr int COLUMNS = 128;  // of the result
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int K = 512;
constexpr int TERMS = 1;  // f16 numbers that make up one x
constexpr float QUANT_STEP = 0x1p-9f;  // x's scales are for quants that come times this
constexpr int GROUPS = 1;  // of 16 columns, that a wave computes
constexpr int WAVES_N = COLUMNS / 16 / GROUPS;  // beside each other
constexpr int WAVES_K = BLOCK_SIZE / WAVE / WAVES_N;  // that share columns
static_assert(GROUPS * WAVES_N * 16 == COLUMNS, "waves share the columns evenly");
static_assert(WAVES_N * WAVES_K * WAVE == BLOCK_SIZE, "and K");
constexpr int STEPS = ROWS / TILE_ROWS;  // instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");
constexpr int UNITS = (K + 31) / 32;
constexpr int QUADS = (UNITS + 3) / 4;  // of a column: four units that are stored together
constexpr int SPLITS = 1;  // blocks of a cluster: each has its own part of K
constexpr int SPLIT_QUADS = (QUADS + SPLITS - 1) / SPLITS;
constexpr int STAGE_UNITS = 4;  // of x, staged at a time
constexpr int QUAD_STAGES = STAGE_UNITS < 4 ? 4 / STAGE_UNITS : 1;
constexpr int STAGE_QUADS = STAGE_UNITS < 4 ? 1 : STAGE_UNITS / 4;
constexpr int TURN_UNITS = STAGE_UNITS < 4 ? STAGE_UNITS : 4;
constexpr int TURNS = STAGE_QUADS / WAVES_K;  // quads of a stage that a wave has
static_assert(TURNS * WAVES_K == STAGE_QUADS, "waves share the quads of a stage evenly");
// x is counted in items of 16 bytes, eight x each.
constexpr int TERM_ITEMS = TILE_ROWS * 4;  // of an instruction's rows in a unit
constexpr int UNIT_ITEMS = TERMS * TERM_ITEMS;
constexpr int RUN_ITEMS = STAGE_UNITS * UNIT_ITEMS;  // of a stage, beside each other in memory
constexpr int ROW_ITEMS = QUADS * 4 * UNIT_ITEMS;  // from the rows of an instruction to the next ones
constexpr int STAGE_ITEMS = STEPS * RUN_ITEMS;
constexpr int COPIERS =  // threads
    BLOCK_SIZE >= 512 ? 512 : BLOCK_SIZE >= 256 ? 256 : BLOCK_SIZE >= 128 ? 128 : 64;
static_assert(COPIERS <= BLOCK_SIZE, "there are so many");
constexpr int COPIES = (STAGE_ITEMS + COPIERS - 1) / COPIERS;  // of a thread
static_assert(COPIERS % RUN_ITEMS == 0 || RUN_ITEMS % COPIERS == 0, "they share runs evenly");
constexpr int STAGES = 2;  // in shared memory: one is used, the next ones are on their way
constexpr int STAGES_BYTES = STAGES * STAGE_ITEMS * 16;
constexpr int PRODUCTS = 2;
constexpr int PARTIAL_SUMS = SPLITS * WAVES_K;  // of a result
constexpr int OWNED = ROWS;
constexpr int SUMS_BYTES = PARTIAL_SUMS > 1 ? PRODUCTS * PARTIAL_SUMS * OWNED * COLUMNS * 4 : 0;
constexpr int ROOM_BYTES = STAGES_BYTES > SUMS_BYTES ? STAGES_BYTES : SUMS_BYTES;
constexpr int STAGED_BYTES = ROOM_BYTES + ROWS * 4 + (SPLITS > 1 ? 32 : 16);  // and x's scales
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop of few rounds would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// e to the x within 2 ulp, denormal results included.
DEVICE float exp_f32(float x) {
    const bool t0 = x < -104.0f;
    const float t1 = t0 ? -104.0f : x;
    const bool t2 = 89.0f < t1;
    const float t3 = t2 ? 89.0f : t1;
    const float t4 = fma_f32(t3, 1.442695f, 1.2582912e+07f);
    const i32 t5 = as_i32(t4);
    const i32 t6 = (i32)((u32)t5 - (u32)(i32)0x4b400000u);
    const float t7 = t4 - 1.2582912e+07f;
    const float t8 = fma_f32(t7, -0.6933594f, t3);
    const float t9 = fma_f32(t7, 0.00021219444f, t8);
    const float t10 = t9 * t9;
    const float t11 = fma_f32(0.0013814616f, t9, 0.008368716f);
    const float t12 = fma_f32(t11, t9, 0.04166839f);
    const float t13 = fma_f32(t12, t9, 0.16666521f);
    const float t14 = fma_f32(t13, t9, 0.49999994f);
    const float t15 = fma_f32(t10, t14, t9);
    const float t16 = t15 + 1.0f;
    const i32 t17 = t6 >> 1;
    const i32 t18 = (i32)((u32)t17 + (u32)127);
    const i32 t19 = (i32)((u32)t18 << 23);
    const float t20 = as_f32(t19);
    const float t21 = t16 * t20;
    const i32 t22 = (i32)((u32)t6 - (u32)t17);
    const i32 t23 = (i32)((u32)t22 + (u32)127);
    const i32 t24 = (i32)((u32)t23 << 23);
    const float t25 = as_f32(t24);
    const float t26 = t21 * t25;
    return t26;
}

// Q4_0 [512, 96] in the layout `tiles16`.
struct Q4_0_512x96 {
    static constexpr int K = 512;
    static constexpr int N = 96;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr int BLOCK_ELEMENTS = 32;
    static constexpr int BLOCKS = K / BLOCK_ELEMENTS;  // of a column
    static constexpr int BLOCK_UNITS = BLOCK_ELEMENTS / 32;
    static_assert(K % BLOCK_ELEMENTS == 0, "columns are whole blocks");
    static constexpr float ZERO = 8.0f;  // the quant of the value 0
    static constexpr int QUADS = (UNITS + 3) / 4;  // of a column
    static constexpr i64 QUANTS0_AT = 0;
    static constexpr int QUANTS0_STRIDE = 16;  // bytes of a block
    static constexpr i64 D_AT = 24576;
    static constexpr int D_STRIDE = 2;  // bytes of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
    };

    static_assert((N + 15) / 16 * (i64)QUADS * 16 < 1ll << 32, "quads are counted in 32 bits");
    // Which of the weight's quads one is: 16 columns stand beside each other.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / 16 * QUADS + quad) * 16 + column % 16; }

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 quad = quad_index((u32)column, unit / 4);
        Stored stored;
        UNROLL for (int i = 0; i < 4; ++i)
            stored.words[0][i] = ((const u32*)(w + QUANTS0_AT))[quad * 16 + i * 4 + unit % 4];
        stored.d = ((const u16*)(w + D_AT))[quad * 4 + unit % 4];
        return stored;
    }

    // What a lane has of a quad, the four units of a column that are stored together.
    struct Part {
        u32x4 words[4 / PARTS];
        u32 d[2];
    };

    // at: the quad's place among all of them.
    DEVICE Part load_part(const u8* w, u32 at) {
        Part part;
        const u8* const words = w + QUANTS0_AT + (u32)at * 64 + lane_part() * (4 / PARTS) * 16;
        UNROLL for (int i = 0; i < 4 / PARTS; ++i) part.words[i] = stream_16(words + i * 16);
        const u64 d = *(const u64*)(w + D_AT + (u32)at * 8);
        part.d[0] = (u32)d;
        part.d[1] = (u32)(d >> 32);
        return part;
    }

    // The quants of unit u minus 8, times 2^-9, of each word's elements 0, 2 · 1, 3 · 16, 18 · 17, 19.
    // Four bits at the end of an f16 are so many times 2^-24, its next four so many times 2^-20.
    DEVICE void halves(const Part& part, int u, u32x4 (&q)[4 / PARTS]) {
        UNROLL for (int i = 0; i < 4 / PARTS; ++i)
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 word = part.words[i][u] >> (8 * odd);
                q[i][odd] = fma_halves(word & 0x000F000Fu, 0x78007800u, 0xA400A400u);  // * 2^15 - 2^-6
                q[i][odd + 2] = fma_halves(word & 0x00F000F0u, 0x68006800u, 0xA400A400u);  // * 2^11 - 2^-6
            }
    }

    DEVICE float scale(const Part& part, int u) { return half_to_f32((u16)(part.d[u / 2] >> (16 * (u % 2)))); }

    // The values of unit u, rounded to f16: scales are below 2^7, so that 2^9 times one is an f16, too.
    DEVICE void rounded(const Part& part, int u, u32x4 (&values)[4 / PARTS]) {
        const u32 d = (part.d[u / 2] >> (16 * (u % 2)) & 0xFFFFu) * 0x10001u;
        const u32 d_step = fma_halves(d, 0x60006000u, 0);
        halves(part, u, values);
        UNROLL for (int i = 0; i < 4 / PARTS; ++i)
            UNROLL for (int j = 0; j < 4; ++j) values[i][j] = fma_halves(values[i][j], d_step, 0);
    }

    // A single value.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / 128);
        const int unit = k / 32 % 4;
        const u32 byte = w[QUANTS0_AT + quad * 64 + k % 16 / 4 * 16 + unit * 4 + k % 4];
        return (float)((i32)(byte >> (k % 32 / 16 * 4) & 15) - 8) *
               half_to_f32(((const u16*)(w + D_AT))[quad * 4 + unit]);
    }

    // 32 quants, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[8]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = stored.words[0][i];
            q[i] = word & 0x0f0f0f0fu;
            q[i + 4] = word >> 4 & 0x0f0f0f0fu;
        }
    }

    // Quant i of a unit, 0 at the value 0 and counted from `zero`: a small whole number.
    DEVICE float centred(const u32 (&q)[8], int i, float zero = 0.0f) {
        return byte_minus(q[i / 4], i % 4, ZERO + zero);
    }

    // What the 32 elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int) {
        return half_to_f32(stored.d);
    }

    // 32 values, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[32]) {
        u32 q[8];
        quants(stored, unit, q);
        const float factor = scale(stored, 0);
        UNROLL for (int i = 0; i < 32; ++i) values[i] = centred(q, i) * factor;
    }
};

struct Arguments {
    const float* x;
    const u8* gate;
    const u8* up;
    const float* bias;
    float* output0;
    const u16* x_terms;
    const float* x_scales;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float v0 = a.x[row * 512 + column];
    return v0;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float v2, float v9) {
    const float v1 = a.bias[column];
    const float v3 = v2 + v1;
    const float v4 = -(v3);
    const float v5 = exp_f32(v4);
    const float v7 = 1.0f + v5;
    const float v8 = v3 / v7;
    const float v10 = v8 * v9;
    a.output0[row * 96 + column] = v10;
}

// The same product by multiply-add, for rows that f16 terms do not represent.
DEVICE float exact_v2(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;  // one sum of all of K would err by too much
    ROLLED for (int k = 0; k < K; ++k) {
        sum = fma_f32(x_value(a, row, k), Q4_0_512x96::value(a.gate, column, k), sum);
        if (k % 32 < 31) continue;
        total += sum;
        sum = 0.0f;
    }
    return total;
}

// The same product by multiply-add, for rows that f16 terms do not represent.
DEVICE float exact_v9(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;  // one sum of all of K would err by too much
    ROLLED for (int k = 0; k < K; ++k) {
        sum = fma_f32(x_value(a, row, k), Q4_0_512x96::value(a.up, column, k), sum);
        if (k % 32 < 31) continue;
        total += sum;
        sum = 0.0f;
    }
    return total;
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x comes split into f16 terms that
// share a scale in each row, and the values of weights are rounded to f16: one term of x errs as much.
// Waves load the weights of their columns straight into registers; x goes through shared memory, the
// next stage while this one is used.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED u32x4 staged[ROOM_BYTES / 16];
    SHARED float x_scales[ROWS];  // NaN in rough rows
    SHARED int any_rough;
    const int thread = thread_index();
    const int wave_n = wave_index() % WAVES_N, wave_k = WAVES_K > 1 ? wave_index() / WAVES_N : 0;
    const i64 row0 = block_of_rows() * ROWS;
    if (thread == 0) any_rough = 0;
    const int column0 = block_x() / SPLITS * COLUMNS;
    const int first_quad = block_x() % SPLITS * SPLIT_QUADS;
    const int end_quad = at_run_time(first_quad + SPLIT_QUADS < QUADS ? first_quad + SPLIT_QUADS : QUADS);

    u32 v2_at[GROUPS][LANE_COLUMNS];  // quad 0 of the lane's columns
    u32 v9_at[GROUPS][LANE_COLUMNS];  // quad 0 of the lane's columns
    UNROLL for (int g = 0; g < GROUPS; ++g) {
        const int wanted_tile = column0 / 16 + wave_n * GROUPS + g;
        const int tile = WIDTH % COLUMNS == 0 || wanted_tile < (WIDTH + 15) / 16 ? wanted_tile : (WIDTH - 1) / 16;
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            v2_at[g][c] = Q4_0_512x96::quad_index(tile * 16, 0) + lane_column(c);
            v9_at[g][c] = Q4_0_512x96::quad_index(tile * 16, 0) + lane_column(c);
        }
    }
    const auto load_v2 = [&](Q4_0_512x96::Part (&parts)[GROUPS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int g = 0; g < GROUPS; ++g)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                parts[g][c] = Q4_0_512x96::load_part(a.gate, v2_at[g][c] + quad * 16);
    };
    Q4_0_512x96::Part v2_parts[TURNS][GROUPS][LANE_COLUMNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) load_v2(v2_parts[turn], first_quad + turn * WAVES_K + wave_k);
    const auto load_v9 = [&](Q4_0_512x96::Part (&parts)[GROUPS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int g = 0; g < GROUPS; ++g)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                parts[g][c] = Q4_0_512x96::load_part(a.up, v9_at[g][c] + quad * 16);
    };
    Q4_0_512x96::Part v9_parts[TURNS][GROUPS][LANE_COLUMNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) load_v9(v9_parts[turn], first_quad + turn * WAVES_K + wave_k);
    lane_sums sums[PRODUCTS][GROUPS][STEPS] = {};
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] * QUANT_STEP : 0.0f;
    // A stage of x is one run of memory for the rows of each instruction. Rows beyond the last are
    // anything, which no result has; beyond K x is 0, up to a whole quad.
    const u32x4* x_at = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS + first_quad * 4 * UNIT_ITEMS +
        thread / RUN_ITEMS * ROW_ITEMS + thread % RUN_ITEMS;
    // Items of a thread in a stage: whether there is one more, and where it goes.
    const auto has_item = [&](int i) {
        return (COPIERS == BLOCK_SIZE || thread < COPIERS) &&
               (STAGE_ITEMS % COPIERS == 0 || thread + i * COPIERS < STAGE_ITEMS);
    };
    const auto item_of = [&](int into, int i) { return staged + into * STAGE_ITEMS + thread + i * COPIERS; };
    Copy copies[COPIES];
    const auto begin_stage = [&](int into) {
        UNROLL for (int i = 0; i < COPIES; ++i) {
            const int item = i * COPIERS;
            const u32x4* const from = x_at + item / RUN_ITEMS * ROW_ITEMS + item % RUN_ITEMS;
            if (has_item(i)) begin_copy(copies[i], item_of(into, i), from);
        }
        x_at += RUN_ITEMS;
    };
    const auto end_stage = [&](int into) {
        UNROLL for (int i = 0; i < COPIES; ++i)
            if (has_item(i)) end_copy(copies[i], item_of(into, i));
    };
    const int stages = (end_quad - first_quad + STAGE_QUADS - 1) / STAGE_QUADS * QUAD_STAGES;
    UNROLL for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
        if (ahead < stages) {
            begin_stage(ahead);
            end_stage(ahead);
        }
        close_copies();
    }
    int now = 0, left = stages - (STAGES - 1);
    ROLLED for (int quad0 = first_quad; quad0 < end_quad; quad0 += STAGE_QUADS) {
        // What is needed later is loaded now, into registers of its own where a wave has one quad a stage.
        Q4_0_512x96::Part v2_next[GROUPS][LANE_COLUMNS];
        if (TURNS == 1) load_v2(v2_next, quad0 + STAGE_QUADS + wave_k);
        // What is needed later is loaded now, into registers of its own where a wave has one quad a stage.
        Q4_0_512x96::Part v9_next[GROUPS][LANE_COLUMNS];
        if (TURNS == 1) load_v9(v9_next, quad0 + STAGE_QUADS + wave_k);
        UNROLL for (int s = 0; s < QUAD_STAGES; ++s) {
            await_copies<STAGES - 2>();
            block_barrier();  // all have copied this stage, and none reads the one before
            const int into = STAGES == 2 ? 1 - now : now > 0 ? now - 1 : STAGES - 1;
            const bool goes_on = (s + 1 < QUAD_STAGES && STAGES == 2) || left > 0;
            if (goes_on) begin_stage(into);
            close_copies();
            --left;
            const int x_lane = at_run_time(  // else each of the addresses below is computed anew
                now * STAGE_ITEMS + wave_k * 4 * UNIT_ITEMS + lane_x_row() * 4 + lane_part() * (4 / PARTS));
            UNROLL for (int turn = 0; turn < TURNS; ++turn) {
                const int local_quad = turn * WAVES_K + wave_k;
                if (quad0 + local_quad >= end_quad) break;
                UNROLL for (int u = 0; u < TURN_UNITS; ++u) {
                    u32x4 v2_w[GROUPS][LANE_COLUMNS][4 / PARTS];
                    UNROLL for (int g = 0; g < GROUPS; ++g)
                        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                            const Q4_0_512x96::Part& part = v2_parts[turn][g][c];
                            Q4_0_512x96::rounded(part, s * STAGE_UNITS + u, v2_w[g][c]);
                        }
                    u32x4 v9_w[GROUPS][LANE_COLUMNS][4 / PARTS];
                    UNROLL for (int g = 0; g < GROUPS; ++g)
                        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                            const Q4_0_512x96::Part& part = v9_parts[turn][g][c];
                            Q4_0_512x96::rounded(part, s * STAGE_UNITS + u, v9_w[g][c]);
                        }
                    UNROLL for (int step = 0; step < STEPS; ++step) {
                        u32x4 x[TERMS][4 / PARTS];
                        UNROLL for (int t = 0; t < TERMS; ++t)
                            UNROLL for (int p = 0; p < 4 / PARTS; ++p)
                                x[t][p] = staged[x_lane + step * RUN_ITEMS + (turn * WAVES_K * 4 + u) * UNIT_ITEMS +
                                                 t * TERM_ITEMS + p];
                        UNROLL for (int g = 0; g < GROUPS; ++g) {
                            multiply_unit(x[0], v2_w[g], sums[0][g][step]);
                            float v2_first = sums[0][g][step][0];
                            settle(v2_first);  // x of steps ahead would take more registers than there are
                            sums[0][g][step][0] = v2_first;
                            multiply_unit(x[0], v9_w[g], sums[1][g][step]);
                            float v9_first = sums[1][g][step][0];
                            settle(v9_first);  // x of steps ahead would take more registers than there are
                            sums[1][g][step][0] = v9_first;
                        }
                    }
                }
                if (TURNS > 1) load_v2(v2_parts[turn], quad0 + STAGE_QUADS + local_quad);
                if (TURNS > 1) load_v9(v9_parts[turn], quad0 + STAGE_QUADS + local_quad);
            }
            if (goes_on) end_stage(into);
            now = STAGES == 2 ? into : now + 1 < STAGES ? now + 1 : 0;
        }
        if (TURNS == 1)
            UNROLL for (int g = 0; g < GROUPS; ++g)
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) v2_parts[0][g][c] = v2_next[g][c];
        if (TURNS == 1)
            UNROLL for (int g = 0; g < GROUPS; ++g)
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) v9_parts[0][g][c] = v9_next[g][c];
    }

    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int g = 0; g < GROUPS; ++g)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                    const int r = step * TILE_ROWS + lane_row(v);
                    const int column = column0 + (wave_n * GROUPS + g) * 16 + lane_column(c);
                    const float scale = x_scales[r];
                    if (row0 + r < m && column < WIDTH && scale == scale)
                        epilogue(a, row0 + r, column,
                                 scale * sums[0][g][step][c * LANE_ROWS + v],
                                 scale * sums[1][g][step][c * LANE_ROWS + v]);
                }
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        if (x_scales[r] != x_scales[r]) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    for (int i = thread; i < ROWS * COLUMNS; i += BLOCK_SIZE) {
        const i64 row = row0 + i / COLUMNS;
        const int column = column0 + i % COLUMNS;
        if (row < m && column < WIDTH && x_scales[i / COLUMNS] != x_scales[i / COLUMNS])
            epilogue(a, row, column, exact_v2(a, row, column), exact_v9(a, row, column));
    }
}

KERNEL(BLOCK_SIZE) void q4jit_gated(
    const float* __restrict__ x,
    const u8* __restrict__ gate,
    const u8* __restrict__ up,
    const float* __restrict__ bias,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, gate, up, bias, output0, x_terms, x_scales, m});
}
