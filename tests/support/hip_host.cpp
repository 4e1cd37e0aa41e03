// Executes a grid of one HIP kernel on this machine. It is linked with the kernel's text, whose host
// prelude declares the functions below.
//
//     hip_host JOB RESULT NAME...
//
// JOB holds 8-byte numbers: grid x, y, z; block size; whether arrays touch their lower guard; the
// number of seeds, the seeds; the number of arguments; then of each argument four: its kind (0 a
// value, 1 an input array, 2 an output array), value or size in bytes, alignment, offset of its
// bytes in JOB. NAME... are the arguments' names. The output arrays are written to RESULT.
//
// Every GPU thread is a coroutine on a stack of its own. When one waits, another one, picked at random,
// goes on, so that threads run in no order that a barrier does not guarantee. Blocks of a
// cluster take turns, each with its shared memory swapped in. The grid runs once per seed, and all
// runs must agree to the bit. A fault of the kernel ends the program with
// status 3 and a line on stderr that says what happened and where.

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

extern "C" {
void host_entry(void** arguments);  // the linker makes it the kernel's trampoline
extern const int host_block_size, host_wave;
extern const int host_cluster_blocks __attribute__((weak));  // of a kernel that has clusters
int host_thread, host_block[3];
// The kernel's shared arrays, if it has any.
extern char __start_host_shared[], __stop_host_shared[];
}

namespace {

constexpr size_t PAGE_BYTES = 4096;
constexpr size_t GUARD_BYTES = size_t{1} << 30;
constexpr size_t STACK_BYTES = 64 << 10;
// Between the stacks of two threads: an odd number of pages in all, so that tops spread over the
// sets of a cache.
constexpr size_t STACK_GUARD_BYTES = 9 * PAGE_BYTES;
constexpr int KERNEL_FAULT = 3;
constexpr int MAX_WAVE = 64;
constexpr int MAX_EXCHANGE_BYTES = 64;
constexpr size_t COPY_BYTES = 16;
constexpr uint8_t SHARED_POISON = 0xFF;    // NaN as f32 and as half
constexpr uint8_t MARGIN = 0xFF;           // around arrays, where a page is not filled
constexpr uint16_t OUTPUT_POISON = 0x7FF7; // NaN as f32 and as half, and no NaN that others make

// A page that nobody may touch follows the kernel's own shared arrays.
__attribute__((section("host_shared"), aligned(PAGE_BYTES))) char shared_guard[PAGE_BYTES];

[[noreturn]] void usage_error(const char* what) {
    perror(what);
    _exit(1);
}

// ---- faults

bool in_kernel;

[[noreturn, gnu::format(printf, 1, 2)]] void fault(const char* format, ...) {
    if (in_kernel)
        fprintf(stderr, "block (%d, %d, %d), thread %d: ", host_block[0], host_block[1],
                host_block[2], host_thread);
    va_list rest;
    va_start(rest, format);
    vfprintf(stderr, format, rest);
    va_end(rest);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(KERNEL_FAULT);
}

// ---- arguments

struct Argument {
    const char* name;
    int64_t kind, value, alignment;
    const char* contents;
    char* map;      // the mapping with its guards; pages of the array begin after the first guard
    size_t pages_bytes;
    char* start;    // the array
    std::vector<char> first;  // what the first run left in an output

