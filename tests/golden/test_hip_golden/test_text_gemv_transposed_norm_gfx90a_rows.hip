// transposed_norm_rows for hip:gfx90a, rows, 1 row a tile, 256 threads, made by q4jit
// rows:
//   x_values = y / sqrt(sum(y * y) / 96 + 1e-05) * gain

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int LDS_BYTES = 16;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

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
    const float* y;
    const float* gain;
    float* x_values;
    i64 m;
};

// One block per row: what the products need of it.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    const i64 row = block_of_rows();
    if (row >= m) return;
    float row_sum1 = 0.0f;
    for (int column = thread_index(); column < 96; column += BLOCK_SIZE) {
        const float y_element = a.y[row * 96 + column];
        const float product1 = y_element * y_element;
        row_sum1 += product1;
    }
    row_sum1 = block_sum(row_sum1);
    const float quotient1 = row_sum1 / 96.0f;
    const float sum1 = quotient1 + 1e-05f;
    const float root1 = sqrt_f32(sum1);
    for (int column = thread_index(); column < 96; column += BLOCK_SIZE) {
        const float y_element = a.y[row * 96 + column];
        const float gain_element = a.gain[column];
        const float quotient2 = y_element / root1;
        const float product2 = quotient2 * gain_element;
        a.x_values[row * 96 + column] = product2;
    }
}

KERNEL(BLOCK_SIZE) void q4jit_transposed_norm_rows(
    const float* __restrict__ y,
    const float* __restrict__ gain,
    float* __restrict__ x_values,
    i64 m) {
    compute(Arguments{y, gain, x_values, m});
}
