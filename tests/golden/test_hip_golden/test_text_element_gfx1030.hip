// product for hip:gfx1030, element, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 columns, element:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int STAGE_UNITS = 128;  // of a column, in shared memory at a time
constexpr int LDS_BYTES = 16416;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1030 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// The sum over a wave, in all of them.
template <int LANES>
DEVICE float sum_of_lanes(float value) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// The sum over all threads of the block, in each of them.
DEVICE float block_sum(float value) {
    SHARED float sums[BLOCK_SIZE / WAVE];
    value = sum_of_lanes<WAVE>(value);
    block_barrier();  // the sums of an earlier call may still be read
    if (lane_index() == 0) sums[wave_index()] = value;
    block_barrier();
    float total = 0.0f;
    UNROLL for (int i = 0; i < BLOCK_SIZE / WAVE; ++i) total += sums[i];
    return total;
}

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
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    a.output0[column] = w_product;
}

// A block computes one element of the result. It decodes the column into shared memory, stage by
// stage, and multiplies it by the row; then it adds up the sums of its threads.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float staged[STAGE_UNITS * UNIT];
    const int column = block_x();
    const i64 row = block_of_rows();
    if (row >= m) return;

    float w_product = 0.0f;
    for (int first = 0; first < UNITS; first += STAGE_UNITS) {
        block_barrier();  // the stage before may still be read
        for (int u = thread_index(); u < STAGE_UNITS && first + u < UNITS; u += BLOCK_SIZE) {
            using W = Q4_0_512x96;
            float w[UNIT];
            W::decode(W::load(a.w, column, first + u), first + u, w);
            UNROLL for (int i = 0; i < UNIT; ++i) staged[u * UNIT + i] = w[i];
        }
        block_barrier();
        for (int k = thread_index(); k < STAGE_UNITS * UNIT && first * UNIT + k < K; k += BLOCK_SIZE)
            w_product = fma_f32(x_value(a, row, first * UNIT + k), staged[k], w_product);
    }
    w_product = block_sum(w_product);

    if (thread_index() == 0) epilogue(a, row, column, w_product);
}

KERNEL(BLOCK_SIZE) void q4jit_product(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{x, w, output0, m});
}
