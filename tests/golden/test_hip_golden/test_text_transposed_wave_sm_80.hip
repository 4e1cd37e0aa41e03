// transposed for hip:sm_80, tile_halves_transposed, 8 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = y
// 512 columns, tile_halves_transposed:
//   w_product = x_value @ w.T    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int N = 96;  // columns of w, which the products sum over; 32 of them are a unit of x
constexpr int WIDTH = 512;  // columns of the whole result
constexpr int ROWS = 8;  // of x, in a tile
constexpr int COLUMNS = 128;  // of the result, in a tile
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of x, or of a column that are decoded together
constexpr int UNIT_QUARTERS = 4;
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUADS = 1;  // ⌈N / (QUAD_UNITS · UNIT)⌉, of a row of x
constexpr int WAVE_PANELS = 2;  // panels that a wave computes
constexpr int WAVES_N = 4;  // COLUMNS / (WAVE_PANELS · PANEL), waves with different columns
static_assert(WAVES_N * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
constexpr int STEPS = 1;  // ROWS / TILE_ROWS, instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");
constexpr float QUANT_STEP = 0x1p-9f;  // x_scales are for quants times 2^-9

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int TERM_ITEMS = 32;  // TILE_ROWS · UNIT_QUARTERS, of an instruction's rows in a term of a unit
constexpr int UNIT_ITEMS = 64;  // 2 terms · TERM_ITEMS
constexpr int STAGE_UNITS = 4;  // of x, in shared memory at a time
constexpr int RUN_ITEMS = 256;  // STAGE_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 256;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of N
constexpr int STAGE_ITEMS = 256;  // STEPS · RUN_ITEMS
constexpr int STAGES = 3;  // in shared memory: one is multiplied, the next ones are on their way
constexpr int COPIERS = 128;  // threads that copy x: a power of two, so that they share runs evenly
constexpr int COPIES = 2;  // ⌈STAGE_ITEMS / COPIERS⌉, items of a stage that a thread copies
constexpr int ROOM_BYTES = 12288;  // STAGES · STAGE_ITEMS · 16
constexpr int STAGED_BYTES = 39984;  // ROOM_BYTES + STAGES · WEIGHT_ITEMS · 16 + x_scales, any_rough

// Weights are copied in items of 16 bytes, too: a word of each of a quad's units, or the scales of two columns.
constexpr int UNIT_PANELS = 2;  // UNIT / PANEL, of w in a unit of x
constexpr int QUAD_ITEMS = 64;  // of a quad of a panel: its quants
constexpr int QUAD_SCALES_ITEMS = 8;  // and its scales
constexpr int TILE_QUADS = 1;  // COLUMNS / (QUAD_UNITS · UNIT), of a column of w
constexpr int QUANTS_ITEMS = 512;  // STAGE_UNITS · UNIT_PANELS · TILE_QUADS · QUAD_ITEMS, of a stage
constexpr int WEIGHT_ITEMS = 576;  // the same with scales, which follow the quants
static_assert(UNIT_PANELS * TILE_QUADS * QUAD_ITEMS == BLOCK_SIZE, "a thread copies one item of quants for each unit");
constexpr int LDS_BYTES = 39984;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_80 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q4_0 [512, 96] in the layout `tiles16`.
struct Q4_0_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 128⌉, of a column
    static constexpr int QUAD_BYTES = 64;  // QUAD_UNITS · UNIT / 2, of quants
    static constexpr i64 D_AT = 24576;  // where its region begins

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }

    // Pairs of f16. A nibble n in the lowest bits of an f16 is n * 2^-24, and in the next four bits n * 2^-20:
    // denormal numbers, which a multiplication makes n * 2^-9.
    static constexpr u32 LOW_NIBBLES = 0x000F000Fu;
    static constexpr u32 HIGH_NIBBLES = 0x00F000F0u;
    static constexpr u32 PAIR_OF_2P15 = 0x78007800u;  // 2^15: from 2^-24 to 2^-9
    static constexpr u32 PAIR_OF_2P11 = 0x68006800u;  // 2^11: from 2^-20 to 2^-9
    static constexpr u32 PAIR_OF_MINUS_8 = 0xA400A400u;  // -8 · 2^-9 = -2^-6: the code of 0 is 8

    // The quants of two columns at the same k, times 2^-9: those of the low nibbles of a word's bytes 0 and 2, and
    // those of their high nibbles.
    DEVICE void column_pairs(u32 word, u32& low, u32& high) {
        low = fma_halves(word & LOW_NIBBLES, PAIR_OF_2P15, PAIR_OF_MINUS_8);
        high = fma_halves(word & HIGH_NIBBLES, PAIR_OF_2P11, PAIR_OF_MINUS_8);
    }

    static constexpr u32 PAIR_OF_2P9 = 0x60006000u;  // undoes the 2^-9 of `column_pairs`
    // The scales of two columns, times 2^9: scales are below 2^7.
    DEVICE u32 scale_pair(u32 d) { return fma_halves(d, PAIR_OF_2P9, 0); }

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
    const float* y;
    const u8* w;
    float* output0;
    const u16* x_terms;
    const float* x_scales;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float y_element = a.y[row * 96 + column];
    return y_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 512 + column] = w_product;
}

