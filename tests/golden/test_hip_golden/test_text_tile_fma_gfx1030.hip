// softcap for hip:gfx1030, tile_fma, 64 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, tile_fma:
//   w_product = x_value @ w    Q4_1 [512, 96]
//   output0 = cap * tanh(w_product / cap)

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int TILE_ROWS = 64;
constexpr int TILE_COLUMNS = 64;
constexpr int STRIDE = 65;  // TILE_ROWS + 1 floats; odd: a column of a tile meets all banks
constexpr int THREADS_X = 16;  // beside each other, along N
constexpr int THREADS_Y = 16;  // BLOCK_SIZE / THREADS_X, along M
constexpr int THREAD_ROWS = 4;  // TILE_ROWS / THREADS_Y
constexpr int THREAD_COLUMNS = 4;  // TILE_COLUMNS / THREADS_X
static_assert(TILE_ROWS == TILE_COLUMNS, "both tiles have the same stride");
static_assert(TILE_COLUMNS <= BLOCK_SIZE, "a thread decodes a unit of one column");
constexpr int LDS_BYTES = 16640;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1030 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// tanh x within 3 ulp: a polynomial up to 0.625, by exp beyond.
DEVICE float tanh_f32(float x) {
    const float t0 = abs_f32(x);
    const float t1 = x * x;
    const float t2 = x * t1;
    const float t3 = fma_f32(0.002147537f, t1, -0.00818267f);
    const float t4 = fma_f32(t3, t1, 0.02170297f);
    const float t5 = fma_f32(t4, t1, -0.0539472f);
    const float t6 = fma_f32(t5, t1, 0.1333321f);
    const float t7 = fma_f32(t6, t1, -0.3333333f);
    const float t8 = fma_f32(t2, t7, x);
    const float t9 = t0 + t0;
    const bool is10 = t9 < -104.0f;
    const float t11 = is10 ? -104.0f : t9;
    const bool is12 = 89.0f < t11;
    const float t13 = is12 ? 89.0f : t11;
    const float t14 = fma_f32(t13, 1.442695f, 1.2582912e+07f);  // 1 / ln 2; 1.5 * 2^23, where floats are whole numbers
    const i32 n15 = as_i32(t14);
    const i32 n16 = (i32)((u32)n15 - (u32)(i32)0x4b400000u);  // the bits of 1.5 * 2^23
    const float t17 = t14 - 1.2582912e+07f;  // 1.5 * 2^23, where floats are whole numbers
    const float t18 = fma_f32(t17, -0.6933594f, t13);  // -ln 2, its first 10 bits
    const float t19 = fma_f32(t17, 0.00021219444f, t18);  // -ln 2, the rest
    const float t20 = t19 * t19;
    const float t21 = fma_f32(0.0013814616f, t19, 0.008368716f);
    const float t22 = fma_f32(t21, t19, 0.04166839f);
    const float t23 = fma_f32(t22, t19, 0.16666521f);
    const float t24 = fma_f32(t23, t19, 0.49999994f);
    const float t25 = fma_f32(t20, t24, t19);
    const float t26 = t25 + 1.0f;
    const i32 n27 = n16 >> 1;
    const i32 n28 = (i32)((u32)n27 + (u32)127);  // the bias of an exponent
    const i32 n29 = (i32)((u32)n28 << 23);
    const float t30 = as_f32(n29);
    const float t31 = t26 * t30;
    const i32 n32 = (i32)((u32)n16 - (u32)n27);
    const i32 n33 = (i32)((u32)n32 + (u32)127);  // the bias of an exponent
    const i32 n34 = (i32)((u32)n33 << 23);
    const float t35 = as_f32(n34);
    const float t36 = t31 * t35;
    const float t37 = t36 + 1.0f;
    const float t38 = 2.0f / t37;
    const float t39 = 1.0f - t38;
    const i32 n40 = as_i32(x);
    const i32 n41 = n40 & (i32)0x80000000u;  // the sign
    const bool is42 = 0.625f < t0;
    const float t43 = is42 ? t39 : t8;
    const i32 n44 = as_i32(t43);
    const i32 n45 = n44 | n41;
    const float t46 = as_f32(n45);
    return t46;
}

