// product for hip:sm_90, tile_halves, 32 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_halves:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a column
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int ROWS = 32;  // of x, in a tile
constexpr int COLUMNS = 64;  // of the result, in a tile
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUADS = 4;  // ⌈K / (QUAD_UNITS · UNIT)⌉, of a column
constexpr int WAVE_PANELS = 1;  // panels that a wave computes
constexpr int WAVES_N = 4;  // COLUMNS / (WAVE_PANELS · PANEL), waves with different columns
static_assert(WAVES_N * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
constexpr int STEPS = 4;  // ROWS / TILE_ROWS, instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");
constexpr int SPLITS = 2;  // thread blocks of a cluster that divide K
constexpr int SPLIT_QUADS = 2;  // ⌈QUADS / SPLITS⌉

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int UNIT_ITEMS = 32;  // TILE_ROWS · 4 quarters, of an instruction's rows in a unit
constexpr int STAGE_QUADS = 2;  // of x, in shared memory at a time
constexpr int TURNS = 2;  // STAGE_QUADS, quads of a stage that a wave has
constexpr int RUN_ITEMS = 256;  // STAGE_QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 512;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of K
constexpr int STAGE_ITEMS = 1024;  // STEPS · RUN_ITEMS
constexpr int STAGES = 2;  // in shared memory: one is multiplied, the next one is on its way
constexpr int COPIERS = 128;  // threads that copy x: a power of two, so that they share runs evenly
constexpr int COPIES = 8;  // ⌈STAGE_ITEMS / COPIERS⌉, items of a stage that a thread copies

// Partial sums of a result meet where the stages of x were.
constexpr int OWNED = 16;  // ROWS / SPLITS, rows whose results a thread block of the cluster stores
constexpr int RECEIVED_BYTES = 4096;  // (SPLITS - 1) · OWNED · COLUMNS · 4, from the other blocks
constexpr int PARTIAL_SUMS = 2;  // SPLITS, of a result
constexpr int ROOM_BYTES = 32768;  // max(STAGES · STAGE_ITEMS · 16, PARTIAL_SUMS · OWNED · COLUMNS · 4)
constexpr int STAGED_BYTES = 32928;  // ROOM_BYTES + ROWS · 4 for x_scales + 16 for any_rough + 16 for arrived
constexpr int LDS_BYTES = 32928;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

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

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.output0 = known_from_here(a.output0);
    a.x_terms = known_from_here(a.x_terms);
    a.x_scales = known_from_here(a.x_scales);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = half_to_f32(a.x[row * 512 + column]);
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = f32_to_half(w_product);
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

// wgmma: D[64, ROWS] += A[64, 16] B[16, ROWS]. Rows of A are columns of w, columns of B are rows of x.
//
// A is in registers; wave v of the four has its rows 16 v + 0…15. In a cell: lane, register of two f16.
// A row is one column of the panel. Its k are half a unit, elements in this order:
//
//        k   0  1    2  3    4  5    6  7    8  9   10 11   12 13   14 15
//  element   0  2    4  6    8 10   12 14    1  3    5  7    9 11   13 15
//          ┌──────┬──────┬──────┬──────┬──────┬──────┬──────┬──────┐
//   row 0  │  0 a │  1 a │  2 a │  3 a │  0 c │  1 c │  2 c │  3 c │
//       1  │  4 a │  5 a │  6 a │  7 a │  4 c │  5 c │  6 c │  7 c │
//       …  │      │      │      │      │      │      │      │      │
//       8  │  0 b │  1 b │  2 b │  3 b │  0 d │  1 d │  2 d │  3 d │
//       …  │      │      │      │      │      │      │      │      │
//      15  │ 28 b │ 29 b │ 30 b │ 31 b │ 28 d │ 29 d │ 30 d │ 31 d │
//          └──────┴──────┴──────┴──────┴──────┴──────┴──────┴──────┘
//
// a and c are two words of the lane's first column, b and d the same words of its second column: words 0 and 1
// for elements 0…15 (W0), words 2 and 3 for elements 16…31 (W1).
//
// D is in registers, too: lane l has rows l / 4 (sums 0, 1) and l / 4 + 8 (sums 2, 3) of columns 2 (l % 4) + 0, 1
// in each step of eight columns.
//
// B is in shared memory: rows of x, 64 bytes each: a unit in one term, quarters Q0…Q3 of 16 bytes. Q0 and Q1
// are k 0…7 and 8…15 of the first half, Q2 and Q3 of the second. With the 64-byte swizzle quarter q of row r
// is at q ^ r / 2 % 4, so that eight rows of one quarter are in different banks:
//
//     byte   0    16    32    48                 64 bytes further
//          ┌─────┬─────┬─────┬─────┐           ┌─────┬─────┬─────┬─────┐
//   row 0  │ Q0  │ Q1  │ Q2  │ Q3  │    row 1  │ Q0  │ Q1  │ Q2  │ Q3  │
//       2  │ Q1  │ Q0  │ Q3  │ Q2  │        3  │ Q1  │ Q0  │ Q3  │ Q2  │
//       4  │ Q2  │ Q3  │ Q0  │ Q1  │        5  │ Q2  │ Q3  │ Q0  │ Q1  │
//       6  │ Q3  │ Q2  │ Q1  │ Q0  │        7  │ Q3  │ Q2  │ Q1  │ Q0  │
//          └─────┴─────┴─────┴─────┘           └─────┴─────┴─────┴─────┘
#define SUMS "{ " \
    "%0, %1, %2, %3, " \
    "%4, %5, %6, %7, " \
    "%8, %9, %10, %11, " \
    "%12, %13, %14, %15 }, "
#define W0 "{ %16, %17, %18, %19 }, "
#define W1 "{ %20, %21, %22, %23 }, "
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "

// dots = x w over a unit, whose x begins at `unit`.
DEVICE void multiply_rows(const u32x4* unit, const u32x4 (&w)[LANE_COLUMNS][1], lane_sums (&dots)[STEPS]) {
    // A descriptor of B counts in units of 16 bytes. Its low word is where B begins, its high word how far the
    // next eight rows are and how addresses are swizzled: bits 4 and 5 are combined with bits 7 and 8 by
    // exclusive or.
    constexpr u32 NEXT_HALF = 2;  // quarters, from the first half of a unit to the second
    constexpr u32 SWIZZLE_64_BYTES = 2u << 30;
    const u32 x = (shared_address(unit) & 0x3FFFFu) >> 4;  // 18 bits of address
    // After `more` (add to the sums): the signs of A and B, and B is not transposed.
    asm volatile(
        "{\n\t"
        ".reg .pred more;\n\t"
        ".reg .b64 x<2>;\n\t"
        "mov.b64 x0, { %24, %26};\n\t"
        "mov.b64 x1, { %25, %26};\n\t"
        "setp.ne.u32 more, 0, 0;\n\t"  // the first one does not add
        "wgmma.fence.sync.aligned;\n\t"
        MULTIPLY SUMS W0 "x0, more, 1, 1, 0;\n\t"
        "setp.eq.u32 more, 0, 0;\n\t"
        MULTIPLY SUMS W1 "x1, more, 1, 1, 0;\n\t"
        "wgmma.commit_group.sync.aligned;\n\t"
        "wgmma.wait_group.sync.aligned 0;\n\t"
        "}"
        : "=&f"(dots[0][0]), "=&f"(dots[0][1]), "=&f"(dots[0][2]), "=&f"(dots[0][3]),
          "=&f"(dots[1][0]), "=&f"(dots[1][1]), "=&f"(dots[1][2]), "=&f"(dots[1][3]),
          "=&f"(dots[2][0]), "=&f"(dots[2][1]), "=&f"(dots[2][2]), "=&f"(dots[2][3]),
          "=&f"(dots[3][0]), "=&f"(dots[3][1]), "=&f"(dots[3][2]), "=&f"(dots[3][3])
        : "r"(w[0][0][0]), "r"(w[1][0][0]), "r"(w[0][0][1]), "r"(w[1][0][1]),
          "r"(w[0][0][2]), "r"(w[1][0][2]), "r"(w[0][0][3]), "r"(w[1][0][3]),
          "r"(x), "r"(x + NEXT_HALF),
          "n"(RUN_ITEMS | SWIZZLE_64_BYTES)
        : "memory");
}
#undef SUMS
#undef W0
#undef W1
#undef MULTIPLY

// sums += x w over a quad. Four waves multiply together.
// Quants are exact in f16: the dot product of a unit is multiplied by the unit's scale.
DEVICE void multiply_quad(
    const Q4_0_512x96::Part (&w_quad)[WAVE_PANELS][LANE_COLUMNS],
    lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* x) {
    UNROLL for (int u = 0; u < QUAD_UNITS; ++u)
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
            u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                Q4_0_512x96::halves(w_quad[n][c], u, w_quants[c]);
            lane_sums w_dots[STEPS];
            multiply_rows(x + u * UNIT_ITEMS, w_quants, w_dots);
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                const float w_scale = Q4_0_512x96::scale(w_quad[n][c], u);
                UNROLL for (int step = 0; step < STEPS; ++step)
                    UNROLL for (int i = c * LANE_ROWS; i < (c + 1) * LANE_ROWS; ++i)
                        w_sums[n][step][i] =
                            fma_f32(w_scale, w_dots[step][i], w_sums[n][step][i]);
            }
        }
}

