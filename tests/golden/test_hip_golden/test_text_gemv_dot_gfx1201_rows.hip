// residual_rows for hip:gfx1201, rows, 1 row a tile, 256 threads, made by q4jit
// rows:
//   x_value = x

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int K = 512;
constexpr int UNITS = K / 32;
static_assert(K % 32 == 0, "x is rounded 32 elements at a time");
constexpr int LDS_BYTES = 32;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1201 has 65536 bytes of shared memory for a block");

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

struct Arguments {
    const float* x;
    u32* x_quants;
    float* x_scales;
    i16* x_sums;
    i64 m;
};

// One block per row: what is known before the products.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    const i64 row = block_of_rows();
    if (row >= m) return;

    // x as int8, in each 32 elements relative to the largest of them. A row is rough, and the scales
    // of it are NaN, where that may err by more than 2e-2: the squares of all errors are compared
    // with those of the usual elements alone, because a column may have zeros where the few huge
    // ones are. Too large, too small, Inf and NaN make the error NaN.
    float size = 0.0f;
    for (int column = thread_index(); column < K; column += BLOCK_SIZE) {
        const float x_element = a.x[row * 512 + column];
        size += abs_f32(x_element);
    }
    const float usual_size = block_sum(size) * (8.0f / K);
    float error = 0.0f, usual = 0.0f;
    for (int first = 0; first < K; first += 4 * BLOCK_SIZE) {  // 8 lanes share 32 elements
        const int k = first + 4 * thread_index();
        float x[4];
        float largest = 0.0f;
        UNROLL for (int i = 0; i < 4; ++i) {
            const int column = k < K ? k + i : i;
            const float x_element = a.x[row * 512 + column];
            x[i] = x_element;
            if (abs_f32(x[i]) > largest) largest = abs_f32(x[i]);
        }
        UNROLL for (int mask = 1; mask < 8; mask *= 2) {
            const float other = shuffle_xor(largest, mask);
            if (other > largest) largest = other;
        }
        const float scale = largest / 127.0f;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        constexpr float WHOLE = 0x1.8p+23f;  // a float of this size has its ones in the lowest bit
        u32 quants = 0;
        float lost = 0.0f, kept = 0.0f;
        UNROLL for (int i = 0; i < 4; ++i) {
            const float rounded = fma_f32(x[i], inverse, WHOLE);
            quants |= (as_u32(rounded) & 0xFF) << 8 * i;
            const float rest = fma_f32(WHOLE - rounded, scale, x[i]);
            lost = fma_f32(rest, rest, lost);
            if (abs_f32(x[i]) <= usual_size) kept = fma_f32(x[i], x[i], kept);
        }
        if (largest > 0x1p+50f || (largest > 0.0f && largest < 0x1p-50f)) lost = as_f32(0x7fc00000u);
        float sum = (float)dot4((i32)quants, 0x01010101, 0);
        UNROLL for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
        if (k >= K) continue;
        error += lost;
        usual += kept;
        a.x_quants[(row * K + k) / 4] = quants;
        if (k % 16 == 0) a.x_sums[(row * K + k) / 16] = (i16)sum;
        if (k % 32 == 0) a.x_scales[(row * K + k) / 32] = scale;
    }
    error = block_sum(error);
    usual = block_sum(usual);
    if (!(error <= 2e-4f * usual)) {
        for (int unit = thread_index(); unit < UNITS; unit += BLOCK_SIZE)
            a.x_scales[row * UNITS + unit] = as_f32(0x7fc00000u);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_residual_rows(
    const float* __restrict__ x,
    u32* __restrict__ x_quants,
    float* __restrict__ x_scales,
    i16* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, x_quants, x_scales, x_sums, m});
}
