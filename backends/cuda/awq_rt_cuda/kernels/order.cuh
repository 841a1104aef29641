// Which output tiles a cluster of gemm_ring.cu computes, and which part of the depth a block of it.
#pragma once

#include "ring.cuh"

constexpr int kBand = BAND;  // row blocks that are worked through together

struct Work {
    u32 rank, neighbour, part, first_neighbour;  // this block's place in its cluster: rank = part * kShare + neighbour
    u32 row_blocks, column_blocks;               // of output tiles; a column block is a cluster's kShare blocks wide
    u32 first_output, output_step;               // of this cluster: every so many-th tile
    u32 first_tile, end_tile;                    // of this block: 64 rows of W each

    __device__ __forceinline__ Work(u32 m, u32 strips, u32 tiles) {
        constexpr u32 kCluster = kSplit * kShare;
        rank = blockIdx.x % kCluster, neighbour = rank % kShare, part = rank / kShare;
        first_neighbour = rank - neighbour;
        row_blocks = (m + kRows - 1) / kRows;
        column_blocks = (strips + kBlockStrips * kShare - 1) / (kBlockStrips * kShare);
        first_output = blockIdx.x / kCluster, output_step = gridDim.x / kCluster;
        // Tiles go in pairs. What a last pair has beyond the weight is computed with zeros for x.
        const u32 pairs = (tiles + 1) / 2;
        first_tile = pairs * part / kSplit * 2, end_tile = pairs * (part + 1) / kSplit * 2;
    }

    __device__ __forceinline__ u32 outputs() const { return row_blocks * column_blocks; }

    // Where an output tile lies, in an order that keeps in the L2 cache what blocks of the same time read: bands of
    // kBand row blocks, within a band column by column.
    __device__ __forceinline__ void place(u32 output, u32& first_row, u32& first_strip) const {
        const u32 band = output / (kBand * column_blocks), top = band * kBand;
        const u32 height = min((u32)kBand, row_blocks - top), within = output - top * column_blocks;
        first_row = (top + within % height) * kRows;
        first_strip = (within / height * kShare + neighbour) * kBlockStrips;
    }
};
