// q4_1_matmul_kernel for hip:gfx1030, any M, N and K, made by q4jit
// output [m, n] = activations [m, k] @ weights [k, n], all row by row; weights are n GGUF rows of k
// elements in Q4_1, k a multiple of 32.

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int STAGE = 4096;  // elements of a column, in shared memory at a time
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
    block_barrier();  // the sums of a call before may still be read
    if (lane_index() == 0) sums[wave_index()] = value;
    block_barrier();
    float total = 0.0f;
    UNROLL for (int i = 0; i < BLOCK_SIZE / WAVE; ++i) total += sums[i];
    return total;
}

// 16 bytes that are aligned to 2, as those of GGUF's blocks are.
DEVICE u32x4 load_16_by_2(const u8* at) {
    const u16* halves = (const u16*)at;
    u32x4 words;
    UNROLL for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | (u32)halves[2 * i + 1] << 16;
    return words;
}

// The description of one block: a column is a run of them, and units are counted from its start.
// Q4_1 [32, 1] in the layout `gguf`: rows as in a GGUF file.
struct Q4_1_32x1 {
    static constexpr int BLOCKS = 1;  // 32 / 32, of a column
    static constexpr int BLOCK_BYTES = 20;
    static constexpr i64 M_AT = 2;  // where it begins in a block
    static constexpr i64 QUANTS0_AT = 4;  // where it begins in a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
        u16 m;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + QUANTS0_AT + block * BLOCK_BYTES;
        stored.words[0] = load_16_by_2(quants0);
        stored.d = *(const u16*)(w + block * BLOCK_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * BLOCK_BYTES);
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
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 0.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d); }

    // What is added to all 32 elements of a unit.
    DEVICE float minimum(const Stored& stored) { return half_to_f32(stored.m); }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        const float factor = scale(stored);
        const float least = minimum(stored);
        UNROLL for (int i = 0; i < UNIT; ++i) values[i] = centred(q, i) * factor + least;
    }
};

// One block per element of the result, grid (n, m, 1); rows beyond MAX_GRID_Y go to the z axis. The
// column is decoded into shared memory, stage by stage, and multiplied by the row.
KERNEL(BLOCK_SIZE) void q4_1_matmul_kernel(
    const float* __restrict__ activations,
    const u8* __restrict__ weights_q4_1,
    float* __restrict__ output,
    int m,
    int n,
    int k) {
    SHARED float staged[STAGE];
    const int column = block_x();
    const i64 row = block_of_rows();
    if (row >= m || column >= n) return;
    const float* x = activations + row * k;
    using W = Q4_1_32x1;
    const u8* blocks = weights_q4_1 + (i64)column * (k / 32) * W::BLOCK_BYTES;
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
