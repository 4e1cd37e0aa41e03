// Runs a kernel that `q4jit build` made, without Python, and checks it against a loop on the CPU.
//
//     embed_hsaco DIR WEIGHTS FORMAT LAYOUT PRECISION K N M
//
// DIR is the folder of the build; this program was compiled with its q4jit_kernels.h. WEIGHTS is a
// weight [K, N] of FORMAT in LAYOUT, as `q4jit pack` writes it. Formats: Q4_0, Q4_1.

#include <hip/hip_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "q4jit_kernels.h"

namespace {

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "embed_hsaco: %s\n", message.c_str());
    std::exit(1);
}

void check(hipError_t status, const char* what) {
    if (status != hipSuccess)
        fail(std::string(what) + " failed: " + hipGetErrorName(status) + ", " +
             hipGetErrorString(status));
}

std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot open " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

// Memory of the device, freed at the end of its scope.
class Buffer {
  public:
    explicit Buffer(size_t size_bytes) { check(hipMalloc(&address_, size_bytes), "hipMalloc"); }
    Buffer(const void* data, size_t size_bytes) : Buffer(size_bytes) {
        check(hipMemcpy(address_, data, size_bytes, hipMemcpyHostToDevice), "hipMemcpy");
    }
    Buffer(Buffer&& other) noexcept : address_(other.address_) { other.address_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { (void)hipFree(address_); }
    void** argument() { return &address_; }
    const void* address() const { return address_; }

  private:
    void* address_ = nullptr;
};

// The arch of device 0, without the features that HIP appends (gfx90a:sramecc+:xnack-).
std::string device_arch() {
    check(hipInit(0), "hipInit (is there an AMD GPU, and may this user open /dev/kfd?)");
    hipDeviceProp_t properties;
    check(hipGetDeviceProperties(&properties, 0), "hipGetDeviceProperties");
    const std::string name = properties.gcnArchName;
    return name.substr(0, name.find(':'));
}

// The weights and the product, as the command line describes them.
struct Wanted {
    std::string format, layout, precision;
    long long k, n, m;
};

const q4jit_product& find_product(const std::string& arch, const Wanted& wanted,
                                  size_t weight_bytes) {
    const auto& [format, layout, precision, k, n, m] = wanted;
    for (const q4jit_product& product : q4jit_products)
        if (arch == product.arch && format == product.format && layout == product.layout &&
            precision == product.precision && k == product.k && n == product.n &&
            m >= product.m_min && (product.m_max == 0 || m <= product.m_max) &&
            (size_t)product.weight_bytes == weight_bytes)
            return product;
    fail("the build has no kernel for " + arch + ", " + format + ", layout " + layout +
         ", precision " + precision + ", K = " + std::to_string(k) + ", N = " + std::to_string(n) +
         ", M = " + std::to_string(m) + " and weights of " +
         std::to_string(weight_bytes) + " bytes; manifest.json lists its kernels");
}

// Runs all launches of a product, in order, on the default stream.
void run(const q4jit_product& product, const std::string& folder, Buffer& x, Buffer& w, Buffer& y,
         long long m) {
    std::vector<Buffer> scratch;
    for (int i = 0; i < product.scratch_count; ++i)
        scratch.emplace_back((size_t)(product.scratch_bytes_per_row[i] * m));
    for (int i = 0; i < product.launch_count; ++i) {
        const q4jit_launch& launch = product.launches[i];
        hipModule_t module;
        hipFunction_t function;
        check(hipModuleLoad(&module, (folder + "/" + launch.file).c_str()), "hipModuleLoad");
        check(hipModuleGetFunction(&function, module, launch.symbol), "hipModuleGetFunction");
        std::vector<void*> arguments;
        for (const int* role = launch.arguments; *role != Q4JIT_END; ++role) switch (*role) {
            case Q4JIT_X: arguments.push_back(x.argument()); break;
            case Q4JIT_WEIGHTS: arguments.push_back(w.argument()); break;
            case Q4JIT_Y: arguments.push_back(y.argument()); break;
            case Q4JIT_M: arguments.push_back(&m); break;
            default: arguments.push_back(scratch.at((size_t)(*role - Q4JIT_SCRATCH)).argument());
        }
        const long long tiles = (m + launch.rows_per_block - 1) / launch.rows_per_block;
        const long long z = (tiles + Q4JIT_MAX_GRID_Y - 1) / Q4JIT_MAX_GRID_Y;
        const long long rows = tiles < Q4JIT_MAX_GRID_Y ? tiles : Q4JIT_MAX_GRID_Y;
        check(hipModuleLaunchKernel(function, launch.grid_x, (unsigned)rows, (unsigned)z,
                                    launch.block_size, 1, 1, 0, nullptr, arguments.data(), nullptr),
              "hipModuleLaunchKernel");
        check(hipDeviceSynchronize(), "the kernel");
        check(hipModuleUnload(module), "hipModuleUnload");
    }
}

float half_to_float(const char* at) {
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp((float)fraction, -24)
                                       : std::ldexp((float)(fraction + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
}

// Returns the address of a field of a block, in the product's layout.
const char* field(const q4jit_product& product, const std::vector<char>& weights, const char* name,
                  long long column, long long block) {
    const long long blocks = product.k / product.block_elements;
    for (const q4jit_region& region : product.regions)
        if (region.name && !std::strcmp(region.name, name))
            return weights.data() + region.offset_bytes +
                   (column * blocks + block) * region.stride_bytes;
    fail(std::string("the layout has no field ") + name);
}

// Returns w[k, column], decoded from Q4_0 or Q4_1.
float weight_at(const q4jit_product& product, const std::vector<char>& weights, long long k,
                long long column) {
    const long long block = k / 32, i = k % 32;
    const float d = half_to_float(field(product, weights, "d", column, block));
    const unsigned char quants =
        (unsigned char)field(product, weights, "quants0", column, block)[i % 16];
    const int q = i < 16 ? quants & 15 : quants >> 4;
    if (!std::strcmp(product.format, "Q4_0")) return d * (float)(q - 8);
    return d * (float)q + half_to_float(field(product, weights, "m", column, block));
}

// Returns the rms of the error relative to sqrt(sum of (x w)^2), q4jit's measure of precision.
double error_of(const q4jit_product& product, const std::vector<char>& weights,
                const std::vector<float>& x, const std::vector<float>& y, long long m) {
    double squares = 0;
    for (long long column = 0; column < product.n; ++column) {
        std::vector<double> w((size_t)product.k);
        for (long long k = 0; k < product.k; ++k)
            w[(size_t)k] = weight_at(product, weights, k, column);
        for (long long row = 0; row < m; ++row) {
            double sum = 0, size = 0;
            for (long long k = 0; k < product.k; ++k) {
                const double term = x[(size_t)(row * product.k + k)] * w[(size_t)k];
                sum += term;
                size += term * term;
            }
            const double error = y[(size_t)(row * product.n + column)] - sum;
            squares += error * error / (size > 0 ? size : 1);
        }
    }
    return std::sqrt(squares / (double)(m * product.n));
}

}  // namespace

int main(int count, char** arguments) {
    long long sizes[3] = {};
    for (int i = 0; i < 3 && count == 9; ++i) {
        char* end;
        sizes[i] = std::strtoll(arguments[6 + i], &end, 10);
        if (*end) sizes[i] = 0;
    }
    const auto [k, n, m] = sizes;
    if (k < 1 || n < 1 || m < 1)
        fail("usage: embed_hsaco DIR WEIGHTS FORMAT LAYOUT PRECISION K N M; "
             "K, N and M are whole numbers from 1");
    const std::string folder = arguments[1];
    const std::vector<char> weights = read_file(arguments[2]);
    const q4jit_product& product = find_product(
        device_arch(), {arguments[3], arguments[4], arguments[5], k, n, m}, weights.size());
    if (std::strcmp(product.format, "Q4_0") && std::strcmp(product.format, "Q4_1"))
        fail(std::string("this example decodes Q4_0 and Q4_1 only, not ") + product.format);

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> x((size_t)(m * product.k)), y((size_t)(m * product.n));
    for (float& value : x) value = normal(random);

    Buffer x_device(x.data(), 4 * x.size()), w_device(weights.data(), weights.size());
    Buffer y_device(4 * y.size());
    run(product, folder, x_device, w_device, y_device, m);
    check(hipMemcpy(y.data(), y_device.address(), 4 * y.size(), hipMemcpyDeviceToHost),
          "hipMemcpy");
    const double error = error_of(product, weights, x, y, m);
    const double bound = !std::strcmp(product.precision, "f32")   ? 2e-6
                         : !std::strcmp(product.precision, "f16") ? 5e-4
                                                                  : 2e-2;
    std::printf("%s, M = %lld: rms error %.2e, bound %.0e\n", product.name, m, error, bound);
    return error < bound ? 0 : 1;
}
