// Asynchronous copies that the copy engine makes alone, and the barriers in shared memory that say when they are done
// (sm_90). One PTX instruction a function.
#pragma once

#include "ptx.cuh"

// A description of a matrix in device memory that the driver encoded (tensor_map.py), passed by value.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Barriers initialised before it are so for the copy engine and for the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives if `now`: no branch, which would part the matrix instructions around it.
__device__ __forceinline__ void barrier_arrive_if(bool now, u32 barrier) {
    asm volatile(
        "{.reg .pred now; .reg .b64 state; setp.ne.b32 now, %0, 0; @now mbarrier.arrive.shared::cta.b64 state, [%1];}"
        :: "r"((int)now), "r"(barrier) : "memory");
}

// The same at the barrier that block `rank` of the cluster has where `barrier` is in ours.
__device__ __forceinline__ void barrier_arrive_at_if(bool now, u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .pred now; .reg .b32 remote; setp.ne.b32 now, %0, 0; mapa.shared::cluster.u32 remote, %1, %2; "
        "@now mbarrier.arrive.shared::cluster.b64 _, [remote];}"
        :: "r"((int)now), "r"(barrier), "r"(rank) : "memory");
}

// Arrives, and has the phase wait for `bytes` of copies too.
__device__ __forceinline__ void barrier_arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

// Arrives when all earlier copy_async of this thread are done; such an arrival is counted by barrier_init.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

// Returns when the phase of parity `phase` is complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" :: "r"(barrier), "r"(phase) : "memory");
}

// Has the copy engine read `map` before it is needed.
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// The box of `map` at (column, row) to the same place of every block in `blocks` (a bit a rank of the cluster); its
// bytes count at the same barrier of each.
__device__ __forceinline__ void copy_box_to(
    u32 shared, const TensorMap* map, u32 column, u32 row, u32 barrier, u16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;"
        :: "r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

__device__ __forceinline__ void copy_box(u32 shared, const TensorMap* map, u32 column, u32 row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(shared), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Two floats to the place and with the barrier that `shared` and `barrier` are in block `rank` of the cluster, where
// their 8 bytes count.
__device__ __forceinline__ void send_2(u32 shared, float a, float b, u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %4; mapa.shared::cluster.u32 at, %3, %4; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%1, %2}, [at];}"
        :: "r"(shared), "f"(a), "f"(b), "r"(barrier), "r"(rank) : "memory");
}

// The same with four.
__device__ __forceinline__ void send_4(u32 shared, float4 v, u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 to, at; mapa.shared::cluster.u32 to, %0, %6; mapa.shared::cluster.u32 at, %5, %6; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%1, %2, %3, %4}, [at];}"
        :: "r"(shared), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier), "r"(rank) : "memory");
}

// Shared memory written by this thread before it is visible to the copy engine after it.
__device__ __forceinline__ void before_bulk_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Shared memory to the box of `map` at (column, row); what lies outside of the matrix is not written.
__device__ __forceinline__ void store_box(const TensorMap* map, u32 column, u32 row, u32 shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
                 :: "l"(map), "r"(column), "r"(row), "r"(shared) : "memory");
}

__device__ __forceinline__ void store_box_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when the copy engine has read what this thread had it store.
__device__ __forceinline__ void store_box_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// A matrix of 8 by 8 16-bit values from fragment to fragment, transposed.
__device__ __forceinline__ u32 transposed(u32 a) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// Four matrices of 8 by 8 16-bit values from fragments, each transposed. Lane l gives the address of row l % 8 of
// matrix l / 8, and holds of row l / 4 before the transposition the values 2 (l % 4) and the next.
__device__ __forceinline__ void store_matrices_transposed(u32 address, const u32 (&d)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3]) : "memory");
}
