// The matrix units behind one interface: y[16 rows of x, 16 columns] += x w over 32 rows of k, a word of codes in each chunk.
//
// A lane brings the same chunks for x and for w: eights of consecutive k, those of the quarters that `quarter_of` names.
// Which quarters meet in one instruction, and where results lie, is all in which the units differ:
//
//   MFMA            chunk = quarter lane / 16, 4 or 8 of k an instruction      result j: row 4 (lane / 16) + j
//   WMMA repeated   all four quarters in both halves, 16 of k an instruction   result j: row 2 j + lane / 16
//   WMMA split      quarters 2 c + lane / 16, 8 of k a lane and instruction    result j: row 8 (lane / 16) + j
//
// The column of a result is lane % 16 everywhere. Sources: AMD's instruction set manuals for CDNA3, RDNA3 and RDNA4.
#pragma once
#include "tile.h"

#if MATRIX == MATRIX_MFMA_16 || MATRIX == MATRIX_MFMA_32
constexpr u32 kUnitChunks = 1, kFewRows = 4;  // the unit's rows 0, 4, 8 and 12
using Results = floats4;
__device__ __forceinline__ u32 quarter_of(u32, u32 lane) { return lane / 16; }
__device__ __forceinline__ u32 result_row(u32 j, u32 lane) { return 4 * (lane / 16) + j; }
#elif MATRIX == MATRIX_WMMA_REPEATED
constexpr u32 kUnitChunks = 4, kFewRows = 0;
using Results = floats8;
__device__ __forceinline__ u32 quarter_of(u32 chunk, u32) { return chunk; }
__device__ __forceinline__ u32 result_row(u32 j, u32 lane) { return 2 * j + lane / 16; }
#elif MATRIX == MATRIX_WMMA_SPLIT
constexpr u32 kUnitChunks = 2, kFewRows = 0;
using Results = floats8;
__device__ __forceinline__ u32 quarter_of(u32 chunk, u32 lane) { return 2 * chunk + lane / 16; }
__device__ __forceinline__ u32 result_row(u32 j, u32 lane) { return 8 * (lane / 16) + j; }
#else
#error "this architecture has no matrix unit that the kernels know"
#endif
constexpr u32 kResults = sizeof(Results) / 4;

#if ACTIVATION_HALF
template <int count>
using Vector = f16 __attribute__((ext_vector_type(count)));
#define UNIT(half_name, bfloat_name) __builtin_amdgcn_##half_name
#elif MATRIX == MATRIX_MFMA_32
template <int count>
using Vector = __bf16 __attribute__((ext_vector_type(count)));
#define UNIT(half_name, bfloat_name) __builtin_amdgcn_##bfloat_name
#else
template <int count>
using Vector = short __attribute__((ext_vector_type(count)));
#define UNIT(half_name, bfloat_name) __builtin_amdgcn_##bfloat_name
#endif

// The lanes of one instruction hold 32 consecutive k. Where those share a group, small integers are multiplied and a group's
// sums are scaled; elsewhere weights are scaled, and rounded once.
constexpr bool kScaleWeights = kGroup % 32 != 0;

// A word's eight weights as activations.
__device__ __forceinline__ words4 weights_of_word(u32 word, GroupConstants group) {
    const float scale = scale_of(group);
    f16x2 pairs[4];
    dequantize(pairs, word, zero_pair(group));
    words4 eight;
#pragma unroll
    for (int i = 0; i < 4; i++) eight[i] = activations_of_floats((float)pairs[i].x * scale, (float)pairs[i].y * scale);
    return eight;
}

#if ACTIVATION_HALF
constexpr bool kOffset = false;

// A word's eight codes less their zero point.
__device__ __forceinline__ words4 operands_of_word(u32 word, GroupConstants group) {
    f16x2 pairs[4];
    dequantize(pairs, word, zero_pair(group));
    return {bits_as<u32>(pairs[0]), bits_as<u32>(pairs[1]), bits_as<u32>(pairs[2]), bits_as<u32>(pairs[3])};
}

__device__ __forceinline__ float offset_of(GroupConstants) { return 0; }
#else
constexpr bool kOffset = !kScaleWeights;

// A word's eight codes plus 16: 0x4180 is 16, and a code in the upper four bits of its mantissa counts sixteenths of that.
__device__ __forceinline__ words4 operands_of_word(u32 word, GroupConstants) {
    const u32 mask = 0x00780078u, sixteen = 0x41804180u;
    return {and_or(word << 3, mask, sixteen), and_or(word >> 1, mask, sixteen), and_or(word >> 5, mask, sixteen),
            and_or(word >> 9, mask, sixteen)};
}

// 16 + z, made in the same way of float32's bits.
__device__ __forceinline__ float offset_of(GroupConstants group) {
    return bits_as<float>(and_or(zero_bytes(group) >> 9, 0x00780000u, 0x41800000u));
}
#endif

struct Halves {
    u64 low, high;
};
struct Sixteen {
    words4 low, high;
};

__device__ __forceinline__ Results multiply(const words4 (&x)[kUnitChunks], const words4 (&w)[kUnitChunks], Results sums) {
#if MATRIX == MATRIX_MFMA_32
    sums = UNIT(mfma_f32_16x16x32_f16, mfma_f32_16x16x32_bf16)(
        bits_as<Vector<8>>(x[0]), bits_as<Vector<8>>(w[0]), sums, 0, 0, 0);
#elif MATRIX == MATRIX_MFMA_16
    const Halves left = bits_as<Halves>(x[0]), right = bits_as<Halves>(w[0]);
    sums = UNIT(mfma_f32_16x16x16f16, mfma_f32_16x16x16bf16_1k)(
        bits_as<Vector<4>>(left.low), bits_as<Vector<4>>(right.low), sums, 0, 0, 0);
    sums = UNIT(mfma_f32_16x16x16f16, mfma_f32_16x16x16bf16_1k)(
        bits_as<Vector<4>>(left.high), bits_as<Vector<4>>(right.high), sums, 0, 0, 0);
#elif MATRIX == MATRIX_WMMA_REPEATED
#pragma unroll
    for (int i = 0; i < 4; i += 2)
        sums = UNIT(wmma_f32_16x16x16_f16_w32, wmma_f32_16x16x16_bf16_w32)(
            bits_as<Vector<16>>(Sixteen{x[i], x[i + 1]}), bits_as<Vector<16>>(Sixteen{w[i], w[i + 1]}), sums);
#else
#pragma unroll
    for (int i = 0; i < 2; i++)
        sums = UNIT(wmma_f32_16x16x16_f16_w32_gfx12, wmma_f32_16x16x16_bf16_w32_gfx12)(
            bits_as<Vector<8>>(x[i]), bits_as<Vector<8>>(w[i]), sums);
#endif
    return sums;
}

// The sums of rows of x, in every column.
__device__ __forceinline__ Results add_rows(const words4 (&x)[kUnitChunks], Results sums) {
    const u32 ones = ACTIVATION_HALF ? 0x3C003C00u : 0x3F803F80u;
    words4 w[kUnitChunks];
#pragma unroll
    for (u32 c = 0; c < kUnitChunks; c++) w[c] = words4{ones, ones, ones, ones};
    return multiply(x, w, sums);
}
