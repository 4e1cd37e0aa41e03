// product for hip:sm_90, tile_halves, 64 rows a tile, 128 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_halves:
//   w_product = x_value @ w    Q2_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a column
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int ROWS = 64;  // of x, in a tile
constexpr int COLUMNS = 64;  // of the result, in a tile
constexpr int PANEL = 16;  // columns of a matrix instruction
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUADS = 4;  // ⌈K / (QUAD_UNITS · UNIT)⌉, of a column
constexpr int X_SUMS = 2;  // of the x of a unit and a row: of both halves
constexpr int QUAD_SUMS = 64;  // QUAD_UNITS · X_SUMS · TILE_ROWS, for an instruction's rows
constexpr int WAVE_PANELS = 1;  // panels that a wave computes
constexpr int WAVES_N = 4;  // COLUMNS / (WAVE_PANELS · PANEL), waves with different columns
static_assert(WAVES_N * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
constexpr int STEPS = 8;  // ROWS / TILE_ROWS, instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");

// x is copied in items of 16 bytes: a quarter of a unit, in one term.
constexpr int TERM_ITEMS = 32;  // TILE_ROWS · 4 quarters, of an instruction's rows in a term of a unit
constexpr int UNIT_ITEMS = 64;  // 2 terms · TERM_ITEMS
constexpr int STAGE_UNITS = 2;  // of x, in shared memory at a time
constexpr int QUAD_STAGES = 2;
static_assert(QUAD_STAGES * STAGE_UNITS == QUAD_UNITS, "a quad is whole stages");
constexpr int RUN_ITEMS = 128;  // STAGE_UNITS · UNIT_ITEMS, of an instruction's rows in a stage: adjacent
constexpr int ROW_ITEMS = 1024;  // QUADS · QUAD_UNITS · UNIT_ITEMS, of an instruction's rows in all of K
constexpr int STAGE_ITEMS = 1024;  // STEPS · RUN_ITEMS
constexpr int STAGES = 2;  // in shared memory: one is multiplied, the next one is on its way
constexpr int COPIERS = 128;  // threads that copy x: a power of two, so that they share runs evenly
constexpr int COPIES = 8;  // ⌈STAGE_ITEMS / COPIERS⌉, items of a stage that a thread copies
// Blocks of a compute unit, so that a thread gets 128 registers: the compiler, left alone, took up to 137,
// and the kernel 1.1 to 1.5 times as long on an H100.
constexpr int RESIDENT = 4;  // 512 / BLOCK_SIZE
constexpr int ROOM_BYTES = 32768;  // STAGES · STAGE_ITEMS · 16
constexpr int STAGED_BYTES = 33040;  // ROOM_BYTES + ROWS · 4 for x_scales + 16 for any_rough
constexpr int LDS_BYTES = 33040;  // shared memory of a block
static_assert(STAGED_BYTES <= LDS_BYTES, "there is room for x and for the sums of the waves");
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q2_K [512, 96] in the layout `tiles16`.
struct Q2_K_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 256⌉ · 2, of a column
    static constexpr int QUANTS0_BYTES = 32;  // of a quad
    static constexpr i64 SCALES_AT = 12288;  // where its region begins
    static constexpr int SCALES_BYTES = 8;  // of a quad
    static constexpr i64 D_AT = 15360;  // where its region begins
    static constexpr int D_BYTES = 4;  // of a block

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }
    // The number of a quad's block among all blocks of the weight.
    DEVICE u32 block_index(u32 quad) { return quad / (2 * PANEL) * PANEL + quad % PANEL; }

    // What a lane has of a quad: of each quarter of a unit that it has, the planes; the quad's scales.
    struct Part {
        u32 quants0[LANE_QUARTERS][2];
        u32 scales[2];
        u32 d[1];
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + lane_part() * LANE_QUARTERS * 8;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) load_8(quants0 + i * 8, part.quants0[i]);
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
    // Of plane 0, the bits of pair `odd` of unit u: those of the lower elements where they belong in the code.
    DEVICE u32 plane0(const Part& part, int i, int u, int odd) {
        const u32 word = part.quants0[i][u / 2];
        const int pair = 2 * (u % 2) + odd;
        const int by = pair % 2 * 2 + pair / 2 * 8;
        return word >> by;
    }

    // The numbers of unit u, times 2^-9: the pairs 0, 2 · 1, 3 · 16, 18 · 17, 19 of a quarter.
    DEVICE void halves(const Part& part, int u, const u32 (&zero)[2], u32x4 (&q)[LANE_QUARTERS]) {
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) {
            UNROLL for (int odd = 0; odd < 2; ++odd) {
                const u32 bits0 = plane0(part, i, u, odd);
                q[i][odd] = fma_halves(bits0 & 0x00030003u, PAIR_OF_2P15, zero[0]);
                q[i][odd + 2] = fma_halves(bits0 & 0x00300030u, PAIR_OF_2P11, zero[1]);
            }
        }
    }

    // What the numbers of sub-block `half` of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u, int half) {
        const u32 four = (u < 2 ? part.scales[0] : part.scales[1]) & 0x0f0f0f0fu;
        return half_to_f32((u16)part.d[0]) * byte_minus(four, u % 2 * 2 + half, 0.0f);
    }
    // What is added to the elements of sub-block `half` of unit u.
    DEVICE float minimum(const Part& part, int u, int half) {
        const float m = half_to_f32((u16)(part.d[0] >> 16));
        const u32 four = (u < 2 ? part.scales[0] : part.scales[1]) >> 4 & 0x0f0f0f0fu;
        return -(m * byte_minus(four, u % 2 * 2 + half, 0.0f));
    }
    // The scale, the code next to 0 as a pair of f16, -2^-9 times the code, and what is added to elements whose code is
    // counted from it. Without this, sums of scale · code and minimum would cancel each other where elements are 0,
    // and a large x there would leave its rounding error.
    DEVICE void centre(const Part& part, int u, float (&scales)[2], float (&rests)[2], u32 (&zeros)[2]) {
        constexpr float WHOLE = 0x1.8p+23f;  // plus and minus it rounds to a whole number
        UNROLL for (int half = 0; half < 2; ++half) {
            const float d = scale(part, u, half), least = minimum(part, u, half);
            const float zero = clamp(-least * near_reciprocal(d), 0.0f, 3.0f) + WHOLE - WHOLE;
            scales[half] = d;
            rests[half] = fma_f32(zero, d, least);
            zeros[half] = to_halves(zero * -0x1p-9f, zero * -0x1p-9f);
        }
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int u = k / UNIT % QUAD_UNITS, upper = k / (UNIT / 2) % 2, part_of_unit = k / 4 % 4, element = k % 4;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + part_of_unit * 8;
        const int pair0 = 2 * (u % 2) + element % 2;
        const u32 word0 = ((const u16*)quants0)[u / 2 * 2 + element / 2];
        const u32 code = (word0 >> (pair0 % 2 * 2 + pair0 / 2 * 8 + 4 * upper) & 3u);
        Part part;
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u32*)(w + D_AT + (i64)block_index((u32)quad) * D_BYTES);
        const float number = (float)code;
        return number * scale(part, u, upper) + minimum(part, u, upper);
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    const u16* x_terms;
    const float* x_scales;
    const float* x_sums;
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
    a.x_sums = known_from_here(a.x_sums);
    start_next_grid();
}

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
        sum = fma_f32(x_value(a, row, k), Q2_K_512x96::value(a.w, column, k), sum);
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
    "%12, %13, %14, %15, " \
    "%16, %17, %18, %19, " \
    "%20, %21, %22, %23, " \
    "%24, %25, %26, %27, " \
    "%28, %29, %30, %31 }, "
