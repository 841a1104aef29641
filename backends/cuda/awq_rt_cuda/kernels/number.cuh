// The two 16-bit floats a kernel may be compiled for. ACTIVATION_HALF: 1 float16, 0 bfloat16.
// SCALE_KIND: 0 float16, 1 bfloat16, 2 float32: what the checkpoint holds, kept as it is.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ACTIVATION_HALF
    mma_half(d, a, b0, b1);
#else
    mma_bfloat(d, a, b0, b1);
#endif
}

__device__ __forceinline__ u32 activations_of_floats(float low, float high) {
#if ACTIVATION_HALF
    return half2_of_floats(low, high);
#else
    return bfloat2_of_floats(low, high);
#endif
}

__device__ __forceinline__ u32 mul_activations(u32 a, u32 b) {
#if ACTIVATION_HALF
    return mul_half2(a, b);
#else
    return fma_bfloat2(a, b, 0x80008000u);  // a product minus zero is the product, and its sign
#endif
}

#if SCALE_KIND == 2
typedef float2 ScalePair;
__device__ __forceinline__ float low_scale(ScalePair pair) { return pair.x; }
__device__ __forceinline__ float high_scale(ScalePair pair) { return pair.y; }
#else
typedef u32 ScalePair;
#if SCALE_KIND == 0
__device__ __forceinline__ float low_scale(ScalePair pair) { return float_of_half(pair); }
__device__ __forceinline__ float high_scale(ScalePair pair) { return float_of_half(pair >> 16); }
#else
__device__ __forceinline__ float low_scale(ScalePair pair) { return float_of_bfloat(pair); }
__device__ __forceinline__ float high_scale(ScalePair pair) { return __uint_as_float(pair & 0xFFFF0000u); }
#endif
#endif
