// residual for hip:gfx90a, gemv, 4 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 gemv:
//   w_product = x_value @ w    Q8_0 [512, 96]
//   output0 = r + w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int ROWS = 4;  // of x, which share one decoding
constexpr int COLUMNS = 2;  // of the result, which share one reading of x
constexpr int LANES = 16;  // share the units of a column
constexpr int GROUPS = BLOCK_SIZE / LANES;
constexpr int WIDTH = 96;  // columns of the result
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int K = 512;
// Of x in shared memory: 32 products with quants up to 255 cannot overflow before their scale.
constexpr float X_SCALE = 0x1p-13f;
constexpr int UNITS = (K + 31) / 32;  // of a column
constexpr int AHEAD = 1;  // units of a lane that are loaded before their turn
constexpr int CHUNK_UNITS = AHEAD * LANES;  // of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // in floats: 16-byte loads of neighbouring lanes meet all banks
constexpr int ROW_STRIDE = CHUNK_UNITS * UNIT_STRIDE;
constexpr int STAGED_BYTES = ROWS * ROW_STRIDE * 4;
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// The sum over neighbouring lanes, in all of them.
template <int LANES>
DEVICE float sum_of_lanes(float value) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// A loop of few rounds would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// 16 bytes that are aligned to 2, as those of GGUF's blocks are.
DEVICE u32x4 load_16_by_2(const u8* at) {
    const u16* halves = (const u16*)at;
    u32x4 words;
    UNROLL for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | (u32)halves[2 * i + 1] << 16;
    return words;
}

// Q8_0 [512, 96] in the layout `gguf`: rows as in a GGUF file.
struct Q8_0_512x96 {
    static constexpr int K = 512;
    static constexpr int N = 96;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr int BLOCK_ELEMENTS = 32;
    static constexpr int BLOCKS = K / BLOCK_ELEMENTS;  // of a column
    static constexpr int BLOCK_UNITS = BLOCK_ELEMENTS / 32;
    static_assert(K % BLOCK_ELEMENTS == 0, "columns are whole blocks");
    static constexpr float ZERO = 128.0f;  // the quant of the value 0
    static constexpr i64 D_AT = 0;
    static constexpr int D_STRIDE = 34;  // bytes from block to block
    static constexpr i64 QUANTS0_AT = 2;
    static constexpr int QUANTS0_STRIDE = 34;  // bytes from block to block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[2];
        u16 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        Stored stored;
        {
            const u8* at = w + QUANTS0_AT + block * QUANTS0_STRIDE;
            UNROLL for (int i = 0; i < 2; ++i)
                stored.words[i] = load_16_by_2(at + 16 * i);
        }
        stored.d = *(const u16*)(w + D_AT + block * D_STRIDE);
        return stored;
    }

    // 32 quants, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[8]) {
        UNROLL for (int i = 0; i < 8; ++i) q[i] = stored.words[0 + i / 4][i % 4];
        UNROLL for (int i = 0; i < 8; ++i) q[i] ^= 0x80808080u;  // signed bytes, counted from -128
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
    const float* r;
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
    const float r_element = a.r[row * 96 + column];
    const float sum1 = r_element + w_product;
    a.output0[row * 96 + column] = sum1;
}

// A group of lanes computes COLUMNS columns for ROWS rows: each lane takes every LANES-th unit of a
// column, decodes it once for all rows, and the lanes add up their sums. Units are loaded
// AHEAD of their turn, the first while x is staged. x comes from shared memory: there lanes read
// their units side by side, which lie 128 bytes apart in a row.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float x_tile[ROWS * ROW_STRIDE];
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[ROWS][COLUMNS] = {};
    Q8_0_512x96::Stored w_ahead[AHEAD][COLUMNS];
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        const int unit = i * LANES + lane < UNITS ? i * LANES + lane : UNITS - 1;
        UNROLL for (int c = 0; c < COLUMNS; ++c)
            w_ahead[i][c] = Q8_0_512x96::load(a.w, columns[c], unit);
    }
    ROLLED for (int first = 0; first < UNITS; first += CHUNK_UNITS) {
        block_barrier();  // the x before may still be read
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const i64 row = row0 + r < m ? row0 + r : m - 1;
            for (int k = thread_index(); k < CHUNK_UNITS * 32; k += BLOCK_SIZE) {
                const bool inside = first * 32 + k < K;
                x_tile[r * ROW_STRIDE + k / 32 * UNIT_STRIDE + k % 32] =
                    inside ? x_value(a, row, first * 32 + k) * X_SCALE : 0.0f;
            }
        }
        block_barrier();
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            const int unit = first + i * LANES + lane;
            if (unit >= UNITS) break;  // an Inf there times the 0 of x would be NaN
            const float* x = x_tile + (i * LANES + lane) * UNIT_STRIDE;
            const int next = unit + CHUNK_UNITS < UNITS ? unit + CHUNK_UNITS : unit;
            UNROLL for (int c = 0; c < COLUMNS; ++c) {
                {
                    using W = Q8_0_512x96;
                    u32 q[8];
                    W::quants(w_ahead[i][c], unit, q);
                    float scales[1];
                    UNROLL for (int h = 0; h < 1; ++h) scales[h] = W::scale(w_ahead[i][c], h) / X_SCALE;
                    w_ahead[i][c] = W::load(a.w, columns[c], next);
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        float& sum = w_sums[r][c];
                        UNROLL for (int h = 0; h < 1; ++h) {
                            float dot = 0.0f;
                            UNROLL for (int j = 32 * h; j < 32 * (h + 1); ++j)
                                dot = fma_f32(x[r * ROW_STRIDE + j], W::centred(q, j), dot);
                            sum = fma_f32(scales[h], dot, sum);
                        }
                        if (ROWS > 1) settle(sum);
                    }
                }
            }
        }
    }

    float w_product = 0.0f;  // the result that this lane finishes
    UNROLL for (int i = 0; i < ROWS * COLUMNS; ++i) {
        const float total = sum_of_lanes<LANES>(w_sums[i / COLUMNS][i % COLUMNS]);
        if (lane == i) w_product = total;
    }

    const i64 row = row0 + lane / COLUMNS;
    const int column = column0 + lane % COLUMNS;
    if (lane < ROWS * COLUMNS && row < m && column < WIDTH)
        epilogue(a, row, column, w_product);
}

KERNEL(BLOCK_SIZE) void q4jit_residual(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    const float* __restrict__ r,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, r, output0, m});
}
