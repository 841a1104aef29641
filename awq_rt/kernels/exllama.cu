// y = x @ W + bias for 4-bit W without matrix units, for few rows of x: ExLlama-v2's scheme.
//
// Codes become weights two an instruction in 16-bit pairs; that is exact. ExLlama goes on to multiply and add in 16
// bits; here products and sums are float32, so that the bound of every other kernel holds and no sum overflows.
//
//   grid   x: blocks of kColumns columns; y: kRows rows of x each
//   block  kWaves waves share the columns; wave w takes the tiles w, w + kWaves, ... of kTileDepth rows of W
//   wave   kColumnLanes lanes side by side with 4 columns each, kLaneRows times below each other with a word's depth
//   sums   lane registers, the lanes of a column by exchange, waves through shared memory: always in the same order, so
//          results repeat bit for bit; no block waits for another
#include "exllama.cuh"

constexpr int kRows = ROWS;    // of x and y that a block computes
constexpr int kWaves = WAVES;

constexpr int kColumnLanes = 8;
constexpr int kColumns = kColumnLanes * 4;
constexpr int kLaneRows = kLanes / kColumnLanes;
constexpr int kTileDepth = 128;
constexpr int kWordRows = kTileDepth / 8;       // rows of words in a tile
constexpr int kLoads = kWordRows / kLaneRows;   // of a lane for a tile, one uint4 each
constexpr bool kOneGroup = kGroupSize % kTileDepth == 0;  // a tile then has one, and k is a multiple of its depth
constexpr int kGroups = kOneGroup ? 1 : kLoads;           // whose scales a lane holds
constexpr bool kScaleWeights = kRows > 4;       // instead of sums: one more multiplication, and registers for no sums
constexpr int kHalvesAtOnce = kRows > 4 ? 1 : 2;  // of a word: with many rows more would not find registers
constexpr int kThreads = kWaves * kLanes;
constexpr int kChunks = kRows * kTileDepth / 8; // of x in a tile, 16 bytes each
constexpr int kLaneChunks = (kChunks + kLanes - 1) / kLanes;