    bool is_array() const { return kind != 0; }
    bool is_output() const { return kind == 2; }
    size_t size() const { return static_cast<size_t>(value); }
    char* pages() const { return map + GUARD_BYTES; }
};

std::vector<Argument> arguments;

// The array ends as near as its alignment allows to a guard, or begins at the other one.
void map_array(Argument& array, bool low_guard) {
    array.pages_bytes = (array.size() + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    void* const map = mmap(nullptr, 2 * GUARD_BYTES + array.pages_bytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) usage_error("mmap");
    array.map = static_cast<char*>(map);
    const size_t slack = array.pages_bytes - array.size();
    const size_t alignment = static_cast<size_t>(array.alignment);
    array.start = array.pages() + (low_guard ? 0 : slack / alignment * alignment);
}

void fill_array(Argument& array) {
    mprotect(array.pages(), array.pages_bytes, PROT_READ | PROT_WRITE);
    memset(array.pages(), MARGIN, array.pages_bytes);
    if (array.is_output()) {
        for (size_t i = 0; i < array.size(); ++i)
            array.start[i] = static_cast<char>(OUTPUT_POISON >> i % 2 * 8);
    } else {
        memcpy(array.start, array.contents, array.size());
        mprotect(array.pages(), array.pages_bytes, PROT_READ);
    }
}

// A write between the end of an array and the end of its page.
void check_margins(const Argument& array) {
    for (const char* p = array.pages(); p < array.pages() + array.pages_bytes; ++p) {
        if (p == array.start) p += array.size();
        if (p < array.pages() + array.pages_bytes && static_cast<uint8_t>(*p) != MARGIN)
            fault("a thread wrote at byte %td of %s, which has %zu", p - array.start,
                  array.name, array.size());
    }
}

// ---- stray accesses

char* stacks;  // of all threads, each behind its guard
size_t stacks_bytes;

void on_stray_access(int signal_number, siginfo_t* info, void* context) {
    // clang's check of pointers ends in a trap without a message.
    if (signal_number == SIGILL || signal_number == SIGTRAP)
        fault("an access beyond the array that a pointer came from");
    const char* const at = static_cast<const char*>(info->si_addr);
    const char* access = "accesses memory";
#if defined(__x86_64__)
    const auto* registers = &static_cast<ucontext_t*>(context)->uc_mcontext;
    access = registers->gregs[REG_ERR] & 2 ? "writes" : "reads";
#else
    (void)context;
#endif
    for (const Argument& array : arguments) {
        if (!array.is_array() || at < array.map) continue;
        if (at >= array.map + 2 * GUARD_BYTES + array.pages_bytes) continue;
        if (at >= array.start && at < array.start + array.size())
            fault("%s at byte %td of %s, which is an input", access, at - array.start,
                  array.name);
        fault("%s at byte %td of %s, which has %zu", access, at - array.start, array.name,
              array.size());
    }
    if (at >= stacks && at < stacks + stacks_bytes) fault("its stack of 64 KiB is full");
    if (at >= shared_guard && at < shared_guard + sizeof shared_guard)
        fault("%s beyond the end of shared memory", access);
    fault("%s at %p, which is in no argument (%s)", access, static_cast<const void*>(at),
          strsignal(signal_number));
}

void catch_stray_accesses() {
    static char stack[64 << 10];
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_stray_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP})
        sigaction(number, &action, nullptr);
}

// ---- threads

const char* const BARRIER = "block_barrier";
const char* const CLUSTER = "a meeting of the cluster";
const char* const SENT = "await_sent";

// Where threads meet. Two calls on one line differ by the address they return to.
struct Place {
    const char* what;
    int line;
    const void* address;
    int mask;  // of a shuffle

    bool operator==(const Place& other) const {
        return address == other.address && line == other.line && what == other.what &&
               mask == other.mask;
    }
};

enum class State { RUNNABLE, WAITING, DONE };

struct Copy {
    void* to;
    const void* from;
    int group;
};

struct alignas(64) Thread {
    State state;
    Place place;
    jmp_buf context;
    std::vector<Copy> copies;  // begun, not awaited
    int groups;  // of copies that were closed
};

struct Wave {
    int arrived, first_to_come;
    int turn;  // values of one exchange stay until all lanes have left it
    alignas(64) char values[2][MAX_WAVE * MAX_EXCHANGE_BYTES];
};

// A block's threads, and those that wait.
struct Team {
    std::vector<Thread> threads;
    std::vector<Wave> waves;
    std::vector<int> runnable;
    int at_barrier, first_at_barrier;
};

// The state of a block of a cluster while another one runs: its threads, and its shared memory.
struct Block {
    Team team;
    std::vector<char> shared;
    // Numbers from other blocks: the bytes expected, once that is known, and the bytes received.
    bool expects;
    uint32_t expected_bytes, sent_bytes;
};

// The state of the running block; the other blocks of its cluster are in `cluster`.
Team team;
auto& [threads, waves, runnable, at_barrier, first_at_barrier] = team;

std::vector<Block> cluster;
int rank_in_cluster;
int cluster_arrivals;  // of threads at all meetings of the cluster so far
jmp_buf scheduler;
std::vector<void*> entry_arguments;
uint64_t random_state;

