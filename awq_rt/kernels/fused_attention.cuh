// What the kernels of decode attention share: how the context is cut, and how parts of a softmax are added up.
//
//   grid   x: parts of the context; y: heads of k and v, times kChunks of the heads of q that share one; z: rows
//   part   of the positions before the query's; the last active part has the query's own besides
//
// A result of a wave or a part is (sum of share * v, largest score, sum of shares) a head, share = exp2(score -
// largest). Parts meet in the first block's shared memory or, with TO_PARTS, in float32 [rows, heads, parts,
// head_dim + 4] that fused_attention_sum.cu adds: in the same order, so both give the same bits.
//
// Cached positions are requested before the wait for earlier kernels. That is right because a cache's slots below the
// query were written by kernels before the last ordinary launch of the stream (one that starts when all before it have
// ended; fused/order.py makes the launch itself ordinary where there was none), and this kernel started after that one.
// The query's position may be newer: it is read again after the wait, and what was requested for another is dropped.
#pragma once

#include "fused_head.cuh"

constexpr int kThreads = THREADS;
constexpr int kWaves = kThreads / kLanes;
constexpr int kSharing = SHARING;            // heads of q that share a head of k and v
constexpr int kGroup = GROUP;                // of these, what a block serves at most
constexpr int kChunks = (kSharing + kGroup - 1) / kGroup;
constexpr bool kSoftcap = SOFTCAP;
constexpr bool kSlopes = SLOPES;
constexpr bool kToParts = TO_PARTS;
constexpr u32 kAlone = ALONE;                // positions up to which one part takes all, which saves adding up
constexpr int kMostParts = 8;                // what every GPU with clusters allows
constexpr int kPartStride = kHeadDim + 4;    // floats of a head's result: the sum of v, the largest score, the total
constexpr float kNothing = -1e30f;           // the largest of no scores: finite, so that differences are numbers
constexpr float kUnseen = -3e38f;            // the score of a position past the end: its share is 0

// The heads that a block serves.
struct Heads {
    u32 kv_head, kv_heads, heads, first, count;
    bool writes;  // this block, of those that share a head of k and v, puts the new one into the cache

    __device__ __forceinline__ Heads() {
        const u32 chunk = blockIdx.y % kChunks;
        kv_head = blockIdx.y / kChunks, kv_heads = gridDim.y / kChunks, heads = kv_heads * kSharing;
        first = kv_head * kSharing + chunk * kGroup;
        count = kSharing % kGroup == 0 ? kGroup : min(kGroup, kSharing - chunk * kGroup);
        writes = chunk == 0;
    }
};

// A part's share of the positions before the query.
struct Share {
    u32 begin, end, active;  // parts that take any

    __device__ __forceinline__ Share(u32 query, u32 window, u32 part, u32 parts) {
        const u32 oldest = query >= window ? query - window + 1 : 0, seen = query - oldest;
        active = kToParts || seen > kAlone ? parts : 1;
        const u32 each = (seen + active - 1) / active;
        begin = min(oldest + part * each, query);
        end = part < active ? min(begin + each, query) : begin;
    }
};

// A score in powers of two, from q k^T and `scale`, which holds log2(e) unless a softcap comes first.
__device__ __forceinline__ float score_of(float product, float scale, float softcap, float slope, u32 query, u32 key) {
    float score = product * scale;
    if (kSoftcap) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
        score = softcap - 2.0f * softcap * reciprocal_of(exp2_of(2.0f * kLog2E * score) + 1.0f);
        score *= kLog2E;
    }
    if (kSlopes) score -= slope * kLog2E * (float)(query - key);
    return score;
}

// The weights of parts in their sum: exp2(largest - the largest of all).
template <int kMost>
struct Weights {
    float of[kMost], largest, total;

    // `load` gives part p's largest score and its shares' sum.
    template <typename Load>
    __device__ __forceinline__ Weights(u32 count, Load load) {
        float sums[kMost];
        largest = kNothing;
#pragma unroll
        for (int p = 0; p < kMost; p++) {
            const float2 end = p < count ? load(p) : make_float2(kNothing, 0.0f);
            of[p] = end.x, sums[p] = end.y;
            largest = fmaxf(largest, end.x);
        }
        total = 0.0f;
#pragma unroll
        for (int p = 0; p < kMost; p++) {
            of[p] = exp2_of(of[p] - largest);
            total += of[p] * sums[p];
        }
    }
};

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& more) {
    sum.x += weight * more.x, sum.y += weight * more.y, sum.z += weight * more.z, sum.w += weight * more.w;
}

__device__ __forceinline__ void write_quad(void* y, u64 at, const float4& sum, float total) {
    const float factor = reciprocal_of(total);
    reinterpret_cast<uint2*>(y)[at / 4] = make_uint2(activations_of_floats(sum.x * factor, sum.y * factor),
                                                     activations_of_floats(sum.z * factor, sum.w * factor));
}

// Adds up the results of a block, and those of all parts. Called by all threads after a barrier; they have arrived at
// the cluster's barrier once before.
template <int kResults, int kBlocks>
__device__ __forceinline__ void add_up(
    const float (&results)[kResults][kGroup][kPartStride],
    float (&blocks)[kBlocks][kGroup][kPartStride],  // of the first block: where parts meet
    void* y,                            // as of the kernel
    u32 part, u32 parts, u32 active,
    u32 first, u32 count) {             // heads, the first counted from the first row's
    const u32 quads = count * (kHeadDim / 4);
    if (!kToParts && active > 1) cluster_wait();  // the first block has begun
    for (u32 quad = threadIdx.x; quad < quads; quad += kThreads) {
        const u32 g = quad / (kHeadDim / 4), feature = quad % (kHeadDim / 4) * 4;
        const Weights<kResults> weights(kResults, [&](int w) {
            return *reinterpret_cast<const float2*>(&results[w][g][kHeadDim]);
        });
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kResults; w++)
            add_weighted(sum, weights.of[w], *reinterpret_cast<const float4*>(&results[w][g][feature]));
        const float4 end = make_float4(weights.largest, weights.total, 0.0f, 0.0f);
        if (parts == 1 || active == 1) {
            write_quad(y, (u64)(first + g) * kHeadDim + feature, sum, weights.total);
        } else if (kToParts) {
            float* to = reinterpret_cast<float*>(y) + ((u64)(first + g) * parts + part) * kPartStride;
            *reinterpret_cast<float4*>(to + feature) = sum;
            if (feature == 0) *reinterpret_cast<float4*>(to + kHeadDim) = end;
        } else {
            store_first_4(shared_address(&blocks[part][g][feature]), sum);
            if (feature == 0) store_first_4(shared_address(&blocks[part][g][kHeadDim]), end);
        }
    }
    if (kToParts || active == 1) return;
    wave_barrier();
    cluster_arrive();
    if (part != 0) return;  // nobody reads its shared memory
    cluster_wait();
    for (u32 quad = threadIdx.x; quad < quads; quad += kThreads) {
        const u32 g = quad / (kHeadDim / 4), feature = quad % (kHeadDim / 4) * 4;
        const Weights<kMostParts> weights(parts, [&](int p) {
            return *reinterpret_cast<const float2*>(&blocks[p][g][kHeadDim]);
        });
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int p = 0; p < kMostParts; p++)
            if (p < parts) add_weighted(sum, weights.of[p], *reinterpret_cast<const float4*>(&blocks[p][g][feature]));
        write_quad(y, (u64)(first + g) * kHeadDim + feature, sum, weights.total);
    }
}
