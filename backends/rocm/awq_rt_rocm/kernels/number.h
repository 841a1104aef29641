// Number types: what activations and scales are stored as, and how a word of eight codes becomes numbers.
//
// ACTIVATION_HALF  1: x and y are float16, 0: bfloat16
// SCALE_KIND       0: float16, 1: bfloat16, 2: float32
#pragma once
#include "bfloat.h"

// A group's scale and zero point of one column, as they lie in memory: one load brings both.
#if SCALE_KIND == 2
using GroupConstants = words2;  // the scale; then z in byte 2, 16 z in byte 3
#else
using GroupConstants = u32;  // the scale in the low half, z in byte 2, 16 z in byte 3
#endif

__device__ __forceinline__ float scale_of(GroupConstants group) {
#if SCALE_KIND == 0
    return (float)bits_as<f16>((u16)group);
#elif SCALE_KIND == 1
    return float_of_bfloat((u16)group);
#else
    return bits_as<float>(group.x);
#endif
}

// z in byte 2 and 16 z in byte 3; the other bytes hold something else.
__device__ __forceinline__ u32 zero_bytes(GroupConstants group) {
#if SCALE_KIND == 2
    return group.y;
#else
    return group;
#endif
}

__device__ __forceinline__ u16 activation_of_float(float value) {
#if ACTIVATION_HALF
    return bits_as<u16>((f16)value);
#else
    return bfloat_of_float(value);
#endif
}

__device__ __forceinline__ u32 activations_of_floats(float low, float high) {
    return activation_of_float(low) | (u32)activation_of_float(high) << 16;
}

// A zero point as the two constants that `dequantize` adds: -(1024 + z) and -(64 + z), each twice.
struct ZeroPair {
    f16x2 low, high;
};

__device__ __forceinline__ ZeroPair zero_pair(GroupConstants group) {
    // 0xE400 is -1024 and 0xD400 is -64; a unit is bit 0 of the first and bit 4 of the second.
    const u32 bytes = zero_bytes(group);
    return {bits_as<f16x2>(permuted_bytes(bytes, 0xE400u, 0x01060106u)),
            bits_as<f16x2>(permuted_bytes(bytes, 0xD400u, 0x01070107u))};
}

// The eight codes of a word less their zero point, in the order of k: exact, because every number here is an integer of at
// most 11 bits, or one 16 times as large. 0x6400 is 1024, whose unit in the last place is 1: 0x6400 | c is 1024 + c, and
// with the code four bits higher 1024 + 16 c, a sixteenth of which is 64 + c.
__device__ __forceinline__ void dequantize(f16x2 (&pairs)[4], u32 word, ZeroPair zero) {
    const f16x2 sixteenth = {(f16)0.0625f, (f16)0.0625f};
    const u32 later = word >> 8;
    pairs[0] = bits_as<f16x2>(and_or(word, 0x000F000Fu, 0x64006400u)) + zero.low;
    pairs[1] = bits_as<f16x2>(and_or(word, 0x00F000F0u, 0x64006400u)) * sixteenth + zero.high;
    pairs[2] = bits_as<f16x2>(and_or(later, 0x000F000Fu, 0x64006400u)) + zero.low;
    pairs[3] = bits_as<f16x2>(and_or(later, 0x00F000F0u, 0x64006400u)) * sixteenth + zero.high;
}
