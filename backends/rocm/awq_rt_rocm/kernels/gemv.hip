// y = x W + bias for few rows, on the vector units: memory bound, so what counts is that loads are early and whole.
//
// A block is one strip of 16 columns; its waves take the strip's tiles in turn, so that neighbours read neighbouring
// KiB. In a wave of 64 lanes, lane = 16 quarter + column holds one chunk of a tile; in a wave of 32, two. x is staged a tile
// at a time in shared memory of the wave's own, where all 16 columns read the same 16 bytes. Codes less zero points
// are small integers, exact in float16; sums are float32, and the scale is applied to the sums of a group.
//
// ROWS   rows of x a block takes
// WAVES  waves of a block
// DEPTH  tiles a wave has under way
#include "tile.h"

constexpr u32 kRows = ROWS, kWaves = WAVES, kDepth = DEPTH;
constexpr u32 kThreads = kWaves * kWave;
constexpr u32 kChunks = 64 / kWave;              // of a tile, that one lane holds
constexpr u32 kRowsAtOnce = kWave / 16;          // rows of x that a wave stages with one load
constexpr u32 kStageSteps = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;

#if ACTIVATION_HALF
using Staged = f16;  // multiplied in pairs
#else
using Staged = float;  // there is no product of a float16 and a bfloat16: x is widened once, where it is staged
#endif

struct Under {  // what of one tile is under way
    Chunk chunks[kChunks];
    words4 x[kStageSteps];
};

struct Block {
    Weight weight;
    const u16* x;  // [m, k]
    u32 k, strip, first_row, lane;
    u32 row_bytes[kStageSteps];  // where the row of x begins whose eights the lane stages

    // A row beyond the last is the last once more; it is not stored.
    __device__ __forceinline__ void find_rows(u32 m) {
#pragma unroll
        for (u32 i = 0; i < kStageSteps; i++) {
            const u32 wanted = i * kRowsAtOnce + lane / 16, there = m - first_row < kRows ? m - first_row : kRows;
            row_bytes[i] = (wanted < there ? wanted : there - 1) * k * 2;
            keep_in_place(row_bytes[i]);  // not computed anew wherever x is read
        }
    }

    __device__ __forceinline__ void read(Under& under, u32 tile) const {
#pragma unroll
        for (u32 i = 0; i < kChunks; i++)
            under.chunks[i].read(weight, strip, tile, lane / 16 + i * (kWave / 16), lane % 16);
#pragma unroll
        for (u32 i = 0; i < kStageSteps; i++) {
            // Beyond the end of a row its last eight are read again: the weights there are exactly zero, so that only a
            // row which holds an infinity or a NaN, and is lost anyway, can tell.
            const u32 wanted_bytes = row_bytes[i] + lane % 16 * 16;
            const u32 last_bytes = row_bytes[i] + (k - 8 - tile * kTileDepth) * 2;
            const u16* first = x + (u64)first_row * k + tile * kTileDepth;
            under.x[i] = load<words4>(first, wanted_bytes < last_bytes ? wanted_bytes : last_bytes);
        }
    }
};

__device__ __forceinline__ void stage(Staged (&to)[kRows][kTileDepth], const Under& under, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < kStageSteps; i++) {
        // Lanes beyond the last row hold that row once more, and put it where it lies already.
        const u32 wanted = i * kRowsAtOnce + lane / 16, row = wanted < kRows ? wanted : kRows - 1;
#if ACTIVATION_HALF
        *reinterpret_cast<words4*>(&to[row][lane % 16 * 8]) = under.x[i];
#else
        floats4 wide[2];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            wide[j / 2][j % 2 * 2] = bits_as<float>(under.x[i][j] << 16);
            wide[j / 2][j % 2 * 2 + 1] = bits_as<float>(under.x[i][j] & 0xFFFF0000u);
        }
        floats4* place = reinterpret_cast<floats4*>(&to[row][lane % 16 * 8]);
        place[0] = wide[0];
        place[1] = wide[1];
#endif
    }
}

