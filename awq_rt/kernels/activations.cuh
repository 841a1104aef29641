// The 16-bit floats that activations are, two to a register, the first in its low half. ACTIVATION_HALF: 1 float16,
// 0 bfloat16.
//
// Of the platform: u8 to u64, kLanes, floats_of_half2, floats_of_bfloat2, half2_of_floats, bfloat2_of_floats,
// of_other_lane, wave_barrier, let_next_kernel_start, wait_for_earlier_kernels.
#pragma once

#include "platform.cuh"

__device__ __forceinline__ void floats_of_activations(float& low, float& high, u32 pair) {
#if ACTIVATION_HALF
    floats_of_half2(low, high, pair);
#else
    floats_of_bfloat2(low, high, pair);
#endif
}

__device__ __forceinline__ u32 activations_of_floats(float low, float high) {
#if ACTIVATION_HALF
    return half2_of_floats(low, high);
#else
    return bfloat2_of_floats(low, high);
#endif
}