// Marsaglia's xorshift64; `bound` is below 2^32.
size_t random_below(size_t bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (random_state >> 32) * bound >> 32;
}

// Continues any thread that can run, or the scheduler if none can.
[[noreturn]] void go_on() {
    if (runnable.empty()) _longjmp(scheduler, 1);
    std::swap(runnable[random_below(runnable.size())], runnable.back());
    host_thread = runnable.back();
    runnable.pop_back();
    _longjmp(threads[static_cast<size_t>(host_thread)].context, 1);
}

void give_way() {
    if (_setjmp(threads[static_cast<size_t>(host_thread)].context) == 0) go_on();
}

// A coroutine lives as long as the program and runs its thread of every block.
void run_thread() {
    for (;;) {
        host_entry(entry_arguments.data());
        Thread& thread = threads[static_cast<size_t>(host_thread)];
        if (!thread.copies.empty()) fault("it ended and did not await what it copies");
        thread.state = State::DONE;
        give_way();
    }
}

// A coroutine is made outside of any block, so at first it returns to its maker.
void begin_thread() {
    if (_setjmp(threads[static_cast<size_t>(host_thread)].context) == 0) _longjmp(scheduler, 1);
    run_thread();
}

size_t shared_bytes() { return static_cast<size_t>(shared_guard - __start_host_shared); }

// Swaps the state of a block of the cluster with the running one: before it runs and after.
void swap_block(int rank) {
    Block& block = cluster[static_cast<size_t>(rank)];
    std::swap(team, block.team);
    std::swap_ranges(block.shared.begin(), block.shared.end(), __start_host_shared);
}

// Of the block that runs; `stack_number` counts the stacks of all blocks.
void make_threads(int count, int stack_number) {
    threads.resize(static_cast<size_t>(count));
    waves.resize(static_cast<size_t>(count / host_wave));
    for (int thread = 0; thread < count; ++thread, ++stack_number) {
        char* const stack = stacks + STACK_GUARD_BYTES +
                            static_cast<size_t>(stack_number) * (STACK_GUARD_BYTES + STACK_BYTES);
        if (mprotect(stack, STACK_BYTES, PROT_READ | PROT_WRITE) != 0) usage_error("mprotect");
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        // Tops at the same offset in their pages would share few sets, too.
        context.uc_stack.ss_size = STACK_BYTES - static_cast<size_t>(thread % 61) * 64;
        context.uc_link = nullptr;
        makecontext(&context, begin_thread, 0);
        host_thread = thread;
        if (_setjmp(scheduler) == 0) setcontext(&context);
    }
}

void make_blocks(int blocks, int count) {
    stacks_bytes = static_cast<size_t>(blocks * count) * (STACK_GUARD_BYTES + STACK_BYTES);
    void* const map = mmap(nullptr, stacks_bytes, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) usage_error("mmap");
    stacks = static_cast<char*>(map);
    cluster.resize(static_cast<size_t>(blocks));
    for (int rank = 0; rank < blocks; ++rank) {
        cluster[static_cast<size_t>(rank)].shared.resize(shared_bytes());
        swap_block(rank);
        make_threads(count, rank * count);
        swap_block(rank);
    }
}

void make_runnable(int thread) {
    threads[static_cast<size_t>(thread)].state = State::RUNNABLE;
    runnable.push_back(thread);
}

void wait_at(const Place& place) {
    Thread& thread = threads[static_cast<size_t>(host_thread)];
    thread.state = State::WAITING;
    thread.place = place;
}

[[noreturn]] void divergence(int other_thread, const Place& here) {
    const Thread& other = threads[static_cast<size_t>(other_thread)];
    if (other.state == State::DONE)
        fault("waits in %s at line %d, but thread %d has ended", here.what, here.line,
              other_thread);
    if (here.mask != other.place.mask && here.line == other.place.line)
        fault("waits in %s at line %d with a mask of %d, but thread %d with %d", here.what,
              here.line, here.mask, other_thread, other.place.mask);
    fault("waits in %s at line %d, but thread %d in %s at line %d%s", here.what, here.line,
          other_thread, other.place.what, other.place.line,
          here.line == other.place.line ? ", reached another way" : "");
}

// Lanes that meet must come from the same call.
void compare_places(int first_to_come, const Place& here) {
    if (!(threads[static_cast<size_t>(first_to_come)].place == here))
        divergence(first_to_come, here);
}

