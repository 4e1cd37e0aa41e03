// residual for hip:sm_90, tile_matrix, 64 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_matrix:
//   w_product = x_value @ w    Q6_K [512, 96]
//   output0 = r + w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int TERMS = 2;  // bf16 numbers that make up one x
constexpr int TILE_ROWS = 64;
constexpr int TILE_COLUMNS = 64;
constexpr int STRIDE = 40;  // UNIT + 8: rows start 16 bytes aligned, neighbours in other banks
constexpr int PANEL = 16;  // rows, columns and k of a product of matrix units
constexpr int WAVES_X = 4;  // BLOCK_SIZE / WAVE / 2: waves beside each other, in 2 rows of waves
constexpr int FRAGMENTS_X = 1;  // TILE_COLUMNS / PANEL / WAVES_X, of a wave
constexpr int FRAGMENTS_Y = 2;  // TILE_ROWS / PANEL / 2
static_assert(2 * WAVES_X * WAVE == BLOCK_SIZE, "every wave has a part of the tile");
static_assert(WAVES_X * FRAGMENTS_X * PANEL == TILE_COLUMNS, "waves share the tile evenly");
static_assert(TILE_COLUMNS <= BLOCK_SIZE, "a thread decodes a unit of one column");
constexpr int LDS_BYTES = 15876;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q6_K [512, 96] in the layout `planar`.
struct Q6_K_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int QUANTS0_BYTES = 16;  // of a unit
    static constexpr i64 QUANTS1_AT = 24576;  // where its region begins
    static constexpr int QUANTS1_BYTES = 8;  // of a unit
    static constexpr i64 SCALES_AT = 36864;  // where its region begins
    static constexpr int SCALES_BYTES = 2;  // of a unit
    static constexpr i64 D_AT = 39936;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u64 quants1;
        u16 d;
        u16 scales;  // of its two sub-blocks, a byte each
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + unit;
        Stored stored;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        const u8* const quants1 = w + QUANTS1_AT + index * QUANTS1_BYTES;
        stored.quants1 = *(const u64*)(quants1);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.scales = *(const u16*)(w + SCALES_AT + index * SCALES_BYTES);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = stored.words[0][i];
            q[i] = word & 0x0f0f0f0fu;  // low nibbles: elements 0…15
            q[i + 4] = word >> 4 & 0x0f0f0f0fu;  // high nibbles: 16…31
        }
        // The next 2 bits: a byte has those of 4 elements, which are 8 apart.
        UNROLL for (int i = 0; i < 8; ++i)
            q[i] |= ((u32)(stored.quants1 >> (i % 2 * 32)) >> (i / 2 * 2) & 0x03030303u) << 4;
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 32.0f); }

    // What the 16 elements of sub-block `half` of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int half) {
        return half_to_f32(stored.d) * (float)(i8)(stored.scales >> (8 * half));
    }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        UNROLL for (int half = 0; half < 2; ++half) {
            const float factor = scale(stored, half);
            UNROLL for (int i = 16 * half; i < 16 * half + 16; ++i) values[i] = centred(q, i) * factor;
        }
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    const float* r;
    float* output0;
    const u16* x_terms;
    const u32* x_rough;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.r = known_from_here(a.r);
    a.output0 = known_from_here(a.output0);
    a.x_terms = known_from_here(a.x_terms);
    a.x_rough = known_from_here(a.x_rough);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row * 512 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    const float r_element = a.r[row * 96 + column];
    const float sum1 = r_element + w_product;
    a.output0[row * 96 + column] = sum1;
}

// The same product by multiply-add, for rows that bf16 terms do not represent.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    using W = Q6_K_512x96;
    float total = 0.0f;
    for (int unit = 0; unit < UNITS; ++unit) {
        float w[UNIT];
        W::decode(W::load(a.w, column, unit), unit, w);
        float sum = 0.0f;
        UNROLL for (int i = 0; i < UNIT; ++i) sum = fma_f32(x_value(a, row, unit * UNIT + i), w[i], sum);
        total += sum;
    }
    return total;
}

