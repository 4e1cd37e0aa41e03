// product for hip:sm_90, tile_halves, 64 rows a tile, 128 threads, made by q4jit
// rows:
//   v0 = x
// 96 tile_halves:
//   v1 = v0 @ w    Q4_0 [512, 96]
//   output0 = v1

constexpr int BLOCK_SIZE = 128;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int ROWS = 64;  // of x
constexpr int COLUMNS = 64;  // of the result
constexpr int WIDTH = 96;  // columns of the whole result
constexpr int K = 512;
constexpr int TERMS = 1;  // f16 numbers that make up one x
constexpr float QUANT_STEP = 0x1p-9f;  // x's scales are for quants that come times this
constexpr int GROUPS = 1;  // of 16 columns, that a wave computes
constexpr int WAVES_N = COLUMNS / 16 / GROUPS;  // beside each other
constexpr int WAVES_K = BLOCK_SIZE / WAVE / WAVES_N;  // that share columns
static_assert(GROUPS * WAVES_N * 16 == COLUMNS, "waves share the columns evenly");
static_assert(WAVES_N * WAVES_K * WAVE == BLOCK_SIZE, "and K");
static_assert(WAVES_N % 4 == 0, "four waves that multiply together share x");
constexpr int STEPS = ROWS / TILE_ROWS;  // instructions for all rows
static_assert(STEPS * TILE_ROWS == ROWS, "instructions are full");
constexpr int UNITS = (K + 31) / 32;
constexpr int QUADS = (UNITS + 3) / 4;  // of a column: four units that are stored together
constexpr int SPLITS = 8;  // blocks of a cluster: each has its own part of K
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
constexpr int PRODUCTS = 1;
constexpr int PARTIAL_SUMS = SPLITS * WAVES_K;  // of a result
constexpr int OWNED = ROWS / SPLITS;  // rows of which a block of a cluster stores the results
static_assert(OWNED * SPLITS == ROWS, "blocks share the rows evenly");
constexpr int SUMS_BYTES = PARTIAL_SUMS > 1 ? PRODUCTS * PARTIAL_SUMS * OWNED * COLUMNS * 4 : 0;
constexpr int ROOM_BYTES = STAGES_BYTES > SUMS_BYTES ? STAGES_BYTES : SUMS_BYTES;
constexpr int STAGED_BYTES = ROOM_BYTES + ROWS * 4 + (SPLITS > 1 ? 32 : 16);  // and x's scales
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop of few rounds would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

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
    const u8* w;
    float* output0;
    const u16* x_terms;
    const float* x_scales;
    i64 m;
};

// Kernels overlap. This one waits until those before are done, whose results it may read and whose
// arguments it may overwrite: weights alone, which no kernel writes, are loaded earlier. Then the next
// one may start and load its own.
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
    const float v0 = a.x[row * 512 + column];
    return v0;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float v1) {
    a.output0[row * 96 + column] = v1;
}

// The same product by multiply-add, for rows that f16 terms do not represent.
DEVICE float exact_v1(const Arguments& a, i64 row, int column) {
    float total = 0.0f, sum = 0.0f;  // one sum of all of K would err by too much
    ROLLED for (int k = 0; k < K; ++k) {
        sum = fma_f32(x_value(a, row, k), Q4_0_512x96::value(a.w, column, k), sum);
        if (k % 32 < 31) continue;
        total += sum;
        sum = 0.0f;
    }
    return total;
}

// wgmma, 64 columns (of a wave: 16, as for mma.sync) by ROWS rows by 16 k, four waves together.
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

// Begins sums += x w over a unit, of which x begins at `unit`.
DEVICE void begin_multiply_rows(const u32x4* unit, const u32x4 (&w)[LANE_COLUMNS][1], lane_sums (&sums)[STEPS]) {
    // What describes a matrix in shared memory counts 16 bytes: its begin, and its next eight rows. A row
    // has 64 bytes, of which the four parts are exchanged by their row: bits 4 and 5 of an address are
    // combined with bits 7 and 8 by exclusive or.
    constexpr u32 NEXT_K = 2;  // 16 k
    constexpr u32 EXCHANGED_64 = 2u << 30;
    const u32 x = (shared_address(unit) & 0x3FFFFu) >> 4;
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
          "r"(x + 0 * TERM_ITEMS), "r"(x + 0 * TERM_ITEMS + NEXT_K),
          "n"(RUN_ITEMS | EXCHANGED_64)
        : "memory");
}
#undef SUMS
#undef W0
#undef W1
#undef MULTIPLY

