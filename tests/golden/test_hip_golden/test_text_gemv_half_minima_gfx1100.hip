// product for hip:gfx1100, gemv, 2 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv:
//   w_product = x_value @ w    Q2_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int ROWS = 2;  // of x, which share one decoding
constexpr int COLUMNS = 4;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int STAGE_UNITS = 16;  // LANES: of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // UNIT + 4 floats: 16-byte loads of neighbouring lanes meet all banks
constexpr int ROW_STRIDE = 576;  // STAGE_UNITS · UNIT_STRIDE, floats from row to row
// Of x in shared memory: a denormal x becomes a normal number. Huge x overflow, and are multiplied again.
constexpr float X_SCALE = 0x1p+23f;
constexpr int LDS_BYTES = 4608;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

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

    // The integers of sub-block j of a unit.
    DEVICE i32 sub_scale(const u8* scales, int j) {
        return scales[j] & 15;
    }
    DEVICE i32 sub_minimum(const u8* scales, int j) {
        return scales[j] >> 4 & 15;
    }

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
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i, float zero) {
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

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 block = column * BLOCKS + k / (BLOCK_UNITS * UNIT);
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + k / UNIT;
        const int element = k % UNIT;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        // 32 elements share 8 bytes.
        const u32 code = quants0[element % 8] >> element % 32 / 8 * 2 & 3;
        const float d = half_to_f32(*(const u16*)(w + D_AT + block * D_BYTES));
        const float factor = d * (float)sub_scale(w + SCALES_AT + index * SCALES_BYTES, element / 16);
        const float m = half_to_f32(*(const u16*)(w + M_AT + block * M_BYTES));
        const float least = -(m * (float)sub_minimum(w + SCALES_AT + index * SCALES_BYTES, element / 16));
        return (float)code * factor + least;
    }
};

struct Arguments {
    const float* x;
    const u8* w;
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
                x_value(a, row, k), Q2_K_512x96::value(a.w, column, k), sum);
        total += sum;
    }
    return total;
}

// A group of lanes computes COLUMNS columns for ROWS rows: each lane takes every LANES-th unit of a
// column and decodes it once for all rows, and the lanes add up their sums. Units are loaded ahead of
// their turn, the first ones while x is staged. x comes from shared memory: lanes read their units at
// the same time, and in a row of x these are 128 bytes apart.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float x_tile[ROWS * ROW_STRIDE];
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows() * ROWS;
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    // --- load ahead: the first unit of the lane ---
    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[ROWS][COLUMNS] = {};
    Q2_K_512x96::Stored w_ahead[COLUMNS];
    const int first_unit = lane < UNITS ? lane : UNITS - 1;
    UNROLL for (int c = 0; c < COLUMNS; ++c)
        w_ahead[c] = Q2_K_512x96::load(a.w, columns[c], first_unit);
    ROLLED for (int first = 0; first < UNITS; first += STAGE_UNITS) {
        // --- stage x ---
        block_barrier();  // the x before may still be read
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const i64 row = row0 + r < m ? row0 + r : m - 1;
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
        float x_sum[ROWS][2] = {};  // of each half
        UNROLL for (int r = 0; r < ROWS; ++r) {
            UNROLL for (int j = 0; j < UNIT; ++j) x_sum[r][j / 16] += x[r * ROW_STRIDE + j];
            settle(x_sum[r][0]), settle(x_sum[r][1]);
        }
        UNROLL for (int c = 0; c < COLUMNS; ++c) {
            using W = Q2_K_512x96;
            u32 q[UNIT / 4];
            W::quants(w_ahead[c], unit, q);
            float scales[2];  // of the sub-blocks
            UNROLL for (int half = 0; half < 2; ++half) scales[half] = W::scale(w_ahead[c], half) / X_SCALE;
            // Codes are counted from the one next to 0: otherwise d q and m would cancel each other.
            float leasts[2], zeros[2];
            UNROLL for (int half = 0; half < 2; ++half) {
                leasts[half] = W::minimum(w_ahead[c], half) / X_SCALE;
                zeros[half] = W::code_of_zero(scales[half], leasts[half]);
            }
            w_ahead[c] = W::load(a.w, columns[c], next);
            UNROLL for (int r = 0; r < ROWS; ++r) {
                float& sum = w_sums[r][c];
                UNROLL for (int half = 0; half < 2; ++half) {
                    float dot = 0.0f;
                    UNROLL for (int j = UNIT / 2 * half; j < UNIT / 2 * (half + 1); ++j)
                        dot = fma_f32(x[r * ROW_STRIDE + j], W::centred(q, j, zeros[half]), dot);
                    sum = fma_f32(scales[half], dot, sum);
                    sum = fma_f32(fma_f32(zeros[half], scales[half], leasts[half]), x_sum[r][half], sum);
                }
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
    if (lane < ROWS * COLUMNS && row < m && column < WIDTH) {
        if (!is_final(w_product)) w_product = exact_w(a, row, column);
        epilogue(a, row, column, w_product);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