DEVICE bool is_rough(float x_scale) { return x_scale != x_scale; }  // NaN: terms do not represent the row

// One result of a rough row by multiply-add, from decoded weights. Each unit has a sum of its own: one sum
// of all of N would err by too much.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;
    ROLLED for (int n = 0; n < N; ++n) {
        sum = fma_f32(x_value(a, row, n), Q4_0_512x96::value(a.w, n, column), sum);
        if (n % UNIT < UNIT - 1 && n < N - 1) continue;
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

// Scales from 2^7 on are infinite where terms are made of them, and sums with them are Inf or NaN.
DEVICE bool is_large(float sum) { return !(abs_f32(sum) < as_f32(0x7F800000u)); }

// What are a column of w and its elements in the figures above are here a row of w.T, element k of all columns, and
// 32 columns: the matrix instruction sums over columns.
//
// A wave has one word of each unit of a quad: 32 elements of each column, which are two panels of results. In a
// cell: elements 4 w…4 w + 3 and 16 + 4 w…16 + 4 w + 3 of a unit are those of word w. Two lanes share a word.
//
//                     panel 0                         panel 1
//    lanes  0…3     4 w,     16 + 4 w               4 w + 1, 16 + 4 w + 1     of unit 0
//           4…7     4 w + 2, 16 + 4 w + 2           4 w + 3, 16 + 4 w + 3
//          8…11     4 w,     16 + 4 w               4 w + 1, 16 + 4 w + 1     of unit 1
//             …
//
// The column of a lane's result c in the tile, for panel n of the wave.
DEVICE int lane_tile_column(int wave_n, int n, int c) {
    const int unit = wave_n / 4 * QUAD_UNITS + lane_index() / 8;
    return unit * UNIT + c * (UNIT / 2) + wave_n % 4 * 4 + lane_index() / 4 % 2 * 2 + n;
}

// What a lane has of 32 columns of w, a unit of x: four pairs of columns, in the order of x's pairs. Pair 2 p + e
// is columns 4 c + e and 4 c + e + 2 of panel p, for lanes c, 4 + c, 8 + c…
struct Pairs {
    u32x4 words;  // 16 bits of each column: two low and two high nibbles
    u32 d[4];  // the scales, as f16
};

// u: the unit of x in the stage.
DEVICE Pairs load_pairs(const u32x4* stage, int u, int wave_n) {
    const int lane = lane_index(), tile_quad = wave_n / 4, word = wave_n % 4;
    Pairs pairs;
    // A lane gives the address of an item: of columns 0, 2…14 and 1, 3…15 of both panels.
    const int row = lane % 8, odd = lane / 8 % 2, panel = lane / 16;
    const int item = row * 8 + ((odd * 4 + word) ^ row);  // the items of a quad have changed places
    pairs.words = load_transposed(stage + ((u * UNIT_PANELS + panel) * TILE_QUADS + tile_quad) * QUAD_ITEMS + item);
    const u16* const scales = (const u16*)(stage + QUANTS_ITEMS);  // [panel][TILE_QUADS][PANEL][QUAD_UNITS]
    UNROLL for (int i = 0; i < 4; ++i) {
        const int column = ((u * UNIT_PANELS + i / 2) * TILE_QUADS + tile_quad) * PANEL + lane % 4 * 4 + i % 2;
        const u16* const d = scales + column * QUAD_UNITS + lane / 8;
        pairs.d[i] = d[0] | (u32)d[2 * QUAD_UNITS] << 16;
    }
    return pairs;
}

constexpr u32 PAIR_OF_SIGNS = 0x80008000u;
// Values of panel n: rounded to f16, and the rest, which is an f16 exactly: a quant has 4 bits, a scale 11.
template <typename weight>
DEVICE void pair_terms(const Pairs& pairs, int n, u32x4 (&values)[LANE_COLUMNS][LANE_QUARTERS],
                       u32x4 (&rests)[LANE_COLUMNS][LANE_QUARTERS]) {
    UNROLL for (int i = 0; i < 4; ++i) {
        const u32 d = weight::scale_pair(pairs.d[i]);
        u32 quants[LANE_COLUMNS];
        weight::column_pairs(pairs.words[i] >> (8 * n), quants[0], quants[1]);
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            values[c][0][i] = fma_halves(quants[c], d, 0);
            rests[c][0][i] = fma_halves(quants[c], d, values[c][0][i] ^ PAIR_OF_SIGNS);
        }
    }
}

