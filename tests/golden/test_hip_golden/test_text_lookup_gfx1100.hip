// lookup for hip:gfx1100, lookup, 1 row a tile, 256 threads, made by q4jit
// output0 = table.rows(ids)

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int STAGED_BYTES = 0;
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx1100 has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q8_0 [512, 96] in the layout `planar`.
struct Q8_0_512x96 {
    static constexpr int K = 512;
    static constexpr int N = 96;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr int BLOCK_ELEMENTS = 32;
    static constexpr int BLOCKS = K / BLOCK_ELEMENTS;  // of a column
    static constexpr int BLOCK_UNITS = BLOCK_ELEMENTS / 32;
    static_assert(K % BLOCK_ELEMENTS == 0, "columns are whole blocks");
    static constexpr float ZERO = 128.0f;  // the quant of the value 0
    static constexpr i64 QUANTS0_AT = 0;
    static constexpr int QUANTS0_STRIDE = 32;  // bytes from block to block
    static constexpr i64 D_AT = 49152;
    static constexpr int D_STRIDE = 2;  // bytes from block to block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[2];
        u16 d;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        Stored stored;
        {
            const u8* at = w + QUANTS0_AT + block * QUANTS0_STRIDE;
            UNROLL for (int i = 0; i < 2; ++i)
                stored.words[i] = stream_16(at + 16 * i);
        }
        stored.d = *(const u16*)(w + D_AT + block * D_STRIDE);
        return stored;
    }

    // 32 quants, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[8]) {
        UNROLL for (int i = 0; i < 8; ++i) q[i] = stored.words[0 + i / 4][i % 4];
        UNROLL for (int i = 0; i < 8; ++i) q[i] ^= 0x80808080u;  // signed bytes, counted from -128
    }

    // Quant i of a unit, 0 at the value 0 and counted from `zero`: a small whole number.
    DEVICE float centred(const u32 (&q)[8], int i, float zero = 0.0f) {
        return byte_minus(q[i / 4], i % 4, ZERO + zero);
    }

    // What the 32 elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int) {
        return half_to_f32(stored.d);
    }

    // 32 values, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[32]) {
        u32 q[8];
        quants(stored, unit, q);
        const float factor = scale(stored, 0);
        UNROLL for (int i = 0; i < 32; ++i) values[i] = centred(q, i) * factor;
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
    if (row >= m || unit >= W::UNITS) return;
    const i64 id = a.ids[row];
    const bool known = id >= 0 && id < W::N;
    float values[32];
    W::decode(W::load(a.table, known ? id : 0, unit), unit, values);
    UNROLL for (int i = 0; i < 32; ++i) {
        if (unit * 32 + i >= W::K) continue;
        a.output0[row * W::K + unit * 32 + i] = known ? values[i] : as_f32(0x7fc00000u);
    }
}

KERNEL(BLOCK_SIZE) void q4jit_lookup(
    const i64* __restrict__ ids,
    const u8* __restrict__ table,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{ids, table, output0, m});
}
