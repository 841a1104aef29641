// bfloat16, which most architectures have no instructions for.
#pragma once
#include "platform.h"

__device__ __forceinline__ float float_of_bfloat(u16 bits) { return bits_as<float>((u32)bits << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ u16 bfloat_of_float(float value) {
    const u32 bits = bits_as<u32>(value);
    const u32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return (u16)(value != value ? bits >> 16 | 0x40u : rounded);
}
