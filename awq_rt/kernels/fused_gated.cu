// y = activation(gate) * up, where a row holds all of gate and then all of up.
#include "fused.cuh"

constexpr u32 kVectors = WIDTH / 8;  // of a row of y
constexpr int kThreads = THREADS;

// ACTIVATION is one of awq_rt.ops.ACTIVATIONS, in upper case.
#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU 3

// 1 - erf(z) for z >= 0, to 1.4 units of float32 and what its exponent rounds: t exp(-z^2 + P(t)), t = 1 / (1 + z / 2), where P
// was fitted in 40 digits to what is right.
__device__ __forceinline__ float complement_of_erf(float z) {
    const float t = reciprocal_of(1.0f + 0.5f * z);
    const float of[] = {0.14804606f, -0.69753759f, 1.19532758f,  -0.74646991f, -0.03986632f,
                        -0.01950800f, 0.04139597f, 0.38528362f, 0.99878246f,  -1.26545489f};
    float p = of[0];
#pragma unroll
    for (int i = 1; i < 10; i++) p = p * t + of[i];
    return t * exp2_of(kLog2E * (p - z * z));
}

__device__ __forceinline__ float activated(float x) {
#if ACTIVATION == RELU
    return x < 0.0f ? 0.0f : x;  // NaN stays
#elif ACTIVATION == GELU
    const float outside = 0.5f * complement_of_erf((x < 0.0f ? -x : x) * 0.7071067811865476f);
    return x * (x < 0.0f ? outside : 1.0f - outside);
#else
    // tanh(z) = 2 sigmoid(2 z) - 1, so both are a sigmoid.
    const float z = ACTIVATION == SILU ? x : x * (1.5957691216057308f + 0.07135481627260025f * x * x);
    return x * reciprocal_of(1.0f + exp2_of(-kLog2E * z));
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads) fused_gated(
    const u16* gate_up,  // [m, 2 width]
    u16* y,              // [m, width] out
    u32 vectors) {       // m * width / 8
    let_next_kernel_start();
    wait_for_earlier_kernels();
    for (u32 at = blockIdx.x * kThreads + threadIdx.x; at < vectors; at += gridDim.x * kThreads) {
        const u32 row = at / kVectors;
        const u16* from = gate_up + ((u64)at + (u64)row * kVectors) * 8;
        const uint4 gate_words = load_8(from), up_words = load_8(from + kVectors * 8);
        float gate[8], up[8];
        floats_of_8(gate, gate_words);
        floats_of_8(up, up_words);
#pragma unroll
        for (int j = 0; j < 8; j++) gate[j] = activated(gate[j]) * up[j];
        store_8(y + (u64)at * 8, activations_of_8(gate));
    }
}
