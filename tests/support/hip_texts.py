"""Small HIP texts without headers, for the tests of the compilers."""

from q4jit.targets import Target

_GEMV = """\
typedef unsigned u32x4 __attribute__((ext_vector_type(4)));
typedef int i32x4 __attribute__((ext_vector_type(4)));
typedef short bf16x4 __attribute__((ext_vector_type(4)));
typedef float f32x4 __attribute__((ext_vector_type(4)));
#define KERNEL extern "C" __attribute__((global, amdgpu_flat_work_group_size(256, 256)))
constexpr int WAVE = {wave};

// y[n] = sum over 32-blocks of scale * x_scale * sum of (q - 8) * x, with int8 x
KERNEL void gemv(const u32x4* quants, const float* scales, const i32x4* x, const float* x_scales,
                 float* y, int blocks) {{
    __attribute__((shared)) static float partial[256 / WAVE];
    const int thread = __builtin_amdgcn_workitem_id_x();
    const int n = __builtin_amdgcn_workgroup_id_x();
    float sum = 0;
    for (int b = thread; b < blocks; b += 256) {{
        const u32x4 q = quants[(long)n * blocks + b];
        int dot = 0, ones = 0;
        for (int i = 0; i < 4; ++i) {{
            dot = {dot}(q[i] & 0x0F0F0F0F, x[2 * b][i], dot);
            dot = {dot}((q[i] >> 4) & 0x0F0F0F0F, x[2 * b + 1][i], dot);
            ones = {dot}(0x08080808, x[2 * b][i], ones);
            ones = {dot}(0x08080808, x[2 * b + 1][i], ones);
        }}
        sum = __builtin_fmaf(scales[(long)n * blocks + b] * x_scales[b], (float)(dot - ones), sum);
    }}
    for (int mask = WAVE / 2; mask > 0; mask /= 2) {{
        const int other = ((thread & (WAVE - 1)) ^ mask) * 4;
        sum += __builtin_bit_cast(
            float, __builtin_amdgcn_ds_bpermute(other, __builtin_bit_cast(int, sum)));
    }}
    if (thread % WAVE == 0) partial[thread / WAVE] = sum;
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
    if (thread == 0) {{
        float total = 0;
        for (int i = 0; i < 256 / WAVE; ++i) total += partial[i];
        y[n] = total;
    }}
}}
"""
_TILE = """
KERNEL void tile(const bf16x4* a, const bf16x4* b, f32x4* y, int steps) {
    const int thread = __builtin_amdgcn_workitem_id_x();
    f32x4 sum = 0;
    for (int k = 0; k < steps; ++k) {
        const int at = k * 256 + thread;
        sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(a[at], b[at], sum, 0, 0, 0);
    }
    y[thread] = sum;
}
"""
_NVIDIA = """\
extern "C" __global__ void scale(const float* x, float* y, float factor) {
    y[threadIdx.x] = x[threadIdx.x] * factor;
}
"""
_SDOT4 = "#define DOT(a, b, c) __builtin_amdgcn_sdot4((int)(a), b, c, false)\n"
_SUDOT4 = "#define DOT(a, b, c) __builtin_amdgcn_sudot4(true, (int)(a), true, b, c, false)\n"


def hip_text(target: Target) -> str:
    """Return a Q4_0 gemv with dot instructions, LDS and a barrier; for gfx90a a tile too."""
    if target.hip.is_nvidia:
        return _NVIDIA
    dot = _SDOT4 if target.hip.dot == "sdot4" else _SUDOT4
    gemv = dot + _GEMV.format(wave=target.hip.wave, dot="DOT")
    return gemv + (_TILE if target.arch == "gfx90a" else "")
