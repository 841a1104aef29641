// One PTX instruction a function, and nothing else. No CUDA header is needed: users have only the wheels torch brings.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// ---- 16-bit floats, two to a register; HALF is 1 for float16 and 0 for bfloat16

__device__ __forceinline__ u32 sub_half2(u32 a, u32 b) {
    u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 mul_half2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ u32 fma_half2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ u32 fma_bfloat2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float float_of_half(u32 bits) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((u16)bits));
    return d;
}

__device__ __forceinline__ float float_of_bfloat(u32 bits) { return __uint_as_float(bits << 16); }

// The register's low half is `low`.
__device__ __forceinline__ u32 half2_of_floats(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 bfloat2_of_floats(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// The low, or the high, half of a register in both halves.
__device__ __forceinline__ u32 twice_low(u32 pair) {
    u32 d;
    asm("prmt.b32 %0, %1, %1, 0x1010;" : "=r"(d) : "r"(pair));
    return d;
}

__device__ __forceinline__ u32 twice_high(u32 pair) {
    u32 d;
    asm("prmt.b32 %0, %1, %1, 0x3232;" : "=r"(d) : "r"(pair));
    return d;
}

// (bits & mask) | magic in one instruction: 0xEA is the truth table of (a & b) | c.
__device__ __forceinline__ u32 and_or(u32 bits, u32 mask, u32 magic) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(bits), "r"(mask), "r"(magic));
    return d;
}

// ---- memory

// Read-only data that this block alone reads, once: kept out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
    uint4 d;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(p));
    return d;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
    uint4 d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "r"(address) : "memory");
    return d;
}

__device__ __forceinline__ float2 load_shared_floats(u32 address) {
    float2 d;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(d.x), "=f"(d.y) : "r"(address) : "memory");
    return d;
}

__device__ __forceinline__ u32 load_shared_4(u32 address) {
    u32 d;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
    return d;
}

__device__ __forceinline__ u32 load_shared_1(u32 address) {
    u32 d;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
    return d;
}

// Four matrices of 8 rows by 16 bytes; lane l gives the address of row l % 8 of matrix l / 8 and receives, of each,
// the 4 bytes at l % 4 of row l / 4.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

// 16 bytes from global to shared memory without a register; zeros where `valid` is 0.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_async_8(u32 shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kNewest>
__device__ __forceinline__ void copy_async_wait_but() {
    asm volatile("cp.async.wait_group %0;" :: "n"(kNewest) : "memory");
}

// ---- matrix unit: d += a [16, 16] * b [16, 8]

__device__ __forceinline__ void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- order among kernels and blocks

// Lets the next kernel of the stream start its prologue. A no-op where the hardware has no such thing.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns when all earlier kernels of the stream are complete and their writes are visible.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier(u32 name, u32 threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(name), "r"(threads) : "memory");
}

#if __CUDA_ARCH__ >= 900
// A barrier of all threads of the cluster in two halves, without order among memory accesses, which would cost as much
// as a trip to device memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait_relaxed() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

__device__ __forceinline__ void cluster_barrier_relaxed() {
    cluster_arrive_relaxed();
    cluster_wait_relaxed();
}
#endif
