// One head's features over a team of lanes, so that a rotation never leaves a lane.
//
// A lane holds two vectors of 8 features, `first` and `second`:
//
//   half-split rotation      i and i + rotary_dim / 16     feature 8 i + j turns with 8 i + j + rotary_dim / 2
//   interleaved, or none     2 i and 2 i + 1               feature 2 i turns with 2 i + 1
//
// Either way the lane of index i, where its features are rotated, needs the angles 8 i to 8 i + 7.
#pragma once

#include "fused.cuh"

constexpr int kHeadDim = HEAD_DIM;    // a multiple of 16
constexpr int kRotaryDim = ROTARY_DIM;  // leading features that are rotated, a multiple of 16
constexpr bool kInterleaved = INTERLEAVED;
constexpr bool kNormed = QK_NORM;     // q and k are normalised before they are rotated

constexpr int kTeamUsed = kHeadDim / 16;  // lanes that hold features
constexpr int kTeam = kTeamUsed <= 4 ? 4 : kTeamUsed <= 8 ? 8 : 16;

struct Angles {
    float cos[8], sin[8];
};

// Where a lane's two vectors stand in a head.
struct Place {
    u32 first, second;  // features
    bool used, rotated;

    __device__ __forceinline__ Place(u32 lane) {
        constexpr u32 kTurning = kRotaryDim / 16;
        used = lane < kTeamUsed;
        rotated = lane < kTurning;
        if (!kInterleaved && rotated) {
            first = lane * 8;
            second = first + kRotaryDim / 2;
        } else {
            first = lane * 16;
            second = first + 8;
        }
    }
};

__device__ __forceinline__ float team_sum(float x) {
#pragma unroll
    for (int mask = 1; mask < kTeam; mask *= 2) x += of_other_lane(x, mask);
    return x;
}

__device__ __forceinline__ void load_angles(
    Angles& angles, const Place& place, u32 lane,
    const float* cos, const float* sin,  // [positions, rotary_dim / 2]
    u32 position) {
    if (kRotaryDim == 0 || !place.rotated) return;
    const u64 at = (u64)position * (kRotaryDim / 2) + lane * 8;
    load_constant_8(angles.cos, cos + at);
    load_constant_8(angles.sin, sin + at);
}

__device__ __forceinline__ void load_norm(float (&weight)[2][8], const Place& place, const float* norm) {
    if (!kNormed) return;
    if (place.used) {
        load_constant_8(weight[0], norm + place.first);
        load_constant_8(weight[1], norm + place.second);
    } else {  // lanes that hold nothing compute, too
#pragma unroll
        for (int j = 0; j < 8; j++) weight[0][j] = weight[1][j] = 0.0f;
    }
}

// Normalises and rotates a head in place, and rounds it.
__device__ __forceinline__ void place_head(
    uint4 (&words)[2],            // the lane's features: in, raw; out, placed
    const Place& place, const Angles& angles, const float (&weight)[2][8], float eps) {
    float a[8], b[8];
    floats_of_8(a, words[0]);
    floats_of_8(b, words[1]);
    if (kNormed) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j] * a[j] + b[j] * b[j];
        const float factor = rsqrtf(team_sum(place.used ? sum : 0.0f) * (1.0f / kHeadDim) + eps);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            a[j] = a[j] * factor * weight[0][j];
            b[j] = b[j] * factor * weight[1][j];
        }
    }
    if (kRotaryDim > 0 && place.rotated) {
        if (kInterleaved) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float low = a[2 * j], high = b[2 * j];
                a[2 * j] = low * angles.cos[j] - a[2 * j + 1] * angles.sin[j];
                a[2 * j + 1] = a[2 * j + 1] * angles.cos[j] + low * angles.sin[j];
                b[2 * j] = high * angles.cos[4 + j] - b[2 * j + 1] * angles.sin[4 + j];
                b[2 * j + 1] = b[2 * j + 1] * angles.cos[4 + j] + high * angles.sin[4 + j];
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float low = a[j];
                a[j] = low * angles.cos[j] - b[j] * angles.sin[j];
                b[j] = b[j] * angles.cos[j] + low * angles.sin[j];
            }
        }
    }
    if (kNormed || kRotaryDim > 0) {
        words[0] = activations_of_8(a);
        words[1] = activations_of_8(b);
    }
}
