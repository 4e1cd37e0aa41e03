// mxfp4_matmul_kernel for hip:sm_90, any M, N and K, made by q4jit
// output [m, n] = activations [m, k] @ weights [k, n], all row by row; weights are n GGUF rows of k
// elements in MXFP4, k a multiple of 32.

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int STAGE = 4096;  // elements of a column, in shared memory at a time
constexpr int LDS_BYTES = 16416;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

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

// 16 bytes at any address.
DEVICE u32x4 load_16_by_1(const u8* at) {
    u32x4 words;
    UNROLL for (int i = 0; i < 4; ++i)
        words[i] = at[4 * i] | (u32)at[4 * i + 1] << 8 | (u32)at[4 * i + 2] << 16 | (u32)at[4 * i + 3] << 24;
    return words;
}

// The description of one block: a column is a run of them, and units are counted from its start.
// MXFP4 [32, 1] in the layout `gguf`: rows as in a GGUF file.
struct MXFP4_32x1 {
    static constexpr int BLOCKS = 1;  // 32 / 32, of a column
    static constexpr int BLOCK_BYTES = 17;
    static constexpr i64 QUANTS0_AT = 1;  // where it begins in a block

    // The numbers of the codes in a word's low nibbles, and of those in its high ones, as bytes counted from -128.
    DEVICE void numbers(u32 codes, u32& low, u32& high) {
        look_up_nibbles(codes, 0x83828180u, 0x8c888684u, 0x7d7e7f80u, 0x74787a7cu, low, high);
    }

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u8 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + QUANTS0_AT + block * BLOCK_BYTES;
        stored.words[0] = load_16_by_1(quants0);
        stored.d = *(w + block * BLOCK_BYTES);
        return stored;
    }

    // The numbers of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        // low nibbles: elements 0…15, high nibbles: 16…31
        UNROLL for (int i = 0; i < 4; ++i) numbers(stored.words[0][i], q[i], q[i + 4]);
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 128.0f); }

    // What the elements of a unit are multiplied by: half of 2^(d - 127), as the numbers are twice the values.
    DEVICE float block_scale(u8 d) { return as_f32(d < 2 ? 0x00200000u << d : (u32)(d - 1) << 23); }
    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return block_scale(stored.d); }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        const float factor = scale(stored);
        UNROLL for (int i = 0; i < UNIT; ++i) values[i] = centred(q, i) * factor;
    }
};

// One block per element of the result, grid (n, m, 1); rows beyond MAX_GRID_Y go to the z axis. The
// column is decoded into shared memory, stage by stage, and multiplied by the row.
KERNEL(BLOCK_SIZE) void mxfp4_matmul_kernel(
    const float* __restrict__ activations,
    const u8* __restrict__ weights_mxfp4,
    float* __restrict__ output,
    int m,
    int n,
    int k) {
    SHARED float staged[STAGE];
    const int column = block_x();
    const i64 row = block_of_rows();
    if (row >= m || column >= n) return;
    const float* x = activations + row * k;
    using W = MXFP4_32x1;
    const u8* blocks = weights_mxfp4 + (i64)column * (k / 32) * W::BLOCK_BYTES;
    float sum = 0.0f;
    for (i64 first = 0; first < k; first += STAGE) {
        const int elements = (int)(k - first < STAGE ? k - first : STAGE);
        block_barrier();  // the stage before may still be read
        for (int unit = thread_index(); unit < elements / UNIT; unit += BLOCK_SIZE) {
            float w[UNIT];
            const int u = (int)(first / UNIT) + unit;
            W::decode(W::load(blocks, 0, u), u, w);
            UNROLL for (int i = 0; i < UNIT; ++i) staged[unit * UNIT + i] = w[i];
        }
        block_barrier();
        for (int i = thread_index(); i < elements; i += BLOCK_SIZE)
            sum = fma_f32(x[first + i], staged[i], sum);
    }
    sum = block_sum(sum);
    if (thread_index() == 0) output[row * n + column] = sum;
}
