// product_rows for hip:sm_90, rows, 1 row a tile, 512 threads, made by q4jit
// rows:
//   x_value = x

constexpr int BLOCK_SIZE = 512;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int TERMS = 2;  // f16 numbers whose sum is x
constexpr float LEAST = 0x1p-6f;  // scaled x below this is small: two terms err by 2^-25
constexpr int K = 512;  // elements of a row
constexpr int UNIT_QUARTERS = 4;
constexpr int QUARTER = 8;  // elements that a thread splits at a time
constexpr int UNITS = 16;  // of a row, in whole quads: beyond K they are 0
constexpr int QUARTERS = 64;  // UNITS · UNIT_QUARTERS
constexpr int THREAD_QUARTERS = 1;  // ⌈QUARTERS / BLOCK_SIZE⌉, of a thread
constexpr int TILE_ROWS = 8;  // of x, in one matrix instruction
constexpr int LDS_BYTES = 128;  // shared memory of a block
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

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

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
    float* x_sums;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.x_terms = known_from_here(a.x_terms);
    a.x_scales = known_from_here(a.x_scales);
    a.x_sums = known_from_here(a.x_sums);
    start_next_grid();
}

// One block per row: what the products need of it.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    const i64 row = block_of_rows();
    if (row >= m) return;

    // --- x in f16 terms of 11 bits, relative to a power of two: the largest becomes less than 2^15 ---
    // A row is rough if it has Inf or NaN, or if more than a sixteenth of its nonzero elements are so small that
    // f16, a multiple of 2^-24, loses more than allowed: columns may have zeros where the few huge ones are.
    constexpr u32 NAN_BITS = 0x7FC00000u;
    // Load eight elements that a lane of the matrix units multiplies; beyond K they are 0.
    const auto load_quarter = [&](int quarter, float (&x)[QUARTER]) {
        const bool in_range = quarter < K / QUARTER;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int column = in_range ? quarter * QUARTER + half * 4 : 0;
            const f32x4 x_element_four = load_four(&a.x[row * 512 + column]);
            UNROLL for (int i = 0; i < 4; ++i) {
                const float x_element = x_element_four[i];
                x[half * 4 + i] = in_range ? x_element : 0.0f;
            }
        }
        // wgmma takes 16 bytes of a row as eight k of one instruction: elements 0, 2, … 14 or 1, 3, … 15 of
        // half a unit. So two lanes swap four of their elements.
        const bool is_odd = quarter % 2;
        float own[4], other[4];
        UNROLL for (int i = 0; i < 4; ++i) {
            own[i] = is_odd ? x[2 * i + 1] : x[2 * i];
            other[i] = shuffle_xor(is_odd ? x[2 * i] : x[2 * i + 1], 1);
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            x[i] = is_odd ? other[i] : own[i];
            x[4 + i] = is_odd ? own[i] : other[i];
        }
    };
    float quarters[THREAD_QUARTERS][QUARTER];
    float total = 0.0f, largest = 0.0f;
    UNROLL for (int i = 0; i < THREAD_QUARTERS; ++i) {
        load_quarter(thread_index() + i * BLOCK_SIZE, quarters[i]);
        UNROLL for (int j = 0; j < QUARTER; ++j) {
            total += abs_f32(quarters[i][j]);
            if (abs_f32(quarters[i][j]) > largest) largest = abs_f32(quarters[i][j]);
        }
    }
    total = block_sum(total);
    largest = block_largest(largest);

    // --- the scale of the row, times 2^9: quants come times 2^-9 ---
    const bool in_range = total <= 0x1p+120f && largest >= 0x1p-80f;
    constexpr u32 EXPONENT_BITS = 0x7F800000u, EXPONENT_1 = 1u << 23;  // of a float, biased by 127
    const u32 exponent = as_u32(largest) & EXPONENT_BITS;
    const float scale = in_range ? as_f32(exponent - 5 * EXPONENT_1) : 0.0f;  // 2^9 · 2^-14 times the power of two
    const float inverse = in_range ? as_f32((2 * 127 + 14) * EXPONENT_1 - exponent) : 0.0f;

    // --- split into terms, and count the elements that lose too much ---
    float nonzero = 0.0f, small = 0.0f;  // elements that are not 0, and the small ones of them
    UNROLL for (int i = 0; i < THREAD_QUARTERS; ++i) {
        const int quarter = thread_index() + i * BLOCK_SIZE;
        float (&x)[QUARTER] = quarters[i];
        UNROLL for (int j = 0; j < QUARTER; ++j) {
            const bool is_nonzero = x[j] != 0.0f;
            x[j] = in_range ? x[j] * inverse : 0.0f;
            if (is_nonzero) nonzero += 1.0f;
            if (is_nonzero && abs_f32(x[j]) < LEAST) small += 1.0f;
        }
        // The sums of both halves of a unit, which four threads share.
        float sums[2];
        UNROLL for (int half = 0; half < 2; ++half)
            sums[half] = x[4 * half] + x[4 * half + 1] + x[4 * half + 2] + x[4 * half + 3];
        sums[0] += sums[1];  // a thread has elements of one half
        sums[0] += shuffle_xor(sums[0], 1);
        sums[1] = shuffle_xor(sums[0], 2);
        if (quarter % UNIT_QUARTERS == 0 && quarter < QUARTERS)
            UNROLL for (int i = 0; i < 2; ++i)
                a.x_sums[((row / TILE_ROWS * UNITS + quarter / UNIT_QUARTERS) * 2 + i) * TILE_ROWS +
                         row % TILE_ROWS] = sums[i] * 0x1p-9f;  // quants come times 2^-9
        if (quarter >= QUARTERS) continue;
        UNROLL for (int term = 0; term < TERMS; ++term) {
            u32x4 halves;
            UNROLL for (int i = 0; i < 4; ++i) {
                float &first = x[2 * i], &second = x[2 * i + 1];
                halves[i] = to_halves(first, second);
                first -= half_to_f32((u16)halves[i]);
                second -= half_to_f32((u16)(halves[i] >> 16));
            }
            // An instruction's rows are adjacent, so that their x is one run of memory.
            const i64 unit = (row / TILE_ROWS * UNITS + quarter / UNIT_QUARTERS) * TERMS + term;
            // Four lanes write 64 bytes of a row, swizzled as wgmma reads them: no bank conflicts.
            const int at = quarter % UNIT_QUARTERS ^ row / 2 % UNIT_QUARTERS;
            ((u32x4*)a.x_terms)[(unit * TILE_ROWS + row % TILE_ROWS) * UNIT_QUARTERS + at] = halves;
        }
    }
    nonzero = block_sum(nonzero);
    small = block_sum(small);
    const bool rough = total != 0.0f && !(in_range && 16.0f * small <= nonzero);
    if (thread_index() == 0) a.x_scales[row] = rough ? as_f32(NAN_BITS) : scale;
}

KERNEL(BLOCK_SIZE) void q4jit_product_rows(
    const float* __restrict__ x,
    u16* __restrict__ x_terms,
    float* __restrict__ x_scales,
    float* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, x_terms, x_scales, x_sums, m});
}