// sums += x w.T over the units of a stage. Each wave multiplies alone.
// Matrix units truncate what they add up, so that their sums of a unit are added to the totals of a lane.
DEVICE void multiply_stage(
    const u32x4* w_stage, lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* staged, int x_first, int wave_n) {
    UNROLL for (int u = 0; u < STAGE_UNITS; ++u) {
        const Pairs w_pairs = load_pairs(w_stage, u, wave_n);
        u32x4 w_values[WAVE_PANELS][LANE_COLUMNS][LANE_QUARTERS];
        u32x4 w_rests[WAVE_PANELS][LANE_COLUMNS][LANE_QUARTERS];
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            pair_terms<Q4_0_512x96>(w_pairs, n, w_values[n], w_rests[n]);
        UNROLL for (int step = 0; step < STEPS; ++step) {
            const u32x4* const x_at = staged + x_first + step * RUN_ITEMS + u * UNIT_ITEMS;
            const u32x4 x[LANE_QUARTERS] = {x_at[0]};
            const u32x4 x_rest[LANE_QUARTERS] = {x_at[TERM_ITEMS]};
            UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
                lane_sums w_dots = {};
                multiply_unit(x, w_rests[n], w_dots);  // the smallest products first
                multiply_unit(x_rest, w_values[n], w_dots);
                multiply_unit(x, w_values[n], w_dots);
                UNROLL for (int i = 0; i < LANE_COLUMNS * LANE_ROWS; ++i) w_sums[n][step][i] += w_dots[i];
            }
        }
    }
}