// No thread can continue: one waits for another that has ended or waits elsewhere.
[[noreturn]] void report_deadlock(const Block& here) {
    const int count = static_cast<int>(threads.size());
    for (int thread = 0; thread < count; ++thread) {
        const Thread& waiting = threads[static_cast<size_t>(thread)];
        if (waiting.state != State::WAITING) continue;
        host_thread = thread;
        if (waiting.place.what == SENT)
            fault("waits in %s at line %d for %u bytes; %u have arrived", SENT,
                  waiting.place.line, here.expected_bytes, here.sent_bytes);
        if (waiting.place.what == CLUSTER)
            fault("waits in %s at line %d, where not all threads of all blocks come", CLUSTER,
                  waiting.place.line);
        const bool barrier = waiting.place.what == BARRIER;
        const int first = barrier ? 0 : thread / host_wave * host_wave;
        const int last = barrier ? count : first + host_wave;
        for (int other = first; other < last; ++other) {
            const Thread& absent = threads[static_cast<size_t>(other)];
            if (absent.state == State::WAITING && absent.place == waiting.place) continue;
            host_thread = thread;
            divergence(other, waiting.place);
        }
    }
    fault("the harness lost a thread");
}

void begin_block() {
    memset(__start_host_shared, SHARED_POISON, shared_bytes());
    at_barrier = 0;
    for (Wave& wave : waves) wave.arrived = 0;
    for (size_t thread = 0; thread < threads.size(); ++thread)
        make_runnable(static_cast<int>(thread));
}

// Runs a block of the cluster until none of its threads can continue. `first`: the cluster's first block.
void run_block(int rank, const int (&first)[3]) {
    swap_block(rank);
    rank_in_cluster = rank;
    host_block[0] = first[0] + rank;
    host_block[1] = first[1];
    host_block[2] = first[2];
    if (_setjmp(scheduler) == 0) go_on();
    swap_block(rank);
}

// Runs the blocks of a cluster, neighbours on the x axis, in turns and in a random order.
void run_cluster(const int (&first)[3]) {
    cluster_arrivals = 0;
    for (int rank = 0; rank < static_cast<int>(cluster.size()); ++rank) {
        swap_block(rank);
        begin_block();
        swap_block(rank);
        Block& block = cluster[static_cast<size_t>(rank)];
        block.expects = false;
        block.sent_bytes = 0;
    }
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        const int begin = static_cast<int>(random_below(cluster.size()));
        for (int i = 0; i < static_cast<int>(cluster.size()); ++i) {
            const int rank = (begin + i) % static_cast<int>(cluster.size());
            if (cluster[static_cast<size_t>(rank)].team.runnable.empty()) continue;
            goes_on = true;
            run_block(rank, first);
        }
    }
    for (int rank = 0; rank < static_cast<int>(cluster.size()); ++rank) {
        swap_block(rank);
        host_block[0] = first[0] + rank;
        for (const Thread& thread : threads)
            if (thread.state != State::DONE) report_deadlock(cluster[static_cast<size_t>(rank)]);
        swap_block(rank);
    }
}

void run_grid(const int64_t* grid) {
    const auto blocks_x = static_cast<int64_t>(cluster.size());
    if (grid[0] % blocks_x != 0)
        fault("a grid of %lld blocks on its x axis is no whole number of clusters of %lld",
              static_cast<long long>(grid[0]), static_cast<long long>(blocks_x));
    std::vector<int64_t> clusters(static_cast<size_t>(grid[0] / blocks_x * grid[1] * grid[2]));
    for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = static_cast<int64_t>(i) * blocks_x;
    for (size_t left = clusters.size(); left > 0; --left) {
        std::swap(clusters[random_below(left)], clusters[left - 1]);
        const int64_t block = clusters[left - 1];
        run_cluster({static_cast<int>(block % grid[0]), static_cast<int>(block / grid[0] % grid[1]),
                     static_cast<int>(block / grid[0] / grid[1])});
    }
}

// ---- meetings of a wave

// A division would take longer, and a wave has 32 or 64 threads.
int own_lane() { return host_thread & (host_wave - 1); }

