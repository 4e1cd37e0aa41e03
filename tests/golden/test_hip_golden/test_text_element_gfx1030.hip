// product for hip:gfx1030, element, M = 1, made by q4jit
// rows:
//   x_value = x
// 96 element:
//   w_product = x_value @ w    Q4_0 [512, 96]
//   output0 = w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int CHUNK_UNITS = 128;  // of a column, in shared memory at a time
constexpr int STAGED_BYTES = CHUNK_UNITS * 32 * 4;
constexpr int LDS_BYTES = STAGED_BYTES + BLOCK_SIZE / WAVE * 4;  // shared memory of a block
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
    block_barrier();  // the sums of a call before may still be read
    if (lane_index() == 0) sums[wave_index()] = value;
    block_barrier();
    float total = 0.0f;
    UNROLL for (int i = 0; i < BLOCK_SIZE / WAVE; ++i) total += sums[i];
    return total;
}

// Q4_0 [512, 96] in the layout `planar`.
struct Q4_0_512x96 {
    static constexpr int K = 512;
    static constexpr int N = 96;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr int BLOCK_ELEMENTS = 32;
    static constexpr int BLOCKS = K / BLOCK_ELEMENTS;  // of a column
    static constexpr int BLOCK_UNITS = BLOCK_ELEMENTS / 32;
    static_assert(K % BLOCK_ELEMENTS == 0, "columns are whole blocks");
    static constexpr float ZERO = 8.0f;  // the quant of the value 0
    static constexpr i64 QUANTS0_AT = 0;
    static constexpr int QUANTS0_STRIDE = 16;  // bytes from block to block
    static constexpr i64 D_AT = 24576;
    static constexpr int D_STRIDE = 2;  // bytes from block to block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        Stored stored;
        {
            const u8* at = w + QUANTS0_AT + block * QUANTS0_STRIDE;
            stored.words[0] = stream_16(at);
        }
        stored.d = *(const u16*)(w + D_AT + block * D_STRIDE);
        return stored;
    }

    // 32 quants, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[8]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = stored.words[0][i];
            q[i] = word & 0x0f0f0f0fu;
            q[i + 4] = word >> 4 & 0x0f0f0f0fu;
        }
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

// One block per element of the result: the column is decoded into shared memory, piece by piece,
// and multiplied by the row; then the threads' sums are added up.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float staged[CHUNK_UNITS * 32];
    const int column = block_x();
    const i64 row = block_of_rows();
    if (row >= m) return;

    float w_product = 0.0f;
    for (int first = 0; first < Q4_0_512x96::UNITS; first += CHUNK_UNITS) {
        block_barrier();  // the piece before may still be read
        for (int u = thread_index(); u < CHUNK_UNITS && first + u < Q4_0_512x96::UNITS; u += BLOCK_SIZE) {
            float w[32];
            using W = Q4_0_512x96;
            W::decode(W::load(a.w, column, first + u), first + u, w);
            UNROLL for (int i = 0; i < 32; ++i) staged[u * 32 + i] = w[i];
        }
        block_barrier();
        for (int k = thread_index(); k < CHUNK_UNITS * 32 && first * 32 + k < Q4_0_512x96::K; k += BLOCK_SIZE)
            w_product = fma_f32(x_value(a, row, first * 32 + k), staged[k], w_product);
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