// A block computes TILE_ROWS × TILE_COLUMNS results on matrix units. x comes split into bf16 terms;
// quants are whole numbers that bf16 holds exactly. The products of a unit are summed by the matrix
// unit, then multiplied by the unit's scale and added up in f32.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    SHARED u16 x_tile[TERMS * TILE_ROWS * STRIDE];
    SHARED u16 weight_tile[TILE_COLUMNS * STRIDE];
    SHARED float scale_tile[2 * TILE_COLUMNS];  // where a unit has two sub-blocks, those of all second ones last
    const int thread = thread_index();
    const i64 row0 = block_of_rows() * TILE_ROWS;
    const int column0 = block_x() * TILE_COLUMNS;
    const int wave_row = wave_index() / WAVES_X * FRAGMENTS_Y * PANEL;
    const int wave_column = wave_index() % WAVES_X * FRAGMENTS_X * PANEL;

    float w_sums[FRAGMENTS_Y][FRAGMENTS_X][ACCUMULATOR_ELEMENTS] = {};
    for (int unit = 0; unit < UNITS; ++unit) {
        // --- stage x and quants ---
        constexpr int ROW_ITEMS = UNIT / 8;  // of 16 bytes, eight x each
        using W = Q6_K_512x96;
        block_barrier();  // the tiles before may still be read
        for (int i = thread; i < TERMS * TILE_ROWS * ROW_ITEMS; i += BLOCK_SIZE) {
            const int term = i / (TILE_ROWS * ROW_ITEMS);
            const int r = i / ROW_ITEMS % TILE_ROWS;
            const int k = i % ROW_ITEMS * 8;
            const i64 row = row0 + r < m ? row0 + r : m - 1;
            *(u32x4*)(x_tile + (term * TILE_ROWS + r) * STRIDE + k) =
                *(const u32x4*)(a.x_terms + (term * m + row) * K + unit * UNIT + k);
        }
        if (thread < TILE_COLUMNS) {
            const int column = column0 + thread < WIDTH ? column0 + thread : WIDTH - 1;
            u32 q[UNIT / 4];
            const W::Stored stored = W::load(a.w, column, unit);
            W::quants(stored, unit, q);
            UNROLL for (int i = 0; i < UNIT; i += 2) {  // bf16 is the upper half of an f32
                const u32 low = as_u32(W::centred(q, i)) >> 16;
                const u32 high = as_u32(W::centred(q, i + 1)) & 0xFFFF0000u;
                *(u32*)(weight_tile + thread * STRIDE + i) = low | high;
            }
            UNROLL for (int half = 0; half < 2; ++half)
                scale_tile[half * TILE_COLUMNS + thread] = W::scale(stored, half);
        }
        block_barrier();

        // --- multiply ---
        UNROLL for (int half = 0; half < 2; ++half)  // a sub-block, as many k as a product has
        UNROLL for (int y = 0; y < FRAGMENTS_Y; ++y) {
            accumulator dots[FRAGMENTS_X];
            UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) dots[x] = zero_accumulator();
            const int k = half * PANEL;
            UNROLL for (int term = 0; term < TERMS; ++term) {
                const u16* rows = x_tile + (term * TILE_ROWS + wave_row + y * PANEL) * STRIDE;
                const fragment x_part = load_fragment(rows + k, STRIDE);
                UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) {
                    const u16* columns = weight_tile + (wave_column + x * PANEL) * STRIDE;
                    dots[x] = multiply_add(x_part, load_fragment(columns + k, STRIDE), dots[x]);
                }
            }
            UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) {
                UNROLL for (int i = 0; i < ACCUMULATOR_ELEMENTS; ++i) {
                    const int c = wave_column + x * PANEL + accumulator_column(i);
                    float& sum = w_sums[y][x][i];
                    sum = fma_f32(scale_tile[half * TILE_COLUMNS + c], dots[x][i], sum);
                }
            }
        }
    }

    // --- epilogue ---
    UNROLL for (int y = 0; y < FRAGMENTS_Y; ++y) {
        UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) {
            UNROLL for (int i = 0; i < ACCUMULATOR_ELEMENTS; ++i) {
                const i64 row = row0 + wave_row + y * PANEL + accumulator_row(i);
                const int column = column0 + wave_column + x * PANEL + accumulator_column(i);
                if (row < m && column < WIDTH && a.x_rough[row] == 0)
                    epilogue(a, row, column, w_sums[y][x][i]);
            }
        }
    }

    // --- rough rows ---
    // They have their own loop: unrolled with the other results it would be written 16 times. Flags are
    // read once: a load per result took 20 us on an H100.
    SHARED int any_rough;
    if (thread == 0) any_rough = 0;
    block_barrier();
    for (int r = thread; r < TILE_ROWS; r += BLOCK_SIZE)
        if (row0 + r < m && a.x_rough[row0 + r] != 0) any_rough = 1;
    block_barrier();
    if (!any_rough) return;
    for (int i = thread; i < TILE_ROWS * TILE_COLUMNS; i += BLOCK_SIZE) {
        const i64 row = row0 + i / TILE_COLUMNS;
        const int column = column0 + i % TILE_COLUMNS;
        if (row < m && column < WIDTH && a.x_rough[row] != 0)
            epilogue(a, row, column, exact_w(a, row, column));
    }
}

KERNEL(BLOCK_SIZE) void q4jit_residual(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    const float* __restrict__ r,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const u32* __restrict__ x_rough,
    i64 m) {
    compute(Arguments{x, w, r, output0, x_terms, x_rough, m});
}
