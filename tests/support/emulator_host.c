/* Calls one generated kernel on buffers that end at an unreadable page.
 *
 * usage: host IN OUT
 * IN:  u64 count, u64 gap; per slot u64 kind, u64 word; then the arrays' bytes, one after another.
 *      kind 0: the word is the slot. kind 1: an array of `word` bytes.
 * OUT: the arrays' bytes after the call, one after another.
 *
 * Exit: 0 done; 1 this program or its input is wrong; 3 the kernel touched memory outside its
 * arrays, told on standard error. Other signals end the process as usual.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define MAX_SLOTS 128
#define FILL 0xff /* a NaN in f16 and f32: a read that leaves an array shows in the result */

extern void KERNEL(void *args);

struct buffer {
    unsigned char *map, *data; /* map: a guard page, room, a guard page */
    size_t map_bytes, bytes;   /* bytes of the array */
};

static struct buffer buffers[MAX_SLOTS];
static uint64_t slots[MAX_SLOTS], kinds[MAX_SLOTS];
static uint64_t count, gap;
static size_t page;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    (void)context;
    unsigned char *at = info->si_addr;
    char text[160] = "";
    for (uint64_t i = 0; i < count; i++) {
        struct buffer *b = &buffers[i];
        if (kinds[i] == 1 && at >= b->map && at < b->map + b->map_bytes)
            snprintf(text, sizeof text, "slot %d: access at byte %lld of an array of %lld bytes\n",
                     (int)i, (long long)(at - b->data), (long long)b->bytes);
    }
    if (!text[0])
        snprintf(text, sizeof text, "signal %d: access at %p, near no array\n", signal_number,
                 (void *)at);
    if (write(2, text, strlen(text)) < 0)
        _exit(1);
    _exit(3);
}

static void place(struct buffer *b, size_t bytes) {
    size_t room = (bytes + gap + page) / page * page; /* always at least one byte before the array */
    b->bytes = bytes;
    b->map_bytes = room + 2 * page;
    b->map = mmap(NULL, b->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->map == MAP_FAILED || mprotect(b->map + page, room, PROT_READ | PROT_WRITE))
        fail("mmap");
    memset(b->map + page, FILL, room);
    b->data = b->map + page + room - gap - bytes;
}

static void check_surroundings(int slot, const struct buffer *b) {
    for (unsigned char *p = b->map + page; p < b->map + b->map_bytes - page; p++) {
        if (p == b->data)
            p += b->bytes;
        if (p < b->map + b->map_bytes - page && *p != FILL) {
            fprintf(stderr, "slot %d: write at byte %lld of an array of %lld bytes\n", slot,
                    (long long)(p - b->data), (long long)b->bytes);
            exit(3);
        }
    }
}

static void get(void *to, size_t bytes, FILE *file) {
    if (bytes && fread(to, 1, bytes, file) != bytes)
        fail("input");
}

static void read_input(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        fail(path);
    get(&count, 8, file);
    get(&gap, 8, file);
    if (count > MAX_SLOTS)
        fail("too many slots");
    for (uint64_t i = 0; i < count; i++) {
        get(&kinds[i], 8, file);
        get(&slots[i], 8, file);
    }
    for (uint64_t i = 0; i < count; i++) {
        if (kinds[i] != 1)
            continue;
        place(&buffers[i], slots[i]);
        get(buffers[i].data, buffers[i].bytes, file);
        slots[i] = (uint64_t)(uintptr_t)buffers[i].data;
    }
    fclose(file);
}

static void write_output(const char *path) {
    FILE *file = fopen(path, "wb");
    if (!file)
        fail(path);
    for (uint64_t i = 0; i < count; i++) {
        if (kinds[i] != 1)
            continue;
        check_surroundings((int)i, &buffers[i]);
        if (buffers[i].bytes &&
            fwrite(buffers[i].data, 1, buffers[i].bytes, file) != buffers[i].bytes)
            fail("output");
    }
    if (fclose(file))
        fail("output");
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 1;
    page = (size_t)sysconf(_SC_PAGESIZE);
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    read_input(argv[1]);
    KERNEL(slots);
    write_output(argv[2]);
    return 0;
}
