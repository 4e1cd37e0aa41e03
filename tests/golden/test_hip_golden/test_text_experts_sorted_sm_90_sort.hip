// of_experts_sort for hip:sm_90, sort_experts, 8 rows a tile, 1024 threads, made by q4jit
// sort vectors by ids

constexpr int BLOCK_SIZE = 1024;
static_assert(BLOCK_SIZE % WAVE == 0 && BLOCK_SIZE <= 1024, "a block is whole waves");
constexpr int EXPERTS = 128;
constexpr int ROWS = 8;  // vectors of a tile
constexpr int CHUNKS = 8;  // of the ids; a thread counts those of an expert in one
constexpr int SLOTS = EXPERTS * CHUNKS;
constexpr int LDS_BYTES = 8196;  // shared memory of a block
static_assert(LDS_BYTES <= 49152, "sm_90 has 49152 bytes of shared memory for a block that does not ask for more");

struct Arguments {
    const i64* ids;
    i32* expert_order;
    i32* expert_tiles;
    i64 m;
};

// Kernels overlap. This one waits for the kernels before it: it may read their results and overwrite their
// arguments. Only weights, which no kernel writes, are loaded earlier. Then the next kernel may start, and
// load its weights.
DEVICE void await_kernels_before(Arguments& a) {
    await_grids_before();
    a.ids = known_from_here(a.ids);
    a.expert_order = known_from_here(a.expert_order);
    a.expert_tiles = known_from_here(a.expert_tiles);
    start_next_grid();
}

// The expert of a vector. A number that no expert has counts as 0, and the product gives NaN later.
DEVICE int expert_of(const Arguments& a, i64 row) {
    const i64 expert = a.ids[row];
    return expert >= 0 && expert < EXPERTS ? (int)expert : 0;
}

// The sum over the threads before this one. All threads of a block call this together.
DEVICE int sum_before(int value) {
    SHARED int sums[BLOCK_SIZE];
    block_barrier();  // the sums of an earlier call may still be read
    sums[thread_index()] = value;
    for (int step = 1; step < BLOCK_SIZE; step *= 2) {
        block_barrier();
        const int before = thread_index() >= step ? sums[thread_index() - step] : 0;
        block_barrier();
        sums[thread_index()] += before;
    }
    return sums[thread_index()] - value;
}

// One block sorts all vectors by expert: it counts them, adds up the counts, and writes each vector to
// its place. The vectors of an expert are divided into tiles.
DEVICE void compute(Arguments a) {
    await_kernels_before(a);
    const i64 m = a.m;
    SHARED int starts[SLOTS];
    SHARED int tile_count;
    const i64 length = (m + CHUNKS - 1) / CHUNKS;

    // --- count: the vectors of an expert in a chunk ---
    for (int i = thread_index(); i < SLOTS; i += BLOCK_SIZE) {
        int count = 0;
        for (i64 row = i % CHUNKS * length; row < (i % CHUNKS + 1) * length && row < m; ++row)
            count += expert_of(a, row) == i / CHUNKS;
        starts[i] = count;
    }
    block_barrier();

    // --- add up: the first place of each expert and chunk ---
    constexpr int OWN_SLOTS = (SLOTS + BLOCK_SIZE - 1) / BLOCK_SIZE;
    const int first_slot = thread_index() * OWN_SLOTS;
    int own = 0;
    for (int i = first_slot; i < first_slot + OWN_SLOTS && i < SLOTS; ++i) own += starts[i];
    int start = sum_before(own);
    for (int i = first_slot; i < first_slot + OWN_SLOTS && i < SLOTS; ++i) {
        const int count = starts[i];
        starts[i] = start;
        start += count;
    }
    block_barrier();

    // --- divide: the tiles of each expert ---
    constexpr int OWN_EXPERTS = (EXPERTS + BLOCK_SIZE - 1) / BLOCK_SIZE;
    const int first_expert = thread_index() * OWN_EXPERTS;
    int tiles = 0;
    for (int e = first_expert; e < first_expert + OWN_EXPERTS && e < EXPERTS; ++e) {
        const int end = e + 1 < EXPERTS ? starts[(e + 1) * CHUNKS] : (int)m;
        tiles += (end - starts[e * CHUNKS] + ROWS - 1) / ROWS;
    }
    int tile = sum_before(tiles);
    for (int e = first_expert; e < first_expert + OWN_EXPERTS && e < EXPERTS; ++e) {
        const int end = e + 1 < EXPERTS ? starts[(e + 1) * CHUNKS] : (int)m;
        for (int first = starts[e * CHUNKS]; first < end; first += ROWS, ++tile) {
            a.expert_tiles[3 * tile] = e;
            a.expert_tiles[3 * tile + 1] = first;
            a.expert_tiles[3 * tile + 2] = end - first < ROWS ? end - first : ROWS;
        }
        if (e == EXPERTS - 1) tile_count = tile;
    }
    block_barrier();
    const i64 most_tiles = (m + ROWS - 1) / ROWS + (m < EXPERTS ? m : EXPERTS);
    for (i64 i = 3 * tile_count + thread_index(); i < 3 * most_tiles; i += BLOCK_SIZE) a.expert_tiles[i] = 0;

    // --- place: the vectors in their order ---
    for (int i = thread_index(); i < SLOTS; i += BLOCK_SIZE) {
        int place = starts[i];
        for (i64 row = i % CHUNKS * length; row < (i % CHUNKS + 1) * length && row < m; ++row)
            if (expert_of(a, row) == i / CHUNKS) a.expert_order[place++] = (i32)row;
    }
}

KERNEL(BLOCK_SIZE) void q4jit_of_experts_sort(
    const i64* __restrict__ ids,
    i32* __restrict__ expert_order,
    i32* __restrict__ expert_tiles,
    i64 m) {
    compute(Arguments{ids, expert_order, expert_tiles, m});
}
