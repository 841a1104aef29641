// The road of y = x @ W + bias for 4-bit W on matrix units, from a single row to prefill: all but the unit itself.
//
// W goes from device memory to registers to the matrix unit: each weight is used by one warp, so shared memory would
// only add a copy. Its columns are the unit's rows, so that 8 rows of x already fill an instruction. x goes through a
// ring in shared memory that the warps of a depth group share.
//
//   grid   x: blocks of kWarpsN * kStrips strips, times kSplit parts of the depth; y and z: kRows rows of x each
//   block  kWarpsK depth groups of kWarpsN warps; a warp has kStrips strips. Depth group g of part p takes the tiles
//          p * kWarpsK + g, then every (kSplit * kWarpsK)th
//   sums   lane registers, depth groups through shared memory, parts by sending them to the block of the cluster that
//          adds them or, before sm_90, as float32 partials that sum_parts.cu adds: always in the same order, so results
//          repeat bit for bit
#pragma once

#include "bulk.cuh"
#include "tile.cuh"

constexpr int kRows = ROWS;        // of x and y that a block computes: 1, 2, 4, or a multiple of 8
constexpr int kStrips = STRIPS;    // of a warp
constexpr int kWarpsN = WARPS_N;
constexpr int kWarpsK = WARPS_K;
constexpr int kDepth = DEPTH;      // tiles of W in flight in each warp
constexpr int kSplit = SPLIT;      // blocks that share one output tile
constexpr bool kToPartials = TO_PARTIALS;  // parts meet in sum_parts.cu instead of the cluster

constexpr int kThreads = kWarpsN * kWarpsK * kLanes;
constexpr int kGroupThreads = kWarpsN * kLanes;
constexpr int kRowTiles = (kRows + 7) / 8;
constexpr int kGroupSteps = kSteps / kGroupsInTile;    // matrix instructions that share a scale
constexpr int kColumns = kWarpsN * kStrips * kStrip;
constexpr int kTileStep = kSplit * kWarpsK;            // between two tiles of a depth group
constexpr int kSlots = kDepth;                         // of x's ring, a tile's depth each
constexpr int kSlotBytes = kRows * kTileDepth * 2;
constexpr int kAhead = kWarpsN == 1 ? kDepth : kDepth - 1;  // a warp alone refills a slot at once, others a turn later
constexpr int kSumStride = kColumns + 4;               // floats; 4 more spread a fragment's rows over all banks
constexpr int kQuads = kRows * kColumns / 4;           // of a block's sums: four columns of a row

// Parts of the depth meet in the cluster: quad q of the sums is added up by part q % kSplit, in whose shared memory the
// others put theirs, past what the multiplication uses.
constexpr bool kMeet = kSplit > 1 && !kToPartials;
constexpr int kOwnQuads = (kQuads + kSplit - 1) / kSplit;
constexpr int kRingBytes = kWarpsK * kSlots * kSlotBytes, kSumBytes = kWarpsK * kRows * kSumStride * 4;
constexpr int kReceivedAt = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;  // [kSplit, kOwnQuads] float4
constexpr int kArrivedAt = kReceivedAt + kSplit * kOwnQuads * 16;             // the barrier that counts their bytes
static_assert(kWarpsN == 1 || kDepth > 1, "warps that share a ring read one slot while another is filled");
static_assert(!kMeet || kArrivedAt + 8 <= SHARED_BYTES, "gemm.py counts the same bytes");

// The end of a group: its scale, and its sums from 0 again.
__device__ __forceinline__ void add_group(float (&sums)[4], float (&sum)[4], ScalePair scales) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sums[i] += (i < 2 ? low_scale(scales) : high_scale(scales)) * sum[i];
        sum[i] = 0.0f;
    }
}

