// gemm.cuh on mma.sync, the matrix instruction of one warp, which every GPU since sm_80 has.
//
// GEMV is this kernel with kWarpsN = 1: no warp waits for another before the end.
#define KERNEL_NAME gemm_mma
#include "gemm.cuh"

__device__ __forceinline__ void before_multiply() {}

__device__ __forceinline__ void multiply(
    float (&sums)[kRowTiles][kStrips][4], const Tile (&tiles)[kStrips], u32 slot, u32 lane) {
    // A lane reads row lane % 8 of a row tile; where a tile has fewer rows they repeat, into sums that are not written.
    const u32 read_row = lane % 8 % kRows, read_from = slot + read_row * 128 + (lane / 8 ^ read_row) * 16;
    // Step by step for all rows: each instruction waits only for its predecessor of a step before.
    float sum[kRowTiles][kStrips][4] = {};
    u32 b[kRowTiles][4];  // of two steps, which is what load_matrices brings
#pragma unroll
    for (int j = 0; j < kSteps; j++)
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
            u32 weight[4];
            dequantize(weight, word_of(tiles[s].words, j), zero_pair(tiles[s].zeros[j / kGroupSteps]));
#pragma unroll
            for (int r = 0; r < kRowTiles; r++) {
                if (j % 2 == 0 && s == 0) load_matrices(b[r], (read_from ^ j * 32) + r * 8 * 128);
                mma(sum[r][s], weight, b[r][j % 2 * 2], b[r][j % 2 * 2 + 1]);
                if ((j + 1) % kGroupSteps == 0) add_group(sums[r][s], sum[r][s], tiles[s].scales[j / kGroupSteps]);
            }
        }
}
