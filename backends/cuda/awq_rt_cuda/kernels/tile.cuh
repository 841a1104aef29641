// The packed weight: tiles of 16 columns (a strip) by 64 rows of W, one uint4 a lane, as the matrix unit wants them.
//
//   lane = 4 * row + quad        row 0..7, quad 0..3
//   word j of its uint4 (0..3)   k = 64 * tile + 16 * j + 2 * quad
//   nibble of that word          bits  0..3   n = row,     k + 0        16..19  n = row,     k + 1
//                                      4..7   n = row + 8, k + 0        20..23  n = row + 8, k + 1
//                                      8..11  n = row,     k + 8        24..27  n = row,     k + 9
//                                     12..15  n = row + 8, k + 8        28..31  n = row + 8, k + 9
//
// So one word is operand A of mma.m16n8k16 (its rows are W's columns n), its registers in the order of the nibbles;
// four warps with a strip each are operand A of wgmma.m64.
//
// Scales and zero points lie [strip][group][row]: the pair of columns row and row + 8 in one word or byte.
#pragma once

#include "number.cuh"

constexpr int kStrip = 16;      // columns of W in a tile
constexpr int kTileDepth = 64;  // rows of W in a tile
constexpr int kLanes = 32;
constexpr int kSteps = kTileDepth / 16;  // mma instructions along a tile's depth
constexpr int kGroupSize = GROUP_SIZE;
constexpr int kGroupsInTile = kGroupSize < kTileDepth ? kTileDepth / kGroupSize : 1;
constexpr int kTilesInGroup = kGroupSize < kTileDepth ? 1 : kGroupSize / kTileDepth;
static_assert(kGroupSize % 16 == 0 && (kTileDepth % kGroupSize == 0 || kGroupSize % kTileDepth == 0), "see packing.py");

// The two zero points of a lane, each twice in a register, ready to be subtracted.
struct ZeroPair {
    u32 low, high;
};

#if ACTIVATION_HALF
// 0x6400 is 1024, whose unit in the last place is 1, so 0x6400 | v is exactly 1024 + v for v < 1024: a nibble in place
// is a float without a conversion. In bits 4..7 it counts 16 each: (1024 + 16 c) / 16 = 64 + c, exact as well, as is
// the difference of two integers below 2048. 0xD400 is -64, where bit 4 counts 1.
__device__ __forceinline__ ZeroPair zero_pair(u32 byte) {
    return {0x64006400u | (byte & 15u) * 0x00010001u, 0xD400D400u | (byte >> 4) * 0x00100010u};
}

__device__ __forceinline__ void dequantize(u32 (&a)[4], u32 word, ZeroPair zero) {
    const u32 sixteenth = 0x2C002C00u;
    u32 later = word >> 8;
    a[0] = sub_half2(and_or(word, 0x000F000Fu, 0x64006400u), zero.low);
    a[1] = fma_half2(and_or(word, 0x00F000F0u, 0x64006400u), sixteenth, zero.high);
    a[2] = sub_half2(and_or(later, 0x000F000Fu, 0x64006400u), zero.low);
    a[3] = fma_half2(and_or(later, 0x00F000F0u, 0x64006400u), sixteenth, zero.high);
}
#else
// 0x4300 is 128, whose unit in the last place is 1: 0x4300 | c is exactly 128 + c for c < 128, but 16 c would not fit,
// so each nibble is shifted down. -(128 + z) is 0xC300 | z. Multiplying by one is how sm_80 adds in bfloat16.
__device__ __forceinline__ ZeroPair zero_pair(u32 byte) {
    return {0xC300C300u | (byte & 15u) * 0x00010001u, 0xC300C300u | (byte >> 4) * 0x00010001u};
}

__device__ __forceinline__ void dequantize(u32 (&a)[4], u32 word, ZeroPair zero) {
    const u32 one = 0x3F803F80u;
    a[0] = fma_bfloat2(and_or(word, 0x000F000Fu, 0x43004300u), one, zero.low);
    a[1] = fma_bfloat2(and_or(word >> 4, 0x000F000Fu, 0x43004300u), one, zero.high);
    a[2] = fma_bfloat2(and_or(word >> 8, 0x000F000Fu, 0x43004300u), one, zero.low);
    a[3] = fma_bfloat2(and_or(word >> 12, 0x000F000Fu, 0x43004300u), one, zero.high);
}
#endif

#if SCALE_KIND == 1 - ACTIVATION_HALF
// The weights themselves, each rounded once: exact integers times their scale. For scales of the activations' type.
__device__ __forceinline__ void dequantize_scaled(u32 (&a)[4], u32 word, ZeroPair zero, u32 low_scale, u32 high_scale) {
    dequantize(a, word, zero);
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = mul_activations(a[i], i % 2 ? high_scale : low_scale);
}
#endif

__device__ __forceinline__ u32 word_of(const uint4& words, int j) {
    return j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
}

// One tile's share of a lane, with the scales and zero points of its groups.
struct Tile {
    uint4 words;
    ScalePair scales[kGroupsInTile];
    u8 zeros[kGroupsInTile];
};

// Where a lane finds its share of one strip, from tile `first` on; tiles are taken kStep apart.
template <int kStep>
struct StripReader {
    // Where a step is whole groups, the next scales lie at a constant distance; else their place is computed each time.
    static constexpr bool kWholeGroups = kStep % kTilesInGroup == 0;
    static constexpr int kGroupStep = kStep / kTilesInGroup * kGroupsInTile;

    const uint4* codes;
    const ScalePair* scales;
    const u8* zeros;

    __device__ __forceinline__ void start(
        const uint4* all_codes,       // [strips, tiles, 32]
        const ScalePair* all_scales,  // [strips, groups, 8]
        const u8* all_zeros,          // [strips, groups, 8]
        u32 strip, u32 first, u32 tiles, u32 groups, u32 lane) {
        codes = all_codes + ((u64)strip * tiles + first) * kLanes + lane;
        u64 pair = (u64)strip * groups * 8 + lane / 4;
        if (kWholeGroups) pair += group_of(first) * 8;
        scales = all_scales + pair;
        zeros = all_zeros + pair;
    }

    // The tile `index`, which is `ahead` steps beyond where the reader stands.
    __device__ __forceinline__ void read(Tile& tile, u32 index, int ahead) const {
        tile.words = load_once(codes + ahead * kStep * kLanes);
        const int group = kWholeGroups ? ahead * kGroupStep : (int)group_of(index);
#pragma unroll
        for (int i = 0; i < kGroupsInTile; i++) {
            tile.scales[i] = __ldg(scales + (group + i) * 8);
            tile.zeros[i] = __ldg(zeros + (group + i) * 8);
        }
    }

    __device__ __forceinline__ void advance(int steps) {
        codes += steps * kStep * kLanes;
        if (kWholeGroups) {
            scales += steps * kGroupStep * 8;
            zeros += steps * kGroupStep * 8;
        }
    }

    static __device__ __forceinline__ u32 group_of(u32 index) { return index * kGroupsInTile / kTilesInGroup; }
};