// Eight weights of one column times eight of x.
__device__ __forceinline__ float multiply(const f16x2 (&w)[4], const Staged* x, float sum) {
#if ACTIVATION_HALF
    const words4 eight = *reinterpret_cast<const words4*>(x);
#pragma unroll
    for (int i = 0; i < 4; i++) sum = dot2(w[i], bits_as<f16x2>(eight[i]), sum);
#else
    const floats4* eight = reinterpret_cast<const floats4*>(x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = __builtin_fmaf((float)w[i / 2][i % 2], eight[i / 4][i % 4], sum);
#endif
    return sum;
}

__device__ __forceinline__ void accumulate(
    float (&y)[kRows], const Under& under, const Staged (&x)[kRows][kTileDepth], u32 lane) {
#pragma unroll
    for (u32 c = 0; c < kChunks; c++) {
        const Chunk& chunk = under.chunks[c];
        const u32 quarter = lane / 16 + c * (kWave / 16);
#pragma unroll
        for (int group = 0; group < kGroupsInTile; group++) {
            const ZeroPair zero = zero_pair(chunk.groups[group]);
            const float scale = scale_of(chunk.groups[group]);
            float sums[kRows] = {};
#pragma unroll
            for (int word = group * kGroupWords; word < (group + 1) * kGroupWords; word++) {
                f16x2 w[4];
                dequantize(w, chunk.words[word], zero);
                if (kRows > 1 || !ACTIVATION_HALF) keep_order();
#pragma unroll
                for (u32 row = 0; row < kRows; row++)
                    sums[row] = multiply(w, &x[row][word * 32 + quarter * 8], sums[row]);
            }
#pragma unroll
            for (u32 row = 0; row < kRows; row++) y[row] = __builtin_fmaf(scale, sums[row], y[row]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) gemv(
    const words4* __restrict__ codes,  // [strips, tiles, 4, 16]
    const GroupConstants* __restrict__ constants,  // [strips, groups, 16]
    const float* __restrict__ bias,    // [n], or null
    const u16* __restrict__ x,         // [m, k] activations, 16-byte aligned
    u16* __restrict__ y,               // [m, n] activations, out
    u32 m, u32 n, u32 k, u32 tiles, u32 groups) {
    __shared__ __attribute__((aligned(16))) Staged staged[kWaves][kRows][kTileDepth];
    __shared__ float parts[kWaves][kRows][kStrip];
    const u32 lane = lane_index(), wave = wave_index();
    Block block = {{codes, constants, tiles, groups}, x, k, block_y(), block_x() * kRows, lane, {}};
    block.find_rows(m);

    Under under[kDepth];
#pragma unroll
    for (u32 i = 0; i < kDepth; i++) {
        const u32 tile = wave + i * kWaves;
        block.read(under[i], tile < tiles ? tile : tiles - 1);  // of one too many nothing is made
        keep_order();
    }

    float sums[kRows] = {};
    auto take = [&](Under& tile, u32 next, bool is_next) {
        wave_fence();  // the tile before has been read from shared memory
        stage(staged[wave], tile, lane);
        wave_fence();
        if (kRows == 1) {
            accumulate(sums, tile, staged[wave], lane);
            keep_order();
            if (is_next) block.read(tile, next);
        } else {  // reads of all rows from shared memory would be made before the branch, and spill
            const Under current = tile;
            if (is_next) block.read(tile, next);
            accumulate(sums, current, staged[wave], lane);
        }
        keep_order();
    };
    // As long as every tile has one that follows it: a load that may not have been made would have the compiler wait for the
    // newer ones with it. Several rows in waves of 64 would not find registers without the branch.
    u32 first = wave;
    for (; (kRows == 1 || kWave == 32) && first + (2 * kDepth - 1) * kWaves < tiles; first += kDepth * kWaves) {
#pragma unroll
        for (u32 i = 0; i < kDepth; i++)
            take(under[i], first + (i + kDepth) * kWaves, true);
    }
    for (; first < tiles; first += kDepth * kWaves) {
#pragma unroll
        for (u32 i = 0; i < kDepth; i++) {
            const u32 tile = first + i * kWaves, next = tile + kDepth * kWaves;
            if (tile >= tiles) break;
            take(under[i], next, next < tiles);
        }
    }

#pragma unroll
    for (u32 row = 0; row < kRows; row++) {
#pragma unroll
        for (u32 mask = 16; mask < kWave; mask *= 2) sums[row] += from_lane_xor(sums[row], mask);
        if (lane < 16) parts[wave][row][lane] = sums[row];
    }
    block_barrier();
    for (u32 i = thread_index(); i < kRows * kStrip; i += kThreads) {
        const u32 row = block_x() * kRows + i / kStrip, column = block_y() * kStrip + i % kStrip;
        float sum = 0;
#pragma unroll
        for (u32 w = 0; w < kWaves; w++) sum += parts[w][i / kStrip][i % kStrip];
        if (row < m && column < n) y[(u64)row * n + column] = activation_of_float(sum + (bias ? bias[column] : 0.0f));
    }
}
