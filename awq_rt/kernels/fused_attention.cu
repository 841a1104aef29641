// Decode attention for few heads of q a head of k and v, in float32: see fused_attention.cuh.
//
// A team of lanes takes a position at a time, 16 features a lane, straight from device memory. Each team has a softmax
// of its own, so that nothing but a score and the addition at the end needs another lane.
#include "fused_attention.cuh"

constexpr int kAhead = AHEAD;                    // positions in flight in each team, in registers
constexpr int kTeams = kThreads / kTeam;
constexpr int kLeft = 16 * kTeam / kLanes;
static_assert(kSharing % kGroup == 0, "every block serves as many heads");

// Adds x over the teams of a wave: each step halves what a lane keeps, to kLeft sums from the one that is returned.
template <int kMask = kTeam, int kKept = 8>
__device__ __forceinline__ u32 add_teams(float (&x)[16], u32 lane) {
    if constexpr (kMask == kLanes) {
        return 0;
    } else {
        const bool upper = lane & kMask;
#pragma unroll
        for (int i = 0; i < kKept; i++) {
            const float low = x[i], high = x[i + kKept];  // loaded first: a choice of addresses would put x into memory
            x[i] = (upper ? high : low) + of_other_lane(upper ? low : high, kMask);
        }
        return (upper ? kKept : 0) + add_teams<kMask * 2, kKept / 2>(x, lane);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) fused_attention(
    const u16* qkv,                     // [rows, (kv_heads * kSharing + 2 kv_heads) head_dim]
    const u32* positions,               // [rows], of the new token
    u16* k_cache, u16* v_cache,         // [rows, kv_heads, slots, head_dim]; the last two dimensions are contiguous
    const float* cos, const float* sin,       // [positions, rotary_dim / 2]
    const float* q_norm, const float* k_norm, // [head_dim], or null
    const float* slopes,                // [heads], or null
    void* y,                            // [rows, heads, head_dim] activations; with TO_PARTS the parts
    u64 k_batch_stride, u64 k_head_stride, u64 v_batch_stride, u64 v_head_stride,  // of the caches, in elements
    u32 slots,                          // of a cache's row
    u32 window,                         // positions that a query sees, at least 1
    float scale,                        // of scores, see score_of
    float softcap, float eps) {
    __shared__ __align__(16) float results[kWaves][kGroup][kPartStride];
    __shared__ __align__(16) float blocks[kToParts ? 1 : kMostParts][kGroup][kPartStride];
    const u32 wave = threadIdx.x / kLanes, wave_lane = threadIdx.x % kLanes;
    const u32 lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
    const u32 part = blockIdx.x, parts = gridDim.x, row = blockIdx.z;
    const Heads heads;
    const Place place(lane);
    let_next_kernel_start();
    if (!kToParts && parts > 1) cluster_arrive();

    // Requesting the first positions, and all that no kernel writes.
    k_cache += row * k_batch_stride + heads.kv_head * k_head_stride;
    v_cache += row * v_batch_stride + heads.kv_head * v_head_stride;
    uint4 k[kAhead][2], v[kAhead][2];
    auto fetch = [&](uint4 (&words)[kAhead][2], const u16* from, u32 base, u32 end) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const u32 position = base + i * kTeams + team;
            const bool exists = place.used && position < end;
            words[i][0] = exists ? load_8(from + (u64)position * kHeadDim + place.first) : make_uint4(0, 0, 0, 0);
            words[i][1] = exists ? load_8(from + (u64)position * kHeadDim + place.second) : make_uint4(0, 0, 0, 0);
        }
    };
    u32 query = load_fresh(positions + row);
    if (query >= slots) query = 0;
    Share share(query, window, part, parts);
    Angles angles;
    auto request = [&] {
        fetch(k, k_cache, share.begin, share.end);
        fetch(v, v_cache, share.begin, share.end);
        load_angles(angles, place, lane, cos, sin, query);
    };
    request();
    float weight[2][8];
    load_norm(weight, place, q_norm);
    wait_for_earlier_kernels();

    // The new token's heads, beside its position.
    const u16* fresh = qkv + (u64)row * (heads.heads + 2 * heads.kv_heads) * kHeadDim;
    auto load_head = [&](uint4 (&words)[2], u32 head) {
        words[0] = words[1] = make_uint4(0, 0, 0, 0);
        if (place.used) {
            words[0] = load_8(fresh + head * kHeadDim + place.first);
            words[1] = load_8(fresh + head * kHeadDim + place.second);
        }
    };
    uint4 q_words[kGroup][2], k_words[2], v_words[2];
    const u32 newest = load_fresh(positions + row);
