// values for hip:gfx90a, dequantize, the whole weight, made by q4jit
// output0 = w.dequantize()

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int UNIT = 32;  // elements of a column that are decoded together
constexpr int K = 512;  // elements of a column
constexpr int UNITS = 16;  // ⌈K / UNIT⌉, of a column
constexpr int N = 96;  // columns
constexpr int LDS_BYTES = 0;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

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
    const u8* w;
    float* output0;
    i64 m;
};

// The whole weight as floats, [K, N]: a thread decodes one unit. Neighbouring threads take neighbouring
// columns, whose values are adjacent in the result.
DEVICE void compute(const Arguments& a) {
    using W = Q6_K_512x96;
    const i64 index = (i64)block_x() * BLOCK_SIZE + thread_index();
    const i64 column = index % N;
    const int unit = (int)(index / N);
    if (unit >= UNITS) return;
    float values[UNIT];
    W::decode(W::load(a.w, column, unit), unit, values);
    UNROLL for (int i = 0; i < UNIT; ++i)
        if (unit * UNIT + i < K) a.output0[(i64)(unit * UNIT + i) * N + column] = values[i];
}

KERNEL(BLOCK_SIZE) void q4jit_values(
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{w, output0, m});
}
