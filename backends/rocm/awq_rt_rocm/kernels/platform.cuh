// What the kernels of awq_rt/kernels need of a GPU, in AMD's words.
//
// They speak the language that CUDA and HIP share. hipRTC declares its names, a clang without ROCm's headers does not: the
// macros put what is defined here in their place, so that every compiler reads the same text.
#pragma once

#include "bfloat.h"

#ifndef __align__
#define __align__(bytes) __attribute__((aligned(bytes)))
#endif
#define VECTOR(bytes) struct __attribute__((aligned(bytes), may_alias))

VECTOR(8) Uint2 { u32 x, y; };
VECTOR(16) Uint4 { u32 x, y, z, w; };
VECTOR(8) Float2 { float x, y; };
VECTOR(16) Float4 { float x, y, z, w; };

#define uint2 Uint2
#define uint4 Uint4
#define float2 Float2
#define float4 Float4
#define make_uint2(...) (Uint2{__VA_ARGS__})
#define make_uint4(...) (Uint4{__VA_ARGS__})
#define make_float2(...) (Float2{__VA_ARGS__})
#define make_float4(...) (Float4{__VA_ARGS__})
#define threadIdx (Index{thread_index(), 0, 0})
#define blockIdx (Index{block_x(), block_y(), block_z()})
#define gridDim (grid_size(kThreads))
#define __syncthreads block_barrier
#define __ldg(p) (*(p))
#define __float_as_uint bits_as<u32>
#define __uint_as_float bits_as<float>
#define min lesser
#define fmaxf __builtin_fmaxf
#define rsqrtf __builtin_amdgcn_rsqf

template <class A, class B>
__device__ __forceinline__ auto lesser(A a, B b) -> decltype(a + b) {
    return a < b ? a : b;
}

constexpr int kLanes = kWave;

__device__ __forceinline__ void wave_barrier() { wave_fence(); }

// Kernels of a stream follow each other.
__device__ __forceinline__ void let_next_kernel_start() {}
__device__ __forceinline__ void wait_for_earlier_kernels() {}

// ---- pairs of 16-bit floats

__device__ __forceinline__ void floats_of_half2(float& low, float& high, u32 pair) {
    const f16x2 both = bits_as<f16x2>(pair);
    low = (float)both.x, high = (float)both.y;
}

__device__ __forceinline__ void floats_of_bfloat2(float& low, float& high, u32 pair) {
    low = bits_as<float>(pair << 16), high = bits_as<float>(pair & 0xFFFF0000u);
}

__device__ __forceinline__ u32 half2_of_floats(float low, float high) { return bits_as<u32>(f16x2{(f16)low, (f16)high}); }

__device__ __forceinline__ u32 bfloat2_of_floats(float low, float high) {
    return bfloat_of_float(low) | (u32)bfloat_of_float(high) << 16;
}

__device__ __forceinline__ u32 sub_half2(u32 a, u32 b) { return bits_as<u32>(bits_as<f16x2>(a) - bits_as<f16x2>(b)); }

// One instruction: in HIP a product and a sum are contracted.
__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    return bits_as<u32>(bits_as<f16x2>(a) * bits_as<f16x2>(b) + bits_as<f16x2>(c));
}

// There is no such instruction: product and sum are float32's. For results that are numbers of 16 bits, as they are for small
// integers: what is cut off is zero.
__device__ __forceinline__ u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    float low[3], high[3];
    floats_of_bfloat2(low[0], high[0], a);
    floats_of_bfloat2(low[1], high[1], b);
    floats_of_bfloat2(low[2], high[2], c);
    const u32 lower = bits_as<u32>(low[0] * low[1] + low[2]), upper = bits_as<u32>(high[0] * high[1] + high[2]);
    return permuted_bytes(upper, lower, 0x07060302u);
}

// ---- memory

__device__ __forceinline__ uint4 load_8(const u16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ u32 load_fresh(const u32* p) { return *p; }
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    return bits_as<uint4>(__builtin_nontemporal_load(reinterpret_cast<const words4*>(p)));
}

// ---- clusters: there are none, TO_PARTS is set

__device__ __forceinline__ u32 shared_address(const void*) { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void store_first_4(u32, const float4&) {}

// ---- arithmetic and exchange

// Off by one unit in the last place at most; 0 where it would be below the smallest normal number.
__device__ __forceinline__ float reciprocal_of(float x) { return __builtin_amdgcn_rcpf(x); }

// 2^x; a result below the smallest normal number is 0.
__device__ __forceinline__ float exp2_of(float x) {
#if __has_builtin(__builtin_amdgcn_exp2f)
    return __builtin_amdgcn_exp2f(x);
#else  // before LLVM 18 that is one instruction too
    return __builtin_exp2f(x);
#endif
}

// The value of the lane whose number differs in the bits of `mask`, a power of two.
__device__ __forceinline__ float of_other_lane(float value, int mask) {
    switch (mask) {
        case 1: return in_rows<kXor1>(value);
        case 2: return in_rows<kXor2>(value);
#if defined(__GFX9__)  // lane ^ 4 is lane ^ 7 ^ 3, lane ^ 8 is lane ^ 15 ^ 7
        case 4: return in_rows<kXor7>(in_rows<kXor3>(value));
        case 8: return in_rows<kXor15>(in_rows<kXor7>(value));
#else
        case 4: return in_rows<kXor4>(value);
        case 8: return in_rows<kXor8>(value);
#endif
        default: return from_lane_xor(value, mask);
    }
}
