// What fused_attention_mma.cu needs of the matrix unit, beside what all fused operators share.
#pragma once

#include "fused_attention.cuh"

// {low half of a, low half of b}, or their high halves.
__device__ __forceinline__ u32 pair_of(u32 a, u32 b, bool high) { return __byte_perm(a, b, high ? 0x7632 : 0x5410); }

// The 8 x 8 matrix of 16-bit numbers whose row r lies in lanes 4 r to 4 r + 3, transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
    return d;
}

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if ACTIVATION_HALF
    mma_half(d, a, b0, b1);
#else
    mma_bfloat(d, a, b0, b1);
#endif
}