// Every lane gives `size_bytes` at `mine` and receives the values of all lanes, in order.
const char* exchange(const void* mine, size_t size_bytes, const Place& place) {
    const int number = host_thread >> __builtin_ctz(static_cast<unsigned>(host_wave));
    const int first = number * host_wave;
    Wave& wave = waves[static_cast<size_t>(number)];
    if (wave.arrived == 0) wave.first_to_come = host_thread;
    else compare_places(wave.first_to_come, place);
    char* const values = wave.values[wave.turn];
    memcpy(values + static_cast<size_t>(host_thread - first) * size_bytes, mine, size_bytes);
    if (++wave.arrived < host_wave) {
        wait_at(place);
        give_way();
    } else {
        wave.arrived = 0;
        wave.turn ^= 1;
        for (int other = first; other < first + host_wave; ++other)
            if (other != host_thread) make_runnable(other);
    }
    return values;
}

template <typename T>
T value_of(const char* values, int lane) {
    T value;
    memcpy(&value, values + static_cast<size_t>(lane) * sizeof value, sizeof value);
    return value;
}

float bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// An f16; `flush`: a denormal is taken for 0.
template <bool flush>
float f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
    // An f32 whose exponent is 112 too small, which also holds for denormals.
    const uint32_t wide = (bits & 0x7FFFu) << 13;
    float value;
    memcpy(&value, &wide, sizeof value);
    value *= 0x1p112f;
    if (exponent == 0 && flush) value = 0.0f;
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    return bits >> 15 ? -value : value;
}

using Number = float (*)(uint16_t bits);

// Which lane holds what, from the vendors' documents.
struct Spot {
    int lane, element;
};

// One matrix instruction: `count` elements of each input and `results` elements of the result in a
// lane; `left(m, k)` and `right(n, k)` say where an input's element is, `result(lane, i)` which
// element of the result a lane holds; `number` gives an element's value.
template <Number number, int count_a, int count_b, int results, typename Left, typename Right,
          typename Result>
void multiply(const void* a, const void* b, void* c, const Place& place, Left left, Right right,
              Result result) {
    struct Inputs {
        uint16_t a[count_a], b[count_b];
    } mine;
    static_assert(sizeof mine <= MAX_EXCHANGE_BYTES);
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    const char* const values = exchange(&mine, sizeof mine, place);
    const auto input = [values](Spot spot, int before) {
        const int at = spot.lane * (count_a + count_b) + before + spot.element;
        return number(value_of<uint16_t>(values, at));
    };
    auto* const sums = static_cast<float*>(c);
    for (int i = 0; i < results; ++i) {
        int m, n;
        result(own_lane(), i, m, n);
        for (int k = 0; k < 16; ++k)
            sums[i] = std::fma(input(left(m, k), 0), input(right(n, k), count_a), sums[i]);
    }
}

// MFMA: lane l holds row (of B: column) l % 16 at k = 4 (l / 16) + i, and of C and D column l % 16
// in row 4 (l / 16) + i. (AMD matrix instruction calculator, v_mfma_f32_16x16x16_bf16.)
template <Number number>
void mfma_16x16x16(const void* a, const void* b, void* c, const Place& place) {
    const auto spot = [](int row, int k) { return Spot{row + k / 4 * 16, k % 4}; };
    multiply<number, 4, 4, 4>(a, b, c, place, spot, spot,
                      [](int lane, int i, int& m, int& n) {
                          m = 4 * (lane / 16) + i;
                          n = lane % 16;
                      });
}

// RDNA 3: lanes 0…15 and again 16…31 hold row (column) l % 16 at all k; of C and D lane l holds
// column l % 16 in row 2 i + l / 16. (RDNA 3 ISA guide, 7.9.) Each half is read here by the rows
// of one parity, so a half that is missing shows.
template <Number number>
void wmma_16x16x16(const void* a, const void* b, void* c, const Place& place) {
    const auto left = [](int row, int k) { return Spot{row + row % 2 * 16, k}; };
    const auto right = [](int column, int k) { return Spot{column + column % 2 * 16, k}; };
    multiply<number, 16, 16, 8>(a, b, c, place, left, right,
                        [](int lane, int i, int& m, int& n) {
                            m = 2 * i + lane / 16;
                            n = lane % 16;
                        });
}

