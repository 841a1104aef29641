// The kernels' platform.cuh on a CPU.
#pragma once

#include "ptx.cuh"

constexpr int kLanes = 32;

inline void floats_of_half2(float& low, float& high, u32 pair) {
    low = float_of_half(pair & 0xffff), high = float_of_half(pair >> 16);
}

inline void floats_of_bfloat2(float& low, float& high, u32 pair) {
    low = float_of_bfloat(pair & 0xffff), high = float_of_bfloat(pair >> 16);
}

inline float of_other_lane(float value, int mask) {
    return __uint_as_float(meet(__float_as_uint(value))[lane_of_this() ^ mask].of[0]);
}
