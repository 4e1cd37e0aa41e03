// transposed_norm_splits for hip:gfx90a, gemv_transposed, 4 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x_values
// 512 columns, gemv_transposed:
//   w_product = x_value @ w.T    Q4_1 [512, 96]

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column of w that are decoded together
constexpr int N = 96;  // columns of w, which the products sum over
constexpr int WIDTH = 512;  // columns of the result
constexpr int WAVES = 4;  // BLOCK_SIZE / WAVE
constexpr int COLUMNS = 2048;  // WAVE · UNIT, of the result in a block
constexpr int TILES = 1;  // blocks that divide the results
constexpr int ROWS = 4;  // of x, which share one decoding
constexpr int AHEAD = 2;  // columns whose units a lane loads before their turn
constexpr int STAGE_COLUMNS = 256;  // BLOCK_SIZE: of x, in shared memory at a time
constexpr int SPLIT_COLUMNS = 32;  // N / 3 splits, in whole turns of the waves
static_assert(STAGE_COLUMNS % (WAVES * AHEAD) == 0, "a stage is whole turns of the waves");
constexpr int ROUND = 8;  // sums of each thread that the waves add up at a time
constexpr int ROUND_STRIDE = 260;  // BLOCK_SIZE + 4: sums of a lane meet different banks
constexpr int LDS_BYTES = 12416;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q4_1 [512, 96] in the layout `planar`.
struct Q4_1_512x96 {
    static constexpr int BLOCKS = 16;  // 512 / 32, of a column
    static constexpr int QUANTS0_BYTES = 16;  // of a block
    static constexpr i64 D_AT = 24576;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block
    static constexpr i64 M_AT = 27648;  // where its region begins
    static constexpr int M_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u16 d;
        u16 m;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + block * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * M_BYTES);
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

struct Arguments {
    const u8* w;
    const float* x_values;
    float* split_sums;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x_values[row * 96 + column];
    return x_element;
}

// A block computes a part of the sums over N for ROWS rows and the elements of WAVE units. A lane has one unit
// in each column, and keeps a sum for each of its elements. Waves take columns in turns.
// Then the waves add up their sums, and `add_splits` adds those of the blocks.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    SHARED float x_tile[ROWS * STAGE_COLUMNS];
    SHARED float round_sums[ROUND * ROUND_STRIDE];
    const int thread = thread_index();
    const int tile = block_x() % TILES;
    const int split = block_x() / TILES;
    const int begin = split * SPLIT_COLUMNS;
    const int end = begin + SPLIT_COLUMNS < N ? begin + SPLIT_COLUMNS : N;
    const i64 row0 = block_of_rows() * ROWS;

    {
        using W = Q4_1_512x96;
        const int first_k = tile * COLUMNS;  // of w, and of the block
        const int own_unit = first_k / UNIT + lane_index();
        const int unit = own_unit < 16 ? own_unit : 15;

        // --- load ahead: the first columns of the wave ---
        W::Stored w_ahead[AHEAD];
        UNROLL for (int i = 0; i < AHEAD; ++i) {
            const int column = begin + wave_index() + i * WAVES;
            const int load_column = column < end ? column : end - 1;
            w_ahead[i] = W::load(a.w, load_column, unit);
        }
        float sums[ROWS][UNIT] = {};
        ROLLED for (int first = begin; first < end; first += STAGE_COLUMNS) {
            // --- stage x ---
            block_barrier();  // the x before may still be read
            const int staged = first + thread;
            UNROLL for (int r = 0; r < ROWS; ++r) {
                const float x = staged < end ? x_value(a, row0 + r < m ? row0 + r : m - 1, staged) : 0.0f;
                x_tile[r * STAGE_COLUMNS + thread] = x;
            }
            block_barrier();

            // --- multiply ---
            const int stage_end = first + STAGE_COLUMNS < end ? first + STAGE_COLUMNS : end;
            ROLLED for (int turn = first + wave_index(); turn < stage_end; turn += WAVES * AHEAD) {
                UNROLL for (int i = 0; i < AHEAD; ++i) {
                    const int column = turn + i * WAVES;
                    if (column >= stage_end) break;
                    const int next = column + WAVES * AHEAD < end ? column + WAVES * AHEAD : column;
                    float w[UNIT];
                    W::decode(w_ahead[i], unit, w);
                    w_ahead[i] = W::load(a.w, next, unit);
                    UNROLL for (int j = 0; j < UNIT; ++j) {
                        UNROLL for (int r = 0; r < ROWS; ++r)
                            sums[r][j] = fma_f32(x_tile[r * STAGE_COLUMNS + column - first], w[j], sums[r][j]);
                    }
                }
            }
        }

        // --- add up the sums of the waves, a round at a time ---
        UNROLL for (int r = 0; r < ROWS; ++r) {
            UNROLL for (int round = 0; round < UNIT / ROUND; ++round) {
                block_barrier();  // the sums before may still be read
                UNROLL for (int j = 0; j < ROUND; ++j)
                    round_sums[j * ROUND_STRIDE + thread] = sums[r][round * ROUND + j];
                block_barrier();
                for (int o = thread; o < ROUND * WAVE; o += BLOCK_SIZE) {
                    const int owner = o / ROUND;
                    const int own_sum = o % ROUND;
                    const int column = first_k + owner * UNIT + round * ROUND + own_sum;
                    float total = 0.0f;
                    UNROLL for (int wave = 0; wave < WAVES; ++wave)
                        total += round_sums[own_sum * ROUND_STRIDE + wave * WAVE + owner];
                    const i64 row = row0 + r;
                    if (column >= 0 && column < WIDTH && row < m)
                        a.split_sums[(split * m + row) * WIDTH + column] = total;
                }
            }
        }
    }
}

KERNEL(BLOCK_SIZE) void q4jit_transposed_norm_splits(
    const u8* __restrict__ w,
    const float* __restrict__ x_values,
    float* __restrict__ split_sums,
    i64 m) {
    compute(Arguments{w, x_values, split_sums, m});
}
