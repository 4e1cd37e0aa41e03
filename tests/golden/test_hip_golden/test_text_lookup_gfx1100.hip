// lookup for hip:gfx1100, lookup, 1 row a tile, 256 threads, made by q4jit
// output0 = table.rows(ids)

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int N = 96;  // columns
constexpr int LDS_BYTES = 0;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q8_0 [512, 96] in the layout `planar`.
struct Q8_0_512x96 {
    static constexpr int BLOCKS = 16;  // 512 / 32, of a column
    static constexpr int QUANTS0_BYTES = 32;  // of a block
    static constexpr i64 D_AT = 49152;  // where its region begins
    static constexpr int D_BYTES = 2;  // of a block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[2];
        u16 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit;
        Stored stored;
        const u8* const quants0 = w + block * QUANTS0_BYTES;
        UNROLL for (int i = 0; i < 2; ++i) stored.words[i] = stream_16(quants0 + 16 * i);
        stored.d = *(const u16*)(w + D_AT + block * D_BYTES);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int, u32 (&q)[UNIT / 4]) {
        UNROLL for (int i = 0; i < 8; ++i) q[i] = stored.words[i / 4][i % 4];
        UNROLL for (int i = 0; i < 8; ++i) q[i] ^= 0x80808080u;  // flips sign bits: bytes count from -128 now
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 128.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d); }

    // The values of a unit, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[UNIT]) {
        u32 q[UNIT / 4];
        quants(stored, unit, q);
        const float factor = scale(stored);
        UNROLL for (int i = 0; i < UNIT; ++i) values[i] = centred(q, i) * factor;
    }
};

struct Arguments {
    const i64* ids;
    const u8* table;
    float* output0;
    i64 m;
};

// Rows of a GGUF tensor, which are columns of the weight, by number: a thread decodes one unit. A
// number that no row has gives NaN, and nothing outside of the weight is read.
DEVICE void compute(const Arguments& a) {
    const i64 m = a.m;
    using W = Q8_0_512x96;
    const i64 row = block_of_rows();
    const int unit = block_x() * BLOCK_SIZE + thread_index();
    if (row >= m || unit >= UNITS) return;
    const i64 id = a.ids[row];
    const bool is_known = id >= 0 && id < N;
    float values[UNIT];
    W::decode(W::load(a.table, is_known ? id : 0, unit), unit, values);
    constexpr u32 NAN_BITS = 0x7fc00000u;
    UNROLL for (int i = 0; i < UNIT; ++i) {
        if (unit * UNIT + i >= K) continue;
        a.output0[row * K + unit * UNIT + i] = is_known ? values[i] : as_f32(NAN_BITS);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_lookup(
    const i64* __restrict__ ids,
    const u8* __restrict__ table,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{ids, table, output0, m});
}
