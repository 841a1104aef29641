// What the kernels of awq_rt/kernels need of a GPU, in NVIDIA's words. A pair is two 16-bit floats in a register, the first
// in its low half.
#pragma once

#include "ptx.cuh"  // u8 to u64, and_or, sub_half2, fma_half2, fma_bfloat2, half2_of_floats, bfloat2_of_floats,
                    // load_once, let_next_kernel_start, wait_for_earlier_kernels

constexpr int kLanes = 32;  // of a wave, which executes together; a power of two of at least 8

__device__ __forceinline__ void floats_of_half2(float& low, float& high, u32 pair) {
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(pair));
}

__device__ __forceinline__ void floats_of_bfloat2(float& low, float& high, u32 pair) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000u);
}

// The value of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float of_other_lane(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// What lanes of this wave wrote to shared memory before it is visible to all of them after it.
__device__ __forceinline__ void wave_barrier() { __syncwarp(); }

// ---- of the fused operators alone

// 8 activations that an earlier kernel of the step may have written. Volatile, so that it stays behind the wait for
// earlier kernels, and not kept in the L1 cache, which no write of another multiprocessor updates.
__device__ __forceinline__ uint4 load_8(const u16* p) {
    uint4 d;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(p));
    return d;
}

// A word as it is now, whatever a cache of this multiprocessor holds.
__device__ __forceinline__ u32 load_fresh(const u32* p) {
    u32 d;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(d) : "l"(p) : "memory");
    return d;
}

__device__ __forceinline__ float reciprocal_of(float x) { return 1.0f / x; }

__device__ __forceinline__ float exp2_of(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// ---- a cluster: blocks along x that run at the same time (sm_90); elsewhere nobody calls these

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Returns when all threads of the cluster that have not ended have arrived; what they wrote before is visible.
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// To where `address` of our shared memory lies in that of the cluster's first block.
__device__ __forceinline__ void store_first_4(u32 address, const float4& v) {
    asm volatile("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, 0; "
                 "st.shared::cluster.v4.f32 [remote], {%1, %2, %3, %4};}"
                 :: "r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void store_first_4(u32, const float4&) {}
#endif
