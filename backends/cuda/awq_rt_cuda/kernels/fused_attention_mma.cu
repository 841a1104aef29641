// Decode attention on the matrix unit, for several heads of q a head of k and v: see fused_attention.cuh.
//
// A wave takes 16 positions at a time, k and v straight from device memory to operand A of mma.m16n8k16; the 8 columns
// of operand B are the heads of q. What an instruction sums over may stand in any order that both operands share, and
// so may its rows, which is why neither goes through shared memory:
//
//   scores^T [positions, heads] = k [positions, features] q^T
//       lane (row, quad) loads features 32 j + 8 quad to + 7 of positions row and row + 8, for two instructions
//   sums^T [features, heads] += v^T [features, positions] shares
//       lane (row, quad) loads features 64 j + 8 row to + 7 of positions 2 quad, 2 quad + 1 and 8 further;
//       instruction i takes the i-th of each 8
//
// Shares are multiplied as two 16-bit floats each, high and low: their rounding would else be seen in the result.
#include "fused_mma.cuh"

constexpr int kPositions = 16;                       // of a wave's turn
constexpr int kKeyLoads = (kHeadDim + 31) / 32;      // of 16 bytes, of each of a lane's two positions
constexpr int kValueLoads = (kHeadDim + 63) / 64;    // of each of a lane's four positions
constexpr int kValueSteps = kValueLoads * 4;         // instructions that cover all features
constexpr int kQueryStride = kHeadDim + 8;           // of a head of q in shared memory: rows share no bank
constexpr float kShareBits = 10.0f;                  // shares are up to 2^10: small ones keep their digits
static_assert(kGroup <= 8 && kThreads / kTeam > kGroup, "a head a column; a team a head, and one for k");

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) fused_attention_mma(
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
    __shared__ __align__(16) float results[kWaves + 1][kGroup][kPartStride];  // the last: the query's own position
    __shared__ __align__(16) float blocks[kToParts ? 1 : kMostParts][kGroup][kPartStride];
    __shared__ __align__(16) u16 queries[kGroup + 1][kQueryStride];           // the last: the new k
    const u32 lane = threadIdx.x % kLanes, row = lane / 4, quad = lane % 4, wave = threadIdx.x / kLanes;
    const u32 part = blockIdx.x, parts = gridDim.x, batch_row = blockIdx.z;
    const Heads heads;
    let_next_kernel_start();
    if (!kToParts && parts > 1) cluster_arrive();

    // Requesting the first positions, and all that no kernel writes.
    k_cache += batch_row * k_batch_stride + heads.kv_head * k_head_stride;
    v_cache += batch_row * v_batch_stride + heads.kv_head * v_head_stride;
    uint4 k[2][kKeyLoads], v[4][kValueLoads];
    auto fetch_k = [&](u32 base, u32 end) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < kKeyLoads; j++) {
                const u32 position = base + row + i * 8, feature = j * 32 + quad * 8;
                const bool exists = position < end && (kHeadDim % 32 == 0 || feature < kHeadDim);
                k[i][j] = exists ? load_8(k_cache + (u64)position * kHeadDim + feature) : make_uint4(0, 0, 0, 0);
            }
    };
    auto fetch_v = [&](u32 base, u32 end) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < kValueLoads; j++) {
                const u32 position = base + quad * 2 + i % 2 + i / 2 * 8, feature = j * 64 + row * 8;
                const bool exists = position < end && (kHeadDim % 64 == 0 || feature < kHeadDim);
                v[i][j] = exists ? load_8(v_cache + (u64)position * kHeadDim + feature) : make_uint4(0, 0, 0, 0);
            }
    };
    const u32 team_lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
    const Place place(team_lane);
    u32 query = load_fresh(positions + batch_row);
    if (query >= slots) query = 0;
    Share share(query, window, part, parts);
    Angles angles;
    auto request = [&] {
        fetch_k(share.begin + wave * kPositions, share.end);
        fetch_v(share.begin + wave * kPositions, share.end);
        load_angles(angles, place, team_lane, cos, sin, query);
    };
    request();
    const bool is_k = team == kGroup;
    float weight[2][8];
    load_norm(weight, place, is_k ? k_norm : q_norm);
    wait_for_earlier_kernels();

    // Placing q, a head a team, and the new k, beside which v needs no change. Whole waves: a team adds up.
    const u32 newest = load_fresh(positions + batch_row);
    uint4 placed[2] = {}, new_v[2] = {};
    const bool places = wave <= kGroup * kTeam / kLanes;
    if (places && place.used && (is_k || team < heads.count)) {
        const u16* fresh = qkv + (u64)batch_row * (heads.heads + 2 * heads.kv_heads) * kHeadDim;
        const u16* from = fresh + (is_k ? heads.heads + heads.kv_head : heads.first + team) * kHeadDim;
        const u16* v_from = fresh + (heads.heads + heads.kv_heads + heads.kv_head) * kHeadDim;
        placed[0] = load_8(from + place.first);
        placed[1] = load_8(from + place.second);
        new_v[0] = load_8(v_from + place.first);
        new_v[1] = load_8(v_from + place.second);
    }
    if (newest != query) {
        query = newest;
        share = Share(query, window, part, parts);
        request();
    }
    if (part >= share.active) return;
    const bool own = part == share.active - 1;
    if (places) {
        place_head(placed, place, angles, weight, eps);
        if (place.used && team <= kGroup) {
            store_8(queries[team] + place.first, placed[0]);
            store_8(queries[team] + place.second, placed[1]);
        }
        if (place.used && is_k && own && heads.writes) {
            const u64 slot = (u64)query * kHeadDim;
            store_8(k_cache + slot + place.first, placed[0]);
            store_8(k_cache + slot + place.second, placed[1]);
            store_8(v_cache + slot + place.first, new_v[0]);
            store_8(v_cache + slot + place.second, new_v[1]);
        }
    }
    __syncthreads();

    // The query's own position is a result like a wave's.
    if (wave <= (kGroup * kTeam - 1) / kLanes) {
        const bool exists = place.used && team < kGroup;
        float product = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (!exists) continue;
            float a[8], b[8];
            floats_of_8(a, placed[half]);
            floats_of_8(b, *reinterpret_cast<const uint4*>(queries[kGroup] + (half ? place.second : place.first)));
#pragma unroll
            for (int j = 0; j < 8; j++) product += a[j] * b[j];
        }
        product = team_sum(product);
        if (exists) {
            const float one = own ? exp2_of(kShareBits) : 0.0f;  // its share
            const float slope = kSlopes && team < heads.count ? __ldg(slopes + heads.first + team) : 0.0f;
            float* to = results[kWaves][team];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float a[8];
                floats_of_8(a, new_v[half]);
                float4* at = reinterpret_cast<float4*>(to + (half ? place.second : place.first));
                at[0] = own ? make_float4(a[0] * one, a[1] * one, a[2] * one, a[3] * one) : make_float4(0, 0, 0, 0);
                at[1] = own ? make_float4(a[4] * one, a[5] * one, a[6] * one, a[7] * one) : make_float4(0, 0, 0, 0);
            }
            if (team_lane == 0) {
                to[kHeadDim] = own ? score_of(product, scale, softcap, slope, query, query) : kNothing;
                to[kHeadDim + 1] = one;
            }
        }
    }

    // q as operand B: lane (row, quad) holds features 32 j + 8 quad to + 7 of head `row`.
    uint4 q[kKeyLoads];
