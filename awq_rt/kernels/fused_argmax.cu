// The index of the largest logit of a row, the first of equal ones; NaN is larger than all else. A row has kParts blocks
// that meet in a cluster, or one block.
//
// A logit and its index become one number that is larger when the logit is, or else when the index is smaller.
#include "fused.cuh"

constexpr int kThreads = THREADS;
constexpr int kWaves = kThreads / kLanes;
constexpr int kParts = PARTS;
static_assert(kWaves <= kLanes && kParts <= kLanes, "a wave takes the largest of all waves, and of all parts");

// A 16-bit float as a number in the same order: the bits of negative ones count downwards.
__device__ __forceinline__ u32 ordered(u32 bits) {
    constexpr u32 kInfinity = ACTIVATION_HALF ? 0x7C00 : 0x7F80;
    if ((bits & 0x7FFF) > kInfinity) return 0xFFFF;
    if (bits == 0x8000) return 0x8000;  // -0 is 0
    return bits & 0x8000 ? ~bits & 0xFFFF : bits | 0x8000;
}

__device__ __forceinline__ void take_larger(u32& best, u32& index, u32 value, u32 at) {
    if (value > best || (value == best && at < index)) best = value, index = at;
}

extern "C" __global__ void __launch_bounds__(kThreads) fused_argmax(
    const u16* logits,  // [m, n], n a multiple of 8
    u64* y,             // [m] out
    u32 n) {
    __shared__ u32 values[kWaves], indices[kWaves];
    __shared__ __align__(16) float4 parts[kParts];
    const u32 wave = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, part = blockIdx.x % kParts;
    if (kParts > 1) cluster_arrive();
    let_next_kernel_start();
    wait_for_earlier_kernels();
    const u16* row = logits + (u64)(blockIdx.x / kParts) * n;
    u32 best = 0, index = 0xFFFFFFFF;
    auto take = [&](const uint4& words, u32 first) {
        const u32 of[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 8; i++) take_larger(best, index, ordered(of[i / 2] >> i % 2 * 16 & 0xFFFF), first + i);
    };
    constexpr u32 kStride = kParts * kThreads * 8;
    u32 at = (part * kThreads + threadIdx.x) * 8;
    for (; at + 3 * kStride < n; at += 4 * kStride) {
        uint4 words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = load_8(row + at + i * kStride);
#pragma unroll
        for (int i = 0; i < 4; i++) take(words[i], at + i * kStride);
    }
    for (; at < n; at += kStride) take(load_8(row + at), at);

    auto take_of_lanes = [&] {
#pragma unroll
        for (int mask = 1; mask < kLanes; mask *= 2) {
            const u32 value = __float_as_uint(of_other_lane(__uint_as_float(best), mask));
            const u32 other = __float_as_uint(of_other_lane(__uint_as_float(index), mask));
            take_larger(best, index, value, other);
        }
    };
    take_of_lanes();
    if (lane == 0) values[wave] = best, indices[wave] = index;
    __syncthreads();
    if (wave == 0) {
        best = lane < kWaves ? values[lane] : 0;
        index = lane < kWaves ? indices[lane] : 0xFFFFFFFF;
        take_of_lanes();
    }
    if (kParts > 1) {
        cluster_wait();  // the first block has begun
        if (threadIdx.x == 0)
            store_first_4(shared_address(parts + part), {__uint_as_float(best), __uint_as_float(index), 0.0f, 0.0f});
        cluster_arrive();
        if (part > 0) return;
        cluster_wait();
        if (wave == 0) {
            best = lane < kParts ? __float_as_uint(parts[lane].x) : 0;
            index = lane < kParts ? __float_as_uint(parts[lane].y) : 0xFFFFFFFF;
            take_of_lanes();
        }
    }
    if (threadIdx.x == 0) y[blockIdx.x / kParts] = index;
}
