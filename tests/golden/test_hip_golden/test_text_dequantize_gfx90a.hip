// values for hip:gfx90a, dequantize, the whole weight, made by q4jit
// output0 = w.dequantize()

constexpr int BLOCK_SIZE = 256;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int STAGED_BYTES = 0;
constexpr int LDS_BYTES = STAGED_BYTES;  // shared memory of a block
static_assert(LDS_BYTES <= 65536, "gfx90a has 65536 bytes of shared memory for a block");

constexpr int MAX_GRID_Y = 65535;
// Rows of blocks are counted on the y axis and, where its limit is reached, on the z axis.
DEVICE i64 block_of_rows() { return (i64)block_z() * MAX_GRID_Y + block_y(); }

// Q6_K [512, 96] in the layout `planar`.
struct Q6_K_512x96 {
    static constexpr int K = 512;
    static constexpr int N = 96;
    static constexpr int UNITS = (K + 31) / 32;  // of a column
    static constexpr int BLOCK_ELEMENTS = 256;
    static constexpr int BLOCKS = K / BLOCK_ELEMENTS;  // of a column
    static constexpr int BLOCK_UNITS = BLOCK_ELEMENTS / 32;
    static_assert(K % BLOCK_ELEMENTS == 0, "columns are whole blocks");
    static constexpr float ZERO = 32.0f;  // the quant of the value 0
    static constexpr i64 QUANTS0_AT = 0;
    static constexpr int QUANTS0_STRIDE = 128;  // bytes from block to block
    static constexpr i64 QUANTS1_AT = 24576;
    static constexpr int QUANTS1_STRIDE = 64;  // bytes from block to block
    static constexpr i64 SCALES_AT = 36864;
    static constexpr int SCALES_STRIDE = 16;  // bytes from block to block
    static constexpr i64 D_AT = 39936;
    static constexpr int D_STRIDE = 2;  // bytes from block to block

    // A unit as it is stored: loaded early, unpacked when it is needed.
    struct Stored {
        u32x4 words[4];
        u16 d;
        u16 scales;
    };

    DEVICE Stored load(const u8* w, i64 column, int unit) {
        const i64 block = column * BLOCKS + unit / BLOCK_UNITS;
        const int element = unit % BLOCK_UNITS * 32;
        Stored stored;
        {
            const u8* at = w + QUANTS0_AT + block * QUANTS0_STRIDE +
                element / 128 * 64 + element % 64;
            UNROLL for (int i = 0; i < 2; ++i)
                stored.words[i] = stream_16(at + 16 * i);
        }
        {
            const u8* at = w + QUANTS1_AT + block * QUANTS1_STRIDE +
                element / 128 * 32 + element % 32;
            UNROLL for (int i = 0; i < 2; ++i)
                stored.words[2 + i] = stream_16(at + 16 * i);
        }
        stored.d = *(const u16*)(w + D_AT + block * D_STRIDE);
        stored.scales = *(const u16*)(w + SCALES_AT + block * SCALES_STRIDE + unit % BLOCK_UNITS * 2);
        return stored;
    }

    // 32 quants, four to a word in the order of the elements.
    DEVICE void quants(const Stored& stored, int unit, u32 (&q)[8]) {
        const int element = unit % BLOCK_UNITS * 32;
        {
            // 2 elements a byte, which lie 64 apart
            const int shift = 4 * (element % 128 / 64);
            UNROLL for (int i = 0; i < 8; ++i)
                q[i] = stored.words[0 + i / 4][i % 4] >> shift & 0x0f0f0f0fu;
        }
        {
            // 4 elements a byte, which lie 32 apart
            const int shift = 2 * (element % 128 / 32);
            UNROLL for (int i = 0; i < 8; ++i)
                q[i] |= (stored.words[2 + i / 4][i % 4] >> shift & 0x03030303u) << 4;
        }
    }

    // Quant i of a unit, 0 at the value 0 and counted from `zero`: a small whole number.
    DEVICE float centred(const u32 (&q)[8], int i, float zero = 0.0f) {
        return byte_minus(q[i / 4], i % 4, ZERO + zero);
    }

    // What the 16 elements of either half of a unit are multiplied by.
    DEVICE float scale(const Stored& stored, int half) {
        return half_to_f32(stored.d) * (float)(i8)(stored.scales >> (8 * half));
    }

    // 32 values, rounded as the reference rounds.
    DEVICE void decode(const Stored& stored, int unit, float (&values)[32]) {
        u32 q[8];
        quants(stored, unit, q);
        UNROLL for (int half = 0; half < 2; ++half) {
            const float factor = scale(stored, half);
            UNROLL for (int i = 16 * half; i < 16 * half + 16; ++i)
                values[i] = centred(q, i) * factor;
        }
    }
};

struct Arguments {
    const u8* w;
    float* output0;
    i64 m;
};

// The whole weight as floats, [K, N]: a thread decodes one unit; neighbours take neighbouring
// columns, whose values lie side by side in the result.
DEVICE void compute(const Arguments& a) {
    using W = Q6_K_512x96;
    const i64 index = (i64)block_x() * BLOCK_SIZE + thread_index();
    const i64 column = index % W::N;
    const int unit = (int)(index / W::N);
    if (unit >= W::UNITS) return;
    float values[32];
    W::decode(W::load(a.w, column, unit), unit, values);
    UNROLL for (int i = 0; i < 32; ++i)
        if (unit * 32 + i < W::K) a.output0[(i64)(unit * 32 + i) * W::N + column] = values[i];
}

KERNEL(BLOCK_SIZE) void q4jit_values(
    const u8* __restrict__ w,
    float* __restrict__ output0,
    i64 m) {
    compute(Arguments{w, output0, m});
}
