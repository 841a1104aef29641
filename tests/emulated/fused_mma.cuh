// The kernels' fused_mma.cuh on a CPU.
#pragma once

#include "fused_attention.cuh"

inline u32 pair_of(u32 a, u32 b, bool high) { return high ? a >> 16 | (b & 0xffff0000u) : (a & 0xffff) | b << 16; }

inline u32 transposed(u32 x) {
    const Words* given = meet(x);
    const u32 row = lane_of_this() / 4, quad = lane_of_this() % 4;
    auto at = [&](u32 r, u32 c) { return given[r * 4 + c / 2].of[0] >> c % 2 * 16 & 0xffff; };
    return at(quad * 2, row) | at(quad * 2 + 1, row) << 16;
}

inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_matrices(d, a, b0, b1, [](u32 bits) {
        return ACTIVATION_HALF ? float_of_half(bits & 0xffff) : float_of_bfloat(bits & 0xffff);
    });
}
