// Rotates q and k of new positions, and puts k and v into the cache. A block a token, a team of lanes a head.
#include "fused_head.cuh"

constexpr int kHeads = HEADS;
constexpr int kKvHeads = KV_HEADS;
constexpr int kThreads = THREADS;
constexpr int kTeams = kThreads / kTeam;
constexpr int kAllHeads = kHeads + 2 * kKvHeads;

extern "C" __global__ void __launch_bounds__(kThreads) fused_rope(
    const u16* qkv,                     // [batch, count, (heads + 2 kv_heads) head_dim]
    const u32* first_positions,         // [batch], of each row's first token
    u16* q,                             // [batch, count, heads, head_dim] out
    u16* k_cache, u16* v_cache,         // [batch, kv_heads, slots, head_dim]; the last two dimensions are contiguous
    const float* __restrict__ cos, const float* __restrict__ sin,  // [positions, rotary_dim / 2]
    const float* __restrict__ q_norm, const float* __restrict__ k_norm,  // [head_dim]
    u64 k_batch_stride, u64 k_head_stride, u64 v_batch_stride, u64 v_head_stride,  // of the caches, in elements
    u32 count, float eps) {
    const u32 lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, token = blockIdx.x, row = blockIdx.y;
    const Place place(lane);
    let_next_kernel_start();
    float q_weight[2][8], k_weight[2][8];
    load_norm(q_weight, place, q_norm);
    load_norm(k_weight, place, k_norm);
    wait_for_earlier_kernels();

    const u32 position = load_fresh(first_positions + row) + token;
    Angles angles;
    load_angles(angles, place, lane, cos, sin, position);
    const u16* from = qkv + ((u64)row * count + token) * kAllHeads * kHeadDim;
    k_cache += row * k_batch_stride + (u64)position * kHeadDim;
    v_cache += row * v_batch_stride + (u64)position * kHeadDim;
    q += ((u64)row * count + token) * kHeads * kHeadDim;
    for (u32 base = 0; base < kAllHeads; base += kTeams) {  // as many turns in every lane: a team adds up together
        const u32 head = base + team;
        const bool exists = place.used && head < kAllHeads;
        uint4 words[2] = {};
        if (exists) {
            words[0] = load_8(from + head * kHeadDim + place.first);
            words[1] = load_8(from + head * kHeadDim + place.second);
        }
        if (base < kHeads + kKvHeads) {
            uint4 placed[2] = {words[0], words[1]};
            const bool is_q = head < kHeads;
            float weight[2][8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                weight[0][j] = is_q ? q_weight[0][j] : k_weight[0][j];
                weight[1][j] = is_q ? q_weight[1][j] : k_weight[1][j];
            }
            place_head(placed, place, angles, weight, eps);
            if (head < kHeads + kKvHeads) words[0] = placed[0], words[1] = placed[1];
        }
        if (!exists) continue;
        u16* to = head < kHeads              ? q + head * kHeadDim
                  : head < kHeads + kKvHeads ? k_cache + (head - kHeads) * k_head_stride
                                             : v_cache + (head - kHeads - kKvHeads) * v_head_stride;
        store_8(to + place.first, words[0]);
        store_8(to + place.second, words[1]);
    }
}
