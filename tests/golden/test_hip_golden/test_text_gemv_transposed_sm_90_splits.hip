// transposed_splits for hip:sm_90, gemv_transposed, M = 1, made by q4jit
// rows:
//   x_value = y
// 512 columns, gemv_transposed:
//   w_product = x_value @ w.T    Q4_0 [512, 96]

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column of w that are decoded together
constexpr int PANEL = 16;  // columns of w whose quads are stored together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int QUAD = 128;  // QUAD_UNITS · UNIT, elements
constexpr int LANE_QUARTERS = 1;  // words of 16 bytes that a lane has of the four of a quad
DEVICE int lane_part() { return lane_index() % 4; }
constexpr int N = 96;  // columns of w, which the products sum over
constexpr int WIDTH = 512;  // columns of the result
constexpr int WAVES = 8;  // BLOCK_SIZE / WAVE
constexpr int COLUMNS = 1024;  // WAVE · UNIT, of the result in a block
constexpr int TILES = 1;  // blocks that divide the results
constexpr int STAGE_COLUMNS = 256;  // BLOCK_SIZE: of x, in shared memory at a time
constexpr int SPLIT_COLUMNS = 96;  // N / 1 splits, in whole turns of the waves
static_assert(STAGE_COLUMNS % (WAVES) == 0, "a stage is whole turns of the waves");
constexpr int ROUND = 8;  // sums of each thread that the waves add up at a time
constexpr int ROUND_STRIDE = 260;  // BLOCK_SIZE + 4: sums of a lane meet different banks
constexpr int LDS_BYTES = 10372;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q4_0 [512, 96] in the layout `tiles16`.
struct Q4_0_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 128⌉, of a column
    static constexpr int QUAD_BYTES = 64;  // QUAD_UNITS · UNIT / 2, of quants
    static constexpr int QUAD_SCALES_BYTES = 8;  // QUAD_UNITS · 2
    static constexpr i64 D_AT = 24576;  // where its region begins

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }

    // What a lane has of a quad: words[i][u] is word lane_part() * LANE_QUARTERS + i of unit u. Word j of a unit has
    // elements 4 j…4 j + 3 in its low nibbles and 16 + 4 j…16 + 4 j + 3 in its high ones.
    struct Part {
        u32x4 words[LANE_QUARTERS];
        u32 d[2];  // the scales of the four units, as f16
    };

    // quad: its number among all quads of the weight.
    DEVICE Part load_part(const u8* w, u32 quad) {
        Part part;
        const u8* const words = w + quad * QUAD_BYTES + lane_part() * LANE_QUARTERS * 16;
        UNROLL for (int i = 0; i < LANE_QUARTERS; ++i) part.words[i] = stream_16(words + i * 16);
        const u64 d = *(const u64*)(w + D_AT + quad * QUAD_SCALES_BYTES);
        part.d[0] = (u32)d;
        part.d[1] = (u32)(d >> 32);
        return part;
    }

    // The scale of unit u.
    DEVICE float scale(const Part& part, int u) { return half_to_f32((u16)(part.d[u / 2] >> (16 * (u % 2)))); }

    // The quants of a part of a quad, four to a word: of each unit those in low nibbles, then those in high ones.
    DEVICE void quants(const Part& part, u32 (&q)[UNIT / 4]) {
        constexpr u32 NIBBLES = 0x0F0F0F0Fu;
        UNROLL for (int u = 0; u < QUAD_UNITS; ++u) {
            q[2 * u] = part.words[0][u] & NIBBLES;
            q[2 * u + 1] = part.words[0][u] >> 4 & NIBBLES;
        }
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 8.0f); }
};

struct Arguments {
    const float* y;
    const u8* w;
    float* split_sums;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.y = known_from_here(a.y);
    a.split_sums = known_from_here(a.split_sums);
    start_next_grid();
}

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float y_element = a.y[column];
    return y_element;
}

// Whether x times a scale times a quant is as exact as x times the decoded weight: no product is a denormal or too
// large. A scale is from 2^-24 to 2^23, if it is not 0. What does not suit is *rough*.
DEVICE bool suits_scales(float x) { return x == 0.0f || (abs_f32(x) >= 0x1p-80f && abs_f32(x) <= 0x1p+80f); }

