// product_rows for hip:sm_90, rows, M = 1, made by q4jit
// rows:
//   x_value = x

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;  // elements of a row
constexpr int UNIT = 32;  // elements that share a scale
constexpr int UNITS = 16;  // K / UNIT
constexpr int LDS_BYTES = 32;  // shared memory of a block
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

struct Arguments {
    const float* x;
    u32* x_quants;
    float* x_scales;
    i16* x_sums;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.x = known_from_here(a.x);
    a.x_quants = known_from_here(a.x_quants);
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

    // --- x in int8: each unit relative to its largest element ---
    // A row is rough, and its scales are NaN, if int8 may err by more than 2e-2. The squares of all errors
    // are compared with those of the usual elements alone, because a column may have zeros where the few
    // huge elements are. Too large, too small, Inf and NaN make the error NaN.
    constexpr u32 NAN_BITS = 0x7FC00000u;
    constexpr int LANE_ELEMENTS = 4;  // of a unit, which eight lanes share
    constexpr int UNIT_LANES = UNIT / LANE_ELEMENTS;
    constexpr int SUB_BLOCK = 16;  // elements of a sum in x_sums
    constexpr int SUB_BLOCK_LANES = SUB_BLOCK / LANE_ELEMENTS;
    constexpr i32 ONES = 0x01010101;
    float total = 0.0f;
    for (int column = thread_index(); column < K; column += BLOCK_SIZE) {
        const float x_element = a.x[column];
        total += abs_f32(x_element);
    }
    const float usual_size = block_sum(total) * (8.0f / K);  // eight times the mean
    float error = 0.0f, usual = 0.0f;
    for (int first = 0; first < K; first += LANE_ELEMENTS * BLOCK_SIZE) {
        const int k = first + LANE_ELEMENTS * thread_index();
        float x[LANE_ELEMENTS];
        float largest = 0.0f;
        UNROLL for (int i = 0; i < LANE_ELEMENTS; ++i) {
            const int column = k < K ? k + i : i;
            const float x_element = a.x[column];
            x[i] = x_element;
            if (abs_f32(x[i]) > largest) largest = abs_f32(x[i]);
        }
        UNROLL for (int mask = 1; mask < UNIT_LANES; mask *= 2) {
            const float other = shuffle_xor(largest, mask);
            if (other > largest) largest = other;
        }
        const float scale = largest / 127.0f;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        constexpr float WHOLE = 0x1.8p+23f;  // in a float of this size the lowest bit counts ones
        u32 quants = 0;
        float lost = 0.0f, kept = 0.0f;
        UNROLL for (int i = 0; i < LANE_ELEMENTS; ++i) {
            const float rounded = fma_f32(x[i], inverse, WHOLE);
            quants |= (as_u32(rounded) & 0xFF) << 8 * i;
            const float rest = fma_f32(WHOLE - rounded, scale, x[i]);
            lost = fma_f32(rest, rest, lost);
            if (abs_f32(x[i]) <= usual_size) kept = fma_f32(x[i], x[i], kept);
        }
        if (largest > 0x1p+50f || (largest > 0.0f && largest < 0x1p-50f)) lost = as_f32(NAN_BITS);
        float sum = (float)dot4((i32)quants, ONES, 0);
        UNROLL for (int mask = 1; mask < SUB_BLOCK_LANES; mask *= 2) sum += shuffle_xor(sum, mask);
        if (k >= K) continue;
        error += lost;
        usual += kept;
        a.x_quants[(row * K + k) / LANE_ELEMENTS] = quants;
        if (k % SUB_BLOCK == 0) a.x_sums[(row * K + k) / SUB_BLOCK] = (i16)sum;
        if (k % UNIT == 0) a.x_scales[(row * K + k) / UNIT] = scale;
    }
    error = block_sum(error);
    usual = block_sum(usual);
    if (!(error <= 2e-4f * usual)) {
        for (int unit = thread_index(); unit < UNITS; unit += BLOCK_SIZE)
            a.x_scales[row * UNITS + unit] = as_f32(NAN_BITS);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_product_rows(
    const float* __restrict__ x,
    u32* __restrict__ x_quants,
    float* __restrict__ x_scales,
    i16* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, x_quants, x_scales, x_sums, m});
}
