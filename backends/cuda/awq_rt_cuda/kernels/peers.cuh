// Words that other GPUs write into this one's memory, and this one into theirs.
//
// Each 64-bit word holds 32 bits of data and the number that they were sent under. A GPU writes and reads such a word at
// once, so data with the right number are the right data; nothing else orders them.
#pragma once

#include "ptx.cuh"

struct __align__(16) Packet { u64 words[2]; };

__device__ __forceinline__ void send(Packet* to, u32 a, u32 b, u32 number) {
    const u64 mark = (u64)number << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" :: "l"(to), "l"(a | mark), "l"(b | mark) : "memory");
}

__device__ __forceinline__ Packet look(const Packet* from) {
    Packet d;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(d.words[0]), "=l"(d.words[1]) : "l"(from) : "memory");
    return d;
}

__device__ __forceinline__ bool is_numbered(const Packet& p, u32 number) {
    return p.words[0] >> 32 == number && p.words[1] >> 32 == number;
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// What was sent under `number`, when it is there. A GPU that does not send within `patience` ns ends the kernel.
__device__ __forceinline__ uint2 received(const Packet* from, u32 number, u64 patience) {
    Packet p = look(from);
    if (!is_numbered(p, number)) {
        const u64 start = nanoseconds();
        do {
            p = look(from);
            if (nanoseconds() - start > patience) __trap();
        } while (!is_numbered(p, number));
    }
    return make_uint2((u32)p.words[0], (u32)p.words[1]);
}
