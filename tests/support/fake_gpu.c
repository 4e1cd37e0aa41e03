// A HIP runtime and a CUDA driver without a GPU: two devices that use host memory.
//
// It implements the functions that q4jit's drivers call, counts open objects, records the last
// launch, and fails on request: `fake_fail("hipMalloc", 2)` makes the next hipMalloc return 2. HIP
// and CUDA have the same error numbers. A kernel's symbol ends in its number of parameters: `scale_3`.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define DEVICES 2
#define ALLOCATIONS 256

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, NOT_FOUND = 500 };

static struct { void *pointer; size_t size; int device; } allocations[ALLOCATIONS];
static struct { const char *name; int code; } failures[] = {
    {"hipInit", 100}, {"hipErrorNoDevice", 100}, {"hipErrorInvalidValue", 1},
    {"hipErrorOutOfMemory", 2}, {"hipErrorInvalidImage", 200}, {"hipErrorIllegalAddress", 700}};

static char failing[64];
static int failing_code;
static __thread int current = 0;          // the HIP device of this thread
static __thread uintptr_t context = 0;    // the CUDA context of this thread; 0 if it has no context
static __thread uintptr_t pushed[8];
static __thread int depth = 0;
static __thread int capture_mode = 0;
static int retained[DEVICES];
static size_t memory_bytes = 1 << 20;

EXPORT int fake_modules, fake_events, fake_capturing, fake_relaxed_calls, fake_last_error;
EXPORT int fake_streams, fake_graphs, fake_replays;
EXPORT int fake_devices = DEVICES;
EXPORT int fake_launch_device, fake_launches, fake_launch_sum, fake_max_dynamic_bytes;
EXPORT int fake_early_launches;
EXPORT unsigned fake_launch_shape[7];
EXPORT uint64_t fake_launch_stream, fake_launch_values[16];
EXPORT char fake_properties[DEVICES][4096];
EXPORT int fake_properties_bytes;

EXPORT void fake_fail(const char *name, int code) {
    snprintf(failing, sizeof failing, "%s", name);
    failing_code = code;
}

EXPORT int fake_allocations(void) {
    int count = 0;
    for (int i = 0; i < ALLOCATIONS; i++) count += allocations[i].pointer != NULL;
    return count;
}

static int injected(const char *name) {
    if (strcmp(name, failing) != 0) return 0;
    failing[0] = 0;
    return failing_code;
}

