// The weight as activations [n, k], for a product by the vendor's library. A lane writes the 8 rows of one word, 16 bytes.
#include "tile.h"

constexpr u32 kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads) dequantize_tiles(
    const words4* __restrict__ codes,  // [strips, tiles, 4, 16]
    const GroupConstants* __restrict__ constants,  // [strips, groups, 16]
    u16* __restrict__ w,               // [n, k] activations, out: row n holds column n of W
    u32 n, u32 k, u32 tiles, u32 groups) {
    const u32 thread = thread_index(), quarter = thread / kStrip % kQuarters, column = thread % kStrip;
    const u32 tile = block_x() * (kThreads / kTileChunks) + same_for_wave(thread / kTileChunks), strip = block_y();
    const u32 place = strip * kStrip + column;
    if (tile >= tiles || place >= n) return;
    Chunk chunk;
    chunk.read({codes, constants, tiles, groups}, strip, tile, quarter, column);
#pragma unroll
    for (int word = 0; word < 4; word++) {
        const u32 depth = tile * kTileDepth + word * 32 + quarter * 8;
        const float scale = scale_of(chunk.groups[word / kGroupWords]);
        f16x2 pairs[4];
        dequantize(pairs, chunk.words[word], zero_pair(chunk.groups[word / kGroupWords]));
        words4 eight;
#pragma unroll
        for (int i = 0; i < 4; i++)
            eight[i] = activations_of_floats((float)pairs[i].x * scale, (float)pairs[i].y * scale);
        if (depth < k) *reinterpret_cast<words4*>(w + (u64)place * k + depth) = eight;
    }
}
