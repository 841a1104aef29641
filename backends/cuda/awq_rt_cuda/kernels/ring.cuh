// The ring of stages between a producer warp and the warpgroups that multiply (sm_90a): a stage is what one step of 64
// rows of W needs: x's rows, and of every strip its tile with the scales and zero points of the tile's groups.
//
// Each stage has two barriers. `full`: the copies of the stage have arrived. `empty`: all warps that read the stage,
// in every block that gets the same x, have done so.
#pragma once

#include "bulk.cuh"
#include "tile.cuh"

constexpr int kRows = ROWS;              // of x that a block multiplies
constexpr int kStrips = STRIPS;          // of a warp
constexpr int kConsumers = CONSUMERS;    // warpgroups that multiply
constexpr int kStages = STAGES;
constexpr int kSplit = SPLIT;            // blocks of a cluster that share one output tile, each a part of the depth
constexpr int kShare = SHARE;            // blocks of a cluster that share one part of x, each with other columns

constexpr int kConsumerWarps = kConsumers * 4;
// Registers are dealt out four warps at a time: where consumers take more than they start with, the producer's warp is
// one of four, which give up theirs.
constexpr int kTakeRegisters = TAKE_REGISTERS;  // of a consumer's thread; 0: all keep what they start with
constexpr int kStartRegisters = 65536 / ((kConsumers + 1) * 128) / 8 * 8;
constexpr int kKeptRegisters = kStartRegisters * (kConsumers + 1) - kTakeRegisters * kConsumers;  // by the producer's
constexpr int kThreads = (kConsumerWarps + (kTakeRegisters > 0 ? 4 : 1)) * kLanes;
constexpr int kBlockStrips = kConsumerWarps * kStrips;
constexpr int kColumns = kBlockStrips * kStrip;
constexpr int kCopiedRows = kRows / kShare;  // of x that one block brings, for itself and its neighbours

constexpr int kXBytes = kRows * kTileDepth * 2;
constexpr int kBoxColumns = 64;  // of y, 128 bytes: what one copy of the engine stores
constexpr int kBoxBytes = kRows * kBoxColumns * 2;
constexpr int kTileBytes = kLanes * 16;
constexpr int kScalesBytes = kGroupsInTile * 8 * sizeof(ScalePair);  // of a strip
constexpr int kZerosBytes = kGroupsInTile * 8;

// Byte offsets in shared memory: barriers first, then what the swizzle of x and y counts from multiples of 1024.
constexpr int kFullAt = 0;
constexpr int kEmptyAt = kFullAt + kStages * 8;
constexpr int kPartsAt = kEmptyAt + kStages * 8;
constexpr int kXAt = 1024;
constexpr int kOutputAt = kXAt + kStages * kXBytes;
constexpr int kCodesAt = kOutputAt + (kSplit == 1 ? kConsumers * kStrips * kBoxBytes : 0);
constexpr int kScalesAt = kCodesAt + kStages * kBlockStrips * kTileBytes;
constexpr int kZerosAt = kScalesAt + kStages * kBlockStrips * kScalesBytes;
constexpr int kRingEnd = kZerosAt + kStages * kBlockStrips * kZerosBytes;
static_assert(kPartsAt + 8 <= kXAt, "barriers fit");
static_assert(kRingEnd <= SHARED_BYTES, "ring.py counts the same bytes");
static_assert(kCopiedRows % 8 == 0 && kXBytes % 1024 == 0, "whole atoms of the swizzle");

struct Maps {
    TensorMap codes;  // [strips, tiles * 128] words in boxes of kBlockStrips by 128, see tile.cuh
    TensorMap x;      // [m, k] in boxes of kCopiedRows by 64, swizzled by 128 bytes
    TensorMap y;      // [m, n] in boxes of kRows by 64, swizzled by 128 bytes
};

