// y = x / sqrt(mean(x^2) + eps) * weight, a block a row; with ADD, residual += x comes first and is what is normalised.
//
// The row stays in registers between the sum and the product.
#include "fused.cuh"

constexpr int kHidden = HIDDEN;    // of a row, a multiple of 8
constexpr int kThreads = THREADS;
constexpr int kVectors = (kHidden / 8 + kThreads - 1) / kThreads;  // of a thread
constexpr int kWaves = kThreads / kLanes;

extern "C" __global__ void __launch_bounds__(kThreads) fused_norm(
    const u16* x,                       // [m, hidden]
    u16* residual,                      // [m, hidden], added to in place; unused without ADD
    const float* __restrict__ weight,   // [hidden]
    u16* y,                             // [m, hidden] out
    float eps) {
    __shared__ float sums[kWaves];
    auto exists = [&](int i) { return kHidden / 8 % kThreads == 0 || threadIdx.x + i * kThreads < kHidden / 8; };
    auto column = [&](int i) { return (threadIdx.x + i * kThreads) * 8; };
    let_next_kernel_start();
    float scale[kVectors][8];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) load_constant_8(scale[i], weight + column(i));
    wait_for_earlier_kernels();

    const u64 row = (u64)blockIdx.x * kHidden;
    uint4 words[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) words[i] = load_8(x + row + column(i));
#if ADD
    uint4 more[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) more[i] = load_8(residual + row + column(i));
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) {
            float a[8], b[8];
            floats_of_8(a, words[i]);
            floats_of_8(b, more[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) a[j] += b[j];
            words[i] = activations_of_8(a);
            store_8(residual + row + column(i), words[i]);
        }
#endif
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) {
            float a[8];
            floats_of_8(a, words[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += a[j] * a[j];
        }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) sum += of_other_lane(sum, mask);
    if (threadIdx.x % kLanes == 0) sums[threadIdx.x / kLanes] = sum;
    __syncthreads();
    sum = sums[0];
#pragma unroll
    for (int w = 1; w < kWaves; w++) sum += sums[w];
    const float factor = rsqrtf(sum * (1.0f / kHidden) + eps);
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) {
            float a[8];
            floats_of_8(a, words[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) a[j] = a[j] * factor * scale[i][j];
            store_8(y + row + column(i), activations_of_8(a));
        }
}
