// The kernels' fused_platform.cuh on a CPU. Addresses that a GPU would refuse end the process.
#pragma once

#include "platform.cuh"

inline uint4 load_8(const u16* p) {
    if ((size_t)p % 16) fail("a load of 16 bytes is not aligned");
    uint4 d;
    memcpy(&d, p, 16);
    return d;
}

inline u32 load_fresh(const u32* p) { return *p + (std::exchange(fiber().has_read, true) ? 0 : stale_by); }

inline float exp2_of(float x) { return exp2f(x); }

inline u32 pair_of(u32 a, u32 b, bool high) { return high ? a >> 16 | (b & 0xffff0000u) : (a & 0xffff) | b << 16; }

inline u32 transposed(u32 x) {
    const Words* given = meet(x);
    const u32 row = lane_of_this() / 4, quad = lane_of_this() % 4;
    auto at = [&](u32 r, u32 c) { return given[r * 4 + c / 2].of[0] >> c % 2 * 16 & 0xffff; };
    return at(quad * 2, row) | at(quad * 2 + 1, row) << 16;
}

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
