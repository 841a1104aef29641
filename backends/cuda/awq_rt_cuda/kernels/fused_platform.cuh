// What the fused operators need of a GPU beyond platform.cuh, in NVIDIA's words, and nothing else of NVIDIA's.
#pragma once

#include "platform.cuh"

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

__device__ __forceinline__ float exp2_of(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// {low half of a, low half of b}, or their high halves.
__device__ __forceinline__ u32 pair_of(u32 a, u32 b, bool high) { return __byte_perm(a, b, high ? 0x7632 : 0x5410); }

// The 8 x 8 matrix of 16-bit numbers whose row r lies in lanes 4 r to 4 r + 3, transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(x));
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