// A block computes ROWS × COLUMNS results of x w.T on matrix units. The terms of a row of x share a scale.
// A weight is exactly the sum of two terms in f16. The second terms of both, x and w, are not multiplied:
// that is 2^-22 of their product.
// x and w go through shared memory: a stage is multiplied while the next ones are copied.
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

    // --- stage w: its quads in the tile, for the panels of a stage ---
    SHARED u32x4 w_staged[STAGES * WEIGHT_ITEMS];  // [STAGES]: quants, then scales
    // The number of a quad among those of all panels.
    const auto w_quad = [&](int panel, int tile_quad) {
        const int quad = column0 / (QUAD_UNITS * UNIT) + tile_quad;
        if (panel > 5) panel = 5;  // beyond the last one x is 0
        return (i64)panel * Q4_0_512x96::QUADS + quad;
    };
    int first_panel = 0;  // of the stage that is copied next
    Copy weights_copy;  // of all items: they are awaited by group
    const auto begin_weights = [&](int room) {
        u32x4* const w_room = w_staged + room * WEIGHT_ITEMS;
        UNROLL for (int u = 0; u < STAGE_UNITS; ++u) {
            const int panel = first_panel + u * UNIT_PANELS + thread / (TILE_QUADS * QUAD_ITEMS);
            const i64 quad = w_quad(panel, thread / QUAD_ITEMS % TILE_QUADS);
            // The items of 128 bytes change places: words of eight columns, read together, are in different banks.
            begin_copy(weights_copy, w_room + u * BLOCK_SIZE + (thread ^ thread / 8 % 8),
                       (const u32x4*)a.w + quad * QUAD_ITEMS + thread % QUAD_ITEMS);
        }
        if (thread < WEIGHT_ITEMS - QUANTS_ITEMS) {
            const int panel = first_panel + thread / (TILE_QUADS * QUAD_SCALES_ITEMS);
            const i64 quad = w_quad(panel, thread / QUAD_SCALES_ITEMS % TILE_QUADS);
            const u32x4* const scales = (const u32x4*)(a.w + Q4_0_512x96::D_AT);
            begin_copy(weights_copy, w_room + QUANTS_ITEMS + thread,
                       scales + quad * QUAD_SCALES_ITEMS + thread % QUAD_SCALES_ITEMS);
        }
        first_panel += STAGE_UNITS * UNIT_PANELS;
    };
    // Copy the first stages; the group of x's first stage awaits them.
    UNROLL for (int stage = 0; stage < STAGES - 1; ++stage)
        if (first_panel < end_quad * QUAD_UNITS * UNIT_PANELS) begin_weights(stage);

    // --- stage x: copy the first stages into shared memory ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] * QUANT_STEP : 0.0f;
    // In memory a stage is one run for each instruction's rows. Rows beyond the last hold anything: their
    // results are not stored. Beyond N x is 0, up to a whole quad; x_terms has room for a whole stage.
    const u32x4* x_from = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS +
                          thread / RUN_ITEMS * ROW_ITEMS + thread % RUN_ITEMS;
    const auto item_of = [&](int room, int i) { return staged + room * STAGE_ITEMS + thread + i * COPIERS; };
    Copy copies[COPIES];
    // All threads are COPIERS. The test hides this from the compiler, which would keep every address in a register.
    const auto begin_stage = [&](int room) {
        UNROLL for (int i = 0; i < COPIES; ++i) {
            const int item = i * COPIERS;
            const u32x4* const from = x_from + item / RUN_ITEMS * ROW_ITEMS + item % RUN_ITEMS;
            if (thread < COPIERS) begin_copy(copies[i], item_of(room, i), from);
        }
        x_from += RUN_ITEMS;
    };
    const auto end_stage = [&](int room) {
        UNROLL for (int i = 0; i < COPIES; ++i)
            if (thread < COPIERS) end_copy(copies[i], item_of(room, i));
    };
    const int stages = end_quad;
    UNROLL for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < stages) {
            begin_stage(stage);
            end_stage(stage);
        }
        close_copies();
    }
    int now = 0, into = STAGES - 1;  // the stage that is multiplied, and the last one that is copied
    int left = stages - (STAGES - 1);  // stages that no copy has begun for
    // Wait for stage `now`, and begin to copy the next one over the one before it.
    // Return where this lane's x begins.
    const auto enter_stage = [&](bool goes_on) {
        await_copies<STAGES - 2>();
        block_barrier();  // all threads have copied `now`, and none reads the stage before
        into = now > 0 ? now - 1 : STAGES - 1;
        if (goes_on) begin_stage(into);
        if (goes_on) begin_weights(into);
        close_copies();
        --left;
        // Hidden from the compiler, which would compute each address of `multiply_stage` anew.
        return at_run_time(now * STAGE_ITEMS + lane_x_row() * UNIT_QUARTERS + lane_part() * LANE_QUARTERS);
    };
    const auto leave_stage = [&](bool goes_on) {
        if (goes_on) end_stage(into);
        now = now + 1 < STAGES ? now + 1 : 0;
    };

    // --- multiply: stage by stage ---
    lane_sums w_sums[WAVE_PANELS][STEPS] = {};
    ROLLED for (int stage = 0; stage < stages; ++stage) {
        const bool goes_on = left > 0;
        const auto x = enter_stage(goes_on);
        multiply_stage(w_staged + now * WEIGHT_ITEMS, w_sums, staged, x, wave_n);
        leave_stage(goes_on);
    }

    // --- large scales: all rows of the tile become rough ---
    bool has_large = false;  // rows beyond the last hold anything
    UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
        UNROLL for (int step = 0; step < STEPS; ++step)
            UNROLL for (int i = 0; i < LANE_COLUMNS * LANE_ROWS; ++i) {
                const bool is_inside = row0 + step * TILE_ROWS + lane_row(i % LANE_ROWS) < m;
                has_large = has_large || (is_inside && is_large(w_sums[n][step][i]));
            }
    if (has_large) any_rough = 1;
    block_barrier();
    if (any_rough)
        for (int r = thread; r < ROWS; r += BLOCK_SIZE) x_scales[r] = as_f32(0x7FC00000u);  // NaN
    block_barrier();

    // --- epilogue: this lane has whole sums ---
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                    const int r = step * TILE_ROWS + lane_row(v);
                    const int column = column0 + lane_tile_column(wave_n, n, c);
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

KERNEL(BLOCK_SIZE) void q4jit_transposed(
    const float* __restrict__ y,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{y, w, output0, x_terms, x_scales, m});
}
