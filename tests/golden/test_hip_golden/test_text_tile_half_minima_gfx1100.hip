// product for hip:gfx1100, tile_matrix, 64 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_matrix:
//   w_product = x_value @ w    Q2_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int TERMS = 3;  // bf16 numbers that make up one x
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
constexpr int LDS_BYTES = 22788;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q2_K [512, 96] in the layout `planar`.
struct Q2_K_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int QUANTS0_BYTES = 8;  // of a unit
    static constexpr i64 SCALES_AT = 12288;  // where its region begins
    static constexpr int SCALES_BYTES = 2;  // of a unit
    static constexpr i64 D_AT = 15360;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block
    static constexpr i64 M_AT = 15872;  // where its region begins
    static constexpr int M_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u64 quants0;
        u16 d;
        u16 m;
        u16 scales;  // of its two sub-blocks, a byte each
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + unit;
        Stored stored;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        stored.quants0 = *(const u64*)(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * M_BYTES);
        stored.scales = *(const u16*)(w + SCALES_AT + index * SCALES_BYTES);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        // The low 2 bits: a byte has those of 4 elements, which are 8 apart.
        UNROLL for (int i = 0; i < 8; ++i)
            q[i] = (u32)(stored.quants0 >> (i % 2 * 32)) >> (i / 2 * 2) & 0x03030303u;
    }

    // Quant i of a unit as a number, counted from the quant `zero`.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i, float zero = 0.0f) {
        return byte_minus(q[i / 4], i % 4, zero);
    }

    // What the 16 elements of sub-block `half` of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int half) {
        return half_to_f32(stored.d) * (float)(stored.scales >> (8 * half) & 15);
    }

    // What is added to the 16 elements of sub-block `half` of a unit.
    DEVICE float minimum(const Stored& stored, int half) {
        return -(half_to_f32(stored.m) * (float)(stored.scales >> (8 * half + 4) & 15));
    }

    // The code whose value d q + least is next to 0.
    DEVICE float code_of_zero(float d, float least) {
        const float zero = -least / d;
        if (!(zero > 0.0f)) return 0.0f;  // NaN included: d is 0
        return zero < 3.0f ? (float)(int)(zero + 0.5f) : 3.0f;
    }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        UNROLL for (int half = 0; half < 2; ++half) {
            const float factor = scale(stored, half);
            const float least = minimum(stored, half);
            UNROLL for (int i = 16 * half; i < 16 * half + 16; ++i) values[i] = centred(q, i) * factor + least;
        }
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    const u16* x_terms;
    const u32* x_rough;
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

// The same product by multiply-add, for rows that bf16 terms do not represent.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    using W = Q2_K_512x96;
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
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED u16 x_tile[TERMS * TILE_ROWS * STRIDE];
    SHARED u16 weight_tile[TILE_COLUMNS * STRIDE];
    SHARED float scale_tile[2 * TILE_COLUMNS];  // where a unit has two sub-blocks, those of all second ones last
    SHARED float minimum_tile[2 * TILE_COLUMNS];
    SHARED u16 ones[PANEL * STRIDE];
    for (int i = thread_index(); i < PANEL * STRIDE; i += BLOCK_SIZE) ones[i] = 0x3F80;  // 1 in bf16
    const int thread = thread_index();
    const i64 row0 = block_of_rows() * TILE_ROWS;
    const int column0 = block_x() * TILE_COLUMNS;
    const int wave_row = wave_index() / WAVES_X * FRAGMENTS_Y * PANEL;
    const int wave_column = wave_index() % WAVES_X * FRAGMENTS_X * PANEL;

    float w_sums[FRAGMENTS_Y][FRAGMENTS_X][ACCUMULATOR_ELEMENTS] = {};
    for (int unit = 0; unit < UNITS; ++unit) {
        // --- stage x and quants ---
        constexpr int ROW_ITEMS = UNIT / 8;  // of 16 bytes, eight x each
        using W = Q2_K_512x96;
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
            // Codes are counted from the one next to 0: otherwise d q and m, added up apart, would cancel
            // each other in some elements, and a large x there would leave its rounding error.
            float zeros[2];
            UNROLL for (int half = 0; half < 2; ++half) {
                const float d = W::scale(stored, half);
                const float least = W::minimum(stored, half);
                zeros[half] = W::code_of_zero(d, least);
                minimum_tile[half * TILE_COLUMNS + thread] = fma_f32(zeros[half], d, least);
            }
            UNROLL for (int i = 0; i < UNIT; i += 2) {  // bf16 is the upper half of an f32
                const u32 low = as_u32(W::centred(q, i, zeros[i / 16])) >> 16;
                const u32 high = as_u32(W::centred(q, i + 1, zeros[i / 16])) & 0xFFFF0000u;
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
            accumulator x_sums = zero_accumulator();
            const int k = half * PANEL;
            UNROLL for (int term = 0; term < TERMS; ++term) {
                const u16* rows = x_tile + (term * TILE_ROWS + wave_row + y * PANEL) * STRIDE;
                const fragment x_part = load_fragment(rows + k, STRIDE);
                UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) {
                    const u16* columns = weight_tile + (wave_column + x * PANEL) * STRIDE;
                    dots[x] = multiply_add(x_part, load_fragment(columns + k, STRIDE), dots[x]);
                }
                x_sums = multiply_add(x_part, load_fragment(ones, STRIDE), x_sums);
            }
            UNROLL for (int x = 0; x < FRAGMENTS_X; ++x) {
                UNROLL for (int i = 0; i < ACCUMULATOR_ELEMENTS; ++i) {
                    const int c = wave_column + x * PANEL + accumulator_column(i);
                    float& sum = w_sums[y][x][i];
                    sum = fma_f32(scale_tile[half * TILE_COLUMNS + c], dots[x][i], sum);
                    sum = fma_f32(minimum_tile[half * TILE_COLUMNS + c], x_sums[i], sum);
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

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u16* __restrict__ x_terms,
    const u32* __restrict__ x_rough,
    i64 m) {
    compute(Arguments{x, w, output0, x_terms, x_rough, m});
}