#define W0 "{ %32, %33, %34, %35 }, "
#define W1 "{ %36, %37, %38, %39 }, "
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "

#define W_HALF "{ %32, %33, %34, %35 }, "
// dots = x w over one half of a unit, whose x begins at `unit`.
DEVICE void multiply_half_rows(
    const u32x4* unit, const u32x4 (&w)[LANE_COLUMNS][1], int half, lane_sums (&dots)[STEPS]) {
    constexpr u32 NEXT_HALF = 2;  // quarters, from the first half of a unit to the second
    constexpr u32 SWIZZLE_64_BYTES = 2u << 30;
    const u32 x = ((shared_address(unit) & 0x3FFFFu) >> 4) + half * NEXT_HALF;  // 18 bits of address
    asm volatile(
        "{\n\t"
        ".reg .pred more;\n\t"
        ".reg .b64 x<2>;\n\t"
        "mov.b64 x0, { %36, %38};\n\t"
        "mov.b64 x1, { %37, %38};\n\t"
        "setp.ne.u32 more, 0, 0;\n\t"  // the first one does not add
        "wgmma.fence.sync.aligned;\n\t"
        MULTIPLY SUMS W_HALF "x0, more, 1, 1, 0;\n\t"
        "setp.eq.u32 more, 0, 0;\n\t"
        MULTIPLY SUMS W_HALF "x1, more, 1, 1, 0;\n\t"
        "wgmma.commit_group.sync.aligned;\n\t"
        "wgmma.wait_group.sync.aligned 0;\n\t"
        "}"
        : "=&f"(dots[0][0]), "=&f"(dots[0][1]), "=&f"(dots[0][2]), "=&f"(dots[0][3]),
          "=&f"(dots[1][0]), "=&f"(dots[1][1]), "=&f"(dots[1][2]), "=&f"(dots[1][3]),
          "=&f"(dots[2][0]), "=&f"(dots[2][1]), "=&f"(dots[2][2]), "=&f"(dots[2][3]),
          "=&f"(dots[3][0]), "=&f"(dots[3][1]), "=&f"(dots[3][2]), "=&f"(dots[3][3]),
          "=&f"(dots[4][0]), "=&f"(dots[4][1]), "=&f"(dots[4][2]), "=&f"(dots[4][3]),
          "=&f"(dots[5][0]), "=&f"(dots[5][1]), "=&f"(dots[5][2]), "=&f"(dots[5][3]),
          "=&f"(dots[6][0]), "=&f"(dots[6][1]), "=&f"(dots[6][2]), "=&f"(dots[6][3]),
          "=&f"(dots[7][0]), "=&f"(dots[7][1]), "=&f"(dots[7][2]), "=&f"(dots[7][3])
        : "r"(w[0][0][2 * half]), "r"(w[1][0][2 * half]), "r"(w[0][0][2 * half + 1]), "r"(w[1][0][2 * half + 1]),
          "r"(x + TERM_ITEMS),
          "r"(x),
          "n"(RUN_ITEMS | SWIZZLE_64_BYTES)
        : "memory");
}
#undef W_HALF
#undef SUMS
#undef W0
#undef W1
#undef MULTIPLY

