// y = x W + bias on the matrix unit, whichever it is (matrix.h): for 16 rows and more, and on CDNA for the fewest too.
//
// A wave takes ROWS rows of x and STRIPS strips of W, and of their tiles every WAVES-th; the waves' sums meet in shared
// memory. Codes go from device memory to registers and straight into the unit as small integers, exact in either
// type; x comes from the caches, an operand a load. Sums of a group are scaled once they are complete; groups that end
// between the lanes of an instruction have their weights scaled instead.
//
// There is no packed arithmetic on bfloat16 that would take the zero point off. A code becomes 16 + c there, and what is
// too much, 16 + z times the sum of x over the group, is taken off the group's sums; the unit adds x up too.
//
// The unit takes 16 rows at a time. kFewRows of x are spread over them so that they come out as result 0 of all lanes: the
// others, which repeat them, are neither scaled nor added up.
//
// ROWS    rows of x a block takes, kFewRows or a multiple of 16
// STRIPS  strips of 16 columns a block takes: so often is a load of x used
// WAVES   waves of a block
#include "matrix.h"

constexpr u32 kRows = ROWS, kStrips = STRIPS, kWaves = WAVES;
constexpr u32 kThreads = kWaves * kWave, kColumns = kStrips * kStrip;
constexpr bool kFew = kRows == kFewRows;
static_assert(kFew || kRows % 16 == 0, "rows must fill the unit, or be so few that result 0 holds them");
constexpr u32 kRowTiles = kFew ? 1 : kRows / 16;
constexpr u32 kLive = kFew ? 1 : kResults;  // results of a lane that are rows of x

struct Under {  // what of one tile is under way
    Chunk chunks[kStrips][kUnitChunks];
    words4 x[kFew ? 4 : 1][kUnitChunks];  // by word; for more rows there are no registers: x is loaded where it is used
};

struct Block {
    Weight weight;
    const u16* x;  // [m, k]
    u32 k, strips, first_strip, first_row, lane;
    u32 row_bytes[kRowTiles];  // where the row of x begins that the lane brings as the unit's row lane % 16

    // A row beyond the last is the last once more; it is not stored.
    __device__ __forceinline__ void find_rows(u32 m) {
#pragma unroll
        for (u32 r = 0; r < kRowTiles; r++) {
            const u32 last = m - first_row - 1, wanted = kFew ? lane % 16 * kFewRows / 16 : r * 16 + lane % 16;
            row_bytes[r] = (wanted < last ? wanted : last) * k * 2;
            keep_in_place(row_bytes[r]);  // not computed anew wherever x is read
        }
    }

    __device__ __forceinline__ void read(Under& under, u32 tile) const {
#pragma unroll
        for (u32 s = 0; s < kStrips; s++) {
            const u32 strip = first_strip + s < strips ? first_strip + s : strips - 1;  // one too many is not stored
#pragma unroll
            for (u32 c = 0; c < kUnitChunks; c++)
                under.chunks[s][c].read(weight, strip, tile, quarter_of(c, lane), lane % 16);
        }
        if (kFew) {
#pragma unroll
            for (int word = 0; word < 4; word++) read_x(under.x[word], 0, tile, word);
        }
    }

    __device__ __forceinline__ void read_x(words4 (&x8)[kUnitChunks], u32 row_tile, u32 tile, int word) const {
        const u16* first = x + (u64)first_row * k + tile * kTileDepth;
#pragma unroll
        for (u32 c = 0; c < kUnitChunks; c++) {
            // Beyond the end of a row its last eight are read again: the weights there are exactly zero, so that only a
            // row which holds an infinity or a NaN, and is lost anyway, can tell.
            const u32 wanted_bytes = row_bytes[row_tile] + (quarter_of(c, lane) * 8 + word * 32) * 2;
            const u32 last_bytes = row_bytes[row_tile] + (k - 8 - tile * kTileDepth) * 2;
            x8[c] = load<words4>(first, wanted_bytes < last_bytes ? wanted_bytes : last_bytes);
        }
    }

    __device__ __forceinline__ void accumulate(float (&y)[kRowTiles][kStrips][kLive], const Under& under, u32 tile) const {
#pragma unroll
        for (int group = 0; group < kGroupsInTile; group++) {
            Results sums[kRowTiles][kStrips] = {}, row_sums[kRowTiles] = {};
#pragma unroll
            for (int word = group * kGroupWords; word < (group + 1) * kGroupWords; word++) {
                words4 x8[kRowTiles][kUnitChunks];
#pragma unroll
                for (u32 r = 0; r < kRowTiles; r++) {
                    if (!kFew) read_x(x8[r], r, tile, word);
#pragma unroll
                    for (u32 c = 0; c < kUnitChunks; c++)
                        if (kFew) x8[r][c] = under.x[word][c];
                }
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
                    for (u32 j = 0; j < kLive; j++) {
                        float sum = sums[r][s][j];
                        if (kOffset) sum = __builtin_fmaf(-offset, row_sums[r][j], sum);
                        y[r][s][j] = __builtin_fmaf(scale, sum, y[r][s][j]);
                        keep_in_place(y[r][s][j]);
                    }
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
    Block block = {{codes, constants, tiles, groups}, x, k, strips, block_y() * kStrips, block_x() * kRows, lane, {}};
    block.find_rows(m);

    // Two tiles by turns: one is multiplied while the other is on its way. Inside the loop both are there: a load that may not
    // have been made would have the compiler wait for the newer ones with it.
    Under even, odd;
    float sums[kRowTiles][kStrips][kLive] = {};
    if (wave < tiles) block.read(even, wave);
    u32 tile = wave;
    for (; tile + 2 * kWaves < tiles; tile += 2 * kWaves) {
        block.read(odd, tile + kWaves);
        keep_order();
        block.accumulate(sums, even, tile);
        keep_order();
        block.read(even, tile + 2 * kWaves);
        keep_order();
        block.accumulate(sums, odd, tile + kWaves);
        keep_order();
    }
    if (tile + kWaves < tiles) block.read(odd, tile + kWaves);
    if (tile < tiles) block.accumulate(sums, even, tile);
    if (tile + kWaves < tiles) block.accumulate(sums, odd, tile + kWaves);

#pragma unroll
    for (u32 r = 0; r < kRowTiles; r++)
#pragma unroll
        for (u32 s = 0; s < kStrips; s++)
#pragma unroll
            for (u32 j = 0; j < kLive; j++)
                parts[wave][kFew ? lane / 16 : r * 16 + result_row(j, lane)][s * kStrip + lane % 16] = sums[r][s][j];
    block_barrier();
    for (u32 i = thread_index(); i < kRows * kColumns; i += kThreads) {
        const u32 row = block_x() * kRows + i / kColumns, column = block_y() * kColumns + i % kColumns;
        float sum = 0;
#pragma unroll
        for (u32 w = 0; w < kWaves; w++) sum += parts[w][i / kColumns][i % kColumns];
        if (row < m && column < n) y[(u64)row * n + column] = activation_of_float(sum + (bias ? bias[column] : 0.0f));
    }
}
