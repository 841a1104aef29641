// What the fused operators share: 8 activations are one load of 16 bytes, all arithmetic is float32.
//
// Of the platform: load_8, load_fresh, exp2_of, reciprocal_of; for attention shared_address, cluster_arrive, cluster_wait,
// store_first_4, which nobody calls where TO_PARTS is set.
#pragma once

#include "activations.cuh"

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ void floats_of_8(float (&d)[8], const uint4& v) {
    floats_of_activations(d[0], d[1], v.x);
    floats_of_activations(d[2], d[3], v.y);
    floats_of_activations(d[4], d[5], v.z);
    floats_of_activations(d[6], d[7], v.w);
}

__device__ __forceinline__ uint4 activations_of_8(const float (&x)[8]) {
    return make_uint4(activations_of_floats(x[0], x[1]), activations_of_floats(x[2], x[3]),
                      activations_of_floats(x[4], x[5]), activations_of_floats(x[6], x[7]));
}

__device__ __forceinline__ void store_8(u16* p, const uint4& v) { *reinterpret_cast<uint4*>(p) = v; }

// 8 floats that no kernel of this step writes: a norm's weight, a table.
__device__ __forceinline__ void load_constant_8(float (&d)[8], const float* p) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(p)), high = __ldg(reinterpret_cast<const float4*>(p) + 1);
    d[0] = low.x, d[1] = low.y, d[2] = low.z, d[3] = low.w;
    d[4] = high.x, d[5] = high.y, d[6] = high.z, d[7] = high.w;
}
