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

// 16 bytes that are aligned to 2, as those of GGUF's blocks are.
DEVICE u32x4 load_16_by_2(const u8* at) {
    const u16* halves = (const u16*)at;
    u32x4 words;
    UNROLL for (int i = 0; i < 4; ++i) words[i] = halves[2 * i] | (u32)halves[2 * i + 1] << 16;
    return words;
}

// Q5_K [512, 96] in the layout `gguf`: rows as in a GGUF file.
struct Q5_K_512x96 {
    static constexpr int BLOCKS = 2;  // 512 / 256, of a column
    static constexpr int BLOCK_UNITS = 8;  // 256 / UNIT
    static constexpr int BLOCK_BYTES = 176;
    static constexpr i64 M_AT = 2;  // where it begins in a block
    static constexpr i64 SCALES_AT = 4;  // where it begins in a block
    static constexpr i64 QUANTS0_AT = 48;  // where it begins in a block
    static constexpr i64 QUANTS1_AT = 16;  // where it begins in a block

    // The integers of sub-block j of a block.
    DEVICE i32 sub_scale(const u8* scales, int j) {
        return (scales[j % 4 + j / 4 * 8] & 15) | (scales[j % 4] >> (4 + j / 4 * 2) & 3) << 4;
    }
    DEVICE i32 sub_minimum(const u8* scales, int j) {
        return (scales[4 + j % 4 + j / 4 * 4] >> (j / 4 * 4) & 15) | (scales[4 + j % 4] >> (4 + j / 4 * 2) & 3) << 4;
    }

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[4];
        u16 d;
        u16 m;
        i8 scales;
        i8 minima;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const int element = unit % BLOCK_UNITS * UNIT;  // the unit's first one, in the block
        Stored stored;
        // 64 elements share 32 bytes.
        const u8* const quants0 = w + QUANTS0_AT + block * BLOCK_BYTES + element / 64 * 32 + element % 32;
        UNROLL for (int i = 0; i < 2; ++i) stored.words[i] = load_16_by_2(quants0 + 16 * i);
        // 256 elements share 32 bytes.
        const u8* const quants1 = w + QUANTS1_AT + block * BLOCK_BYTES + element % 32;
        UNROLL for (int i = 0; i < 2; ++i) stored.words[2 + i] = load_16_by_2(quants1 + 16 * i);
        stored.d = *(const u16*)(w + block * BLOCK_BYTES);
        stored.m = *(const u16*)(w + M_AT + block * BLOCK_BYTES);
        stored.scales = (i8)sub_scale(w + SCALES_AT + block * BLOCK_BYTES, unit % BLOCK_UNITS);
        stored.minima = (i8)sub_minimum(w + SCALES_AT + block * BLOCK_BYTES, unit % BLOCK_UNITS);
        return stored;
    }

    // The quants of a unit, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[UNIT / 4]) {
        const int element = unit % BLOCK_UNITS * UNIT;  // the unit's first one, in the block
        // The low 4 bits: a byte has those of 2 elements, which are 32 apart.
        const int shift0 = 4 * (element % 64 / 32);
        UNROLL for (int i = 0; i < 8; ++i)
            q[i] = stored.words[i / 4][i % 4] >> shift0 & 0x0f0f0f0fu;
        // The next 1 bit: a byte has those of 8 elements, which are 32 apart.
        const int shift1 = (element % 256 / 32);
        UNROLL for (int i = 0; i < 8; ++i)
            q[i] |= (stored.words[2 + i / 4][i % 4] >> shift1 & 0x01010101u) << 4;
    }

    // Quant i of a unit as a number, 0 for the value 0.
    DEVICE float centred(const u32 (&q)[UNIT / 4], int i) { return byte_minus(q[i / 4], i % 4, 0.0f); }

    // What the elements of a unit are multiplied by.
    DEVICE float scale(const Stored& stored) { return half_to_f32(stored.d) * (float)stored.scales; }

    // What is added to all 32 elements of a unit.
    DEVICE float minimum(const Stored& stored) { return -(half_to_f32(stored.m) * (float)stored.minima); }

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
    float* output0;
    i64 m;
};

// The whole weight as floats, [K, N]: a thread decodes one unit. Neighbouring threads take neighbouring
// columns, whose values are adjacent in the result.
DEVICE void compute(const Arguments& a) {
    using W = Q5_K_512x96;
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
