// The packed weight: strips of 16 columns, cut into tiles of 128 rows, 1 KiB each.
//
//   codes   [strips, tiles, 4 quarters, 16 columns] chunks of 16 bytes: word s of a chunk holds
//           k = 128 tile + 32 s + 8 quarter + i, i = 0..7, code i at bit 4 (i / 2) + 16 (i % 2)
//   groups  [strips, groups, 16 columns] scale and zero point, see GroupConstants
//
// So 32 consecutive k are word s of the four quarters: a wave of 64 lanes holds a tile as lane = 16 quarter + column, and a
// matrix instruction of depth 16 or 32 finds its operands in one word a lane. GROUP_SIZE is a multiple of 8.
#pragma once
#include "number.h"

constexpr u32 kStrip = 16, kTileDepth = 128, kQuarters = 4, kTileChunks = kQuarters * kStrip;
constexpr u32 kGroup = GROUP_SIZE;

// Words of a chunk that share a group, whatever the quarter: sums may be kept unscaled so long.
constexpr int kGroupWords = kGroup % 128 == 0 ? 4 : kGroup % 64 == 0 ? 2 : 1;
constexpr int kGroupsInTile = 4 / kGroupWords;

struct Weight {
    const words4* codes;
    const GroupConstants* constants;
    u32 tiles, groups;

};

// One chunk, with the scale and zero point of each of its groups.
struct Chunk {
    words4 words;
    GroupConstants groups[kGroupsInTile];

    __device__ __forceinline__ void read(const Weight& weight, u32 strip, u32 tile, u32 quarter, u32 column) {
        // What is the same for the wave goes into the base, in scalar registers; a lane adds 32 bits.
        const words4* tile_codes = weight.codes + ((u64)strip * weight.tiles + tile) * kTileChunks;
        words = load<words4>(tile_codes, (quarter * kStrip + column) * sizeof(words4));
#pragma unroll
        for (int i = 0; i < kGroupsInTile; i++) {
            const u32 depth = tile * kTileDepth + i * kGroupWords * 32;
            const u64 first = ((u64)strip * weight.groups + depth / kGroup) * kStrip;
            // A group that is no multiple of 32 may end between the quarters.
            const u32 place = kGroup % 32 == 0 ? column : ((depth + quarter * 8) / kGroup - depth / kGroup) * kStrip + column;
            groups[i] = load<GroupConstants>(weight.constants + first, place * sizeof(GroupConstants));
        }
    }
};
