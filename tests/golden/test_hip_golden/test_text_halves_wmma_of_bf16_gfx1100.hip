// product for hip:gfx1100, tile_halves, 64 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_halves:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a column
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int ROWS = 64;  // of x, in a tile
constexpr int COLUMNS = 64;  // of the result, in a tile
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int UNIT_QUARTERS = 4;
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUADS = 4;  // ⌈K / (QUAD_UNITS · UNIT)⌉, of a column
constexpr int WAVE_PANELS = 1;  // panels that a wave computes
constexpr int WAVES_N = 4;  // COLUMNS / (WAVE_PANELS · PANEL), waves with different columns
static_assert(WAVES_N * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
constexpr int STEPS = 4;  // ROWS / TILE_ROWS, instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int UNIT_ITEMS = 64;  // TILE_ROWS · UNIT_QUARTERS, of an instruction's rows in a unit
constexpr int STAGE_UNITS = 2;  // of x, in shared memory at a time
constexpr int QUAD_STAGES = 2;
static_assert(QUAD_STAGES * STAGE_UNITS == QUAD_UNITS, "a quad is whole stages");
constexpr int RUN_ITEMS = 128;  // STAGE_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 1024;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of K
constexpr int STAGE_ITEMS = 512;  // STEPS · RUN_ITEMS
constexpr int STAGES = 2;  // in shared memory: one is multiplied, the next one is on its way
constexpr int COPIERS = 128;  // threads that copy x: a power of two, so that they share runs evenly
constexpr int COPIES = 4;  // ⌈STAGE_ITEMS / COPIERS⌉, items of a stage that a thread copies
constexpr int ROOM_BYTES = 16384;  // STAGES · STAGE_ITEMS · 16
constexpr int STAGED_BYTES = 16656;  // ROOM_BYTES + ROWS · 4 for x_scales + 16 for any_rough
constexpr int LDS_BYTES = 16656;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

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
    const u16* x_terms;
    const float* x_scales;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = bf16_to_f32(a.x[row * 512 + column]);
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = f32_to_bf16(w_product);
}

DEVICE bool is_rough(float x_scale) { return x_scale != x_scale; }  // NaN: terms do not represent the row

// One result of a rough row by multiply-add, from decoded weights. Each unit has a sum of its own: one sum
// of all of K would err by too much.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;
    ROLLED for (int k = 0; k < K; ++k) {
        sum = fma_f32(x_value(a, row, k), Q4_0_512x96::value(a.w, column, k), sum);
        if (k % UNIT < UNIT - 1) continue;
        total += sum;
        sum = 0.0f;
    }
    return total;
}

// All results of the tile's rough rows.
DEVICE void store_rough_rows(const Arguments& a, i64 row0, int column0, const float* x_scales) {
    for (int i = thread_index(); i < ROWS * COLUMNS; i += BLOCK_SIZE) {
        const i64 row = row0 + i / COLUMNS;
        const int column = column0 + i % COLUMNS;
        if (row < a.m && column < WIDTH && is_rough(x_scales[i / COLUMNS]))
            epilogue(a, row, column, exact_w(a, row, column));
    }
}

// sums += x w over the units of a quad that are in a stage, from `first_unit` on. Each wave multiplies alone.
// Quants are exact in f16: the dot product of a unit is multiplied by the unit's scale.
DEVICE void multiply_quad(
    const Q4_0_512x96::Part (&w_quad)[WAVE_PANELS][LANE_COLUMNS],
    lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* staged, int x_first, int first_unit) {
    UNROLL for (int u = 0; u < STAGE_UNITS; ++u) {
        u32x4 w_quants[WAVE_PANELS][LANE_COLUMNS][LANE_QUARTERS];
        float w_scale[WAVE_PANELS][LANE_COLUMNS];
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                Q4_0_512x96::halves(w_quad[n][c], first_unit + u, w_quants[n][c]);
                w_scale[n][c] = Q4_0_512x96::scale(w_quad[n][c], first_unit + u);
            }
        UNROLL for (int step = 0; step < STEPS; ++step) {
            u32x4 x[LANE_QUARTERS];
            UNROLL for (int q = 0; q < LANE_QUARTERS; ++q)
                x[q] = staged[x_first + step * RUN_ITEMS + u * UNIT_ITEMS + q];
            UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
                lane_sums w_dots = {};
                multiply_unit(x, w_quants[n], w_dots);
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                    UNROLL for (int i = c * LANE_ROWS; i < (c + 1) * LANE_ROWS; ++i) {
                        float sum = fma_f32(w_scale[n][c], w_dots[i], w_sums[n][step][i]);
                        settle(sum);  // x of steps ahead would take more registers than there are
                        w_sums[n][step][i] = sum;
                    }
            }
        }
    }
}

