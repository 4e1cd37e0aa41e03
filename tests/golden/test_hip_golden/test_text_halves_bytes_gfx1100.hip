// product for hip:gfx1100, tile_halves, 64 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_halves:
//   w_product = x_value @ w    Q8_0 [512, 96]
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
constexpr int TERMS = 2;  // f16 numbers whose sum is x

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int TERM_ITEMS = 64;  // TILE_ROWS · UNIT_QUARTERS, of an instruction's rows in a term of a unit
constexpr int UNIT_ITEMS = 128;  // TERMS · TERM_ITEMS
constexpr int STAGE_UNITS = 1;  // of x, in shared memory at a time
constexpr int QUAD_STAGES = 4;
static_assert(QUAD_STAGES * STAGE_UNITS == QUAD_UNITS, "a quad is whole stages");
constexpr int RUN_ITEMS = 128;  // STAGE_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 2048;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of K
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

// Q8_0 [512, 96] in the layout `tiles16`.
struct Q8_0_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 128⌉, of a column
    static constexpr int QUANTS0_BYTES = 128;  // of a quad
    static constexpr i64 D_AT = 49152;  // where its region begins
    static constexpr int D_BYTES = 8;  // of a quad

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }

    // What a lane has of a quad: of each quarter of a unit that it has, the planes; the quad's scales.
    struct Part {
        u32x4 quants0[LANE_QUARTERS][2];
        u32 d[2];
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + lane_part() * LANE_QUARTERS * 32;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) {
            part.quants0[i][0] = stream_16(quants0 + i * 32);
            part.quants0[i][1] = stream_16(quants0 + i * 32 + 16);
        }
        load_8(w + D_AT + quad * D_BYTES, part.d);
        return part;
    }

    DEVICE void load_8(const u8* from, u32 (&words)[2]) {
        const u64 both = *(const u64*)from;
        words[0] = (u32)both;
        words[1] = (u32)(both >> 32);
    }

    // Pairs of f16: a code c is 1024 + c.
    static constexpr u32 PAIR_OF_2P_9 = 0x18001800u;  // 2^-9
    static constexpr u32 PAIR_OF_ZERO = 0xc080c080u;  // -1152 · 2^-9

    // The numbers of unit u, times 2^-9: the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19 of a quarter.
    DEVICE void halves(const Part& part, int u, u32x4 (&q)[LANE_QUARTERS]) {
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) {
            UNROLL for (int j = 0; j < 4; ++j) q[i][j] = byte_pair(part.quants0[i][u / 2][u % 2 * 2 + j / 2], j % 2);
            UNROLL for (int j = 0; j < 4; ++j) q[i][j] = fma_halves(q[i][j], PAIR_OF_2P_9, PAIR_OF_ZERO);
        }
    }

    // What the numbers of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u) {
        return half_to_f32((u16)((u < 2 ? part.d[0] : part.d[1]) >> (16 * (u % 2))));
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int u = k / UNIT % QUAD_UNITS, upper = k / (UNIT / 2) % 2, part_of_unit = k / 4 % 4, element = k % 4;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + part_of_unit * 32;
        const u32 code = quants0[8 * u + 4 * upper + element];
        Part part;
        load_8(w + D_AT + quad * D_BYTES, part.d);
        const float number = (float)code - 128.0f;
        return number * scale(part, u);
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    const u16* x_terms;
    const float* x_scales;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row * 512 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = w_product;
}

DEVICE bool is_rough(float x_scale) { return x_scale != x_scale; }  // NaN: terms do not represent the row

// One result of a rough row by multiply-add, from decoded weights. Each unit has a sum of its own: one sum
// of all of K would err by too much.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;
    ROLLED for (int k = 0; k < K; ++k) {
        sum = fma_f32(x_value(a, row, k), Q8_0_512x96::value(a.w, column, k), sum);
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
    const Q8_0_512x96::Part (&w_quad)[WAVE_PANELS][LANE_COLUMNS],
    lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* staged, int x_first, int first_unit) {
    UNROLL for (int u = 0; u < STAGE_UNITS; ++u) {
        u32x4 w_quants[WAVE_PANELS][LANE_COLUMNS][LANE_QUARTERS];
        float w_scale[WAVE_PANELS][LANE_COLUMNS][1];
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                UNROLL for (int half = 0; half < 1; ++half)
                    w_scale[n][c][half] = Q8_0_512x96::scale(w_quad[n][c], first_unit + u);
                Q8_0_512x96::halves(w_quad[n][c], first_unit + u, w_quants[n][c]);
            }
        UNROLL for (int step = 0; step < STEPS; ++step) {
            u32x4 x[TERMS][LANE_QUARTERS];
            UNROLL for (int t = 0; t < TERMS; ++t)
                UNROLL for (int q = 0; q < LANE_QUARTERS; ++q)
                    x[t][q] = staged[x_first + step * RUN_ITEMS + u * UNIT_ITEMS + t * TERM_ITEMS + q];
            UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
                UNROLL for (int half = 0; half < 1; ++half) {
                    lane_sums w_dots = {};
                    UNROLL for (int t = TERMS - 1; t >= 0; --t) {  // the smallest term first
                        multiply_unit(x[t], w_quants[n], w_dots);
                    }
                    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                        UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                            const int i = c * LANE_ROWS + v;
                            float sum = fma_f32(w_scale[n][c][half], w_dots[i], w_sums[n][step][i]);
                            settle(sum);  // x of steps ahead would take more registers than there are
                            w_sums[n][step][i] = sum;
                        }
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
            w_index[n][c] = Q8_0_512x96::quad_index(panel * PANEL, 0) + lane_column(c);
        }
    }
    const auto load_w = [&](Q8_0_512x96::Part (&quad_parts)[WAVE_PANELS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                quad_parts[n][c] = Q8_0_512x96::load_part(a.w, w_index[n][c] + quad * PANEL);
    };
    Q8_0_512x96::Part w_quad[WAVE_PANELS][LANE_COLUMNS];
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
        Q8_0_512x96::Part w_next[WAVE_PANELS][LANE_COLUMNS];
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
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_scales, m});
}