#pragma unroll
    for (int j = 0; j < kKeyLoads; j++) {
        const u32 feature = j * 32 + quad * 8;
        const bool exists = row < heads.count && (kHeadDim % 32 == 0 || feature < kHeadDim);
        q[j] = exists ? *reinterpret_cast<const uint4*>(queries[row] + feature) : make_uint4(0, 0, 0, 0);
    }

    // A lane's scores are of heads 2 quad and 2 quad + 1, at positions row and row + 8; its sums are of these heads.
    float slope[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        slope[h] = kSlopes && quad * 2 + h < heads.count ? __ldg(slopes + heads.first + quad * 2 + h) : 0.0f;
    float largest[2] = {kNothing, kNothing}, total[2] = {}, sums[kValueSteps][4] = {};
    constexpr u32 kStep = kWaves * kPositions;
    for (u32 base = share.begin + wave * kPositions; base < share.end; base += kStep) {
        float scores[4] = {};
#pragma unroll
        for (int j = 0; j < kKeyLoads; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 a[4] = {word_of(k[0][j], half * 2), word_of(k[1][j], half * 2),
                                  word_of(k[0][j], half * 2 + 1), word_of(k[1][j], half * 2 + 1)};
                mma(scores, a, word_of(q[j], half * 2), word_of(q[j], half * 2 + 1));
            }
        fetch_k(base + kStep, share.end);

        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = largest[h];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[i * 2 + h];
                const u32 position = base + row + i * 8;
                score = position < share.end ? score_of(score, scale, softcap, slope[h], query, position) : kUnseen;
                most = fmaxf(most, score);
            }
#pragma unroll
            for (int mask = 4; mask < kLanes; mask *= 2) most = fmaxf(most, of_other_lane(most, mask));
            shrink[h] = exp2_of(largest[h] - most);
            largest[h] = most;
            total[h] *= shrink[h];
        }
        u32 high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float a = exp2_of(scores[i * 2] - largest[0] + kShareBits);
            const float b = exp2_of(scores[i * 2 + 1] - largest[1] + kShareBits);
            total[0] += a, total[1] += b;
            const u32 rounded = activations_of_floats(a, b);
            float a_high, b_high;
            floats_of_activations(a_high, b_high, rounded);
            high[i] = transposed(rounded);
            low[i] = transposed(activations_of_floats(a - a_high, b - b_high));
        }
#pragma unroll
        for (int i = 0; i < kValueSteps; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) sums[i][c] *= shrink[c % 2];
            u32 a[4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int at = i + c % 2 * kValueSteps, load = at / 8, word = at % 8 / 2, pair = c / 2 * 2;
                a[c] = pair_of(word_of(v[pair][load], word), word_of(v[pair + 1][load], word), at % 2);
            }
            mma(sums[i], a, high[0], high[1]);
            mma(sums[i], a, low[0], low[1]);
        }
        fetch_v(base + kStep, share.end);
    }

    // Adding up: a wave's sums to shared memory, in the order of features.
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
        for (int mask = 4; mask < kLanes; mask *= 2) total[h] += of_other_lane(total[h], mask);
        if (quad * 2 + h >= kGroup) continue;
        float* to = results[wave][quad * 2 + h];
#pragma unroll
        for (int load = 0; load < kValueLoads; load++) {
            const u32 feature = load * 64 + row * 8;
            if (kHeadDim % 64 != 0 && feature >= kHeadDim) continue;
#pragma unroll
            for (int word = 0; word < 8; word += 4) {
                float four[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int at = load * 8 + word + i;
                    four[i] = sums[at % kValueSteps][at / kValueSteps * 2 + h];
                }
                *reinterpret_cast<float4*>(to + feature + word) = make_float4(four[0], four[1], four[2], four[3]);
            }
        }
        if (row == 0) to[kHeadDim] = largest[h], to[kHeadDim + 1] = total[h];
    }
    __syncthreads();
    add_up(results, blocks, y, part, parts, share.active, batch_row * heads.heads + heads.first, heads.count);
}
