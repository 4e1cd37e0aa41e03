// transposed_norm for hip:gfx90a, add_splits, 1 row a tile, 256 threads, made by q4jit
// rows:
// 512 columns, add_splits:
//   w_product = x_value @ w.T    Q4_1 [512, 96]
//   output0 = w_product + r

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int WIDTH = 512;  // columns of the result
constexpr int COLUMNS = 32;  // of a block
constexpr int GROUPS = 8;  // BLOCK_SIZE / COLUMNS: threads that share a column
constexpr int SPLITS = 3;  // sums of each result
static_assert(BLOCK_SIZE % COLUMNS == 0, "every column has the same number of threads");
constexpr int LDS_BYTES = 1024;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Add to a total, and what rounding takes from it to `lost` (Knuth's TwoSum).
DEVICE void add_long(float& total, float& lost, float part) {
    const float sum = total + part;
    const float added = sum - total;
    lost += (total - (sum - added)) + (part - added);
    total = sum;
}

// A total with what it lost; where it is infinite that is Inf − Inf.
DEVICE float long_sum(float total, float lost) {
    return abs_f32(lost) < as_f32(0x7F800000u) ? total + lost : total;
}

struct Arguments {
    const float* r;
    float* output0;
    const float* split_sums;
    i64 m;
};

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    const float r_element = a.r[row * 512 + column];
    const float sum1 = w_product + r_element;
    a.output0[row * 512 + column] = sum1;
}

// A block adds up the sums of COLUMNS results of a row, always in the same order. A thread takes every GROUPS-th
// of them, and one thread of each column adds up those of the threads.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float group_sums[BLOCK_SIZE];
    const int thread = thread_index();
    const int group = thread / COLUMNS;
    const int column = block_x() * COLUMNS + thread % COLUMNS;
    const i64 row = block_of_rows();
    if (row >= m) return;

    float w_product = 0.0f;
    {
        float lost = 0.0f;
        if (column < WIDTH) {
            _Pragma("unroll 4")
            for (int split = group; split < SPLITS; split += GROUPS)
                add_long(w_product, lost, a.split_sums[(split * m + row) * WIDTH + column]);
        }
        block_barrier();  // the sums before may still be read
        group_sums[thread] = long_sum(w_product, lost);
        block_barrier();
        w_product = lost = 0.0f;
        for (int i = thread % COLUMNS; i < BLOCK_SIZE; i += COLUMNS) add_long(w_product, lost, group_sums[i]);
        w_product = long_sum(w_product, lost);
    }

    if (group == 0 && column < WIDTH) epilogue(a, row, column, w_product);
}

KERNEL(BLOCK_SIZE) void q4jit_transposed_norm(
    const float* __restrict__ r,
    float* __restrict__ output0,
    const float* __restrict__ split_sums,
    i64 m) {
    compute(Arguments{r, output0, split_sums, m});
}