#define CALL(name, ...)                         \
    EXPORT int name(__VA_ARGS__) {              \
        int code = injected(#name);             \
        if (code) return fake_last_error = code;
#define CUDA(name, ...) CALL(name, __VA_ARGS__) if (!context) return INVALID_CONTEXT;
#define END(value) return fake_last_error = (value); }

// --- both runtimes ------------------------------------------------------------------------------

static size_t used(int device) {
    size_t sum = 0;
    for (int i = 0; i < ALLOCATIONS; i++)
        if (allocations[i].pointer && allocations[i].device == device) sum += allocations[i].size;
    return sum;
}

static int allocate(void **pointer, size_t size, int device) {
    fake_relaxed_calls += capture_mode == 2;
    if (size == 0) return INVALID_VALUE;
    if (size > memory_bytes - used(device)) return OUT_OF_MEMORY;
    for (int i = 0; i < ALLOCATIONS; i++)
        if (!allocations[i].pointer) {
            *pointer = allocations[i].pointer = malloc(size);
            allocations[i].size = size;
            allocations[i].device = device;
            return 0;
        }
    abort();
}

static int find(const void *pointer) {
    for (int i = 0; i < ALLOCATIONS; i++) {
        const char *start = allocations[i].pointer;
        if (start && (const char *)pointer >= start &&
            (const char *)pointer < start + allocations[i].size)
            return i;
    }
    return -1;
}

static int release(void *pointer) {
    fake_relaxed_calls += capture_mode == 2;
    int i = find(pointer);
    if (i < 0 || allocations[i].pointer != pointer) return INVALID_VALUE;
    free(pointer);
    allocations[i].pointer = NULL;
    return 0;
}

static int copy(void *to, const void *from, size_t size, int to_device, int from_device) {
    if ((find(to) >= 0) != to_device || (find(from) >= 0) != from_device) return INVALID_VALUE;
    memcpy(to, from, size);
    return 0;
}

static int load(void **module, const void *image) {
    if (memcmp(image, "\x7f" "ELF", 4) != 0) return INVALID_IMAGE;
    fake_modules++;
    *module = malloc(1);
    return 0;
}

static int unload(void *module) {
    fake_modules--;
    free(module);
    return 0;
}

static int function(void **result, const char *symbol) {
    if (strncmp(symbol, "missing", 7) == 0) return NOT_FOUND;
    *result = strdup(symbol);
    return 0;
}

// CUlaunchConfig in cuda.h of CUDA 12 and 13.
struct launch {
    unsigned shape[7];
    void *stream;
    struct { int id; char pad[4]; int value[16]; } *attributes;
    unsigned number;
};

static int record(int device, char *symbol, const unsigned shape[7], void *stream, void **values) {
    int count = atoi(strrchr(symbol, '_') + 1);
    for (int i = 0; i < count; i++) memcpy(&fake_launch_values[i], values[i], 8);
    memcpy(fake_launch_shape, shape, sizeof fake_launch_shape);
    fake_launch_stream = (uint64_t)(uintptr_t)stream;
    fake_launch_device = device;
    // several threads may launch at the same time
    if (count) __atomic_fetch_add(&fake_launch_sum, *(int *)values[0], __ATOMIC_RELAXED);
    __atomic_fetch_add(&fake_launches, 1, __ATOMIC_RELAXED);
    return 0;
}

static int exchange(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return 0;
}

static int event(void **event) {
    fake_events++;
    *event = malloc(1);
    return 0;
}

static int no_event(void *event) {
    fake_events--;
    free(event);
    return 0;
}

// Launches during a capture are counted as launches; replays are counted separately.
static int capture_begins(void) {
    if (fake_capturing) return INVALID_VALUE;
    fake_capturing = 1;
    return 0;
}

static int capture_ends(void **graph) {
    if (!fake_capturing) return INVALID_VALUE;
    fake_capturing = 0;
    fake_graphs++;
    *graph = malloc(1);
    return 0;
}

static int instantiate(void **instance, void *graph) {
    if (!graph) return INVALID_VALUE;
    fake_graphs++;
    *instance = malloc(1);
    return 0;
}

static int replayed(void *instance, void *stream) {
    if (!instance || !stream) return INVALID_VALUE;
    fake_replays++;
    return 0;
}

static int no_graph(void *graph) {
    fake_graphs--;
    free(graph);
    return 0;
}

static int stream_made(void **stream) {
    fake_streams++;
    *stream = malloc(1);
    return 0;
}

static int no_stream(void *stream) {
    fake_streams--;
    free(stream);
    return 0;
}

// --- HIP ----------------------------------------------------------------------------------------

struct attributes { int type, device; void *device_pointer, *host_pointer; int managed, flags; };

EXPORT const char *hipGetErrorName(int code) {
    for (unsigned i = 1; i < sizeof failures / sizeof *failures; i++)
        if (failures[i].code == code) return failures[i].name;
    return "hipErrorUnknown";
}
EXPORT const char *hipGetErrorString(int code) { return code ? "text of the error" : "no error"; }
EXPORT int hipGetLastError(void) {
    int code = fake_last_error;
    fake_last_error = 0;
    return code;
}
CALL(hipInit, unsigned flags) (void)flags; END(0)
CALL(hipGetDeviceCount, int *count) *count = fake_devices; END(fake_devices ? 0 : 100)
CALL(hipGetDevice, int *device) *device = current; return 0; }
CALL(hipSetDevice, int device)
    if (device < 0 || device >= fake_devices) return INVALID_DEVICE;
    current = device;
END(0)
CALL(hipGetDevicePropertiesR0600, void *properties, int device)
    memcpy(properties, fake_properties[device], fake_properties_bytes);
END(0)
CALL(hipMalloc, void **pointer, size_t size) END(allocate(pointer, size, current))
CALL(hipFree, void *pointer) END(release(pointer))
CALL(hipMemcpyAsync, void *to, const void *from, size_t size, int kind, void *stream)
    (void)stream;
END(copy(to, from, size, kind & 1, kind >> 1))
CALL(hipMemsetAsync, void *to, int value, size_t size, void *stream)
    (void)stream;
    memset(to, value, size);
END(0)
CALL(hipMemGetInfo, size_t *available, size_t *total)
    *available = memory_bytes - used(current);
    *total = memory_bytes;
END(0)
CALL(hipStreamSynchronize, void *stream) (void)stream; END(0)
CALL(hipStreamIsCapturing, void *stream, int *status) (void)stream; *status = fake_capturing; END(0)
CALL(hipThreadExchangeStreamCaptureMode, int *mode) END(exchange(mode))
CALL(hipPointerGetAttributes, struct attributes *attributes, const void *pointer)
    int i = find(pointer);
    if (i < 0) return fake_last_error = INVALID_VALUE;
    attributes->type = 2;
    attributes->device = allocations[i].device;
END(0)
CALL(hipModuleLoadData, void **module, const void *image) END(load(module, image))
CALL(hipModuleUnload, void *module) END(unload(module))
CALL(hipModuleGetFunction, void **result, void *module, const char *symbol)
    (void)module;
END(function(result, symbol))
CALL(hipModuleLaunchKernel, void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
     unsigned by, unsigned bz, unsigned bytes, void *stream, void **values, void **extra)
    (void)extra;
END(record(current, kernel, (unsigned[]){gx, gy, gz, bx, by, bz, bytes}, stream, values))
CALL(hipStreamCreateWithFlags, void **made, unsigned flags) (void)flags; END(stream_made(made))
CALL(hipStreamDestroy, void *made) END(no_stream(made))
CALL(hipStreamBeginCapture, void *stream, int mode) (void)stream; (void)mode; END(capture_begins())
CALL(hipStreamEndCapture, void *stream, void **graph) (void)stream; END(capture_ends(graph))
CALL(hipGraphInstantiateWithFlags, void **made, void *graph, unsigned long long flags)
    (void)flags;
END(instantiate(made, graph))
CALL(hipGraphLaunch, void *instance, void *stream) END(replayed(instance, stream))
CALL(hipGraphDestroy, void *graph) END(no_graph(graph))
CALL(hipGraphExecDestroy, void *instance) END(no_graph(instance))
CALL(hipEventCreate, void **made) END(event(made))
CALL(hipEventDestroy, void *made) END(no_event(made))
CALL(hipEventRecord, void *made, void *stream) (void)made; (void)stream; END(0)
CALL(hipEventSynchronize, void *made) (void)made; END(0)
CALL(hipEventElapsedTime, float *milliseconds, void *start, void *stop)
    (void)start; (void)stop;
    *milliseconds = 1.5f;
END(0)

// --- CUDA: a context's handle is 1000 + the index of its device ----------------------------------

CALL(cuGetErrorName, int error, const char **name)
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_OTHER";
    return 0; }