#pragma unroll
    for (int g = 0; g < kGroup; g++) load_head(q_words[g], heads.first + g);
    if (wave == kWaves - 1) {
        load_head(k_words, heads.heads + heads.kv_head);
        load_head(v_words, heads.heads + heads.kv_heads + heads.kv_head);
    }
    if (newest != query) {
        query = newest;
        share = Share(query, window, part, parts);
        request();
    }
    if (part >= share.active) return;

    // q and k, each rounded as if it were stored.
    auto floats_of_16 = [](float (&d)[16], const uint4& first, const uint4& second) {
        float low[8], high[8];
        floats_of_8(low, first);
        floats_of_8(high, second);
#pragma unroll
        for (int j = 0; j < 8; j++) d[j] = low[j], d[8 + j] = high[j];
    };
    float q[kGroup][16], slope[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        place_head(q_words[g], place, angles, weight, eps);
        floats_of_16(q[g], q_words[g][0], q_words[g][1]);
        slope[g] = kSlopes ? __ldg(slopes + heads.first + g) : 0.0f;
    }
    auto product = [&](const float (&a)[16], const float (&b)[16]) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) sum += a[j] * b[j];
        return sum;
    };

    // The query's own position: one team puts it into the cache and starts from it.
    float largest[kGroup], total[kGroup], sums[kGroup][16];
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        largest[g] = kNothing;
        total[g] = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; j++) sums[g][j] = 0.0f;
    }
    if (part == share.active - 1 && wave == kWaves - 1) {
        load_norm(weight, place, k_norm);
        place_head(k_words, place, angles, weight, eps);
        float key[16];
        floats_of_16(key, k_words[0], k_words[1]);
        const bool chosen = team == kTeams - 1;
        if (chosen && place.used && heads.writes) {
            const u64 slot = (u64)query * kHeadDim;
            store_8(k_cache + slot + place.first, k_words[0]);
            store_8(k_cache + slot + place.second, k_words[1]);
            store_8(v_cache + slot + place.first, v_words[0]);
            store_8(v_cache + slot + place.second, v_words[1]);
        }
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
            const float score = score_of(team_sum(product(q[g], key)), scale, softcap, slope[g], query, query);
            if (!chosen) continue;
            largest[g] = score, total[g] = 1.0f;
            floats_of_16(sums[g], v_words[0], v_words[1]);
        }
    }

    // The cached positions: scores of kAhead of them, then their values; what was used is replaced by what comes next.
    constexpr u32 kStep = kTeams * kAhead;
    for (u32 base = share.begin; base < share.end; base += kStep) {
        float scores[kGroup][kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            float key[16];
            floats_of_16(key, k[i][0], k[i][1]);
#pragma unroll
            for (int g = 0; g < kGroup; g++) scores[g][i] = product(q[g], key);
        }
        fetch(k, k_cache, base + kStep, share.end);
#pragma unroll
        for (int g = 0; g < kGroup; g++) {
            float most = largest[g];
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const u32 position = base + i * kTeams + team;
                const float score = score_of(team_sum(scores[g][i]), scale, softcap, slope[g], query, position);
                scores[g][i] = position < share.end ? score : kUnseen;
                most = fmaxf(most, scores[g][i]);
            }
            const float shrink = exp2_of(largest[g] - most);
            largest[g] = most;
            total[g] *= shrink;
#pragma unroll
            for (int j = 0; j < 16; j++) sums[g][j] *= shrink;
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                scores[g][i] = exp2_of(scores[g][i] - most);
                total[g] += scores[g][i];
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            float value[16];
            floats_of_16(value, v[i][0], v[i][1]);
#pragma unroll
            for (int g = 0; g < kGroup; g++)
#pragma unroll
                for (int j = 0; j < 16; j++) sums[g][j] += scores[g][i] * value[j];
        }
        fetch(v, v_cache, base + kStep, share.end);
    }

    // Adding up the teams of a wave.
#pragma unroll
    for (int g = 0; g < kGroup; g++) {
        float most = largest[g];
#pragma unroll
        for (int mask = kTeam; mask < kLanes; mask *= 2) most = fmaxf(most, of_other_lane(most, mask));
        const float shrink = exp2_of(largest[g] - most);
        total[g] *= shrink;
#pragma unroll
        for (int mask = kTeam; mask < kLanes; mask *= 2) total[g] += of_other_lane(total[g], mask);
#pragma unroll
        for (int j = 0; j < 16; j++) sums[g][j] *= shrink;
        const u32 from = add_teams(sums[g], wave_lane);
        float* result = results[wave][g];
        if (place.used) {
            float* to = result + (from < 8 ? place.first + from : place.second + from - 8);
#pragma unroll
            for (int j = 0; j < kLeft; j++) to[j] = sums[g][j];
        }
        if (wave_lane == 0) result[kHeadDim] = most, result[kHeadDim + 1] = total[g];
    }
    __syncthreads();
    add_up(results, blocks, y, part, parts, share.active, row * heads.heads + heads.first, heads.count);
}
