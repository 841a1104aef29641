// Adds up the parts of fused_attention*.cu where blocks cannot read each other's shared memory. A block a head.
#include "fused_attention.cuh"

extern "C" __global__ void __launch_bounds__(kHeadDim / 4) fused_attention_sum(
    const float* parts_of_heads,  // [rows * heads, parts, head_dim + 4]
    u16* y,                       // [rows * heads, head_dim] out
    u32 parts) {
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const float* from = parts_of_heads + (u64)blockIdx.x * parts * kPartStride;
    const Weights<kMostParts> weights(parts, [&](int p) {
        return *reinterpret_cast<const float2*>(from + p * kPartStride + kHeadDim);
    });
    const u32 feature = threadIdx.x * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int p = 0; p < kMostParts; p++)
        if (p < parts)
            add_weighted(sum, weights.of[p], *reinterpret_cast<const float4*>(from + p * kPartStride + feature));
    write_quad(y, (u64)blockIdx.x * kHeadDim + feature, sum, weights.total);
}
