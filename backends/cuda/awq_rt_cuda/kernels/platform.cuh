// What exllama*.cu need of a GPU, in NVIDIA's words. They name nothing of a vendor's but what stands here, in CUDA's and
// HIP's common language: another vendor's backend brings a file of this name with the same functions.
//
// ACTIVATION_HALF and SCALE_KIND as in number.cuh. A pair is two 16-bit floats in a register, the first in its low half.
#pragma once

#include "ptx.cuh"  // u8 to u64, and_or, sub_half2, fma_half2, fma_bfloat2, half2_of_floats, bfloat2_of_floats,
                    // load_once, let_next_kernel_start, wait_for_earlier_kernels

constexpr int kLanes = 32;  // of a wave, which executes together; a power of two of at least 8

__device__ __forceinline__ void floats_of_half2(float& low, float& high, u32 pair) {
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(pair));
}

__device__ __forceinline__ void floats_of_bfloat2(float& low, float& high, u32 pair) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000u);
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float of_other_lane(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// What lanes of this wave wrote to shared memory before it is visible to all of them after it.
__device__ __forceinline__ void wave_barrier() { __syncwarp(); }
