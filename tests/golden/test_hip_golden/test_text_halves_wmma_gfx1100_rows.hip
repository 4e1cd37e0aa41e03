// gated_rows for hip:gfx1100, rows, 1 row a tile, 512 threads, made by q4jit
// rows:
//   v0 = x

constexpr int BLOCK_SIZE = 512;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int TERMS = 1;  // f16 numbers that make up one x
static_assert(512 % 32 == 0, "x has whole units");
constexpr float LEAST = 0x1p-14f;  // of x beside a largest of 2^14: a term errs by 2^-25
constexpr int K = 512;
constexpr int TILE_ROWS = 16;  // of x, in one matrix instruction
constexpr int UNITS = (K + 127) / 128 * 4;  // of 32 x; beyond K they are 0
constexpr int SHARES = UNITS * 4;
constexpr int THREAD_SHARES = (SHARES + BLOCK_SIZE - 1) / BLOCK_SIZE;
constexpr int KEPT_SHARES = THREAD_SHARES > 8 ? 1 : THREAD_SHARES;  // in registers, of a thread
constexpr int STAGED_BYTES = 0;
constexpr int LDS_BYTES = STAGED_BYTES + BLOCK_SIZE / WAVE * 4 + BLOCK_SIZE / WAVE * 4;  // shared memory of a block
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

// A loop of few rounds would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

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

// The largest of all threads of the block, in each of them.
DEVICE float block_largest(float value) {
    SHARED float largest[BLOCK_SIZE / WAVE];
    UNROLL for (int mask = WAVE / 2; mask > 0; mask /= 2) {
        const float other = shuffle_xor(value, mask);
        if (other > value) value = other;
    }
    if (lane_index() == 0) largest[wave_index()] = value;
    block_barrier();
    UNROLL for (int i = 0; i < BLOCK_SIZE / WAVE; ++i)
        if (largest[i] > value) value = largest[i];
    return value;
}

// Four neighbouring floats at any float's address: one load where they are aligned.
DEVICE f32x4 load_four(const float* at) {
    if ((u64)at % 16 == 0) return *(const f32x4*)at;
    return f32x4{at[0], at[1], at[2], at[3]};
}

struct Arguments {
    const float* x;
    u16* x_terms;
    float* x_scales;
    i64 m;
};

// One block per row: what is known before the products.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    const i64 row = block_of_rows();
    if (row >= m) return;

    // x in f16, which has 11 bits, relative to the largest: that becomes 2^14 and errs by nothing.
    // An f16 is a multiple of 2^-24. A row is rough for Inf and NaN, and where more than a sixteenth of what
    // is not 0 is so small that this step loses more than the precision allows: columns may have zeros
    // where the few huge ones are. A thread takes eight x at a time, those of a lane of the matrix units.
    const auto load_share = [&](int share, float (&x)[8]) {
        const bool is_inside = THREAD_SHARES * BLOCK_SIZE * 8 == K || share < K / 8;  // x beyond K is 0
        UNROLL for (int half = 0; half < 2; ++half) {
            const int column = is_inside ? share / 4 * 32 + half * 16 + share % 4 * 4 : 0;
            const f32x4 v0_four = load_four(&a.x[row * 512 + column]);
            UNROLL for (int i = 0; i < 4; ++i) {
                const float v0 = v0_four[i];
                x[half * 4 + i] = is_inside ? v0 : 0.0f;
            }
        }
    };
    float shares[KEPT_SHARES][8];
    float size = 0.0f, largest = 0.0f;
    UNROLL for (int i = 0; i < THREAD_SHARES; ++i) {
        const int share = thread_index() + i * BLOCK_SIZE;
        float (&x)[8] = shares[i % KEPT_SHARES];
        load_share(share, x);
        UNROLL for (int j = 0; j < 8; ++j) {
            size += abs_f32(x[j]);
            if (abs_f32(x[j]) > largest) largest = abs_f32(x[j]);
        }
    }
    size = block_sum(size);
    largest = block_largest(largest);
    const bool suits = size <= 0x1p+120f && largest >= 0x1p-80f;
    const float scale = suits ? largest * 0x1p-5f : 0.0f;  // 2^9 more: quants come times 2^-9
    const float inverse = suits ? 0x1p+14f / largest : 0.0f;
    float some = 0.0f, small = 0.0f;  // elements that are not 0, and those that lose too much
    UNROLL for (int i = 0; i < THREAD_SHARES; ++i) {
        const int share = thread_index() + i * BLOCK_SIZE;
        float (&x)[8] = shares[i % KEPT_SHARES];
        if (KEPT_SHARES < THREAD_SHARES) load_share(share, x);
        UNROLL for (int j = 0; j < 8; ++j) {
            const bool is_some = x[j] != 0.0f;
            x[j] = suits ? x[j] * inverse : 0.0f;
            if (is_some) some += 1.0f;
            if (is_some && abs_f32(x[j]) < LEAST) small += 1.0f;
        }
        if (share >= SHARES) continue;
        UNROLL for (int term = 0; term < TERMS; ++term) {
            u32x4 halves;
            UNROLL for (int i = 0; i < 4; ++i) {
                float &first = x[i / 2 * 4 + i % 2], &second = x[i / 2 * 4 + i % 2 + 2];  // in the order of a weight's
                halves[i] = to_halves(first, second);
                first -= half_to_f32((u16)halves[i]);
                second -= half_to_f32((u16)(halves[i] >> 16));
            }
            // the rows of an instruction stand beside each other, so that its x is one run of memory
            const i64 unit = (row / TILE_ROWS * UNITS + share / 4) * TERMS + term;
            ((u32x4*)a.x_terms)[(unit * TILE_ROWS + row % TILE_ROWS) * 4 + share % 4] = halves;
        }
    }
    some = block_sum(some);
    small = block_sum(small);
    const bool rough = size != 0.0f && !(suits && 16.0f * small <= some);
    if (thread_index() == 0) a.x_scales[row] = rough ? as_f32(0x7fc00000u) : scale;
}

KERNEL(BLOCK_SIZE) void q4jit_gated_rows(
    const float* __restrict__ x,
    u16* __restrict__ x_terms,
    float* __restrict__ x_scales,
    i64 m) {
    compute(Arguments{x, x_terms, x_scales, m});
}