// A block computes a part of the sums over N for a row and the elements of WAVE / 4 quads. A lane has a quarter of
// a quad in each column, and keeps a sum for each of its elements. Waves take columns in turns.
// Then the waves add up their sums, and `add_splits` adds those of the blocks.
DEVICE void compute(Arguments a) {
    const i64 m = a.m;
    SHARED float x_tile[STAGE_COLUMNS];
    SHARED float rough_tile[STAGE_COLUMNS];
    SHARED int rough_stage;  // the last one with rough elements
    SHARED float round_sums[ROUND * ROUND_STRIDE];
    const int thread = thread_index();
    const int tile = block_x() % TILES;
    const int split = block_x() / TILES;
    const int begin = split * SPLIT_COLUMNS;
    const int end = begin + SPLIT_COLUMNS < N ? begin + SPLIT_COLUMNS : N;
    const i64 row0 = block_of_rows();

    {
        using W = Q4_0_512x96;
        const int first_k = tile * COLUMNS;  // of w, and of the block
        const int own_quad = first_k / QUAD + lane_index() / 4;
        const int quad = own_quad < W::QUADS ? own_quad : W::QUADS - 1;

        // --- load ahead: the first column of the wave ---
        W::Part w_ahead;
        const int column = begin + wave_index();
        const int load_column = column < end ? column : end - 1;
        w_ahead = W::load_part(a.w, W::quad_index(load_column, quad));
        await_kernels_before(a);
        float sums[UNIT] = {};
        if (thread == 0) rough_stage = -1;
        ROLLED for (int first = begin; first < end; first += STAGE_COLUMNS) {
            // --- stage x ---
            block_barrier();  // the x before may still be read
            const int staged = first + thread;
            const float x = staged < end ? x_value(a, row0 < m ? row0 : m - 1, staged) : 0.0f;
            const bool suits = suits_scales(x);
            x_tile[thread] = suits ? x : 0.0f;
            rough_tile[thread] = suits ? 0.0f : x;
            if (!suits) rough_stage = first;
            block_barrier();

            // --- multiply ---
            const int stage_end = first + STAGE_COLUMNS < end ? first + STAGE_COLUMNS : end;
            ROLLED for (int column = first + wave_index(); column < stage_end; column += WAVES) {
                const int next = column + WAVES < end ? column + WAVES : column;
                u32 q[UNIT / 4];
                W::quants(w_ahead, q);
                float scales[4];  // of the units
                UNROLL for (int j = 0; j < 4; ++j) scales[j] = W::scale(w_ahead, j);
                w_ahead = W::load_part(a.w, W::quad_index(next, quad));
                float scaled[4];
                const float x = x_tile[column - first];
                UNROLL for (int j = 0; j < 4; ++j) scaled[j] = x * scales[j];
                UNROLL for (int j = 0; j < UNIT; ++j) {
                    const float quant = W::centred(q, j);
                    sums[j] = fma_f32(scaled[j / 8], quant, sums[j]);
                }
            }
            if (rough_stage == first)
                ROLLED for (int column = first + wave_index(); column < stage_end; column += WAVES) {
                    const float rough = rough_tile[column - first];
                    if (rough == 0.0f) continue;
                    const W::Part stored = W::load_part(a.w, W::quad_index(column, quad));
                    u32 q[UNIT / 4];
                    W::quants(stored, q);
                    float scales[4];  // of the units
                    UNROLL for (int j = 0; j < 4; ++j) scales[j] = W::scale(stored, j);
                    UNROLL for (int j = 0; j < UNIT; ++j) {
                        const float w = W::centred(q, j) * scales[j / 8];
                        sums[j] = fma_f32(rough, w, sums[j]);
                    }
                }
        }

        // --- add up the sums of the waves, a round at a time ---
        UNROLL for (int round = 0; round < UNIT / ROUND; ++round) {
            block_barrier();  // the sums before may still be read
            UNROLL for (int j = 0; j < ROUND; ++j)
                round_sums[j * ROUND_STRIDE + thread] = sums[round * ROUND + j];
            block_barrier();
            const int o = thread;
            // A round is one unit of each quad. Its part p has elements 4 p…4 p + 3 and 16 + 4 p…16 + 4 p + 3.
            const int k = o % UNIT;
            const int owner = o / UNIT * 4 + k % 16 / 4;
            const int own_sum = k / 16 * 4 + k % 4;
            const int column = first_k + o / UNIT * QUAD + round * UNIT + k;
            float total = 0.0f;
            UNROLL for (int wave = 0; wave < WAVES; ++wave)
                total += round_sums[own_sum * ROUND_STRIDE + wave * WAVE + owner];
            const i64 row = row0;
            if (column >= 0 && column < WIDTH && row < m)
                a.split_sums[(split * m + row) * WIDTH + column] = total;
        }
    }
}

KERNEL(BLOCK_SIZE) void q4jit_transposed_splits(
    const float* __restrict__ y,
    const u8* __restrict__ w,
    float* __restrict__ split_sums,
    i64 m) {
    compute(Arguments{y, w, split_sums, m});
}
