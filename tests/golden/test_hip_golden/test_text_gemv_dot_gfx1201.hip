// residual for hip:gfx1201, gemv_dot, 4 rows a tile, 256 threads, made by q4jit
// rows:
//   x_value = x
// 96 columns, gemv_dot:
//   w_product = x_value @ w    Q6_K [512, 96]
//   output0 = r + w_product

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int UNITS = 16;  // ⌈512 / UNIT⌉, of a column
constexpr int WIDTH = 96;  // columns of the result
constexpr int ROWS = 4;  // of x, which share one decoding
constexpr int COLUMNS = 1;  // of the result, which share one reading of x
constexpr int LANES = 16;  // that share the units of a column: a group
constexpr int GROUPS = 16;  // BLOCK_SIZE / LANES, of a block
static_assert(ROWS * COLUMNS <= LANES, "every result of a group has a lane for its epilogue");
static_assert(WAVE % LANES == 0, "lanes of a group exchange sums inside their wave");
constexpr int LDS_BYTES = 0;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1201 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// The sum over neighbouring lanes, in all of them.
template <int LANES>
DEVICE float sum_of_lanes(float value) {
    UNROLL for (int mask = LANES / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// A loop with few turns would be unrolled whole, at the price of registers.
#define ROLLED _Pragma("unroll 1")

// Q6_K [512, 96] in the layout `planar`.
struct Q6_K_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int QUANTS0_BYTES = 16;  // of a unit
    static constexpr i64 QUANTS1_AT = 24576;  // where its region begins
    static constexpr int QUANTS1_BYTES = 8;  // of a unit
    static constexpr i64 SCALES_AT = 36864;  // where its region begins
    static constexpr int SCALES_BYTES = 2;  // of a unit
    static constexpr i64 D_AT = 39936;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[1];
        u64 quants1;
        u16 d;
        u16 scales;  // of its two sub-blocks, a byte each
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const i64 index = column * (BLOCKS * BLOCK_UNITS) + unit;
        Stored stored;
        const u8* const quants0 = w + index * QUANTS0_BYTES;
        stored.words[0] = stream_16(quants0);
        const u8* const quants1 = w + QUANTS1_AT + index * QUANTS1_BYTES;
        stored.quants1 = *(const u64*)(quants1);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        stored.scales = *(const u16*)(w + SCALES_AT + index * SCALES_BYTES);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const u32 word = stored.words[0][i];
            q[i] = word & 0x0f0f0f0fu;  // low nibbles: elements 0…15
            q[i + 4] = word >> 4 & 0x0f0f0f0fu;  // high nibbles: 16…31
        }
        // The next 2 bits: a byte has those of 4 elements, which are 8 apart.
        UNROLL for (int i = 0; i < 8; ++i)
            q[i] |= ((u32)(stored.quants1 >> (i % 2 * 32)) >> (i / 2 * 2) & 0x03030303u) << 4;
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 32.0f); }

    // What the 16 elements of sub-block `half` of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int half) {
        return half_to_f32(stored.d) * (float)(i8)(stored.scales >> (8 * half));
    }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        UNROLL for (int half = 0; half < 2; ++half) {
            const float factor = scale(stored, half);
            UNROLL for (int i = 16 * half; i < 16 * half + 16; ++i) values[i] = centred(q, i) * factor;
        }
    }
};

struct Arguments {
    const float* x;
    const u8* w;
    const float* r;
    float* output0;
    const u32* x_quants;
    const float* x_scales;
    const i16* x_sums;
    i64 m;
};

// x, after the prologue.
DEVICE float x_value(const Arguments& a, i64 row, int column) {
    const float x_element = a.x[row * 512 + column];
    return x_element;
}

// From the products at one row and column to the results.
DEVICE void epilogue(const Arguments& a, i64 row, int column, float w_product) {
    const float r_element = a.r[row * 96 + column];
    const float sum1 = r_element + w_product;
    a.output0[row * 96 + column] = sum1;
}

// The same product by multiply-add, for rows that int8 does not represent; LANES lanes share it.
DEVICE float exact_w(const Arguments& a, i64 row, int column, int lane) {
    using W = Q6_K_512x96;
    float sum = 0.0f;
    ROLLED for (int unit = lane; unit < UNITS; unit += LANES) {
        float w[UNIT];
        W::decode(W::load(a.w, column, unit), unit, w);
        UNROLL for (int i = 0; i < UNIT; ++i) sum = fma_f32(x_value(a, row, unit * UNIT + i), w[i], sum);
    }
    return sum_of_lanes<LANES>(sum);
}