// A block computes ROWS × COLUMNS results on matrix units. The terms of a row of x share a scale.
// Quants are exact in f16; the sum of a unit is multiplied by the weights' scale and added up in f32.
// Waves load the weights of their columns straight into registers. x goes through shared memory: a
// stage is multiplied while the next one is copied.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    // --- the tile: its rows, its columns ---
    SHARED u32x4 staged[ROOM_BYTES / 16];  // x: [STAGES][STEPS][RUN_ITEMS]
    SHARED float x_scales[ROWS];  // NaN: the row is rough
    SHARED int any_rough;
    const int thread = thread_index();
    const int wave_n = wave_index() % WAVES_N;
    const i64 row0 = block_of_rows() * ROWS;
    if (thread == 0) any_rough = 0;
    const int column0 = block_x() * COLUMNS;
    const int end_quad = at_run_time(QUADS);

    // --- load ahead: the weights of the first quad ---
    u32 w_index[WAVE_PANELS][LANE_COLUMNS];  // of the first quad in each of the lane's columns
    UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
        const int tile_panel = column0 / PANEL + wave_n * WAVE_PANELS + n;
        const int panel = tile_panel <= 5 ? tile_panel : 5;  // beyond the last one nothing is stored
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            w_index[n][c] = Q4_0_512x96::quad_index(panel * PANEL, 0) + lane_column(c);
        }
    }
    const auto load_w = [&](Q4_0_512x96::Part (&quad_parts)[WAVE_PANELS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                quad_parts[n][c] = Q4_0_512x96::load_part(a.w, w_index[n][c] + quad * PANEL);
    };
    Q4_0_512x96::Part w_quad[WAVE_PANELS][LANE_COLUMNS];
    load_w(w_quad, 0);
    lane_sums w_sums[WAVE_PANELS][STEPS] = {};

    // --- stage x: copy the first stage into shared memory ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] : 0.0f;
    // In memory a stage is one run for each instruction's rows. Rows beyond the last hold anything: their
    // results are not stored. Beyond K x is 0, up to a whole quad; x_terms has room for a whole stage.
    const u32x4* x_from = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS +
                          thread / RUN_ITEMS * ROW_ITEMS + thread % RUN_ITEMS;
    const auto item_of = [&](int room, int i) { return staged + room * STAGE_ITEMS + thread + i * COPIERS; };
    Copy copies[COPIES];
    const auto begin_stage = [&](int room) {
        UNROLL for (int i = 0; i < COPIES; ++i) {
            const int item = i * COPIERS;
            const u32x4* const from = x_from + item / RUN_ITEMS * ROW_ITEMS + item % RUN_ITEMS;
            begin_copy(copies[i], item_of(room, i), from);
        }
        x_from += RUN_ITEMS;
    };
    const auto end_stage = [&](int room) {
        UNROLL for (int i = 0; i < COPIES; ++i)
            end_copy(copies[i], item_of(room, i));
    };
    const int stages = end_quad * QUAD_STAGES;
    begin_stage(0);
    end_stage(0);
    close_copies();
    int now = 0, into = 1;  // the stage that is multiplied, and the one that is copied
    int left = stages - 1;  // stages that no copy has begun for
    // Wait for stage `now`, and begin to copy the next one over the one before it.
    // Return where this lane's x begins.
    const auto enter_stage = [&](bool goes_on) {
        await_copies<STAGES - 2>();
        block_barrier();  // all threads have copied `now`, and none reads the stage before
        into = 1 - now;
        if (goes_on) begin_stage(into);
        close_copies();
        --left;
        // Hidden from the compiler, which would compute each address of `multiply_quad` anew.
        return at_run_time(now * STAGE_ITEMS +
                           lane_x_row() * UNIT_QUARTERS + lane_part() * LANE_QUARTERS);
    };
    const auto leave_stage = [&](bool goes_on) {
        if (goes_on) end_stage(into);
        now = into;
    };

    // --- multiply: stage by stage ---
    ROLLED for (int quad = 0; quad < end_quad; ++quad) {
        // The next quad is loaded while this one is multiplied.
        Q4_0_512x96::Part w_next[WAVE_PANELS][LANE_COLUMNS];
        load_w(w_next, quad + 1);
        UNROLL for (int s = 0; s < QUAD_STAGES; ++s) {
            const bool goes_on = s + 1 < QUAD_STAGES || left > 0;
            const auto x = enter_stage(goes_on);
            multiply_quad(w_quad, w_sums, staged, x, s * STAGE_UNITS);
            leave_stage(goes_on);
        }
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) w_quad[n][c] = w_next[n][c];
    }

    // --- epilogue: this lane has whole sums ---
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                    const int r = step * TILE_ROWS + lane_row(v);
                    const int column = column0 + (wave_n * WAVE_PANELS + n) * PANEL + lane_column(c);
                    const float scale = x_scales[r];
                    if (row0 + r < m && column < WIDTH && !is_rough(scale))
                        epilogue(a, row0 + r, column, scale * w_sums[n][step][c * LANE_ROWS + v]);
                }

    // --- rough rows ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        if (is_rough(x_scales[r])) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    store_rough_rows(a, row0, column0, x_scales);
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const u16* __restrict__ x,
    const u8* __restrict__ w,
    u16* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_scales, m});
}
