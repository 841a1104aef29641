// The instructions of the kernels' ptx.cuh that the fused operators need.
#pragma once

#include "emulated.hpp"

inline float float_of_half(u32 bits) {
    const u32 sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    const float size = __uint_as_float(rest << 13) * 0x1p112f;  // exact, for subnormal numbers too
    return sign ? -size : size;
}

inline float float_of_bfloat(u32 bits) { return __uint_as_float(bits << 16); }

inline u32 half_of_float(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (x != x) return 0x7fff;
    if (fabsf(x) >= 65520.0f) return sign | 0x7c00;
    if (fabsf(x) < 0x1p-14f) return sign | (u32)nearbyintf(fabsf(x) * 0x1p24f);
    return sign | (size + 0xfff + (size >> 13 & 1)) / 0x2000 - (112 << 10);
}

inline u32 half2_of_floats(float low, float high) { return half_of_float(low) | half_of_float(high) << 16; }

inline u32 bfloat_of_float(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 bfloat2_of_floats(float low, float high) { return bfloat_of_float(low) | bfloat_of_float(high) << 16; }

inline u32 mul_half2(u32 a, u32 b) {
    return half2_of_floats(float_of_half(a) * float_of_half(b), float_of_half(a >> 16) * float_of_half(b >> 16));
}

inline u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    auto fma = [](u32 x, u32 y, u32 z) { return float_of_bfloat(x) * float_of_bfloat(y) + float_of_bfloat(z); };
    return bfloat2_of_floats(fma(a & 0xffff, b & 0xffff, c & 0xffff), fma(a >> 16, b >> 16, c >> 16));
}

inline u32 shared_address(const void* p) { return (u32)((const char*)p - __start_shared_memory); }
inline void let_next_kernel_start() {}
inline void wait_for_earlier_kernels() {}

// d += a [16, 16] * b [16, 8], from the fragments of all lanes.
template <typename Number>
inline void multiply_matrices(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Number number) {
    float left[16][16], right[16][8];
    const Words* given = meet(a[0], a[1], a[2], a[3]);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 8; i++)
            left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                number(given[lane].of[i / 2] >> i % 2 * 16);
    given = meet(b0, b1);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            right[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = number(given[lane].of[i / 2] >> i % 2 * 16);
    const int row = lane_of_this() / 4, column = lane_of_this() % 4 * 2;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) d[i] += left[row + i / 2 * 8][k] * right[k][column + i % 2];
    meet();  // nobody gives anew while another still reads
}
