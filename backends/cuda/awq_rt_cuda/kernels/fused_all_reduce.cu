// residual += the sum of all GPUs' x; y = residual / sqrt(mean(residual^2) + eps) * weight. A block a row.
//
// Each GPU writes its row of x into the inboxes of the others, and finds theirs in its own. A packet of 4 activations tells
// by itself that it has arrived: no barrier, one trip over the link. An inbox has two halves, used in turn;
// awq_rt/parallel/inbox.py says why two suffice.
#include "fused.cuh"
#include "peers.cuh"

constexpr int kHidden = HIDDEN;    // of a row, a multiple of 8
constexpr int kThreads = THREADS;
constexpr int kGpus = GPUS;
constexpr int kMostRows = MOST_ROWS;
constexpr int kRowVectors = kHidden / 8;
constexpr int kVectors = (kRowVectors + kThreads - 1) / kThreads;  // of a thread
constexpr int kWaves = kThreads / kLanes;

extern "C" __global__ void __launch_bounds__(kThreads) fused_all_reduce(
    const u16* x,                       // [m, hidden], m <= kMostRows
    u16* residual,                      // [m, hidden], added to in place
    const float* __restrict__ weight,   // [hidden]
    u16* y,                             // [m, hidden] out
    Packet* const* __restrict__ inboxes,  // [gpus], each [2][gpus][kMostRows][2][hidden / 8]
    u32* counters,                      // [kMostRows], the sums so far of each row
    u32 rank,
    float eps,
    u64 patience) {
    __shared__ float squares[kWaves];
    auto exists = [&](int i) { return kRowVectors % kThreads == 0 || threadIdx.x + i * kThreads < kRowVectors; };
    auto vector = [&](int i) { return threadIdx.x + i * kThreads; };
    let_next_kernel_start();
    float scale[kVectors][8];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) load_constant_8(scale[i], weight + vector(i) * 8);
    wait_for_earlier_kernels();

    const u32 number = load_fresh(counters + blockIdx.x) + 1;
    auto place = [&](u32 gpu, u32 sender) {
        return inboxes[gpu] + (((u64)(number & 1) * kGpus + sender) * kMostRows + blockIdx.x) * 2 * kRowVectors;
    };
    const u64 row = (u64)blockIdx.x * kHidden;
    uint4 own[kVectors], more[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) own[i] = load_8(x + row + vector(i) * 8);
#pragma unroll
    for (u32 step = 1; step < kGpus; step++) {
        const u32 gpu = rank + step < kGpus ? rank + step : rank + step - kGpus;
        Packet* const to = place(gpu, rank);
#pragma unroll
        for (int i = 0; i < kVectors; i++)
            if (exists(i)) {
                send(to + vector(i), own[i].x, own[i].y, number);
                send(to + kRowVectors + vector(i), own[i].z, own[i].w, number);
            }
    }
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) more[i] = load_8(residual + row + vector(i) * 8);

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) {
            float total[8] = {};
#pragma unroll
            for (u32 gpu = 0; gpu < kGpus; gpu++) {  // in the same order on each, so that all have the same bits
                uint4 words = own[i];
                if (gpu != rank) {
                    const Packet* const from = place(rank, gpu);
                    const uint2 low = received(from + vector(i), number, patience);
                    const uint2 high = received(from + kRowVectors + vector(i), number, patience);
                    words = make_uint4(low.x, low.y, high.x, high.y);
                }
                float a[8];
                floats_of_8(a, words);
#pragma unroll
                for (int j = 0; j < 8; j++) total[j] += a[j];
            }
            float a[8];
            floats_of_8(a, more[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) total[j] += a[j];
            own[i] = activations_of_8(total);
            store_8(residual + row + vector(i) * 8, own[i]);
            floats_of_8(a, own[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += a[j] * a[j];
        }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += of_other_lane(sum, mask);
    if (threadIdx.x % kLanes == 0) squares[threadIdx.x / kLanes] = sum;
    __syncthreads();
    if (threadIdx.x == 0) counters[blockIdx.x] = number;
    sum = squares[0];
#pragma unroll
    for (int w = 1; w < kWaves; w++) sum += squares[w];
    const float factor = rsqrtf(sum * (1.0f / kHidden) + eps);
#pragma unroll
    for (int i = 0; i < kVectors; i++)
        if (exists(i)) {
            float a[8];
            floats_of_8(a, own[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) a[j] = a[j] * factor * scale[i][j];
            store_8(y + row + vector(i) * 8, activations_of_8(a));
        }
}
