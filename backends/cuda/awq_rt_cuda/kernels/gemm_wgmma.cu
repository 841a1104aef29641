// gemm.cuh on wgmma, the matrix instruction of four warps (sm_90a): the unit itself reads x from shared memory, and
// twice as much is multiplied in a cycle as with mma.sync. Four warps have a strip each; their tiles are operand A.
#define KERNEL_NAME gemm_wgmma
#include "gemm.cuh"
#include "wgmma.cuh"

static_assert(kWarpsN % 4 == 0 && kRows % 8 == 0, "four warps work together");

// The unit reads shared memory past the path of ordinary stores: what was stored must be visible there first.
__device__ __forceinline__ void before_multiply() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void multiply(
    float (&sums)[kRowTiles][kStrips][4], const Tile (&tiles)[kStrips], u32 slot, u32 lane) {
    u32 weight[kStrips][kSteps][4];
    float sum[kStrips][kRowTiles][4];
#pragma unroll
    for (int s = 0; s < kStrips; s++)
#pragma unroll
        for (int j = 0; j < kSteps; j++)
            dequantize(weight[s][j], word_of(tiles[s].words, j), zero_pair(tiles[s].zeros[j / kGroupSteps]));
#pragma unroll
    for (int g = 0; g < kGroupsInTile; g++) {
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kStrips; s++)
#pragma unroll
            for (int j = g * kGroupSteps; j < (g + 1) * kGroupSteps; j++)
                wgmma(sum[s], weight[s][j], wgmma_description(slot + j * 32), j % kGroupSteps != 0);
        wgmma_commit();
        wgmma_wait_but<0>();
#pragma unroll
        for (int s = 0; s < kStrips; s++)
#pragma unroll
            for (int r = 0; r < kRowTiles; r++) add_group(sums[r][s], sum[s][r], tiles[s].scales[g]);
    }
}
