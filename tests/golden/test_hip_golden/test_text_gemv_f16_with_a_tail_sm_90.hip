// product for hip:sm_90, gemv, 2 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 37 gemv:
//   w_product = x_value @ w    F16 [40, 37]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int ROWS = 2;  // of x, which share one decoding
constexpr int COLUMNS = 4;  // of the result, which share one reading of x
constexpr int LANES = 16;  // share the units of a column
constexpr int GROUPS = BLOCK_SIZE / LANES;
constexpr int WIDTH = 37;  // columns of the result
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int K = 40;
constexpr int UNITS = (K + 31) / 32;  // of a column
constexpr int AHEAD = 1;  // units of a lane that are loaded before their turn
constexpr int CHUNK_UNITS = AHEAD * LANES;  // of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // in floats: 16-byte loads of neighbouring lanes meet all banks
constexpr int ROW_STRIDE = CHUNK_UNITS * UNIT_STRIDE;
constexpr int STAGED_BYTES = ROWS * ROW_STRIDE * 4;
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

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

// F16 [40, 37] in the layout `planar`.
struct F16_40x37 {
    static constexpr int K = 40;
    static constexpr int N = 37;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr i64 COLUMN_BYTES = 128;

    // A unit as it is stored: loaded early, decoded when it is needed.
    struct Stored { u32x4 words[4]; };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        Stored stored;
        const u8* at = w + column * COLUMN_BYTES + unit * 64;
        UNROLL for (int i = 0; i < 4; ++i) stored.words[i] = stream_16(at + 16 * i);
        return stored;
    }

    // 32 values; beyond K they are 0.
    DEVICE void decode(const Stored& stored, int, float (&values)[32]) {
        UNROLL for (int i = 0; i < 32; ++i)
            values[i] = half_to_f32((u16)(stored.words[i / 8][i / 2 % 4] >> (16 * (i % 2))));
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    i64 m;
};

// Kernels overlap. This one waits until those before are done, whose results it may read and whose
// arguments it may overwrite: weights alone, which no kernel writes, are loaded earlier. Then the next
// one may start and load its own.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.output0 = known_from_here(a.output0);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row * 40 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 37 + column] = w_product;
}

// A group of lanes computes COLUMNS columns for ROWS rows: each lane takes every LANES-th unit of a
// column, decodes it once for all rows, and the lanes add up their sums. Units are loaded
// AHEAD of their turn, the first while x is staged. x comes from shared memory: there lanes read
// their units side by side, which lie 128 bytes apart in a row.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    SHARED float x_tile[ROWS * ROW_STRIDE];
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[ROWS][COLUMNS] = {};
    F16_40x37::Stored w_ahead[AHEAD][COLUMNS];
    UNROLL for (int i = 0; i < AHEAD; ++i) {
        const int unit = i * LANES + lane < UNITS ? i * LANES + lane : UNITS - 1;
        UNROLL for (int c = 0; c < COLUMNS; ++c)
            w_ahead[i][c] = F16_40x37::load(a.w, columns[c], unit);
    }
    ROLLED for (int first = 0; first < UNITS; first += CHUNK_UNITS) {
        block_barrier();  // the x before may still be read
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const i64 row = row0 + r < m ? row0 + r : m - 1;
            for (int k = thread_index(); k < CHUNK_UNITS * 32; k += BLOCK_SIZE) {
                const bool inside = first * 32 + k < K;
                x_tile[r * ROW_STRIDE + k / 32 * UNIT_STRIDE + k % 32] =
                    inside ? x_value(a, row, first * 32 + k) : 0.0f;
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
                    using W = F16_40x37;
                    float w[32];
                    W::decode(w_ahead[i][c], unit, w);
                    w_ahead[i][c] = W::load(a.w, columns[c], next);
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        UNROLL for (int j = 0; j < 32; ++j)
                            w_sums[r][c] = fma_f32(x[r * ROW_STRIDE + j], w[j], w_sums[r][c]);
                        if (ROWS > 1) settle(w_sums[r][c]);
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

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