// RDNA 4: lane l holds row (column) l % 16 at k = 8 (l / 16) + i, and of C and D column l % 16 in
// row 8 (l / 16) + i. (RDNA 4 ISA guide, 7.12.)
template <Number number>
void wmma_gfx12_16x16x16(const void* a, const void* b, void* c, const Place& place) {
    const auto spot = [](int row, int k) { return Spot{row + k / 8 * 16, k % 8}; };
    multiply<number, 8, 8, 8>(a, b, c, place, spot, spot,
                      [](int lane, int i, int& m, int& n) {
                          m = 8 * (lane / 16) + i;
                          n = lane % 16;
                      });
}

// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With group = l / 4 and t = l % 4:
// a_i is row group (+ 8 for i = 2, 3, 6, 7), k = 2 t + i % 2 (+ 8 for i ≥ 4); b_i is k = 2 t + i % 2
// (+ 8 for i ≥ 2), column group; c_i is row group (+ 8 for i ≥ 2), column 2 t + i % 2.
template <Number number>
void mma_16x8x16(const void* a, const void* b, void* c, const Place& place) {
    multiply<number, 8, 4, 4>(
        a, b, c, place,
        [](int row, int k) {
            return Spot{row % 8 * 4 + k % 8 / 2, k % 2 + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0)};
        },
        [](int column, int k) { return Spot{column * 4 + k % 8 / 2, k % 2 + (k >= 8 ? 2 : 0)}; },
        [](int lane, int i, int& m, int& n) {
            m = lane / 4 + (i >= 2 ? 8 : 0);
            n = 2 * (lane % 4) + i % 2;
        });
}

#define HERE(what) (Place{what, line, __builtin_return_address(0), 0})

}  // namespace

extern "C" {

void host_barrier(int line) {
    const Place place = HERE(BARRIER);
    if (at_barrier == 0) first_at_barrier = host_thread;
    else compare_places(first_at_barrier, place);
    if (++at_barrier < static_cast<int>(threads.size())) {
        wait_at(place);
        give_way();
        return;
    }
    at_barrier = 0;
    for (int other = 0; other < static_cast<int>(threads.size()); ++other)
        if (other != host_thread) make_runnable(other);
}

float host_shuffle_xor(float value, int mask, int line) {
    if (mask < 0 || mask >= host_wave)
        fault("shuffle_xor at line %d with a mask of %d in a wave of %d", line, mask, host_wave);
    Place place = HERE("shuffle_xor");
    place.mask = mask;
    const char* const values = exchange(&value, sizeof value, place);
    return value_of<float>(values, own_lane() ^ mask);
}

// ---- clusters

// Lets the threads of all blocks that wait there continue.
void wake(const char* what, int only_rank) {
    for (int rank = 0; rank < static_cast<int>(cluster.size()); ++rank) {
        if (only_rank >= 0 && rank != only_rank) continue;
        const bool is_here = rank == rank_in_cluster;
        Block& block = cluster[static_cast<size_t>(rank)];
        Team& theirs = is_here ? team : block.team;
        for (int thread = 0; thread < static_cast<int>(theirs.threads.size()); ++thread) {
            Thread& waiting = theirs.threads[static_cast<size_t>(thread)];
            if (waiting.state != State::WAITING || waiting.place.what != what) continue;
            waiting.state = State::RUNNABLE;
            theirs.runnable.push_back(thread);
        }
    }
}

// The last thread of all blocks that reaches a meeting lets all continue.
void host_cluster_arrive(int) {
    const auto all = static_cast<int>(cluster.size() * threads.size());
    if (++cluster_arrivals % all == 0) wake(CLUSTER, -1);
}

void host_cluster_wait(int meeting, int line) {
    const auto all = static_cast<int>(cluster.size() * threads.size());
    if (cluster_arrivals >= (meeting + 1) * all) return;
    wait_at(HERE(CLUSTER));
    give_way();
}

void host_cluster_expect(unsigned bytes) {
    Block& block = cluster[static_cast<size_t>(rank_in_cluster)];
    block.expects = true;
    block.expected_bytes = bytes;
}

// A copy of 16 bytes is done at once or when it is awaited, at random: a GPU does it at any time between.
void host_begin_copy(void* to, const void* from) {
    if (random_below(2) == 0)
        memcpy(to, from, COPY_BYTES);
    else {
        Thread& thread = threads[static_cast<size_t>(host_thread)];
        thread.copies.push_back({to, from, thread.groups});
    }
}

void host_close_copies() { ++threads[static_cast<size_t>(host_thread)].groups; }

void host_await_copies(int later_groups) {
    Thread& thread = threads[static_cast<size_t>(host_thread)];
    std::vector<Copy> later;
    for (const Copy& copy : thread.copies) {
        if (copy.group < thread.groups - later_groups)
            memcpy(copy.to, copy.from, COPY_BYTES);
        else
            later.push_back(copy);
    }
    thread.copies = later;
}

void host_send(float* to, int rank, float x, int line) {
    if (rank < 0 || rank >= static_cast<int>(cluster.size()))
        fault("send at line %d to block %d of a cluster of %zu", line, rank, cluster.size());
    const auto at = static_cast<size_t>(reinterpret_cast<char*>(to) - __start_host_shared);
    if (at + sizeof x > shared_bytes())
        fault("send at line %d to an address beyond shared memory", line);
    Block& block = cluster[static_cast<size_t>(rank)];
    if (!block.expects) fault("send at line %d to block %d, which expects nothing yet", line, rank);
    char* const there = rank == rank_in_cluster ? __start_host_shared : block.shared.data();
    memcpy(there + at, &x, sizeof x);
    block.sent_bytes += sizeof x;
    if (block.sent_bytes > block.expected_bytes)
        fault("send at line %d of more than the %u bytes that block %d expects", line,
              block.expected_bytes, rank);
    if (block.sent_bytes == block.expected_bytes) wake(SENT, rank);
}

void host_await_sent(int line) {
    const Block& block = cluster[static_cast<size_t>(rank_in_cluster)];
    if (block.sent_bytes == block.expected_bytes) return;
    wait_at(HERE(SENT));
    give_way();
}

#define MATRIX(name, instruction, number)                                        \
    void host_##name(const void* a, const void* b, void* c, int line) {          \
        instruction<number>(a, b, c, HERE("multiply_add"));                      \
    }
