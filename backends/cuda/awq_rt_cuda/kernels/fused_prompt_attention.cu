// Attention of a short prompt, from its first position on, in float32: rotates q and k, puts k and v into the cache and
// attends, all in one kernel. A matrix unit would be idle most of its time: what counts at this size are launches.
//
//   grid   x: chunks of kWaves positions; y: heads of q; z: rows
//   block  places the keys up to the chunk's last position in shared memory, a team of lanes a key; then a wave a query
#include "fused_attention.cuh"

constexpr int kMost = MOST;               // positions of a prompt
constexpr int kTeams = kThreads / kTeam;
constexpr int kRow = kHeadDim + 8;        // in shared memory: 16 bytes more spread rows over all banks
constexpr int kKeys = (kMost + kLanes - 1) / kLanes;         // of a lane
constexpr int kPairs = (kHeadDim / 2 + kLanes - 1) / kLanes;  // of features, of a lane
static_assert(kTeams >= kWaves, "the chunk's queries are placed in one turn");

template <typename Combine>
__device__ __forceinline__ float of_wave(float x, Combine combine) {
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) x = combine(x, of_other_lane(x, mask));
    return x;
}

extern "C" __global__ void __launch_bounds__(kThreads) fused_prompt_attention(
    const u16* qkv,                     // [rows, count, (heads + 2 kv_heads) head_dim]
    u16* k_cache, u16* v_cache,         // [rows, kv_heads, slots, head_dim]; the last two dimensions are contiguous
    const float* cos, const float* sin,       // [positions, rotary_dim / 2]
    const float* q_norm, const float* k_norm, // [head_dim], or null
    const float* slopes,                // [heads], or null
    u16* y,                             // [rows, count, heads, head_dim] out
    u64 k_batch_stride, u64 k_head_stride, u64 v_batch_stride, u64 v_head_stride,  // of the caches, in elements
    u32 count,                          // positions, at most kMost
    u32 window,                         // positions that a query sees, at least 1
    float scale,                        // of scores, see score_of
    float softcap, float eps) {
    __shared__ __align__(16) u16 keys[kMost][kRow], values[kMost][kRow], queries[kWaves][kRow];
    __shared__ float shares[kWaves][kMost];
    const u32 wave = threadIdx.x / kLanes, wave_lane = threadIdx.x % kLanes;
    const u32 lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
    const u32 row = blockIdx.z, head = blockIdx.y, heads = gridDim.y;
    const u32 kv_head = head / kSharing, kv_heads = heads / kSharing, features = (heads + 2 * kv_heads) * kHeadDim;
    const u32 first = blockIdx.x * kWaves, end = min(first + kWaves, count);
    const u32 oldest = first >= window ? first - window + 1 : 0;
    const Place place(lane);
    let_next_kernel_start();
    float q_weight[2][8], k_weight[2][8];
    load_norm(q_weight, place, q_norm);
    load_norm(k_weight, place, k_norm);
    wait_for_earlier_kernels();

    qkv += (u64)row * count * features;
    k_cache += row * k_batch_stride + kv_head * k_head_stride;
    v_cache += row * v_batch_stride + kv_head * v_head_stride;
    auto load_head = [&](uint4 (&words)[2], bool exists, u32 position, u32 which) {
        const u16* from = qkv + (u64)position * features + which * kHeadDim;
        words[0] = exists ? load_8(from + place.first) : make_uint4(0, 0, 0, 0);
        words[1] = exists ? load_8(from + place.second) : make_uint4(0, 0, 0, 0);
    };
    auto keep = [&](u16* to, const uint4 (&words)[2]) {
        store_8(to + place.first, words[0]);
        store_8(to + place.second, words[1]);
    };
    auto turn = [&](uint4 (&words)[2], u32 position, const float (&weight)[2][8]) {
        Angles angles;
        load_angles(angles, place, lane, cos, sin, position);
        place_head(words, place, angles, weight, eps);
    };

    // Placing: every lane takes every turn, because teams add up together.
    uint4 q[2];
    const bool has_query = place.used && team < kWaves && first + team < end;
    load_head(q, has_query, first + team, head);
    for (u32 base = oldest; base < end; base += kTeams) {
        const u32 position = min(base + team, end - 1);
        const bool exists = place.used && base + team < end;
        uint4 k[2], v[2];
        load_head(k, exists, position, heads + kv_head);
        load_head(v, exists, position, heads + kv_heads + kv_head);
        turn(k, position, k_weight);
        if (!exists) continue;
        keep(keys[position], k);
        keep(values[position], v);
        if (position >= first && head % kSharing == 0) {
            keep(k_cache + (u64)position * kHeadDim, k);
            keep(v_cache + (u64)position * kHeadDim, v);
        }
    }
    turn(q, min(first + team, end - 1), q_weight);
    if (has_query) keep(queries[team], q);
    __syncthreads();

    // Attending.
    const u32 query = first + wave;
    if (query >= end) return;
    const float slope = kSlopes ? __ldg(slopes + head) : 0.0f;
    const u32 seen_from = query >= window ? query - window + 1 : 0;
    float scores[kKeys], most = kNothing;
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
        const u32 key = seen_from + i * kLanes + wave_lane;
        scores[i] = kUnseen;
        if (key > query) continue;
        float product = 0.0f;
#pragma unroll
        for (int f = 0; f < kHeadDim; f += 8) {
            float a[8], b[8];
            floats_of_8(a, *reinterpret_cast<const uint4*>(&queries[wave][f]));
            floats_of_8(b, *reinterpret_cast<const uint4*>(&keys[key][f]));
#pragma unroll
            for (int j = 0; j < 8; j++) product += a[j] * b[j];
        }
        scores[i] = score_of(product, scale, softcap, slope, query, key);
        most = fmaxf(most, scores[i]);
    }
    most = of_wave(most, [](float a, float b) { return fmaxf(a, b); });
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys; i++) {
        const u32 at = i * kLanes + wave_lane;
        const float share = exp2_of(scores[i] - most);
        total += share;
        if (at < kMost) shares[wave][at] = share;
    }
    total = of_wave(total, [](float a, float b) { return a + b; });
    wave_barrier();
    float sums[kPairs][2] = {};
#pragma unroll 4
    for (u32 key = seen_from; key <= query; key++) {
        const float share = shares[wave][key - seen_from];
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            const u32 pair = i * kLanes + wave_lane;
            if (kHeadDim / 2 % kLanes != 0 && pair >= kHeadDim / 2) continue;
            float low, high;
            floats_of_activations(low, high, *reinterpret_cast<const u32*>(&values[key][pair * 2]));
            sums[i][0] += share * low, sums[i][1] += share * high;
        }
    }
    const float factor = reciprocal_of(total);
    u32* to = reinterpret_cast<u32*>(y + (((u64)row * count + query) * heads + head) * kHeadDim);
#pragma unroll
    for (int i = 0; i < kPairs; i++) {
        const u32 pair = i * kLanes + wave_lane;
        if (kHeadDim / 2 % kLanes != 0 && pair >= kHeadDim / 2) continue;
        to[pair] = activations_of_floats(sums[i][0] * factor, sums[i][1] * factor);
    }
}