// Q4_1 [512, 96] in the layout `planar`.
struct Q4_1_512x96 {
    static constexpr int BLOCKS = 16;  // 512 / 32, of a column
    static constexpr int QUANTS0_BYTES = 16;  // of a block
    static constexpr i64 D_AT = 24576;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block
    static constexpr i64 M_AT = 27648;  // where its region begins
    static constexpr int M_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
        u16 m;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + block * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * M_BYTES);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = stored.words[0][i];
            q[i] = word & 0x0f0f0f0fu;  // low nibbles: elements 0…15
            q[i + 4] = word >> 4 & 0x0f0f0f0fu;  // high nibbles: 16…31
        }
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 0.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d); }

    // What is added to all 32 elements of a unit.
    DEVICE float minimum(const Stored& stored) { return half_to_f32(stored.m); }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        const float factor = scale(stored);
        const float least = minimum(stored);
        UNROLL for (int i = 0; i < UNIT; ++i) values[i] = centred(q, i) * factor + least;
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float cap;
    float* output0;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row * 512 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    const float quotient1 = w_product / a.cap;
    const float tanh1 = tanh_f32(quotient1);
    const float product1 = a.cap * tanh1;
    a.output0[row * 96 + column] = product1;
}

// A block computes TILE_ROWS × TILE_COLUMNS results by multiply-add. x and decoded weights go through
// shared memory, a unit of K at a time, and a thread adds up THREAD_ROWS × THREAD_COLUMNS results.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float x_tile[UNIT * STRIDE];
    SHARED float weight_tile[UNIT * STRIDE];
    const int thread = thread_index();
    const int thread_x = thread % THREADS_X;
    const int thread_y = thread / THREADS_X;
    const i64 row0 = block_of_rows() * TILE_ROWS;
    const int column0 = block_x() * TILE_COLUMNS;

    float w_sums[THREAD_ROWS][THREAD_COLUMNS] = {};
    for (int unit = 0; unit < UNITS; ++unit) {
        // --- stage x and decoded weights ---
        block_barrier();  // the tiles before may still be read
        for (int i = thread; i < TILE_ROWS * UNIT; i += BLOCK_SIZE) {
            const int r = i / UNIT;
            const int k = i % UNIT;
            const bool is_inside = row0 + r < m && unit * UNIT + k < K;
            x_tile[k * STRIDE + r] = is_inside ? x_value(a, row0 + r, unit * UNIT + k) : 0.0f;
        }
        if (thread < TILE_COLUMNS) {
            using W = Q4_1_512x96;
            float w[UNIT];
            const int column = column0 + thread < WIDTH ? column0 + thread : WIDTH - 1;
            W::decode(W::load(a.w, column, unit), unit, w);
            UNROLL for (int k = 0; k < UNIT; ++k) weight_tile[k * STRIDE + thread] = w[k];
        }
        block_barrier();

        // --- multiply ---
        // The sums of a unit are added up apart: rounding errors grow with the number of additions.
        float unit_sums[THREAD_ROWS][THREAD_COLUMNS] = {};
        for (int k = 0; k < UNIT; ++k) {
            UNROLL for (int r = 0; r < THREAD_ROWS; ++r) {
                const float x = x_tile[k * STRIDE + thread_y + r * THREADS_Y];
                UNROLL for (int c = 0; c < THREAD_COLUMNS; ++c)
                    unit_sums[r][c] = fma_f32(x, weight_tile[k * STRIDE + thread_x + c * THREADS_X], unit_sums[r][c]);
            }
        }
        UNROLL for (int r = 0; r < THREAD_ROWS; ++r)
            UNROLL for (int c = 0; c < THREAD_COLUMNS; ++c) w_sums[r][c] += unit_sums[r][c];
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

KERNEL(BLOCK_SIZE) void q4jit_softcap(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float cap,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, cap, output0, m});
}
