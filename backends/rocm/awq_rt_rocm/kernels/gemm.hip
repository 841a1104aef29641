// y = x W + bias for 16 rows and more, on the matrix unit, whichever it is (matrix.h).
//
// A wave takes ROWS rows of x and STRIPS strips of W, and of their tiles every WAVES-th; the waves' sums meet in shared
// memory. Codes go from device memory to registers and straight into the unit as small integers, exact in either
// type; x comes from the caches, an operand a load. Sums of a group are scaled once they are complete; groups that end
// between the lanes of an instruction have their weights scaled instead.
//
// There is no packed arithmetic on bfloat16 that would take the zero point off. A code becomes 16 + c there, and what is
// too much, 16 + z times the sum of x over the group, is taken off the group's sums; the unit adds x up too.
//
// ROWS    rows of x a block takes, a multiple of 16
// STRIPS  strips of 16 columns a block takes: so often is a load of x used
// WAVES   waves of a block
#include "matrix.h"

constexpr u32 kRows = ROWS, kStrips = STRIPS, kWaves = WAVES;
constexpr u32 kThreads = kWaves * kWave, kRowTiles = kRows / 16, kColumns = kStrips * kStrip;

struct Under {  // what of one tile is under way
    Chunk chunks[kStrips][kUnitChunks];
};

struct Block {
    Weight weight;
    const u16* x;  // [m, k]
    u32 m, k, strips, first_strip, first_row, lane;

    __device__ __forceinline__ void read(Under& under, u32 tile) const {
#pragma unroll
        for (u32 s = 0; s < kStrips; s++) {
            const u32 strip = first_strip + s < strips ? first_strip + s : strips - 1;  // one too many is not stored
#pragma unroll
            for (u32 c = 0; c < kUnitChunks; c++)
                under.chunks[s][c].read(weight, strip, tile, quarter_of(c, lane), lane % 16);
        }
    }

    // Eights of row lane % 16 of a tile of rows. A row beyond the last is the last once more; it is not stored.
    __device__ __forceinline__ void read_x(words4 (&x8)[kUnitChunks], u32 row_tile, u32 tile, int word) const {
        const u32 last = m - first_row - 1, wanted = row_tile * 16 + lane % 16, row = wanted < last ? wanted : last;
        const u16* first = x + (u64)first_row * k;
#pragma unroll
        for (u32 c = 0; c < kUnitChunks; c++) {
            // Beyond the end of a row its last eight are read again: the weights there are exactly zero, so that only a
            // row which holds an infinity or a NaN, and is lost anyway, can tell.
            const u32 wanted_bytes = (row * k + quarter_of(c, lane) * 8) * 2 + (tile * kTileDepth + word * 32) * 2;
            const u32 last_bytes = (row * k + k - 8) * 2;
            x8[c] = load<words4>(first, wanted_bytes < last_bytes ? wanted_bytes : last_bytes);
        }
    }

    __device__ __forceinline__ void accumulate(Results (&y)[kRowTiles][kStrips], const Under& under, u32 tile) const {
#pragma unroll
        for (int group = 0; group < kGroupsInTile; group++) {
            Results sums[kRowTiles][kStrips] = {}, row_sums[kRowTiles] = {};
#pragma unroll
            for (int word = group * kGroupWords; word < (group + 1) * kGroupWords; word++) {
                words4 x8[kRowTiles][kUnitChunks];
#pragma unroll
                for (u32 r = 0; r < kRowTiles; r++) read_x(x8[r], r, tile, word);
#pragma unroll
                for (u32 s = 0; s < kStrips; s++) {
                    words4 w[kUnitChunks];
#pragma unroll
                    for (u32 c = 0; c < kUnitChunks; c++) {
                        const Chunk& chunk = under.chunks[s][c];
                        w[c] = kScaleWeights ? weights_of_word(chunk.words[word], chunk.groups[group])
                                             : operands_of_word(chunk.words[word], chunk.groups[group]);
                    }
#pragma unroll
                    for (u32 r = 0; r < kRowTiles; r++) sums[r][s] = multiply(x8[r], w, sums[r][s]);
                }
                if (kOffset) {
#pragma unroll
                    for (u32 r = 0; r < kRowTiles; r++) row_sums[r] = add_rows(x8[r], row_sums[r]);
                }
            }
#pragma unroll
            for (u32 s = 0; s < kStrips; s++) {
                const GroupConstants constants = under.chunks[s][0].groups[group];
                const float scale = kScaleWeights ? 1.0f : scale_of(constants), offset = offset_of(constants);
#pragma unroll
                for (u32 r = 0; r < kRowTiles; r++)
#pragma unroll
                    for (u32 j = 0; j < kResults; j++) {
                        float sum = sums[r][s][j];
                        if (kOffset) sum = __builtin_fmaf(-offset, row_sums[r][j], sum);
                        y[r][s][j] = __builtin_fmaf(scale, sum, y[r][s][j]);
                    }
#pragma unroll
                for (u32 r = 0; r < kRowTiles; r++) keep_in_place(y[r][s]);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kThreads) gemm(
    const words4* __restrict__ codes,  // [strips, tiles, 4, 16]
    const GroupConstants* __restrict__ constants,  // [strips, groups, 16]
    const float* __restrict__ bias,    // [n], or null
    const u16* __restrict__ x,         // [m, k] activations, 16-byte aligned
    u16* __restrict__ y,               // [m, n] activations, out
    u32 m, u32 n, u32 k, u32 tiles, u32 groups) {
    __shared__ float parts[kWaves][kRows][kColumns];
    const u32 lane = lane_index(), wave = wave_index();
    const u32 strips = (n + kStrip - 1) / kStrip;
    const Block block = {
        {codes, constants, tiles, groups}, x, m, k, strips, block_y() * kStrips, block_x() * kRows, lane};

    // Two tiles by turns: one is multiplied while the other is on its way.
    Under even, odd;
    Results sums[kRowTiles][kStrips] = {};
    if (wave < tiles) block.read(even, wave);
    for (u32 tile = wave; tile < tiles; tile += 2 * kWaves) {
        const u32 second = tile + kWaves, third = second + kWaves;
        if (second < tiles) block.read(odd, second);
        block.accumulate(sums, even, tile);
        if (third < tiles) block.read(even, third);
        if (second < tiles) block.accumulate(sums, odd, second);
    }

#pragma unroll
    for (u32 r = 0; r < kRowTiles; r++)
#pragma unroll
        for (u32 s = 0; s < kStrips; s++)
#pragma unroll
            for (u32 j = 0; j < kResults; j++)
                parts[wave][r * 16 + result_row(j, lane)][s * kStrip + lane % 16] = sums[r][s][j];
    block_barrier();
    for (u32 i = thread_index(); i < kRows * kColumns; i += kThreads) {
        const u32 row = block_x() * kRows + i / kColumns, column = block_y() * kColumns + i % kColumns;
        float sum = 0;
#pragma unroll
        for (u32 w = 0; w < kWaves; w++) sum += parts[w][i / kColumns][i % kColumns];
        if (row < m && column < n) y[(u64)row * n + column] = activation_of_float(sum + (bias ? bias[column] : 0.0f));
    }
}
