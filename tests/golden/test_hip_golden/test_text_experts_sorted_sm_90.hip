// of_experts for hip:sm_90, gemv, 8 vectors of an expert a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv:
//   w_product = vecmat(x_value, w[ids])    Q4_0 [128, 512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int EXPERTS = 128;  // each may have a tile that is not full
constexpr int ROWS = 8;  // of x, which share one decoding
constexpr int COLUMNS = 2;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int STAGE_UNITS = 16;  // LANES: of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // UNIT + 4 floats: 16-byte loads of neighbouring lanes meet all banks
constexpr int ROW_STRIDE = 576;  // STAGE_UNITS · UNIT_STRIDE, floats from row to row
// Of x in shared memory: a denormal x becomes a normal number. Huge x overflow, and are multiplied again.
constexpr float X_SCALE = 0x1p+23f;
constexpr int LDS_BYTES = 18432;  // shared memory of a block
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

// Q4_0 [512, 96] in the layout `planar`.
struct Q4_0_512x96 {
    static constexpr int BLOCKS = 16;  // 512 / 32, of a column
    static constexpr int QUANTS0_BYTES = 16;  // of a block
    static constexpr i64 D_AT = 24576;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + block * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
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
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 8.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d); }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 block = column * BLOCKS + k / UNIT;
        const int element = k % UNIT;
        const u8* const quants0 = w + block * QUANTS0_BYTES;
        // 32 elements share 16 bytes.
        const u32 code = quants0[element % 16] >> element % 32 / 16 * 4 & 15;
        const float d = half_to_f32(*(const u16*)(w + D_AT + block * D_BYTES));
        return ((float)code - 8.0f) * d;
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    const i64* ids;
    const i32* expert_order;
    const i32* expert_tiles;
    float* output0;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.ids = known_from_here(a.ids);
    a.expert_order = known_from_here(a.expert_order);
    a.expert_tiles = known_from_here(a.expert_tiles);
    a.output0 = known_from_here(a.output0);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row / 8 * 512 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[row * 96 + column] = w_product;
}

// Whether a result is right though scales were applied late. With an Inf or NaN in x it is Inf or NaN, but perhaps
// another one than decoded weights give; and huge x overflow before their scale.
DEVICE bool is_final(float result) { return abs_f32(result) <= 0x1.fffffep+127f; }

// One result by a single lane, from decoded weights. Each unit has a sum of its own: one sum of all of K would
// err by too much.
DEVICE float exact_w(const Arguments& a, i64 row, int column) {
    float total = 0.0f;
    ROLLED for (int unit = 0; unit < UNITS; ++unit) {
        float sum = 0.0f;
        ROLLED for (int k = unit * UNIT; k < (unit + 1) * UNIT; ++k)
            sum = fma_f32(
                x_value(a, row, k), Q4_0_512x96::value(a.w, column, k), sum);
        total += sum;
    }
    return total;
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
    const i64 tile = block_of_rows();
    if (tile >= (m + ROWS - 1) / ROWS + (m < EXPERTS ? m : EXPERTS)) return;
    const i32* const of_tile = a.expert_tiles + 3 * tile;
    const int first_place = of_tile[1], places = of_tile[2];
    if (places == 0) return;
    a.w += (u64)of_tile[0] * 27648;  // bytes of a matrix
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    // --- load ahead: the first unit of the lane ---
    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[ROWS][COLUMNS] = {};
    Q4_0_512x96::Stored w_ahead[COLUMNS];
    const int first_unit = lane < UNITS ? lane : UNITS - 1;
    UNROLL for (int c = 0; c < COLUMNS; ++c)
        w_ahead[c] = Q4_0_512x96::load(a.w, columns[c], first_unit);
    ROLLED for (int first = 0; first < UNITS; first += STAGE_UNITS) {
        // --- stage x ---
        block_barrier();  // the x before may still be read
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const i64 row = a.expert_order[first_place + (r < places ? r : places - 1)];
            for (int k = thread_index(); k < STAGE_UNITS * UNIT; k += BLOCK_SIZE) {
                const bool is_inside = first * UNIT + k < K;
                x_tile[r * ROW_STRIDE + k / UNIT * UNIT_STRIDE + k % UNIT] =
                    is_inside ? x_value(a, row, first * UNIT + k) * X_SCALE : 0.0f;
            }
        }
        block_barrier();

        // --- multiply: each lane its unit of the stage ---
        const int unit = first + lane;
        if (unit >= UNITS) continue;  // an Inf there times the 0 of x would be NaN
        const float* const x = x_tile + lane * UNIT_STRIDE;
        const int next = unit + STAGE_UNITS < UNITS ? unit + STAGE_UNITS : unit;
        UNROLL for (int c = 0; c < COLUMNS; ++c) {
            using W = Q4_0_512x96;
            u32 q[UNIT / 4];
            W::quants(w_ahead[c], unit, q);
            const float scale = W::scale(w_ahead[c]) / X_SCALE;
            w_ahead[c] = W::load(a.w, columns[c], next);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                float& sum = w_sums[r][c];
                float dot = 0.0f;
                UNROLL for (int j = 0; j < UNIT; ++j) dot = fma_f32(x[r * ROW_STRIDE + j], W::centred(q, j), dot);
                sum = fma_f32(scale, dot, sum);
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
    const int place = lane / COLUMNS;
    const i64 row = a.expert_order[first_place + (place < places ? place : places - 1)];
    const i64 expert = a.ids[row];
    const bool is_known = expert >= 0 && expert < 128;
    const int column = column0 + lane % COLUMNS;
    if (lane < ROWS * COLUMNS && place < places && column < WIDTH) {
        if (!is_final(w_product)) w_product = exact_w(a, row, column);
        epilogue(a, row, column, is_known ? w_product : as_f32(0x7fc00000u));
    }
}

KERNEL(BLOCK_SIZE) void q4jit_of_experts(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    const i64* __restrict__ ids,
    const i32* __restrict__ expert_order,
    const i32* __restrict__ expert_tiles,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, ids, expert_order, expert_tiles, output0, m});
}
