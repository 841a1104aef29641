// y = x @ weight.T for a few rows of x and a dense weight: the logits of a step. As fast as the weight can be read.
//
// A wave computes kColumns columns of y at a time, that is rows of the weight, which it reads 16 bytes a lane. x is in
// shared memory, once a block. Waves stay: the first loads of their next columns are under way while sums of these are
// added, and those of the first columns before the kernel that makes x has ended.
#include "fused.cuh"

constexpr int kDepth = DEPTH;      // of x and the weight, a multiple of 8
constexpr int kRows = ROWS;        // of x and y, at most
constexpr int kThreads = THREADS;
constexpr int kColumns = COLUMNS;  // of y that a wave computes at a time
constexpr int kAhead = AHEAD;      // loads in flight for each column
constexpr int kWaves = kThreads / kLanes;
constexpr int kStep = 8 * kLanes;  // of the depth, a wave's load
constexpr int kTurn = kAhead * kStep;
constexpr int kTurns = (kDepth + kTurn - 1) / kTurn;
constexpr bool kWhole = kDepth % kTurn == 0;
static_assert(kDepth % 8 == 0 && kRows * kColumns <= kLanes, "a lane has a sum to store");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) fused_logits(
    const u16* x,                    // [rows, depth] activations
    const u16* __restrict__ weight,  // [n, depth] of the same type
    u16* y,                          // [rows, n] out
    u32 rows, u32 n) {
    __shared__ __align__(16) u16 shared_x[kRows * kTurns * kTurn];
    const u32 wave = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const u32 stride = gridDim.x * kWaves * kColumns;
    u32 column = (blockIdx.x * kWaves + wave) * kColumns;
    const u16* from = weight + (u64)column * kDepth + lane * 8;

    uint4 words[kAhead][kColumns];
    auto fetch = [&](int a, int c, const u16* turn_from, u32 first, int turn) {
        const bool exists = (kWhole || turn * kTurn + a * kStep + lane * 8 < kDepth) && first + c < n;
        words[a][c] = exists ? load_once(reinterpret_cast<const uint4*>(turn_from + c * kDepth + a * kStep))
                             : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int a = 0; a < kAhead; a++)
#pragma unroll
        for (int c = 0; c < kColumns; c++) fetch(a, c, from, column, 0);
    let_next_kernel_start();
    wait_for_earlier_kernels();

    for (u32 at = threadIdx.x * 8; at < kRows * kTurns * kTurn; at += kThreads * 8) {
        const u32 row = at / (kTurns * kTurn), k = at % (kTurns * kTurn);
        const bool exists = row < rows && (kWhole || k < kDepth);
        store_8(shared_x + at, exists ? load_8(x + (u64)row * kDepth + k) : make_uint4(0, 0, 0, 0));
    }
    __syncthreads();

    for (; column < n; column += stride) {
        float sums[kRows][kColumns] = {};
#pragma unroll 1
        for (int turn = 0; turn < kTurns; turn++) {
            const bool last = turn == kTurns - 1;  // then the next columns' first loads are requested
            from += last ? (u64)stride * kDepth - (kTurns - 1) * kTurn : (u64)kTurn;
            const u16* x_of_turn = shared_x + turn * kTurn + lane * 8;
#pragma unroll
            for (int a = 0; a < kAhead; a++) {
                float v[kRows][8];
#pragma unroll
                for (int r = 0; r < kRows; r++)
                    floats_of_8(v[r], *reinterpret_cast<const uint4*>(x_of_turn + r * kTurns * kTurn + a * kStep));
#pragma unroll
                for (int c = 0; c < kColumns; c++) {
                    float w[8];
                    floats_of_8(w, words[a][c]);
                    fetch(a, c, from, last ? column + stride : column, last ? 0 : turn + 1);
#pragma unroll
                    for (int r = 0; r < kRows; r++)
#pragma unroll
                        for (int j = 0; j < 8; j++) sums[r][c] += w[j] * v[r][j];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
                float sum = sums[r][c];
#pragma unroll
                for (int mask = 1; mask < kLanes; mask *= 2) sum += of_other_lane(sum, mask);
                if (lane == r * kColumns + c && r < rows && column + c < n)
                    y[(u64)r * n + column + c] = (u16)activations_of_floats(sum, 0.0f);
            }
    }
}