// sums += tile * x for the rows of x in a slot of the ring: the matrix unit's own file defines both of these.
__device__ __forceinline__ void before_multiply();  // called by the threads that copied x, before the barrier
__device__ __forceinline__ void multiply(
    float (&sums)[kRowTiles][kStrips][4],  // of lane's columns row and row + 8, rows of x 8 r + 2 quad and the next
    const Tile (&tiles)[kStrips],          // a lane's share of W
    u32 slot,                              // shared address of x's rows
    u32 lane);

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) KERNEL_NAME(
    const uint4* __restrict__ codes,       // [strips, tiles, 32] packed weight, see tile.cuh
    const ScalePair* __restrict__ scales,  // [strips, groups, 8] pairs of columns
    const u8* __restrict__ zeros,          // [strips, groups, 8] pairs of columns
    const float* __restrict__ bias,        // [n], or null
    const u16* __restrict__ x,             // [m, k] activations, 16-byte aligned
    void* __restrict__ y,                  // [m, n] activations; with kToPartials [kSplit, m, n] float32
    u32 m, u32 n, u32 k,                   // rows of x; columns and rows of W, multiples of 8
    u32 strips, u32 tiles, u32 groups) {   // of the packed weight: n and k rounded up
    extern __shared__ __align__(1024) char shared[];  // the swizzle of wgmma counts from multiples of 1024
    const u32 lane = threadIdx.x % kLanes, row = lane / 4, quad = lane % 4;
    const u32 warp = threadIdx.x / kLanes, warp_n = warp % kWarpsN, depth_group = warp / kWarpsN;
    const u32 part = blockIdx.x % kSplit, first_row = (blockIdx.z * gridDim.y + blockIdx.y) * kRows;
    const u32 first_strip = (blockIdx.x / kSplit * kWarpsN + warp_n) * kStrips;
    const u32 first_tile = part * kWarpsK + depth_group;
    auto group_barrier = [&] {
        if (kWarpsN == 1)
            __syncwarp();
        else if (kWarpsK == 1)
            __syncthreads();
        else
            barrier(1 + depth_group, kGroupThreads);
    };

    // Loading the weight: nothing here depends on an earlier kernel, so it starts before they end.
    StripReader<kTileStep> readers[kStrips];
    Tile ring[kDepth][kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; s++)  // a strip past the last is computed from the last and not written
        readers[s].start(codes, scales, zeros, min(first_strip + s, strips - 1), first_tile, tiles, groups, lane);
    auto fetch_weight = [&](int d, u32 index, int ahead) {
#pragma unroll
        for (int s = 0; s < kStrips; s++)
            if (index < tiles) readers[s].read(ring[d][s], index, ahead);
    };
#pragma unroll
    for (int d = 0; d < kDepth; d++) fetch_weight(d, first_tile + d * kTileStep, d);
#if __CUDA_ARCH__ >= 900
    const u32 received = shared_address(shared) + kReceivedAt, arrived = shared_address(shared) + kArrivedAt;
    if (kMeet) {
        if (threadIdx.x == 0) {
            barrier_init(arrived, 1);
            barrier_init_fence();
            barrier_arrive_expecting(arrived, kSplit * ((kQuads - part + kSplit - 1) / kSplit) * 16);
        }
        cluster_arrive_relaxed();
    }
#endif
    let_next_kernel_start();
    wait_for_earlier_kernels();
    if (first_row >= m) return;  // y times z may be more than there are
    const u32 rows = min(m - first_row, (u32)kRows);

    // Loading x: rows of 128 bytes in 8 chunks; chunk c of row r lies at c ^ r % 8, so that 8 rows share no bank.
    // A thread copies the same chunk of every kCopyRows-th row. Past the end of x's rows come zeros, as W has there.
    constexpr int kCopyRows = kGroupThreads / 8;
    const u32 slots = shared_address(shared) + depth_group * kSlots * kSlotBytes;
    const u32 group_thread = threadIdx.x % kGroupThreads, copy_row = group_thread / 8, chunk = group_thread % 8;
    const u32 copy_to = slots + copy_row * 128 + (chunk ^ copy_row % 8) * 16;
    u32 column = first_tile * kTileDepth + chunk * 8;  // of the next tile to be copied
    const u16* copy_from = x + (u64)(first_row + copy_row) * k + column;
    auto fetch_x = [&](int slot) {
#pragma unroll
        for (int i = 0; i < (kRows + kCopyRows - 1) / kCopyRows; i++)
            if (copy_row + i * kCopyRows < rows)
                copy_async_16((copy_to ^ i * kCopyRows % 8 * 16) + slot * kSlotBytes + i * kCopyRows * 128,
                              copy_from + (u64)(i * kCopyRows) * k, column < k);
        copy_async_commit();
        column += kTileStep * kTileDepth;
        copy_from += kTileStep * kTileDepth;
    };
#pragma unroll
    for (int d = 0; d < kAhead; d++) fetch_x(d);

    // Multiplying: integers c - z are exact in 16 bits, products and sums are float32, the sums are scaled.
    float sums[kRowTiles][kStrips][4] = {};
    for (u32 index = first_tile; index < tiles;) {
#pragma unroll
        for (int d = 0; d < kDepth; d++) {
            copy_async_wait_but<kAhead - 1>();
            before_multiply();
            group_barrier();
            if (kAhead < kDepth) fetch_x((d + kAhead) % kDepth);  // read last time by all, who have passed the barrier

            multiply(sums, ring[d], slots + d * kSlotBytes, lane);
            if (kAhead == kDepth) {
                __syncwarp();
                fetch_x(d);
            }
            fetch_weight(d, index + kDepth * kTileStep, d + kDepth);
            index += kTileStep;
            if (index >= tiles) break;
        }
#pragma unroll
        for (int s = 0; s < kStrips; s++) readers[s].advance(kDepth);
    }

    // Adding up: each depth group's sums [kRows, kColumns] to shared memory, over the ring that nobody reads any more.
    copy_async_wait_but<0>();
    __syncthreads();
    float* partial = reinterpret_cast<float*>(shared) + depth_group * kRows * kSumStride;
#pragma unroll
    for (int r = 0; r < kRowTiles; r++)
#pragma unroll
        for (int s = 0; s < kStrips; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 at = r * 8 + quad * 2 + i % 2;
                if (kRows % 8 == 0 || at < kRows)
                    partial[at * kSumStride + (warp_n * kStrips + s) * kStrip + row + i / 2 * 8] = sums[r][s][i];
            }
    __syncthreads();

    const u32 first_column = blockIdx.x / kSplit * kColumns;
    float* total = reinterpret_cast<float*>(shared);
    auto group_sum = [&](u32 at) {
        float4 sum = *reinterpret_cast<float4*>(total + at);
#pragma unroll
        for (int g = 1; g < kWarpsK; g++) {
            float4 more = *reinterpret_cast<float4*>(total + g * kRows * kSumStride + at);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        return sum;
    };
    auto write = [&](u32 r, u32 column, float4 sum) {
        if (r >= rows || column >= n) return;
        u64 at = (u64)(first_row + r) * n + column;
        if (kToPartials) {
            reinterpret_cast<float4*>(y)[((u64)part * m * n + at) / 4] = sum;
            return;
        }
        if (bias != nullptr) {
            float4 more = __ldg(reinterpret_cast<const float4*>(bias + column));
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        reinterpret_cast<uint2*>(y)[at / 4] =
            make_uint2(activations_of_floats(sum.x, sum.y), activations_of_floats(sum.z, sum.w));
    };

    if (kSplit == 1 || kToPartials) {
        for (u32 q = threadIdx.x; q < kQuads; q += kThreads) {
            u32 r = q / (kColumns / 4), column = q % (kColumns / 4) * 4;
            write(r, first_column + column, group_sum(r * kSumStride + column));
        }
        return;
    }
#if __CUDA_ARCH__ >= 900
    cluster_wait_relaxed();  // every block's barrier is there
    for (u32 q = threadIdx.x; q < kQuads; q += kThreads)
        send_4(received + (part * kOwnQuads + q / kSplit) * 16,
               group_sum(q / (kColumns / 4) * kSumStride + q % (kColumns / 4) * 4), arrived, q % kSplit);
    barrier_wait(arrived, 0);  // no block ends before the others have sent it theirs
    for (u32 own = threadIdx.x; own * kSplit + part < kQuads; own += kThreads) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int p = 0; p < kSplit; p++) {
            const float4 more = *reinterpret_cast<float4*>(shared + kReceivedAt + (p * kOwnQuads + own) * 16);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        const u32 q = own * kSplit + part;
        write(q / (kColumns / 4), first_column + q % (kColumns / 4) * 4, sum);
    }
#endif
}
