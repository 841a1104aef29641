// y = x @ W + bias for 4-bit W and many rows of x, on wgmma (sm_90a).
//
// A producer warp brings tiles of W and x to a ring in shared memory with the copy engine (ring.cuh). Warpgroups
// dequantise their strips in registers, as operand A, while the matrix unit works on what they issued before; x is
// operand B, read by the unit itself. So y^T = W^T x^T, and each weight is dequantised once for kRows rows of x.
//
//   grid     clusters of kSplit * kShare blocks, as many as fit the GPU; each takes every so many-th output tile
//   cluster  parts divide the depth of one output tile, neighbours have adjacent columns of the same rows and bring x
//            for each other (order.cuh)
//   block    kConsumers warpgroups, a warp with kStrips adjacent strips, and the producer warp
//
// Weights are rounded once, to the activations' dtype; products are summed in float32, parts in their order, so results
// repeat bit for bit.
#include "order.cuh"
#include "output.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

constexpr int kGroupSteps = kSteps / kGroupsInTile;  // matrix instructions that share a scale
constexpr bool kClusters = kSplit * kShare > 1;

// A warp's share of a stage's weights as operand A.
__device__ __forceinline__ void dequantize_stage(
    u32 (&weight)[kSteps][kStrips][4], const Ring& ring, u32 stage, u32 warp_strip, u32 lane) {
#pragma unroll
    for (int s = 0; s < kStrips; s++) {
        const uint4 words = load_shared_16(ring.codes(stage, warp_strip + s) + lane * 16);
        u32 pair[kGroupsInTile], zero[kGroupsInTile];
#pragma unroll
        for (int g = 0; g < kGroupsInTile; g++) {
            pair[g] = load_shared_4(ring.scales(stage, warp_strip + s) + (g * 8 + lane / 4) * 4);
            zero[g] = load_shared_1(ring.zeros(stage, warp_strip + s) + g * 8 + lane / 4);
        }
#pragma unroll
        for (int j = 0; j < kSteps; j++) {
            const int g = j / kGroupSteps;
            dequantize_scaled(weight[j][s], word_of(words, j), zero_pair(zero[g]), twice_low(pair[g]),
                              twice_high(pair[g]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) gemm_ring(
    const ScalePair* __restrict__ scales,  // [strips, groups, 8] pairs of columns
    const u8* __restrict__ zeros,          // [strips, groups, 8] pairs of columns
    const float* __restrict__ bias,        // [n], or null
    u16* __restrict__ y,                   // [m, n] activations
    u32 m, u32 n,                          // rows of x, columns of W
    u32 strips, u32 tiles, u32 groups,     // of the packed weight
    const __grid_constant__ Maps maps) {   // of the packed weight's codes, x and y
    extern __shared__ __align__(1024) char shared[];
    const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const Ring ring{shared_address(shared)};
    const Work work(m, strips, tiles);

    if (threadIdx.x == kConsumerWarps * kLanes) {
        prefetch_map(&maps.codes), prefetch_map(&maps.x);
        ring.init();
    }
    __syncthreads();
    let_next_kernel_start();

    if (warp >= kConsumerWarps) {
        if (kTakeRegisters > 0) give_registers<kKeptRegisters>();
        if (warp == kConsumerWarps) {
            const Producer producer{ring, maps, scales, zeros, strips, tiles, groups, lane, work.neighbour,
                                    work.first_neighbour};
            u32 row, strip, ahead = 0;
            // The weight does not depend on an earlier kernel: as much as the ring holds is on its way before they end.
            work.place(work.first_output, row, strip);
            for (u32 tile = work.first_tile; tile < work.end_tile && ahead < kStages; tile++)
                producer.fetch_weight(ahead++, strip, tile);
            if (kClusters) cluster_barrier_relaxed();  // x goes to neighbours only when their barriers are there
            wait_for_earlier_kernels();
            for (u32 stage = 0; stage < ahead; stage++) producer.fetch_x(stage, row, work.first_tile + stage);

            Place place{ahead % kStages, ahead / kStages};
            for (u32 output = work.first_output; output < work.outputs(); output += work.output_step) {
                work.place(output, row, strip);
                for (u32 tile = work.first_tile + ahead; tile < work.end_tile; tile++) {
                    barrier_wait(ring.empty(place.stage), place.turn ^ 1);
                    producer.fetch_weight(place.stage, strip, tile);
                    producer.fetch_x(place.stage, row, tile);
                    place.advance();
                }
                ahead = 0;
            }
        } else if (kClusters) {
            cluster_barrier_relaxed();
        }
        // The consumers' barriers: write_parts has one, the end is another.
        if (kSplit > 1) cluster_barrier_relaxed();
        if (kClusters) cluster_barrier_relaxed();
    } else {
        if (kTakeRegisters > 0) take_registers<kTakeRegisters>();
        if (kClusters) cluster_barrier_relaxed();
        const u32 warp_strip = warp * kStrips;
        float sums[kStrips][kRows / 8][4];
        u32 weight[2][kSteps][kStrips][4];  // operand A of this stage, and of the one that the unit works on
        Place place{0, 0};
        for (u32 output = work.first_output; output < work.outputs(); output += work.output_step) {
            u32 previous = 0;  // stage, which the unit may still read
            for (u32 tile = work.first_tile; tile < work.end_tile;) {
                // Leaving between the halves would have the compiler wait for each instruction: hence pairs of tiles.
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    barrier_wait(ring.full(place.stage), place.turn);
                    dequantize_stage(weight[half], ring, place.stage, warp_strip, lane);
                    const u64 x = wgmma_description(ring.x(place.stage));
                    wgmma_fence();
#pragma unroll
                    for (int j = 0; j < kSteps; j++)
#pragma unroll
                        for (int s = 0; s < kStrips; s++)
                            wgmma(sums[s], weight[half][j][s], x + j * 2, j > 0 || tile > work.first_tile);
                    wgmma_commit();
                    wgmma_wait_but<1>();  // the stage before this one
                    ring.release(tile > work.first_tile, previous, work.first_neighbour, lane);
                    previous = place.stage;
                    place.advance();
                    tile++;
                }
            }
            wgmma_wait_but<0>();
            ring.release(true, previous, work.first_neighbour, lane);

            u32 row, strip;
            work.place(output, row, strip);
            wait_for_earlier_kernels();  // y may be memory that an earlier kernel still reads
            if (kSplit == 1)
                write_sums(sums, ring.base + kOutputAt, bias, maps.y, n, row, strip + warp / 4 * 4 * kStrips);
            else
                write_parts(sums, ring, bias, y, m, n, row, strip + warp_strip, work.part, work.neighbour);
        }
        if (kSplit == 1) store_box_wait();
        if (kClusters) cluster_barrier_relaxed();  // no block ends while others may still reach into it
    }
}