// Where in the ring somebody is: the stage, and the parity of the turn.
struct Place {
    u32 stage, turn;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, turn ^= 1;
    }
};

struct Ring {
    u32 base;  // shared address

    __device__ __forceinline__ u32 x(u32 stage) const { return base + kXAt + stage * kXBytes; }
    __device__ __forceinline__ u32 codes(u32 stage, u32 strip) const {
        return base + kCodesAt + (stage * kBlockStrips + strip) * kTileBytes;
    }
    __device__ __forceinline__ u32 scales(u32 stage, u32 strip) const {
        return base + kScalesAt + (stage * kBlockStrips + strip) * kScalesBytes;
    }
    __device__ __forceinline__ u32 zeros(u32 stage, u32 strip) const {
        return base + kZerosAt + (stage * kBlockStrips + strip) * kZerosBytes;
    }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + kFullAt + stage * 8; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + kEmptyAt + stage * 8; }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(full(stage), 1 + kLanes);
            barrier_init(empty(stage), kConsumerWarps * kShare);
        }
        if (kSplit > 1) barrier_init(base + kPartsAt, 1);
        barrier_init_fence();
    }

    // A consumer warp, if it `has` one, has read `stage`: told here, and to the blocks that bring it x.
    __device__ __forceinline__ void release(bool has, u32 stage, u32 first_neighbour, u32 lane) const {
        __syncwarp();  // one lane speaks for all: their reads come before its arrival
        if (kShare == 1)
            barrier_arrive_if(has && lane == 0, empty(stage));
        else
            barrier_arrive_at_if(has && lane < kShare, empty(stage), first_neighbour + lane % kShare);
    }
};

// The producer warp's half of the work: it fills the stages in order.
struct Producer {
    Ring ring;
    const Maps& maps;
    const ScalePair* scales;  // [strips, groups, 8]
    const u8* zeros;          // [strips, groups, 8]
    u32 strips, tiles, groups;
    u32 lane, neighbour, first_neighbour;  // which of the kShare blocks this is, and the first one's rank

    // The weight's share of a stage: what a kernel may read before the kernels ahead of it have ended.
    __device__ __forceinline__ void fetch_weight(u32 stage, u32 first_strip, u32 tile) const {
        if (lane == 0) {
            barrier_arrive_expecting(ring.full(stage), kXBytes + kBlockStrips * kTileBytes);
            copy_box(ring.codes(stage, 0), &maps.codes, tile * (kTileBytes / 4), first_strip, ring.full(stage));
        }
#pragma unroll
        for (u32 i = 0; i < kBlockStrips; i += kLanes) {
            const u32 strip = i + lane;
            if (kBlockStrips % kLanes != 0 && strip >= kBlockStrips) break;
            // Past the last strip or tile codes read as zeros; scales must be there, and it does not matter which.
            const u64 group =
                (u64)min(first_strip + strip, strips - 1) * groups + StripReader<1>::group_of(min(tile, tiles - 1));
#pragma unroll
            for (int at = 0; at < kScalesBytes; at += 16)
                copy_async_16(ring.scales(stage, strip) + at, (const char*)(scales + group * 8) + at, true);
#pragma unroll
            for (int at = 0; at < kZerosBytes; at += 8)
                copy_async_8(ring.zeros(stage, strip) + at, zeros + group * 8 + at);
        }
        barrier_arrive_after_copies(ring.full(stage));
    }

    __device__ __forceinline__ void fetch_x(u32 stage, u32 first_row, u32 tile) const {
        if (lane != 0) return;
        const u32 to = ring.x(stage) + neighbour * kCopiedRows * 128;
        const u32 row = first_row + neighbour * kCopiedRows, column = tile * kTileDepth;
        if (kShare == 1)
            copy_box(to, &maps.x, column, row, ring.full(stage));
        else
            copy_box_to(to, &maps.x, column, row, ring.full(stage), ((1 << kShare) - 1) << first_neighbour);
    }
};