// A block computes ROWS × COLUMNS results on matrix units. The terms of a row of x share a scale.
// Quants are exact in f16; the sum of a unit is multiplied by the weights' scale and added up in f32.
// Waves load the weights of their columns straight into registers. x goes through shared memory: a
// stage is multiplied while the next one is copied.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    // --- the tile: its rows, its columns, and the split of K ---
    SHARED_AT_512 u32x4 staged[ROOM_BYTES / 16];  // x: [STAGES][STEPS][RUN_ITEMS]; afterwards partial sums
    SHARED float x_scales[ROWS];  // NaN: the row is rough
    SHARED int any_rough;
    SHARED u64 arrived;  // counts the bytes that the cluster's other blocks send
    begin_cluster(&arrived, RECEIVED_BYTES);
    const int thread = thread_index();
    const int wave_n = wave_index() % WAVES_N;
    const i64 row0 = block_of_rows() * ROWS;
    if (thread == 0) any_rough = 0;
    const int column0 = block_x() / SPLITS * COLUMNS;
    const int split = block_x() % SPLITS;
    const int first_quad = split * SPLIT_QUADS;  // blocks beyond the last quad have none
    const int end_quad = at_run_time(first_quad + SPLIT_QUADS < QUADS ? first_quad + SPLIT_QUADS : QUADS);

    // --- load ahead: the weights of the first quads ---
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
    Q4_0_512x96::Part w_quads[TURNS][WAVE_PANELS][LANE_COLUMNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn)
        load_w(w_quads[turn], first_quad + turn);
    lane_sums w_sums[WAVE_PANELS][STEPS] = {};
    await_kernels_before(a);

    // --- stage x: copy the first stage into shared memory ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] : 0.0f;
    // In memory a stage is one run for each instruction's rows. Rows beyond the last hold anything: their
    // results are not stored. Beyond K x is 0, up to a whole quad; x_terms has room for a whole stage.
    const u32x4* x_from = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS +
                          first_quad * QUAD_UNITS * UNIT_ITEMS +
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
    const int stages = (end_quad - first_quad + STAGE_QUADS - 1) / STAGE_QUADS;
    if (stages > 0) {
        begin_stage(0);
        end_stage(0);
    }
    close_copies();
    int now = 0, into = 1;  // the stage that is multiplied, and the one that is copied
    int left = stages - 1;  // stages that no copy has begun for
    // Wait for stage `now`, and begin to copy the next one over the one before it.
    // Return where this wave's x begins.
    const auto enter_stage = [&](bool goes_on) {
        await_copies<STAGES - 2>();
        show_matrix_units();
        block_barrier();  // all threads have copied `now`, and none reads the stage before
        into = 1 - now;
        if (goes_on) begin_stage(into);
        close_copies();
        --left;
        return staged + now * STAGE_ITEMS;
    };
    const auto leave_stage = [&](bool goes_on) {
        if (goes_on) end_stage(into);
        now = into;
    };

    // --- multiply: stage by stage ---
    ROLLED for (int quad0 = first_quad; quad0 < end_quad; quad0 += STAGE_QUADS) {
        const bool goes_on = left > 0;
        const auto x = enter_stage(goes_on);
        UNROLL for (int turn = 0; turn < TURNS; ++turn) {
            const int quad = quad0 + turn;
            if (quad >= end_quad) break;
            const auto quad_x = x + turn * QUAD_UNITS * UNIT_ITEMS;
            multiply_quad(w_quads[turn], w_sums, quad_x);
            load_w(w_quads[turn], quad + STAGE_QUADS);
        }
        leave_stage(goes_on);
    }

    // --- reduce: the sums of all waves of a result meet where x was, each row in the block that owns it ---
    await_cluster();  // all blocks have begun
    meet_cluster();  // no block reads x any more
    float* const partial_sums = (float*)staged;  // [PARTIAL_SUMS][OWNED][COLUMNS]
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                    const int r = step * TILE_ROWS + lane_row(v);
                    const int to = r % OWNED * COLUMNS + (wave_n * WAVE_PANELS + n) * PANEL + lane_column(c);
                    float* const w_to = partial_sums + to + split * OWNED * COLUMNS;
                    const float w_sum = w_sums[n][step][c * LANE_ROWS + v];
                    if (r / OWNED != split) send(w_to, &arrived, r / OWNED, w_sum);
                    else *w_to = w_sum;
                }
    block_barrier();
    await_sent(&arrived);

    // --- epilogue ---
    for (int i = thread; i < OWNED * COLUMNS; i += BLOCK_SIZE) {
        const int r = split * OWNED + i / COLUMNS, column = column0 + i % COLUMNS;
        const float scale = x_scales[r];
        float w_sum = 0.0f;
        UNROLL for (int source = 0; source < PARTIAL_SUMS; ++source)
            w_sum += partial_sums[source * OWNED * COLUMNS + i];
        if (row0 + r < m && column < WIDTH && !is_rough(scale))
            epilogue(a, row0 + r, column, scale * w_sum);
    }
    if (split > 0) return;  // the first block of the cluster computes all rough rows

    // --- rough rows ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        if (is_rough(x_scales[r])) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    store_rough_rows(a, row0, column0, x_scales);
}

KERNEL(BLOCK_SIZE) CLUSTER(SPLITS) void q4jit_product(
    const u16* __restrict__ x,
    const u8* __restrict__ w,
    u16* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_scales, m});
}