// The sums of x of the rows that a lane has in an instruction: of all x of a unit, or of a half.
DEVICE void load_x_sums(const float* from, float (&sums)[LANE_ROWS]) {
    const u64 both = *(const u64*)(from + lane_row(0));
    sums[0] = as_f32((u32)both);
    sums[1] = as_f32((u32)(both >> 32));
}

// sums += x w over the units of a quad that are in a stage, from `first_unit` on. Four waves multiply together.
// Quants are exact in f16: the dot product of a unit is multiplied by the unit's scale.
DEVICE void multiply_quad(
    const Q2_K_512x96::Part (&w_quad)[WAVE_PANELS][LANE_COLUMNS],
    lane_sums (&w_sums)[WAVE_PANELS][STEPS],
    const u32x4* x, int first_unit, const float* x_sums) {
    UNROLL for (int u = 0; u < STAGE_UNITS; ++u)
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n) {
            u32x4 w_quants[LANE_COLUMNS][LANE_QUARTERS];
            float w_scale[LANE_COLUMNS][2], w_rest[LANE_COLUMNS][2];
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                u32 zeros[2];
                Q2_K_512x96::centre(w_quad[n][c], first_unit + u, w_scale[c], w_rest[c], zeros);
                Q2_K_512x96::halves(w_quad[n][c], first_unit + u, zeros, w_quants[c]);
            }
            UNROLL for (int half = 0; half < 2; ++half) {
                lane_sums w_dots[STEPS];
                multiply_half_rows(x + u * UNIT_ITEMS, w_quants, half, w_dots);
                UNROLL for (int step = 0; step < STEPS; ++step) {
                    float x_sum[LANE_ROWS];
                    const float* const of_unit =
                        x_sums + step * QUADS * QUAD_SUMS + ((first_unit + u) * X_SUMS + half) * TILE_ROWS;
                    load_x_sums(of_unit, x_sum);
                    UNROLL for (int v = 0; v < LANE_ROWS; ++v)
                        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
                            const int i = c * LANE_ROWS + v;
                            float sum = w_sums[n][step][i];
                            sum = fma_f32(w_scale[c][half], w_dots[step][i], sum);
                            sum = fma_f32(w_rest[c][half], x_sum[v], sum);
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
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    // --- the tile: its rows, its columns ---
    SHARED_AT_512 u32x4 staged[ROOM_BYTES / 16];  // x: [STAGES][STEPS][RUN_ITEMS]
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
            w_index[n][c] = Q2_K_512x96::quad_index(panel * PANEL, 0) + lane_column(c);
        }
    }
    const auto load_w = [&](Q2_K_512x96::Part (&quad_parts)[WAVE_PANELS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int n = 0; n < WAVE_PANELS; ++n)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                quad_parts[n][c] = Q2_K_512x96::load_part(a.w, w_index[n][c] + quad * PANEL);
    };
    Q2_K_512x96::Part w_quad[WAVE_PANELS][LANE_COLUMNS];
    load_w(w_quad, 0);
    lane_sums w_sums[WAVE_PANELS][STEPS] = {};
    await_kernels_before(a);

    // --- stage x: copy the first stage into shared memory ---
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] : 0.0f;
    // In memory a stage is one run for each instruction's rows. Rows beyond the last hold anything: their
    // results are not stored. Beyond K x is 0, up to a whole quad; x_terms has room for a whole stage.
    const u32x4* x_from = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS +
                          thread / RUN_ITEMS * ROW_ITEMS + thread % RUN_ITEMS;
    const auto item_of = [&](int room, int i) { return staged + room * STAGE_ITEMS + thread + i * COPIERS; };
    const float* const x_sums = a.x_sums + row0 / TILE_ROWS * (QUADS * QUAD_SUMS);
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
    const int stages = end_quad * QUAD_STAGES;
    begin_stage(0);
    end_stage(0);
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
    ROLLED for (int quad = 0; quad < end_quad; ++quad) {
        // The next quad is loaded while this one is multiplied.
        Q2_K_512x96::Part w_next[WAVE_PANELS][LANE_COLUMNS];
        load_w(w_next, quad + 1);
        UNROLL for (int s = 0; s < QUAD_STAGES; ++s) {
            const bool goes_on = s + 1 < QUAD_STAGES || left > 0;
            const auto x = enter_stage(goes_on);
            multiply_quad(w_quad, w_sums, x, s * STAGE_UNITS, x_sums + (quad) * QUAD_SUMS);
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

KERNEL(BLOCK_SIZE, RESIDENT) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    const float* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_scales, x_sums, m});
}