// A group of lanes computes COLUMNS columns for ROWS rows: each lane takes every LANES-th unit of a
// column and multiplies its quants as bytes with those of x; no weight becomes a float.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    const int lane = thread_index() % LANES;
    const i64 row0 = block_of_rows() * ROWS;
    if (row0 >= m) return;
    const int last = m - row0 < ROWS ? (int)(m - row0) - 1 : ROWS - 1;  // row of the block
    const int column0 = (block_x() * GROUPS + thread_index() / LANES) * COLUMNS;

    float w_product = 0.0f;  // the result that this lane finishes
    {
        using W = Q6_K_512x96;
        // offsets from here fit 32 bits: half the scalar registers
        const u32x4* x_quants = (const u32x4*)a.x_quants + 2 * row0 * UNITS;
        const float* x_scales = a.x_scales + row0 * UNITS;
        const i16* x_sums = a.x_sums + 2 * row0 * UNITS;

        // --- multiply: each lane its units of the columns ---
        float sums[ROWS][COLUMNS] = {};
        ROLLED for (int unit = lane; unit < UNITS; unit += LANES) {
            UNROLL for (int c = 0; c < COLUMNS; ++c) {
                const int column = column0 + c < WIDTH ? column0 + c : WIDTH - 1;
                u32 q[UNIT / 4];
                const W::Stored stored = W::load(a.w, column, unit);
                W::quants(stored, unit, q);
                float scales[2];
                UNROLL for (int half = 0; half < 2; ++half) scales[half] = W::scale(stored, half);
                int at = unit;  // in the rows of x
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    const u32x4 x[2] = {x_quants[2 * at], x_quants[2 * at + 1]};
                    const float x_scale = x_scales[at];
                    const i32 x_sum[2] = {x_sums[2 * at], x_sums[2 * at + 1]};  // of each half
                    UNROLL for (int half = 0; half < 2; ++half) {
                        i32 dot = -32 * x_sum[half];
                        UNROLL for (int i = 0; i < 4; ++i) dot = dot4((i32)q[4 * half + i], (i32)x[half][i], dot);
                        sums[r][c] = fma_f32(scales[half] * x_scale, (float)dot, sums[r][c]);
                    }
                    settle(sums[r][c]);
                    if (r < last) at += UNITS;
                }
            }
        }

        // --- add up: one lane finishes each result of the group ---
        // A number that no other product has: masks of 16 lanes, kept for all products, are too many
        // for the scalar registers of a wave.
        float own_index = (float)lane;
        settle(own_index);
        UNROLL for (int i = 0; i < ROWS * COLUMNS; ++i) {
            const float total = sum_of_lanes<LANES>(sums[i / COLUMNS][i % COLUMNS]);
            if (own_index == (float)i) w_product = total;
        }

        // --- rough rows ---
        // Whether a row is rough is the same for the whole block: lanes below meet in shuffles.
        ROLLED for (int i = 0; i < ROWS * COLUMNS; ++i) {
            const int r = i / COLUMNS < last ? i / COLUMNS : last;
            const float x_scale = x_scales[r * UNITS];  // NaN, as all of a rough row
            if (x_scale == x_scale) continue;
            const int column = column0 + i % COLUMNS;
            const float total = exact_w(a, row0 + r, column < WIDTH ? column : WIDTH - 1, lane);
            if (own_index == (float)i) w_product = total;
        }
    }

    // --- epilogue ---
    const i64 row = row0 + lane / COLUMNS;
    const int column = column0 + lane % COLUMNS;
    if (lane < ROWS * COLUMNS && row < m && column < WIDTH)
        epilogue(a, row, column, w_product);
}

KERNEL(BLOCK_SIZE) void q4jit_residual(
    const float* __restrict__ x,
    const u8* __restrict__ w,
    const float* __restrict__ r,
    float* __restrict__ output0,
    const u32* __restrict__ x_quants,
    const float* __restrict__ x_scales,
    const i16* __restrict__ x_sums,
    i64 m) {
    compute(Arguments{x, w, r, output0, x_quants, x_scales, x_sums, m});
}