// Products run beside what follows, and read their weights from registers until they have been
// awaited: till then these must stay what they are.
DEVICE void keep(const u32x4 (&w)[LANE_COLUMNS][1]) {
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
        asm volatile("" : : "r"(w[c][0][0]), "r"(w[c][0][1]), "r"(w[c][0][2]), "r"(w[c][0][3]) : "memory");
}
// All products but those of w, which began last. `before` were those of the unit before, w is the next's.
DEVICE void await_all_but_last(const u32x4 (&w)[LANE_COLUMNS][1], u32x4 (&before)[LANE_COLUMNS][1]) {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    keep(before);
    UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) before[c][0] = w[c][0];
}
DEVICE void await_multiplied(const u32x4 (&before)[LANE_COLUMNS][1]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    keep(before);
}
// The compiler does not know that sums changed after they were named.
DEVICE void settle_sums(lane_sums (&sums)[STEPS]) {
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int i = 0; i < 4; ++i) settle(sums[step][i]);
}

// A block computes COLUMNS columns for ROWS rows on matrix units. x comes split into f16 terms that
// share a scale in each row, and the values of weights are rounded to f16: one term of x errs as much.
// Waves load the weights of their columns straight into registers; x goes through shared memory, the
// next stage while this one is used.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    SHARED_AT_512 u32x4 staged[ROOM_BYTES / 16];
    SHARED float x_scales[ROWS];  // NaN in rough rows
    SHARED int any_rough;
    SHARED u64 arrived;
    begin_cluster(&arrived, PRODUCTS * (SPLITS - 1) * WAVES_K * OWNED * COLUMNS * 4);
    const int thread = thread_index();
    const int wave_n = wave_index() % WAVES_N, wave_k = WAVES_K > 1 ? wave_index() / WAVES_N : 0;
    const i64 row0 = block_of_rows() * ROWS;
    if (thread == 0) any_rough = 0;
    const int column0 = block_x() / SPLITS * COLUMNS;
    const int first_quad = block_x() % SPLITS * SPLIT_QUADS;
    const int end_quad = at_run_time(first_quad + SPLIT_QUADS < QUADS ? first_quad + SPLIT_QUADS : QUADS);

    u32 v1_at[GROUPS][LANE_COLUMNS];  // quad 0 of the lane's columns
    UNROLL for (int g = 0; g < GROUPS; ++g) {
        const int wanted_tile = column0 / 16 + wave_n * GROUPS + g;
        const int tile = WIDTH % COLUMNS == 0 || wanted_tile < (WIDTH + 15) / 16 ? wanted_tile : (WIDTH - 1) / 16;
        UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) {
            v1_at[g][c] = Q4_0_512x96::quad_index(tile * 16, 0) + lane_column(c);
        }
    }
    const auto load_v1 = [&](Q4_0_512x96::Part (&parts)[GROUPS][LANE_COLUMNS], int quad) {
        if (quad >= end_quad) return;
        UNROLL for (int g = 0; g < GROUPS; ++g)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                parts[g][c] = Q4_0_512x96::load_part(a.w, v1_at[g][c] + quad * 16);
    };
    Q4_0_512x96::Part v1_parts[TURNS][GROUPS][LANE_COLUMNS];
    UNROLL for (int turn = 0; turn < TURNS; ++turn) load_v1(v1_parts[turn], first_quad + turn * WAVES_K + wave_k);
    lane_sums sums[PRODUCTS][GROUPS][STEPS] = {};
    await_kernels_before(a);
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        x_scales[r] = row0 + r < m ? a.x_scales[row0 + r] * QUANT_STEP : 0.0f;
    // A stage of x is one run of memory for the rows of each instruction. Rows beyond the last are
    // anything, which no result has; beyond K x is 0, up to a whole quad.
    const u32x4* x_at = (const u32x4*)a.x_terms + row0 / TILE_ROWS * ROW_ITEMS + first_quad * 4 * UNIT_ITEMS +
        thread / RUN_ITEMS * ROW_ITEMS + thread % RUN_ITEMS;
    // Items of a thread in a stage: whether there is one more, and where it goes.
    const auto has_item = [&](int i) {
        // Where the compiler sees that all threads copy, it keeps every address in a register.
        return thread < COPIERS &&
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
        Q4_0_512x96::Part v1_next[GROUPS][LANE_COLUMNS];
        if (TURNS == 1) load_v1(v1_next, quad0 + STAGE_QUADS + wave_k);
        UNROLL for (int s = 0; s < QUAD_STAGES; ++s) {
            await_copies<STAGES - 2>();
            show_matrix_units();
            block_barrier();  // all have copied this stage, and none reads the one before
            const int into = STAGES == 2 ? 1 - now : now > 0 ? now - 1 : STAGES - 1;
            const bool goes_on = (s + 1 < QUAD_STAGES && STAGES == 2) || left > 0;
            if (goes_on) begin_stage(into);
            close_copies();
            --left;
            const u32x4* const x_stage = staged + now * STAGE_ITEMS + wave_k * 4 * UNIT_ITEMS;
            u32x4 before[LANE_COLUMNS][4 / PARTS] = {};  // what the unit multiplied last keeps in registers
            UNROLL for (int turn = 0; turn < TURNS; ++turn) {
                const int local_quad = turn * WAVES_K + wave_k;
                if (quad0 + local_quad >= end_quad) break;
                UNROLL for (int u = 0; u < TURN_UNITS; ++u)
                    UNROLL for (int g = 0; g < GROUPS; ++g) {
                        {
                            const Q4_0_512x96::Part (&part)[LANE_COLUMNS] = v1_parts[turn][g];
                            const u32x4* const x_unit = x_stage + (turn * WAVES_K * 4 + u) * UNIT_ITEMS;
                            u32x4 w[LANE_COLUMNS][4 / PARTS];
                            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                                Q4_0_512x96::rounded(part[c], s * STAGE_UNITS + u, w[c]);
                            begin_multiply_rows(x_unit, w, sums[0][g]);
                            await_all_but_last(w, before);
                        }
                    }
                if (TURNS > 1) load_v1(v1_parts[turn], quad0 + STAGE_QUADS + local_quad);
            }
            await_multiplied(before);  // then x of this stage may be overwritten
            if (goes_on) end_stage(into);
            now = STAGES == 2 ? into : now + 1 < STAGES ? now + 1 : 0;
        }
        if (TURNS == 1)
            UNROLL for (int g = 0; g < GROUPS; ++g)
                UNROLL for (int c = 0; c < LANE_COLUMNS; ++c) v1_parts[0][g][c] = v1_next[g][c];
    }
    UNROLL for (int p = 0; p < PRODUCTS; ++p)
        UNROLL for (int g = 0; g < GROUPS; ++g) settle_sums(sums[p][g]);

    // The sums of all waves that share columns meet where x was, those of OWNED rows in each block of the cluster.
    const int split = block_x() % SPLITS;
    float* const partial_sums = (float*)staged;
    await_cluster();
    meet_cluster();
    UNROLL for (int step = 0; step < STEPS; ++step)
        UNROLL for (int g = 0; g < GROUPS; ++g)
            UNROLL for (int c = 0; c < LANE_COLUMNS; ++c)
                UNROLL for (int v = 0; v < LANE_ROWS; ++v) {
                    const int r = step * TILE_ROWS + lane_row(v);
                    const int to = r % OWNED * COLUMNS + (wave_n * GROUPS + g) * 16 + lane_column(c);
                    float* const v1_to = partial_sums + to +
                        (0 * PARTIAL_SUMS + split * WAVES_K + wave_k) * OWNED * COLUMNS;
                    if (r / OWNED != split) send(v1_to, &arrived, r / OWNED, sums[0][g][step][c * LANE_ROWS + v]);
                    else *v1_to = sums[0][g][step][c * LANE_ROWS + v];
                }
    block_barrier();
    await_sent(&arrived);
    for (int i = thread; i < OWNED * COLUMNS; i += BLOCK_SIZE) {
        const int r = split * OWNED + i / COLUMNS, column = column0 + i % COLUMNS;
        const float scale = x_scales[r];
        float v1 = 0.0f;
        UNROLL for (int part = 0; part < PARTIAL_SUMS; ++part)
            v1 += partial_sums[(0 * PARTIAL_SUMS + part) * OWNED * COLUMNS + i];
        if (row0 + r < m && column < WIDTH && scale == scale)
            epilogue(a, row0 + r, column, scale * v1);
    }
    if (split > 0) return;
    for (int r = thread; r < ROWS; r += BLOCK_SIZE)
        if (x_scales[r] != x_scales[r]) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    for (int i = thread; i < ROWS * COLUMNS; i += BLOCK_SIZE) {
        const i64 row = row0 + i / COLUMNS;
        const int column = column0 + i % COLUMNS;
        if (row < m && column < WIDTH && x_scales[i / COLUMNS] != x_scales[i / COLUMNS])
            epilogue(a, row, column, exact_v1(a, row, column));
    }
}

KERNEL(BLOCK_SIZE) CLUSTER(SPLITS) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_scales, m});
}
