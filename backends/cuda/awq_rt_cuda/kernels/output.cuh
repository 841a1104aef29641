// From sums in registers to y. A warp's sums are of its columns by all rows of the block, columns along the rows of a
// fragment: y wants them the other way.
#pragma once

#include "ring.cuh"

// Writes a warpgroup's sums, whole: turned on their way to shared memory, from where the copy engine takes them while
// the warpgroup goes on.
__device__ __forceinline__ void write_sums(
    const float (&sums)[kStrips][kRows / 8][4],
    u32 output,                   // shared address, kConsumers * kStrips boxes
    const float* bias,            // [n], or null
    const TensorMap& y,           // [m, n]
    u32 n, u32 first_row, u32 strip) {  // of the warpgroup
    const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes % 4, group = threadIdx.x / (4 * kLanes);
    const u32 boxes = output + group * kStrips * kBoxBytes;
    const bool stores = threadIdx.x % (4 * kLanes) == 0;
    if (stores) store_box_wait();  // what this warpgroup stored before
    barrier(1 + group, 4 * kLanes);
#pragma unroll
    for (int s = 0; s < kStrips; s++) {
        const u32 own = warp * kStrips + s;  // strip of the warpgroup
        const u32 chunk = own % 4 * 2 + lane / 8 % 2;  // of 8 columns; chunk c of row r lies at c ^ r % 8
        const u32 to = boxes + own / 4 * kBoxBytes + (lane / 16 * 8 + lane % 8) * 128 + (chunk ^ lane % 8) * 16;
        float add[2] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 column = (strip + own) * kStrip + half * 8 + lane / 4;
            if (bias != nullptr && column < n) add[half] = __ldg(bias + column);
        }
#pragma unroll
        for (int r = 0; r < kRows / 8; r += 2) {
            u32 d[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&sum)[4] = sums[s][r + i / 2];
                d[i] = activations_of_floats(sum[i % 2 * 2] + add[i % 2], sum[i % 2 * 2 + 1] + add[i % 2]);
            }
            store_matrices_transposed(to + r * 8 * 128, d);
        }
    }
    before_bulk_copy();
    barrier(1 + group, 4 * kLanes);
    if (stores) {
#pragma unroll
        for (int box = 0; box < kStrips; box++)
            store_box(&y, strip * kStrip + box * kBoxColumns, first_row, boxes + box * kBoxBytes);
        store_box_commit();
    }
}

constexpr int kPairs = kStrips * (kRows / 8) * 2;  // of a thread's sums: two rows of x, one column
constexpr int kOwnPairs = (kPairs + kSplit - 1) / kSplit;  // that a part adds up and writes; the last may have fewer
constexpr int kConsumerThreads = kConsumerWarps * kLanes;
static_assert(kOwnPairs * (kSplit - 1) < kPairs, "every part has some");

// Adds the sums of the cluster's kSplit parts, in the order of the parts. Each part writes its share of every warp's
// pairs: the others send it theirs, to where its ring was.
__device__ __forceinline__ void write_parts(
    const float (&sums)[kStrips][kRows / 8][4],
    const Ring& ring,
    const float* bias,                       // [n], or null
    u16* y,                                  // [m, n]
    u32 m, u32 n, u32 first_row, u32 strip,  // of this warp
    u32 part, u32 neighbour) {
    const u32 lane = threadIdx.x % kLanes, arrived = ring.base + kPartsAt, place = ring.base + kXAt + threadIdx.x * 8;
    const u32 own_pairs = min((u32)kOwnPairs, kPairs - part * kOwnPairs);
    if (threadIdx.x == 0) barrier_arrive_expecting(arrived, kSplit * own_pairs * kConsumerThreads * 8);
    cluster_barrier_relaxed();  // no ring is read any more
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
        const float* pair = &sums[i / 2 / (kRows / 8)][i / 2 % (kRows / 8)][i % 2 * 2];
        const u32 slot = part * kOwnPairs + i % kOwnPairs;
        send_2(place + slot * kConsumerThreads * 8, pair[0], pair[1], arrived, i / kOwnPairs * kShare + neighbour);
    }
    barrier_wait(arrived, 0);
#pragma unroll
    for (int own = 0; own < kOwnPairs; own++) {
        if (own >= own_pairs) break;
        const u32 i = part * kOwnPairs + own, r = i / 2 % (kRows / 8);
        const u32 first_column = (strip + i / 2 / (kRows / 8)) * kStrip + i % 2 * 8;
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int p = 0; p < kSplit; p++) {
            const float2 more = load_shared_floats(place + (p * kOwnPairs + own) * kConsumerThreads * 8);
            sum.x += more.x, sum.y += more.y;
        }
        const u32 bias_column = first_column + lane / 4;
        const float add = bias != nullptr && bias_column < n ? __ldg(bias + bias_column) : 0.0f;
        const u32 values = transposed(activations_of_floats(sum.x + add, sum.y + add));
        const u32 row = first_row + r * 8 + lane / 4, column = first_column + lane % 4 * 2;
        if (row < m && column < n) *reinterpret_cast<u32*>(y + (u64)row * n + column) = values;
    }
}
