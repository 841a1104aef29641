// The kernels' platform.cuh on a CPU. Addresses that a GPU would refuse end the process.
#pragma once

#include "ptx.cuh"

constexpr int kLanes = 32;

inline void floats_of_half2(float& low, float& high, u32 pair) {
    low = float_of_half(pair & 0xffff), high = float_of_half(pair >> 16);
}

inline void floats_of_bfloat2(float& low, float& high, u32 pair) {
    low = float_of_bfloat(pair & 0xffff), high = float_of_bfloat(pair >> 16);
}

inline float of_other_lane(float value, int mask) {
    return __uint_as_float(meet(__float_as_uint(value))[lane_of_this() ^ mask].of[0]);
}

inline void wave_barrier() { meet(); }

inline uint4 load_8(const u16* p) {
    if ((size_t)p % 16) fail("a load of 16 bytes is not aligned");
    uint4 d;
    memcpy(&d, p, 16);
    return d;
}

inline uint4 load_once(const uint4* p) { return load_8((const u16*)p); }

inline u32 load_fresh(const u32* p) { return *p + (std::exchange(fiber().has_read, true) ? 0 : stale_by); }

inline float exp2_of(float x) { return exp2f(x); }

inline float reciprocal_of(float x) { return 1.0f / x; }

inline void cluster_arrive() { fiber().cluster_arrivals++; }

inline void cluster_wait() {
    const int arrivals = fiber().cluster_arrivals;
    auto all_arrived = [&] {
        for (const Block& other : blocks)
            for (const Fiber& f : other.fibers)
                if (!f.ended && f.cluster_arrivals < arrivals) return false;
        return true;
    };
    while (!all_arrived()) give_way();
}

inline void store_first_4(u32 address, const float4& v) {
    if (blocks[0].running == 0) fail("the first block of the cluster has ended");
    memcpy((this_block == 0 ? __start_shared_memory : blocks[0].shared.data()) + address, &v, 16);
}