// Four columns' scales and zero points in one group.
struct Group {
    Scales scales;
    u16 zeros;
};

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) exllama(
    const uint4* __restrict__ codes,    // [strips, k / 8, 2] packed weight, see exllama.cuh
    const Scales* __restrict__ scales,  // [strips, groups, 2]
    const u16* __restrict__ zeros,      // [strips, groups, 2]
    const float* __restrict__ bias,     // [n], or null
    const u16* x,                       // [m, k] activations, 16-byte aligned; an earlier kernel may still write them
    uint2* __restrict__ y,              // [m, n / 4] activations
    u32 m, u32 n, u32 k) {              // rows of x; columns and rows of W, multiples of 8
    extern __shared__ __align__(16) char memory[];
    auto shared = reinterpret_cast<float (*)[kRows][kTileDepth]>(memory);  // [kWaves]
    const u32 lane = threadIdx.x % kLanes, wave = threadIdx.x / kLanes;
    const u32 column = blockIdx.x * kColumns + lane % kColumnLanes * 4, lane_row = lane / kColumnLanes;
    const u32 first_row = blockIdx.y * kRows, rows = min(m - first_row, (u32)kRows);
    const u32 word_rows = k / 8, groups = k / kGroupSize, tiles = (k + kTileDepth - 1) / kTileDepth;
    // Columns past the last are computed from the last strip and not written.
    const u32 strip = min(column, n - 8) / 8, half = column / 4 % 2;
    const uint4* strip_codes = codes + (u64)strip * word_rows * 2 + half;
    const Scales* strip_scales = scales + (u64)strip * groups * 2 + half;
    const u16* strip_zeros = zeros + (u64)strip * groups * 2 + half;

    // Loading the weight: nothing here depends on an earlier kernel, so it starts before they end. A word is loaded for
    // the next tile when it has been used in this one; it is 0 where W has no rows, as x is there.
    auto row_of = [&](u32 index, int i) { return index * kWordRows + i * kLaneRows + lane_row; };
    auto fetch_words = [&](u32 index, int i) {
        const u32 row = row_of(index, i);
        const bool there = kOneGroup ? index < tiles : row < word_rows;
        return there ? load_once(strip_codes + row * 2) : make_uint4(0, 0, 0, 0);
    };
    auto fetch_group = [&](u32 index, int i) {
        const u32 at = min(row_of(index, i) * 8 / kGroupSize, groups - 1) * 2;
        return Group{__ldg(strip_scales + at), __ldg(strip_zeros + at)};
    };
    uint4 words[kLoads];
    Group group[kGroups], next_group;
#pragma unroll
    for (int i = 0; i < kLoads; i++) words[i] = fetch_words(wave, i);
#pragma unroll
    for (int i = 0; i < kGroups; i++) group[i] = fetch_group(wave, i);
    if (kOneGroup) next_group = fetch_group(wave + kWaves, 0);
    let_next_kernel_start();
    wait_for_earlier_kernels();

    // Loading x: the wave's next tile of it waits in registers, and lies in shared memory as float32 when it is used.
    uint4 ahead[kLaneChunks];
    auto fetch_x = [&](u32 index) {
#pragma unroll
        for (int i = 0; i < kLaneChunks; i++) {
            const u32 chunk = i * kLanes + lane, row = chunk / kWordRows;
            const u32 depth = index * kTileDepth + chunk % kWordRows * 8;
            ahead[i] = make_uint4(0, 0, 0, 0);
            if (row < rows && depth < k)
                ahead[i] = *reinterpret_cast<const uint4*>(x + (u64)(first_row + row) * k + depth);
        }
    };
    auto store_x = [&] {
#pragma unroll
        for (int i = 0; i < kLaneChunks; i++) {
            const u32 chunk = i * kLanes + lane;
            if (kChunks % kLanes != 0 && chunk >= kChunks) break;
            float4 low, high;
            floats_of_activations(low.x, low.y, ahead[i].x);
            floats_of_activations(low.z, low.w, ahead[i].y);
            floats_of_activations(high.x, high.y, ahead[i].z);
            floats_of_activations(high.z, high.w, ahead[i].w);
            float4* to = reinterpret_cast<float4*>(&shared[wave][0][chunk * 8]);
            to[0] = low;
            to[1] = high;
        }
    };

    float sums[kRows][4] = {};
    fetch_x(wave);
    for (u32 index = wave; index < tiles; index += kWaves) {
        store_x();
        wave_barrier();
        fetch_x(index + kWaves);

        float group_sums[kRows][4] = {};
        float (&added)[kRows][4] = kScaleWeights ? sums : group_sums;
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            const Group& its = group[kOneGroup ? 0 : i];
            const float4 scale = floats_of_scales(its.scales);
#pragma unroll kHalvesAtOnce
            for (int h = 0; h < 2; h++) {  // half a word's depth
                float weights[4][4];       // [column][row]
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    four_weights(weights[c], word_of(words[i], c) >> h * 8, zero_pair(its.zeros >> c * 4 & 15u));
                    if (kScaleWeights)
#pragma unroll
                        for (int j = 0; j < 4; j++) weights[c][j] *= element_of(scale, c);
                }
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    const float4 some =
                        *reinterpret_cast<const float4*>(&shared[wave][r][(i * kLaneRows + lane_row) * 8 + h * 4]);
#pragma unroll
                    for (int c = 0; c < 4; c++)
#pragma unroll
                        for (int j = 0; j < 4; j++) added[r][c] += weights[c][j] * element_of(some, j);
                }
            }
            words[i] = fetch_words(index + kWaves, i);
            if (!kScaleWeights && (!kOneGroup || i == kLoads - 1))
#pragma unroll
                for (int r = 0; r < kRows; r++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        sums[r][c] += element_of(scale, c) * group_sums[r][c];
                        group_sums[r][c] = 0.0f;
                    }
            if (!kOneGroup) group[i] = fetch_group(index + kWaves, i);
        }
        if (kOneGroup) {
            group[0] = next_group;
            next_group = fetch_group(index + 2 * kWaves, 0);
        }
        wave_barrier();
    }

    // Adding up, over x's place in shared memory, which the wave itself has read to the end.
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int mask = kColumnLanes; mask < kLanes; mask *= 2) sums[r][c] += of_other_lane(sums[r][c], mask);
        if (lane_row == 0)
            *reinterpret_cast<float4*>(&shared[wave][r][lane * 4]) =
                make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
    __syncthreads();
    for (u32 quad = threadIdx.x; quad < rows * kColumnLanes; quad += kThreads) {  // of columns
        const u32 r = quad / kColumnLanes, to = blockIdx.x * kColumns + quad % kColumnLanes * 4;
        if (to >= n) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int w = 0; w < kWaves; w++) {
            const float4 more = *reinterpret_cast<const float4*>(&shared[w][r][quad % kColumnLanes * 4]);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        if (bias != nullptr) {
            const float4 more = *reinterpret_cast<const float4*>(bias + to);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        y[((u64)(first_row + r) * n + to) / 4] =
            make_uint2(activations_of_floats(sum.x, sum.y), activations_of_floats(sum.z, sum.w));
    }
}
