// transposed for hip:sm_90, tile_halves_transposed, 64 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = y
// 512 columns, tile_halves_transposed:
//   w_product = x_value @ w.T    Q4_0 [512, 1000]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int N = 1000;  // columns of w, which the products sum over; 32 of them are a unit of x
constexpr int WIDTH = 512;  // columns of the whole result
constexpr int ROWS = 64;  // of x, in a tile
constexpr int COLUMNS = 128;  // of the result, in a tile
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of x, or of a column that are decoded together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUADS = 8;  // ⌈N / (QUAD_UNITS · UNIT)⌉, of a row of x
constexpr int WAVE_PANELS = 2;  // panels that a wave computes
constexpr int WAVES_N = 4;  // COLUMNS / (WAVE_PANELS · PANEL), waves with different columns
static_assert(WAVES_N * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
constexpr int STEPS = 8;  // ROWS / TILE_ROWS, instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");
constexpr int SPLITS = 4;  // thread blocks of a cluster that divide N
constexpr int SPLIT_QUADS = 2;  // ⌈QUADS / SPLITS⌉
constexpr float QUANT_STEP = 0x1p-9f;  // x_scales are for quants times 2^-9

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int TERM_ITEMS = 32;  // TILE_ROWS · 4 quarters, of an instruction's rows in a term of a unit
constexpr int UNIT_ITEMS = 64;  // 2 terms · TERM_ITEMS
constexpr int STAGE_UNITS = 2;  // of x, in shared memory at a time
constexpr int QUAD_STAGES = 2;
static_assert(QUAD_STAGES * STAGE_UNITS == QUAD_UNITS, "a quad is whole stages");
constexpr int RUN_ITEMS = 128;  // STAGE_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 2048;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of N
constexpr int STAGE_ITEMS = 1024;  // STEPS · RUN_ITEMS
constexpr int STAGES = 2;  // in shared memory: one is multiplied, the next one is on its way
constexpr int COPIERS = 128;  // threads that copy x: a power of two, so that they share runs evenly
constexpr int COPIES = 8;  // ⌈STAGE_ITEMS / COPIERS⌉, items of a stage that a thread copies

// Partial sums of a result meet where the stages of x were.
constexpr int OWNED = 16;  // ROWS / SPLITS, rows whose results a thread block of the cluster stores
constexpr int RECEIVED_BYTES = 24576;  // (SPLITS - 1) · OWNED · COLUMNS · 4, from the other blocks
constexpr int PARTIAL_SUMS = 4;  // SPLITS, of a result
constexpr int ROOM_BYTES = 32768;  // max(STAGES · STAGE_ITEMS · 16, PARTIAL_SUMS · OWNED · COLUMNS · 4)
constexpr int STAGED_BYTES = 42272;  // ROOM_BYTES + STAGES · WEIGHT_ITEMS · 16 + x_scales, any_rough, arrived

// Weights are copied in items of 16 bytes, too: a word of each of a quad's units, or the scales of two columns.
constexpr int UNIT_PANELS = 2;  // UNIT / PANEL, of w in a unit of x
constexpr int QUAD_ITEMS = 64;  // of a quad of a panel: its quants
constexpr int QUAD_SCALES_ITEMS = 8;  // and its scales
constexpr int TILE_QUADS = 1;  // COLUMNS / (QUAD_UNITS · UNIT), of a column of w
constexpr int QUANTS_ITEMS = 256;  // STAGE_UNITS · UNIT_PANELS · TILE_QUADS · QUAD_ITEMS, of a stage
constexpr int WEIGHT_ITEMS = 288;  // the same with scales, which follow the quants
static_assert(UNIT_PANELS * TILE_QUADS * QUAD_ITEMS == BLOCK_SIZE, "a thread copies one item of quants for each unit");
constexpr int LDS_BYTES = 42272;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q4_0 [512, 1000] in the layout `tiles16`.
struct Q4_0_512x1000 {
    static constexpr int QUADS = 4;  // ⌈512 / 128⌉, of a column
    static constexpr int QUAD_BYTES = 64;  // QUAD_UNITS · UNIT / 2, of quants
    static constexpr i64 D_AT = 258048;  // where its region begins

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

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.y = known_from_here(a.y);
    a.output0 = known_from_here(a.output0);
    a.x_terms = known_from_here(a.x_terms);
    a.x_scales = known_from_here(a.x_scales);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float y_element = a.y[row * 1000 + column];
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
        sum = fma_f32(x_value(a, row, n), Q4_0_512x1000::value(a.w, n, column), sum);
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

// A result: its sum times the scale of the row, or computed anew.
DEVICE float w_of(const Arguments& a, i64 row, int column, float scale, float sum) {
    return is_large(sum) ? exact_w(a, row, column) : scale * sum;
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
    "%12, %13, %14, %15, " \
    "%16, %17, %18, %19, " \
    "%20, %21, %22, %23, " \
    "%24, %25, %26, %27, " \
    "%28, %29, %30, %31 }, "
#define W0 "{ %32, %33, %34, %35 }, "
#define W1 "{ %36, %37, %38, %39 }, "
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "

// Begin sums += x w over a unit, whose x begins at `unit`.
DEVICE void begin_multiply_rows(const u32x4* unit, const u32x4 (&w)[LANE_COLUMNS][1], lane_sums (&sums)[STEPS]) {
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
        "mov.b64 x0, { %40, %42};\n\t"
        "mov.b64 x1, { %41, %42};\n\t"
        "setp.eq.u32 more, 0, 0;\n\t"
        "wgmma.fence.sync.aligned;\n\t"
        MULTIPLY SUMS W0 "x0, more, 1, 1, 0;\n\t"
        MULTIPLY SUMS W1 "x1, more, 1, 1, 0;\n\t"
        "wgmma.commit_group.sync.aligned;\n\t"
        "}"
        : "+f"(sums[0][0]), "+f"(sums[0][1]), "+f"(sums[0][2]), "+f"(sums[0][3]),
          "+f"(sums[1][0]), "+f"(sums[1][1]), "+f"(sums[1][2]), "+f"(sums[1][3]),
          "+f"(sums[2][0]), "+f"(sums[2][1]), "+f"(sums[2][2]), "+f"(sums[2][3]),
          "+f"(sums[3][0]), "+f"(sums[3][1]), "+f"(sums[3][2]), "+f"(sums[3][3]),
          "+f"(sums[4][0]), "+f"(sums[4][1]), "+f"(sums[4][2]), "+f"(sums[4][3]),
          "+f"(sums[5][0]), "+f"(sums[5][1]), "+f"(sums[5][2]), "+f"(sums[5][3]),
          "+f"(sums[6][0]), "+f"(sums[6][1]), "+f"(sums[6][2]), "+f"(sums[6][3]),
          "+f"(sums[7][0]), "+f"(sums[7][1]), "+f"(sums[7][2]), "+f"(sums[7][3])
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

// Products run while later code does, and read their weights' registers until they are awaited: keep those.
DEVICE void keep(const u32x4 (&w)[LANE_COLUMNS][1]) {
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        asm volatile("" : : "r"(w[c][0][0]), "r"(w[c][0][1]), "r"(w[c][0][2]), "r"(w[c][0][3]) : "memory");
}
// Wait for all products except those of w, which began last: `before` becomes w.
DEVICE void await_all_but_last(const u32x4 (&w)[LANE_COLUMNS][1], u32x4 (&before)[LANE_COLUMNS][1]) {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    keep(before);
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) before[c][0] = w[c][0];
}
DEVICE void await_multiplied(const u32x4 (&before)[LANE_COLUMNS][1]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    keep(before);
}
// Tell the compiler that sums have changed since they were operands.
DEVICE void settle_sums(lane_sums (&sums)[STEPS]) {
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int i = 0; i < 4; ++i) settle(sums[step][i]);
}

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

// sums += x w.T over the units of a stage. Four waves multiply together.
// Matrix units truncate what they add up, so that their sums of 2 units are added to the totals of a lane.
DEVICE void multiply_stage(
    const u32x4* w_stage, lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* x, int wave_n) {
    UNROLL for (int u0 = 0; u0 < STAGE_UNITS; u0 += 2) {
        Pairs w_pairs[2];
        UNROLL for (int u = 0; u < 2; ++u) w_pairs[u] = load_pairs(w_stage, u0 + u, wave_n);
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
            lane_sums w_dots[STEPS] = {};
            u32x4 before[LANE_COLUMNS][LANE_QUARTERS] = {};
            UNROLL for (int u = 0; u < 2; ++u) {
                u32x4 w_values[LANE_COLUMNS][LANE_QUARTERS], w_rests[LANE_COLUMNS][LANE_QUARTERS];
                pair_terms<Q4_0_512x1000>(w_pairs[u], n, w_values, w_rests);
                const u32x4* const unit = x + (u0 + u) * UNIT_ITEMS;
                begin_multiply_rows(unit, w_rests, w_dots);  // the smallest products first
                await_all_but_last(w_rests, before);
                begin_multiply_rows(unit + TERM_ITEMS, w_values, w_dots);
                await_all_but_last(w_values, before);
                begin_multiply_rows(unit, w_values, w_dots);
                await_all_but_last(w_values, before);
            }
            await_multiplied(before);
            settle_sums(w_dots);
            UNROLL for (int step = 0; step < STEPS; ++step)
                UNROLL for (int i = 0; i < LANE_COLUMNS * LANE_ROWS; ++i)
                    w_sums[n][step][i] += w_dots[step][i];
        }
    }
}

// A block computes ROWS × COLUMNS results of x w.T on matrix units. The terms of a row of x share a scale.
// A weight is exactly the sum of two terms in f16. The second terms of both, x and w, are not multiplied:
// that is 2^-22 of their product.
// x and w go through shared memory: a stage is multiplied while the next one is copied.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    // --- the tile: its rows, its columns, and the split of N ---
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

    // --- stage w: its quads in the tile, for the panels of a stage ---
    SHARED u32x4 w_staged[STAGES * WEIGHT_ITEMS];  // [STAGES]: quants, then scales
    // The number of a quad among those of all panels.
    const auto w_quad = [&](int panel, int tile_quad) {
        const int quad = column0 / (QUAD_UNITS * UNIT) + tile_quad;
        if (panel > 62) panel = 62;  // beyond the last one x is 0
        return (i64)panel * Q4_0_512x1000::QUADS + quad;
    };
    int first_panel = first_quad * QUAD_UNITS * UNIT_PANELS;  // of the stage that is copied next
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
            const u32x4* const scales = (const u32x4*)(a.w + Q4_0_512x1000::D_AT);
            begin_copy(weights_copy, w_room + QUANTS_ITEMS + thread,
                       scales + quad * QUAD_SCALES_ITEMS + thread % QUAD_SCALES_ITEMS);
        }
        first_panel += STAGE_UNITS * UNIT_PANELS;
    };
    // Copy the first stage; the group of x's first stage awaits them.
    if (first_panel < end_quad * QUAD_UNITS * UNIT_PANELS) begin_weights(0);
    await_kernels_before(a);

    // --- stage x: copy the first stage into shared memory ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] * QUANT_STEP : 0.0f;
    // In memory a stage is one run for each instruction's rows. Rows beyond the last hold anything: their
    // results are not stored. Beyond N x is 0, up to a whole quad; x_terms has room for a whole stage.
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
    const int stages = (end_quad - first_quad) * QUAD_STAGES;
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
        if (goes_on) begin_weights(into);
        close_copies();
        --left;
        return staged + now * STAGE_ITEMS;
    };
    const auto leave_stage = [&](bool goes_on) {
        if (goes_on) end_stage(into);
        now = into;
    };

    // --- multiply: stage by stage ---
    lane_sums w_sums[WAVE_PANELS][STEPS] = {};
    ROLLED for (int stage = 0; stage < stages; ++stage) {
        const bool goes_on = left > 0;
        const auto x = enter_stage(goes_on);
        multiply_stage(w_staged + now * WEIGHT_ITEMS, w_sums, x, wave_n);
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
                    const int to = r % OWNED * COLUMNS + lane_tile_column(wave_n, n, c);
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
            epilogue(a, row0 + r, column, w_of(a, row0 + r, column, scale, w_sum));
    }
    if (split > 0) return;  // the first block of the cluster computes all rough rows

    // --- rough rows ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        if (is_rough(x_scales[r])) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    store_rough_rows(a, row0, column0, x_scales);
}

KERNEL(BLOCK_SIZE) CLUSTER(SPLITS) void q4jit_transposed(
    const float* __restrict__ y,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{y, w, output0, x_terms, x_scales, m});
}
