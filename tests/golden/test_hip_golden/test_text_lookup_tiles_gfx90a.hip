// lookup for hip:gfx90a, lookup in tiles16, 256 threads, made by q4jit
// output0 = table.rows(ids)

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int PANEL = 16;  // columns whose quads are stored together
constexpr int QUAD_UNITS = 4;  // units that are stored together
constexpr int K = 512;  // elements of a column
constexpr int N = 96;  // columns
constexpr int LDS_BYTES = 0;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q5_K [512, 96] in the layout `tiles16`.
struct Q5_K_512x96 {
    static constexpr int QUADS = 4;  // ⌈512 / 256⌉ · 2, of a column
    static constexpr int QUANTS0_BYTES = 64;  // of a quad
    static constexpr i64 QUANTS1_AT = 24576;  // where its region begins
    static constexpr int QUANTS1_BYTES = 16;  // of a quad
    static constexpr i64 SCALES_AT = 30720;  // where its region begins
    static constexpr int SCALES_BYTES = 8;  // of a quad
    static constexpr i64 D_AT = 33792;  // where its region begins
    static constexpr int D_BYTES = 4;  // of a block

    // The number of a quad among all quads of the weight: those of a panel are stored together.
    DEVICE u32 quad_index(u32 column, int quad) { return (column / PANEL * QUADS + quad) * PANEL + column % PANEL; }
    // The number of a quad's block among all blocks of the weight.
    DEVICE u32 block_index(u32 quad) { return quad / (2 * PANEL) * PANEL + quad % PANEL; }

    // The scales of a quad.
    struct Part {
        u32 scales[2];
        u32 d[1];
    };

    DEVICE void load_8(const u8* from, u32 (&words)[2]) {
        const u64 both = *(const u64*)from;
        words[0] = (u32)both;
        words[1] = (u32)(both >> 32);
    }

    // What the numbers of unit u are multiplied by.
    DEVICE float scale(const Part& part, int u) {
        const u32 four = part.scales[0];
        return half_to_f32((u16)part.d[0]) * byte_minus(four, u, 0.0f);
    }
    // What is added to the elements of unit u.
    DEVICE float minimum(const Part& part, int u) {
        const float m = half_to_f32((u16)(part.d[0] >> 16));
        return -(m * byte_minus(part.scales[1], u, 0.0f));
    }

    // A single value, rounded as the reference rounds.
    DEVICE float value(const u8* w, i64 column, int k) {
        const i64 quad = quad_index((u32)column, k / (QUAD_UNITS * UNIT));
        const int u = k / UNIT % QUAD_UNITS, upper = k / (UNIT / 2) % 2, part_of_unit = k / 4 % 4, element = k % 4;
        const u8* const quants0 = w + quad * QUANTS0_BYTES + part_of_unit * 16;
        const int pair0 = element % 2;
        const u32 word0 = ((const u16*)quants0)[u / 1 * 2 + element / 2];
        u32 code = (word0 >> (pair0 % 1 * 4 + pair0 / 1 * 8 + 4 * upper) & 15u);
        const u8* const quants1 = w + QUANTS1_AT + quad * QUANTS1_BYTES + part_of_unit * 4;
        const int pair1 = 2 * (u % 4) + element % 2;
        const u32 word1 = ((const u16*)quants1)[u / 4 * 2 + element / 2];
        code |= (word1 >> (pair1 % 4 * 1 + pair1 / 4 * 8 + 4 * upper) & 1u) << 4;
        Part part;
        load_8(w + SCALES_AT + quad * SCALES_BYTES, part.scales);
        part.d[0] = *(const u32*)(w + D_AT + (i64)block_index((u32)quad) * D_BYTES);
        const float number = (float)code;
        return number * scale(part, u) + minimum(part, u);
    }
};

struct Arguments {
    const i64* ids;
    const u8* table;
    float* output0;
    i64 m;
};

// Rows of a GGUF tensor, which are columns of the weight, by number: neighbouring threads take
// neighbouring elements. A number that no row has gives NaN, and nothing outside of the weight is read.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    using W = Q5_K_512x96;
    const i64 row = block_of_rows();
    if (row >= m) return;
    const i64 id = a.ids[row];
    const bool is_known = id >= 0 && id < N;
    constexpr u32 NAN_BITS = 0x7fc00000u;
    for (int i = 0; i < UNIT; ++i) {
        const int k = (block_x() * UNIT + i) * BLOCK_SIZE + thread_index();
        if (k >= K) return;
        const float value = W::value(a.table, is_known ? id : 0, k);
        a.output0[row * K + k] = is_known ? value : as_f32(NAN_BITS);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_lookup(
    const i64* __restrict__ ids,
    const u8* __restrict__ table,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{ids, table, output0, m});
}
