// product for hip:sm_90, gemv_dot, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_dot:
//   w_product = x_value @ w    IQ4_XS [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int UNITS = 16;  // ⌈512 / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int COLUMNS = 4;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int LDS_BYTES = 0;  // shared memory of a block
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

// IQ4_XS [512, 96] in the layout `planar`.
struct IQ4_XS_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int QUANTS0_BYTES = 16;  // of a unit
    static constexpr i64 SCALES_AT = 24576;  // where its region begins
    static constexpr int SCALES_BYTES = 1;  // of a unit
    static constexpr i64 D_AT = 26112;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // The numbers of the codes in a word's low nibbles, and of those in its high ones, as bytes counted from -128.
    DEVICE void numbers(u32 codes, u32& low, u32& high) {
        look_up_nibbles(codes, 0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u, low, high);
    }

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
        u8 scales;  // of its sub-block
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + unit;
        Stored stored;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.scales = *(w + SCALES_AT + index * SCALES_BYTES);
        return stored;
    }

    // The numbers of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        // low nibbles: elements 0…15, high nibbles: 16…31
        UNROLL for (int i = 0; i < 4; ++i) numbers(stored.words[0][i], q[i], q[i + 4]);
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 128.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d) * (float)(i8)stored.scales; }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        const float factor = scale(stored);
        UNROLL for (int i = 0; i < UNIT; ++i) values[i] = centred(q, i) * factor;
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    float* output0;
    const u32* x_quants;
    const float* x_scales;
    const i16* x_sums;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.output0 = known_from_here(a.output0);
    a.x_quants = known_from_here(a.x_quants);
    a.x_scales = known_from_here(a.x_scales);
    a.x_sums = known_from_here(a.x_sums);
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

// The same product by multiply-add, for rows that int8 does not represent; LANES lanes share it.
DEVICE float exact_w(const Arguments& a, i64 row, int column, int lane) {
    using W = IQ4_XS_512x96;
    float sum = 0.0f;
    ROLLED for (int unit = lane; unit < UNITS; unit += LANES) {
        float w[UNIT];
        W::decode(W::load(a.w, column, unit), unit, w);
        UNROLL for (int i = 0; i < UNIT; ++i) sum = fma_f32(x_value(a, row, unit * UNIT + i), w[i], sum);
    }
    return sum_of_lanes<LANES>(sum);
}

// A group of lanes computes COLUMNS columns for one row: each lane takes every LANES-th unit of a
// column and multiplies its quants as bytes with those of x; no weight becomes a float.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows();
    if (row0 >= m) return;
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    float w_product = 0.0f;  // the result that this lane finishes
    {
        using W = IQ4_XS_512x96;
        // offsets from here fit 32 bits: half the scalar registers
        const u32x4* x_quants = (const u32x4*)a.x_quants + 2 * row0 * UNITS;
        const float* x_scales = a.x_scales + row0 * UNITS;

        // --- multiply: each lane its units of the columns ---
        float sums[COLUMNS] = {};
        ROLLED for (int unit = lane; unit < UNITS; unit += LANES) {
            UNROLL for (int c = 0; c < COLUMNS; ++c) {
                const int column = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
                u32 q[UNIT / 4];
                const W::Stored stored = W::load(a.w, column, unit);
                W::quants(stored, unit, q);
                UNROLL for (int i = 0; i < UNIT / 4; ++i) q[i] ^= 0x80808080u;  // flips sign bits: signed bytes again
                const float scale = W::scale(stored);
                {
                    const u32x4 x[2] = {x_quants[2 * unit], x_quants[2 * unit + 1]};
                    const float x_scale = x_scales[unit];
                    i32 dot = 0;
                    UNROLL for (int i = 0; i < 8; ++i) dot = dot4((i32)q[i], (i32)x[i / 4][i % 4], dot);
                    sums[c] = fma_f32(scale * x_scale, (float)dot, sums[c]);
                }
            }
        }

        // --- add up: one lane finishes each result of the group ---
        // A number that no other product has: masks of 16 lanes, kept for all products, are too many
        // for the scalar registers of a wave.
        float own_index = (float)lane;
        settle(own_index);
        UNROLL for (int i = 0; i < COLUMNS; ++i) {
            const float total = sum_of_lanes<LANES>(sums[i]);
            if (own_index == (float)i) w_product = total;
        }

        // --- rough rows ---
        // Whether a row is rough is the same for the whole block: lanes below meet in shuffles.
        ROLLED for (int i = 0; i < COLUMNS; ++i) {
            const float x_scale = x_scales[0];  // NaN, as all of a rough row
            if (x_scale == x_scale) continue;
            const int column = column0 + i;
            const float total = exact_w(a, row0, column < WIDTH ? column : WIDTH - 1, lane);
            if (own_index == (float)i) w_product = total;
        }
    }

    // --- epilogue ---
    const int column = column0 + lane % COLUMNS;  // not + lane: bits are combined, nothing is added
    if (lane < COLUMNS && column < WIDTH)
        epilogue(a, row0, column, w_product);
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    const u32* __restrict__ x_quants,
    const float* __restrict__ x_scales,
    const i16* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, w, output0, x_quants, x_scales, x_sums, m});
}
