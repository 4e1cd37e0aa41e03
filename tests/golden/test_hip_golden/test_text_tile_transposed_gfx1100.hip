// transposed for hip:gfx1100, tile_transposed, 64 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = y
// 512 columns, tile_transposed:
//   w_product = x_value @ w.T    Q6_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column of w that are decoded together
constexpr int N = 96;  // columns of w, which the products sum over
constexpr int STEP = 32;  // columns of w, in shared memory at a time
constexpr int STEPS = 3;  // ⌈N / STEP⌉
constexpr int WIDTH = 512;  // columns of the result
constexpr int TILE_ROWS = 64;
constexpr int TILE_COLUMNS = 64;
constexpr int TILE_UNITS = 2;  // TILE_COLUMNS / UNIT, of each column of w
constexpr int STRIDE = 65;  // TILE_ROWS + 1 floats; odd: a column of a tile meets all banks
constexpr int THREADS_X = 16;  // beside each other, along the results of a row
constexpr int THREADS_Y = 16;  // BLOCK_SIZE / THREADS_X, along M
constexpr int THREAD_ROWS = 4;  // TILE_ROWS / THREADS_Y
constexpr int THREAD_COLUMNS = 4;  // TILE_COLUMNS / THREADS_X
static_assert(TILE_ROWS == TILE_COLUMNS, "both tiles have the same stride");
static_assert((TILE_UNITS + 1) * STEP <= BLOCK_SIZE, "a thread decodes one unit");
constexpr int LDS_BYTES = 16640;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

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
    const float* y;
    const u8* w;
    float* output0;
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

// A block computes TILE_ROWS × TILE_COLUMNS results of products with w.T by multiply-add. x and decoded weights
// go through shared memory, STEP columns of w at a time, and a thread adds up THREAD_ROWS × THREAD_COLUMNS results.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float x_tile[STEP * STRIDE];
    SHARED float weight_tile[STEP * STRIDE];
    const int thread = thread_index();
    const int thread_x = thread % THREADS_X;
    const int thread_y = thread / THREADS_X;
    const i64 row0 = block_of_rows() * TILE_ROWS;
    const int column0 = block_x() * TILE_COLUMNS;

    float w_sums[THREAD_ROWS][THREAD_COLUMNS] = {};
    for (int step = 0; step < STEPS; ++step) {
        // --- stage x and decoded weights ---
        block_barrier();  // the tiles before may still be read
        for (int i = thread; i < TILE_ROWS * STEP; i += BLOCK_SIZE) {
            const int r = i / STEP;
            const int n = i % STEP;
            const bool is_inside = row0 + r < m && step * STEP + n < N;
            x_tile[n * STRIDE + r] = is_inside ? x_value(a, row0 + r, step * STEP + n) : 0.0f;
        }
        if (thread < TILE_UNITS * STEP) {
            using W = Q6_K_512x96;
            const int n = thread % STEP;
            const int u = thread / STEP;
            const int unit = block_x() * TILE_UNITS + u;
            float w[UNIT] = {};  // 0 beyond N: an Inf there times the 0 of x would be NaN
            if (step * STEP + n < N && unit < 16) W::decode(W::load(a.w, step * STEP + n, unit), unit, w);
            UNROLL for (int k = 0; k < UNIT; ++k) weight_tile[n * STRIDE + u * UNIT + k] = w[k];
        }
        block_barrier();

        // --- multiply ---
        // The sums of a step are added up apart: rounding errors grow with the number of additions.
        float step_sums[THREAD_ROWS][THREAD_COLUMNS] = {};
        for (int n = 0; n < STEP; ++n) {
            UNROLL for (int r = 0; r < THREAD_ROWS; ++r) {
                const float x = x_tile[n * STRIDE + thread_y + r * THREADS_Y];
                UNROLL for (int c = 0; c < THREAD_COLUMNS; ++c)
                    step_sums[r][c] = fma_f32(x, weight_tile[n * STRIDE + thread_x + c * THREADS_X], step_sums[r][c]);
            }
        }
        UNROLL for (int r = 0; r < THREAD_ROWS; ++r)
            UNROLL for (int c = 0; c < THREAD_COLUMNS; ++c) w_sums[r][c] += step_sums[r][c];
    }

    // --- epilogue ---
    UNROLL for (int r = 0; r < THREAD_ROWS; ++r) {
        UNROLL for (int c = 0; c < THREAD_COLUMNS; ++c) {
            const i64 row = row0 + thread_y + r * THREADS_Y;
            const int column = column0 + thread_x + c * THREADS_X;
            if (row < m && column < WIDTH)
                epilogue(a, row, column, w_sums[r][c]);
        }
    }
}

KERNEL(BLOCK_SIZE) void q4jit_transposed(
    const float* __restrict__ y,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{y, w, output0, m});
}
