// product for hip:sm_90, gemv, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv:
//   w_product = x_value @ w    Q4_K [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int COLUMNS = 2;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int STAGE_UNITS = 16;  // LANES: of x, in shared memory at a time
constexpr int UNIT_STRIDE = 36;  // UNIT + 4 floats: 16-byte loads of neighbouring lanes meet all banks
// Of x in shared memory: a denormal x becomes a normal number. Huge x overflow, and are multiplied again.
constexpr float X_SCALE = 0x1p+23f;
constexpr int LDS_BYTES = 2304;  // shared memory of a block
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

// Q4_K [512, 96] in the layout `planar`.
struct Q4_K_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int QUANTS0_BYTES = 16;  // of a unit
    static constexpr i64 SCALES_AT = 24576;  // where its region begins
    static constexpr int SCALES_BYTES = 1;  // of a unit
    static constexpr i64 MINIMA_AT = 26112;  // where its region begins
    static constexpr int MINIMA_BYTES = 1;  // of a unit
    static constexpr i64 D_AT = 27648;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block
    static constexpr i64 M_AT = 28160;  // where its region begins
    static constexpr int M_BYTES = 2;  // of a block

    // The integers of sub-block j of a unit.
    DEVICE i32 sub_scale(const u8* scales, int j) {
        return (i8)scales[j];
    }
    DEVICE i32 sub_minimum(const u8* minima, int j) {
        return (i8)minima[j];
    }

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
        u16 m;
        u8 scales;  // of its sub-block
        u8 minima;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + unit;
        Stored stored;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * M_BYTES);
        stored.scales = *(w + SCALES_AT + index * SCALES_BYTES);
        stored.minima = *(w + MINIMA_AT + index * MINIMA_BYTES);
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

    // Quant i of a unit as a number, counted from the quant `zero`.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i, float zero) {
        return byte_minus(q[i / 4], i % 4, zero);
    }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d) * (float)(i8)stored.scales; }

    // What is added to all 32 elements of a unit.
    DEVICE float minimum(const Stored& stored) { return -(half_to_f32(stored.m) * (float)(i8)stored.minima); }

    // The code whose value d q + least is next to 0.
    DEVICE float code_of_zero(float d, float least) {
        const float zero = -least / d;
        if (!(zero > 0.0f)) return 0.0f;  // NaN included: d is 0
        return zero < 15.0f ? (float)(int)(zero + 0.5f) : 15.0f;
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 block = column * BLOCKS + k / (BLOCK_UNITS * UNIT);
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + k / UNIT;
        const int element = k % UNIT;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        // 32 elements share 16 bytes.
        const u32 code = quants0[element % 16] >> element % 32 / 16 * 4 & 15;
        const float d = half_to_f32(*(const u16*)(w + D_AT + block * D_BYTES));
        const float factor = d * (float)sub_scale(w + SCALES_AT + index * SCALES_BYTES, 0);
        const float m = half_to_f32(*(const u16*)(w + M_AT + block * M_BYTES));
        const float least = -(m * (float)sub_minimum(w + MINIMA_AT + index * MINIMA_BYTES, 0));
        return (float)code * factor + least;
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
    const float x_element = a.x[column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[column] = w_product;
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
                x_value(a, row, k), Q4_K_512x96::value(a.w, column, k), sum);
        total += sum;
    }
    return total;
}

// A group of lanes computes COLUMNS columns for one row: each lane takes every LANES-th unit of a
// column, and the lanes add up their sums. Units are loaded ahead of their turn, the first ones while x
// is staged. x comes from shared memory: lanes read their units at the same time, and in x these are
// 128 bytes apart.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    SHARED float x_tile[STAGE_UNITS * UNIT_STRIDE];
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows();
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    // --- load ahead: the first unit of the lane ---
    int columns[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; ++c) columns[c] = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
    float w_sums[COLUMNS] = {};
    Q4_K_512x96::Stored w_ahead[COLUMNS];
    const int first_unit = lane < UNITS ? lane : UNITS - 1;
    UNROLL for (int c = 0; c < COLUMNS; ++c)
        w_ahead[c] = Q4_K_512x96::load(a.w, columns[c], first_unit);
    ROLLED for (int first = 0; first < UNITS; first += STAGE_UNITS) {
        // --- stage x ---
        block_barrier();  // the x before may still be read
        const i64 row = row0 < m ? row0 : m - 1;
        for (int k = thread_index(); k < STAGE_UNITS * UNIT; k += BLOCK_SIZE) {
            const bool is_inside = first * UNIT + k < K;
            x_tile[k / UNIT * UNIT_STRIDE + k % UNIT] =
                is_inside ? x_value(a, row, first * UNIT + k) * X_SCALE : 0.0f;
        }
        block_barrier();

        // --- multiply: each lane its unit of the stage ---
        const int unit = first + lane;
        if (unit >= UNITS) continue;  // an Inf there times the 0 of x would be NaN
        const float* const x = x_tile + lane * UNIT_STRIDE;
        const int next = unit + STAGE_UNITS < UNITS ? unit + STAGE_UNITS : unit;
        float x_sum = {};
        UNROLL for (int j = 0; j < UNIT; ++j) x_sum += x[j];
        UNROLL for (int c = 0; c < COLUMNS; ++c) {
            using W = Q4_K_512x96;
            u32 q[UNIT / 4];
            W::quants(w_ahead[c], unit, q);
            const float scale = W::scale(w_ahead[c]) / X_SCALE;
            // Codes are counted from the one next to 0: otherwise d q and m would cancel each other.
            const float least = W::minimum(w_ahead[c]) / X_SCALE;
            const float zero = W::code_of_zero(scale, least);
            w_ahead[c] = W::load(a.w, columns[c], next);
            float& sum = w_sums[c];
            float dot = 0.0f;
            UNROLL for (int j = 0; j < UNIT; ++j) dot = fma_f32(x[j], W::centred(q, j, zero), dot);
            sum = fma_f32(scale, dot, sum);
            sum = fma_f32(fma_f32(zero, scale, least), x_sum, sum);
        }
    }

    // --- add up: one lane finishes each result of the group ---
    float w_product = 0.0f;
    UNROLL for (int i = 0; i < COLUMNS; ++i) {
        const float total = sum_of_lanes<LANES>(w_sums[i]);
        if (lane == i) w_product = total;
    }

    // --- epilogue ---
    const int column = column0 + lane % COLUMNS;  // not + lane: bits are combined, nothing is added
    if (lane < COLUMNS && row0 < m && column < WIDTH) {
        if (!is_final(w_product)) w_product = exact_w(a, row0, column);
        epilogue(a, row0, column, w_product);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
