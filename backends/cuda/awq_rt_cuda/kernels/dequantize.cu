// The weight as activations [n, k], for a matrix product by the vendor's library. One warp a tile.
//
// A lane's share of a tile is pairs of values in 16 rows; stored as they are they would be 4-byte writes. They meet in
// shared memory first, and leave as whole rows of 128 bytes.
#include "tile.cuh"

constexpr int kWarps = 8;
constexpr int kRowBytes = kTileDepth * 2 + 16;  // 16 more, so that the 8 rows of a store share no bank

extern "C" __global__ void __launch_bounds__(kWarps * kLanes) dequantize_tiles(
    const uint4* __restrict__ codes,       // [strips, tiles, 32] packed weight, see tile.cuh
    const ScalePair* __restrict__ scales,  // [strips, groups, 8] pairs of columns
    const u8* __restrict__ zeros,          // [strips, groups, 8] pairs of columns
    u16* __restrict__ w,                   // [n, k] out: row n holds column n of W
    u32 n, u32 k, u32 tiles, u32 groups) {
    __shared__ __align__(16) char rows[kWarps][kStrip][kRowBytes];
    const u32 lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, row = lane / 4, quad = lane % 4;
    const u32 strip = blockIdx.z * gridDim.y + blockIdx.y, index = blockIdx.x * kWarps + warp;
    Tile tile;
    StripReader<1> reader;
    reader.start(codes, scales, zeros, strip, index, tiles, groups, lane);
    const bool mine = index < tiles && strip * kStrip < n;  // the grid is rounded up in all its dimensions
    if (mine) reader.read(tile, index, 0);
    let_next_kernel_start();
    wait_for_earlier_kernels();  // `w` may be memory that an earlier kernel still reads
    if (!mine) return;

#pragma unroll
    for (int j = 0; j < kSteps; j++) {
        const u32 word = word_of(tile.words, j);
        const int zero = tile.zeros[j * kGroupsInTile / kSteps];
        const ScalePair pair = tile.scales[j * kGroupsInTile / kSteps];
#pragma unroll
        for (int place = 0; place < 4; place++) {  // of a nibble in both halves of the word
            const int half = place % 2, zero_point = zero >> (half * 4) & 15;
            const float scale = half ? high_scale(pair) : low_scale(pair);
            const int low = (int)(word >> (place * 4) & 15) - zero_point;
            const int high = (int)(word >> (place * 4 + 16) & 15) - zero_point;
            *reinterpret_cast<u32*>(&rows[warp][row + half * 8][(j * 16 + place / 2 * 8 + quad * 2) * 2]) =
                activations_of_floats((float)low * scale, (float)high * scale);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 r = i * 4 + lane / 8, chunk = lane % 8;
        const u32 column = strip * kStrip + r, depth = index * kTileDepth + chunk * 8;
        if (column < n && depth < k)
            *reinterpret_cast<uint4*>(w + (u64)column * k + depth) =
                *reinterpret_cast<const uint4*>(&rows[warp][r][chunk * 16]);
    }
}
