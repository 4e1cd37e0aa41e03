// product for hip:sm_90, gemv, 2 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 37 columns, gemv:
//   w_product = x_value @ w    F16 [40, 37]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 40;  // elements of a column
constexpr int UNITS = 2;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 37;  // columns of the result
constexpr int ROWS = 2;  // of x, which share one decoding
constexpr int COLUMNS = 4;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int STAGE_UNITS = 16;  // LANES: of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // UNIT + 4 floats: 16-byte loads of neighbouring lanes meet all banks
constexpr int ROW_STRIDE = 576;  // STAGE_UNITS · UNIT_STRIDE, floats from row to row
constexpr int LDS_BYTES = 4608;  // shared memory of a block
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

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// F16 [40, 37] in the layout `planar`.
struct F16_40x37 {
    static constexpr i64 COLUMN_BYTES = 128;

    // A unit as it is stored: loaded early, decoded when it is needed.
    struct Stored { u32x4 words[4]; };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        Stored stored;
        const u8* const values = w + column * COLUMN_BYTES + unit * (UNIT * 2);
        UNROLL for (int i = 0; i < 4; ++i) stored.words[i] = stream_16(values + 16 * i);
        return stored;
    }

    // The values of a unit; beyond K they are 0.
    DEVICE void decode(const Stored& stored, int, float (&values)[UNIT]) {
        UNROLL for (int i = 0; i < UNIT; ++i)
            values[i] = half_to_f32((u16)(stored.words[i / 8][i / 2 % 4] >> (16 * (i % 2))));
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
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
// column and decodes it once for all rows, and the lanes add up their sums. Units are loaded ahead of
// their turn, the first ones while x is staged. x comes from shared memory: lanes read their units at
// the same time, and in a row of x these are 128 bytes apart.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    SHARED float x_tile[ROWS * ROW_STRIDE];
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    // --- load ahead: the first unit of the lane ---
    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[ROWS][COLUMNS] = {};
    F16_40x37::Stored w_ahead[COLUMNS];
    const int first_unit = lane < UNITS ? lane : UNITS - 1;
    UNROLL for (int c = 0; c < COLUMNS; ++c)
        w_ahead[c] = F16_40x37::load(a.w, columns[c], first_unit);
    ROLLED for (int first = 0; first < UNITS; first += STAGE_UNITS) {
        // --- stage x ---
        block_barrier();  // the x before may still be read
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const i64 row = row0 + r < m ? row0 + r : m - 1;
            for (int k = thread_index(); k < STAGE_UNITS * UNIT; k += BLOCK_SIZE) {
                const bool is_inside = first * UNIT + k < K;
                x_tile[r * ROW_STRIDE + k / UNIT * UNIT_STRIDE + k % UNIT] =
                    is_inside ? x_value(a, row, first * UNIT + k) : 0.0f;
            }
        }
        block_barrier();

        // --- multiply: each lane its unit of the stage ---
        const int unit = first + lane;
        if (unit >= UNITS) continue;  // an Inf there times the 0 of x would be NaN
        const float* const x = x_tile + lane * UNIT_STRIDE;
        const int next = unit + STAGE_UNITS < UNITS ? unit + STAGE_UNITS : unit;
        UNROLL for (int c = 0; c < COLUMNS; ++c) {
            using W = F16_40x37;
            float w[UNIT];
            W::decode(w_ahead[c], unit, w);
            w_ahead[c] = W::load(a.w, columns[c], next);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                float& sum = w_sums[r][c];
                UNROLL for (int j = 0; j < UNIT; ++j) sum = fma_f32(x[r * ROW_STRIDE + j], w[j], sum);
                settle(sum);
            }
        }
    }

    // --- add up: one lane finishes each result of the group ---
    float w_product = 0.0f;
    UNROLL for (int i = 0; i < ROWS * COLUMNS; ++i) {
        const float total = sum_of_lanes<LANES>(w_sums[i / COLUMNS][i % COLUMNS]);
        if (lane == i) w_product = total;
    }

    // --- epilogue ---
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