CALL(cuGetErrorString, int error, const char **text) (void)error; *text = "its text"; return 0; }
CALL(cuDriverGetVersion, int *version) *version = 13000; END(0)
CALL(cuInit, unsigned flags) (void)flags; END(fake_devices ? 0 : 100)
CALL(cuDeviceGetCount, int *count) *count = fake_devices; END(0)
CALL(cuDeviceGet, int *device, int ordinal) *device = ordinal; END(0)
CALL(cuDeviceGetName, char *name, int length, int device) snprintf(name, length, "Fake %d", device); END(0)
CALL(cuDeviceGetUuid_v2, char *uuid, int device) memset(uuid, 0xA0 + device, 16); END(0)
CALL(cuDeviceGetPCIBusId, char *id, int length, int device)
    snprintf(id, length, "0000:%02x:00.0", device + 1);
END(0)
CALL(cuDeviceTotalMem_v2, size_t *bytes, int device) (void)device; *bytes = memory_bytes; END(0)
CALL(cuDeviceGetAttribute, int *value, int attribute, int device)
    switch (attribute) {
        case 1: *value = 1024; break;        // threads per block
        case 10: *value = 32; break;         // warp size
        case 13: *value = 1500000; break;    // clock
        case 16: *value = 100 + device; break;
        case 18: *value = device; break;     // integrated
        case 38: *value = 4 << 20; break;    // L2
        case 75: *value = 9 - device; break; // compute capability
        case 76: *value = 0; break;
        case 97: *value = 227 << 10; break;  // shared memory per block, opt-in
        default: return INVALID_VALUE;
    }
END(0)
CALL(cuDevicePrimaryCtxRetain, void **made, int device)
    retained[device]++;
    *made = (void *)(uintptr_t)(1000 + device);
END(0)
CALL(cuCtxGetCurrent, void **result) *result = (void *)context; END(0)
CALL(cuCtxPushCurrent_v2, uintptr_t made) pushed[depth++] = context; context = made; END(0)
CALL(cuCtxPopCurrent_v2, void **popped) *popped = (void *)context; context = pushed[--depth]; END(0)
CALL(cuCtxSetCurrent, uintptr_t made) context = made; END(0)
CUDA(cuMemAlloc_v2, void **pointer, size_t size) END(allocate(pointer, size, context - 1000))
CUDA(cuMemFree_v2, void *pointer) END(release(pointer))
CUDA(cuMemcpyHtoDAsync_v2, void *to, const void *from, size_t size, void *stream)
    (void)stream;