MATRIX(mfma_16x16x16, mfma_16x16x16, bf16)
MATRIX(wmma_16x16x16, wmma_16x16x16, bf16)
MATRIX(wmma_gfx12_16x16x16, wmma_gfx12_16x16x16, bf16)
MATRIX(mma_16x8x16, mma_16x8x16, bf16)
MATRIX(wmma_16x16x16_f16, wmma_16x16x16, f16<false>)
MATRIX(wmma_gfx12_16x16x16_f16, wmma_gfx12_16x16x16, f16<false>)
MATRIX(mma_16x8x16_f16, mma_16x8x16, f16<false>)

void host_mfma_16x16x16_f16(const void* a, const void* b, void* c, bool flush, int line) {
    const Place place = HERE("multiply_add");
    flush ? mfma_16x16x16<f16<true>>(a, b, c, place) : mfma_16x16x16<f16<false>>(a, b, c, place);
}

// ldmatrix.x4 (PTX ISA): lanes 8 i … 8 i + 7 give the rows of matrix i; lane l gets of every matrix
// elements 2 (l % 4) and the next of row l / 4.
void host_load_quarters(const uint16_t* row, void* quarters, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fault("load_fragment at line %d of a row that is not at a multiple of 16 bytes", line);
    const char* const values = exchange(&row, sizeof row, HERE("load_fragment"));
    const int lane = own_lane();
    for (int i = 0; i < 4; ++i) {
        const auto* const theirs = value_of<const uint16_t*>(values, 8 * i + lane / 4);
        memcpy(static_cast<char*>(quarters) + 4 * i, theirs + 2 * (lane % 4), 4);
    }
}

void host_load_transposed(const void* row, void* matrices, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fault("load_transposed at line %d of a row that is not at a multiple of 16 bytes", line);
    const char* const values = exchange(&row, sizeof row, HERE("load_transposed"));
    const int lane = own_lane();
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) {
            const auto* const theirs = value_of<const uint16_t*>(values, 8 * i + 2 * (lane % 4) + half);
            memcpy(static_cast<char*>(matrices) + 4 * i + 2 * half, theirs + lane / 4, 2);
        }
}

// The functions that clang's checks of undefined behaviour call; their data begins with the position in the text.
struct SourcePlace {
    const char* file;
    uint32_t line, column;
};
#define UNDEFINED(name, what)                                                 \
    [[noreturn]] void __ubsan_handle_##name(const SourcePlace* place, ...) {  \
        fault("line %u, column %u: %s", place->line, place->column, what);    \
    }
