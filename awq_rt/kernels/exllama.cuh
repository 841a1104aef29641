// ExLlama-v2's form of a weight, in strips: what the product and the dequantising kernel share.
//
//   codes   [strips, k / 8, 8] words: strip s holds columns 8 s .. 8 s + 7, a word 8 codes of one column
//   word    bits  0..3  k + 0    4..7  k + 2    8..11  k + 4   12..15  k + 6
//                16..19 k + 1   20..23 k + 3   24..27  k + 5   28..31  k + 7
//   scales  [strips, groups, 8], zero points [strips, groups, 8] nibbles, the first column in the low one
//
// The shuffle puts neighbours k, k + 1 into the two halves of a register, where one mask makes them a pair of floats.
// Nothing is padded: k and n are multiples of 8, and a group is whole words.
//
// Of the platform: and_or, sub_half2, fma_half2, fma_bfloat2, load_once.
#pragma once

#include "activations.cuh"

constexpr int kGroupSize = GROUP_SIZE;
static_assert(kGroupSize % 8 == 0, "a word has one scale");

// A column's zero point as the two pairs that are subtracted, see tile.cuh for why each step is exact.
struct ZeroPair {
    u32 low, high;
};

// weights[i] = code k + i minus zero point for the four codes k..k+3 in the low byte of each half of `bits`: integers,
// exact in 16 bits, two an instruction.
#if ACTIVATION_HALF
__device__ __forceinline__ ZeroPair zero_pair(u32 zero) {
    return {0x64006400u | zero * 0x00010001u, 0xD400D400u | zero * 0x00100010u};
}

__device__ __forceinline__ void four_weights(float (&weights)[4], u32 bits, ZeroPair zero) {
    const u32 sixteenth = 0x2C002C00u;
    floats_of_half2(weights[0], weights[1], sub_half2(and_or(bits, 0x000F000Fu, 0x64006400u), zero.low));
    floats_of_half2(weights[2], weights[3],
                    fma_half2(and_or(bits, 0x00F000F0u, 0x64006400u), sixteenth, zero.high));
}

#else
__device__ __forceinline__ ZeroPair zero_pair(u32 zero) {
    return {0xC300C300u | zero * 0x00010001u, 0xC300C300u | zero * 0x00010001u};
}

__device__ __forceinline__ void four_weights(float (&weights)[4], u32 bits, ZeroPair zero) {
    const u32 one = 0x3F803F80u;
    floats_of_bfloat2(weights[0], weights[1], fma_bfloat2(and_or(bits, 0x000F000Fu, 0x43004300u), one, zero.low));
    floats_of_bfloat2(weights[2], weights[3],
                      fma_bfloat2(and_or(bits >> 4, 0x000F000Fu, 0x43004300u), one, zero.high));
}
#endif

// Four columns' scales as the checkpoint holds them.
#if SCALE_KIND == 2
typedef float4 Scales;
__device__ __forceinline__ float4 floats_of_scales(Scales scales) { return scales; }
#else
typedef uint2 Scales;
__device__ __forceinline__ float4 floats_of_scales(Scales scales) {
    float4 d;
#if SCALE_KIND == 0
    floats_of_half2(d.x, d.y, scales.x);
    floats_of_half2(d.z, d.w, scales.y);
#else
    floats_of_bfloat2(d.x, d.y, scales.x);
    floats_of_bfloat2(d.z, d.w, scales.y);
#endif
    return d;
}
#endif

__device__ __forceinline__ u32 word_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

__device__ __forceinline__ float element_of(const float4& values, int i) {
    return i == 0 ? values.x : i == 1 ? values.y : i == 2 ? values.z : values.w;
}
