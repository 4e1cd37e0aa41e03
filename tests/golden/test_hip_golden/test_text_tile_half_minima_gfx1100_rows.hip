// product_rows for hip:gfx1100, rows, 1 row a tile, 256 threads, made by q4jit
// rows:
//   x_value = x

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a row
constexpr int TERMS = 3;  // bf16 numbers whose sum is x
constexpr int LDS_BYTES = 32;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

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

struct Arguments {
    const float* x;
    u16* x_terms;
    u32* x_rough;
    i64 m;
};

// One block per row: what the products need of it.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    const i64 row = block_of_rows();
    if (row >= m) return;

    // --- x in bf16 terms: each has the next eight bits of it ---
    // A row is rough if terms cannot represent it: Inf and NaN, magnitudes whose products overflow, and
    // magnitudes whose last terms are denormal.
    constexpr u32 BF16_BITS = 0xFFFF0000u;  // a bf16 is the upper half of an f32
    float rough = 0.0f;
    for (int column = thread_index(); column < K; column += BLOCK_SIZE) {
        const float x_element = a.x[row * 512 + column];
        float rest = x_element;
        const float size = abs_f32(rest);
        if (!(size <= 0x1p+96f) || (size > 0.0f && size < 0x1p-102f)) rough = 1.0f;
        UNROLL for (int term = 0; term < TERMS; ++term) {
            const u32 bits = as_u32(rest) & BF16_BITS;
            a.x_terms[(term * m + row) * K + column] = (u16)(bits >> 16);
            rest -= as_f32(bits);
        }
    }
    rough = block_sum(rough);
    if (thread_index() == 0) a.x_rough[row] = rough > 0.0f;
}

KERNEL(BLOCK_SIZE) void q4jit_product_rows(
    const float* __restrict__ x,
    u16* __restrict__ x_terms,
    u32* __restrict__ x_rough,
    i64 m) {
    compute(Arguments{x, x_terms, x_rough, m});
}