END(copy(to, from, size, 1, 0))
CUDA(cuMemcpyDtoHAsync_v2, void *to, const void *from, size_t size, void *stream)
    (void)stream;
END(copy(to, from, size, 0, 1))
CUDA(cuMemcpyDtoDAsync_v2, void *to, const void *from, size_t size, void *stream)
    (void)stream;
END(copy(to, from, size, 1, 1))
CUDA(cuMemsetD8Async, void *to, unsigned char value, size_t size, void *stream)
    (void)stream;
    memset(to, value, size);
END(0)
CUDA(cuMemGetInfo_v2, size_t *available, size_t *total)
    *available = memory_bytes - used(context - 1000);
    *total = memory_bytes;
END(0)
CUDA(cuStreamSynchronize, void *stream) (void)stream; END(0)
CUDA(cuStreamIsCapturing, void *stream, int *status) (void)stream; *status = fake_capturing; END(0)
CALL(cuThreadExchangeStreamCaptureMode, int *mode) END(exchange(mode))
CALL(cuPointerGetAttribute, void *value, int attribute, uintptr_t pointer)
    int i = find((void *)pointer);
    if (i < 0) return INVALID_VALUE;
    *(int *)value = attribute == 2 ? 2 : allocations[i].device;
END(0)
CUDA(cuModuleLoadData, void **module, const void *image) END(load(module, image))
CUDA(cuModuleUnload, void *module) END(unload(module))
CUDA(cuModuleGetFunction, void **result, void *module, const char *symbol)
    (void)module;
END(function(result, symbol))
CUDA(cuFuncSetAttribute, void *kernel, int attribute, int value)
    (void)kernel;
    if (attribute == 8) fake_max_dynamic_bytes = value;
END(0)
CUDA(cuLaunchKernel, void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
     unsigned bz, unsigned bytes, void *stream, void **values, void **extra)
    (void)extra;
END(record(context - 1000, kernel, (unsigned[]){gx, gy, gz, bx, by, bz, bytes}, stream, values))
CUDA(cuLaunchKernelEx, const struct launch *launch, void *kernel, void **values, void **extra)
    (void)extra;
    for (unsigned i = 0; i < launch->number; i++)  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        fake_early_launches += launch->attributes[i].id == 6 && launch->attributes[i].value[0] == 1;
END(record(context - 1000, kernel, launch->shape, launch->stream, values))
CUDA(cuStreamCreate, void **made, unsigned flags) (void)flags; END(stream_made(made))
CUDA(cuStreamDestroy_v2, void *made) END(no_stream(made))
CUDA(cuStreamBeginCapture_v2, void *stream, int mode) (void)stream; (void)mode; END(capture_begins())
CUDA(cuStreamEndCapture, void *stream, void **graph) (void)stream; END(capture_ends(graph))
CUDA(cuGraphInstantiateWithFlags, void **made, void *graph, unsigned long long flags)
    (void)flags;
END(instantiate(made, graph))
CUDA(cuGraphLaunch, void *instance, void *stream) END(replayed(instance, stream))
CUDA(cuGraphDestroy, void *graph) END(no_graph(graph))
CUDA(cuGraphExecDestroy, void *instance) END(no_graph(instance))
CUDA(cuEventCreate, void **made, unsigned flags) (void)flags; END(event(made))
CUDA(cuEventDestroy_v2, void *made) END(no_event(made))
CUDA(cuEventRecord, void *made, void *stream) (void)made; (void)stream; END(0)
CUDA(cuEventSynchronize, void *made) (void)made; END(0)
CUDA(cuEventElapsedTime_v2, float *milliseconds, void *start, void *stop)
    (void)start; (void)stop;
    *milliseconds = 1.5f;
END(0)

#include <dlfcn.h>
EXPORT int cuGetProcAddress_v2(const char *symbol, void **result, int version, uint64_t flags, int *status) {
    char name[128];
    (void)version; (void)flags;
    void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
    snprintf(name, sizeof name, "%s_v2", symbol);
    *result = dlsym(self, name);
    if (!*result) *result = dlsym(self, symbol);
    if (status) *status = *result ? 0 : 1;
    return *result ? 0 : NOT_FOUND;
}
EXPORT int cuGetProcAddress(const char *symbol, void **result, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, result, version, flags, NULL);
}