UNDEFINED(type_mismatch_v1, "an address that is not a multiple of its type's alignment")
UNDEFINED(out_of_bounds, "an index beyond its array")
UNDEFINED(shift_out_of_bounds, "a shift by as many bits as there are, or more")
UNDEFINED(add_overflow, "a signed sum overflows")
UNDEFINED(sub_overflow, "a signed difference overflows")
UNDEFINED(mul_overflow, "a signed product overflows")
UNDEFINED(negate_overflow, "a signed negation overflows")
UNDEFINED(divrem_overflow, "a division by zero, or one that overflows")
UNDEFINED(float_cast_overflow, "a float that its integer type cannot hold")
UNDEFINED(builtin_unreachable, "a place that is said not to be reached")
UNDEFINED(missing_return, "a function ends without its result")
}

namespace {

// ---- the job

const int64_t* read_job(const char* path, size_t& numbers) {
    const int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) usage_error(path);
    numbers = static_cast<size_t>(status.st_size) / sizeof(int64_t);
    void* const map = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE,
                           file, 0);
    if (map == MAP_FAILED) usage_error(path);
    return static_cast<const int64_t*>(map);
}

void compare_with_first_run(Argument& output, int64_t seed) {
    if (output.first.empty()) output.first.assign(output.start, output.start + output.size());
    for (size_t i = 0; i < output.size(); ++i)
        if (output.first[i] != output.start[i])
            fault("byte %zu of %s depends on the order of threads (seed %lld)", i, output.name,
                  static_cast<long long>(seed));
}

void run(const int64_t* grid, int64_t seed) {
    random_state = static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u | 1;  // anything but 0
    for (Argument& argument : arguments)
        if (argument.is_array()) fill_array(argument);
    in_kernel = true;
    run_grid(grid);
    in_kernel = false;
    for (Argument& argument : arguments) {
        if (argument.is_array()) check_margins(argument);
        if (argument.is_output()) compare_with_first_run(argument, seed);
    }
}

void write_result(const char* path) {
    FILE* const file = fopen(path, "wb");
    if (file == nullptr) usage_error(path);
    for (const Argument& argument : arguments)
        if (argument.is_output() && argument.size() > 0)
            if (fwrite(argument.first.data(), 1, argument.size(), file) != argument.size())
                usage_error(path);
    if (fclose(file) != 0) usage_error(path);
}

}  // namespace

int main(int count, char** words) {
    if (count < 3) return 2;
    size_t numbers;
    const int64_t* const job = read_job(words[1], numbers);
    const int64_t* at = job;
    const int64_t* const grid = at;
    const int64_t block_size = at[3];
    const bool low_guard = at[4] != 0;
    const int64_t seeds = at[5];
    const int64_t* const seed = at + 6;
    at = seed + seeds;
    arguments.resize(static_cast<size_t>(*at++));
    if (count != 3 + static_cast<int>(arguments.size())) return 2;
    for (size_t i = 0; i < arguments.size(); ++i, at += 4) {
        Argument& argument = arguments[i];
        argument.name = words[3 + i];
        argument.kind = at[0];
        argument.value = at[1];
        argument.alignment = at[2];
        argument.contents = reinterpret_cast<const char*>(job) + at[3];
        if (argument.is_array()) map_array(argument, low_guard);
    }
    for (Argument& argument : arguments)
        entry_arguments.push_back(argument.is_array() ? static_cast<void*>(&argument.start)
                                                      : static_cast<void*>(&argument.value));
    if (block_size != host_block_size)
        fault("launched with %lld threads per block, but made for %d",
              static_cast<long long>(block_size), host_block_size);
    if (block_size % host_wave != 0)
        fault("%lld threads are no whole number of waves of %d",
              static_cast<long long>(block_size), host_wave);
    if (mprotect(shared_guard, sizeof shared_guard, PROT_NONE) != 0) usage_error("mprotect");
    catch_stray_accesses();
    make_blocks(&host_cluster_blocks ? host_cluster_blocks : 1, static_cast<int>(block_size));
    for (int64_t i = 0; i < seeds; ++i) run(grid, seed[i]);
    write_result(words[2]);
    return 0;
}
