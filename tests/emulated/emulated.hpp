// Enough of CUDA to run a kernel's source on a CPU: every thread is a fiber, and one cluster runs at a time.
//
// A fiber gives way where the GPU would make it wait: when lanes of its wave must meet, at a barrier of its block, at
// the cluster's. Blocks of a cluster take turns; shared memory is one section of this library that is copied out and
// in, and begins as NaN. What no order of fibers shows, a race without a barrier, is left to the sanitizers.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };

inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((section("shared_memory"), used)) static

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <typename T>
T __ldg(const T* p) { return *p; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __uint_as_float(u32 bits) { float d; memcpy(&d, &bits, 4); return d; }
inline u32 __float_as_uint(float x) { u32 d; memcpy(&d, &x, 4); return d; }

static dim3 threadIdx, blockIdx, gridDim;

// ---- fibers

struct Words { u32 of[4]; };

struct Wave {
    Words given[2][32];  // by the lanes at this meeting and at the one before
    u64 meetings = 0;
    int arrived = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool ended = false, has_read = false;
    int cluster_arrivals = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Wave> waves;
    std::vector<char> shared;
    u64 barriers = 0;
    u32 arrived = 0, running = 0;
};

__attribute__((section("shared_memory"), used)) static char some_shared_memory[16];
extern "C" char __start_shared_memory[], __stop_shared_memory[];

static std::vector<Block> blocks;  // of the cluster
static u32 this_block, this_thread;
static ucontext_t scheduler;
static int stale_by;  // a thread's first load_fresh is off by this: as if an earlier kernel had not written yet

[[noreturn]] inline void fail(const char* why) {
    fprintf(stderr, "emulated kernel: %s\n", why);
    abort();
}

inline Block& block() { return blocks[this_block]; }
inline Fiber& fiber() { return block().fibers[this_thread]; }
inline u32 lane_of_this() { return this_thread % 32; }
inline void give_way() { swapcontext(&fiber().context, &scheduler); }

// What each lane of the wave gave; returns when all have.
inline const Words* meet(u32 a = 0, u32 b = 0, u32 c = 0, u32 d = 0) {
    Wave& wave = block().waves[this_thread / 32];
    const u64 meeting = wave.meetings;
    wave.given[meeting % 2][lane_of_this()] = {a, b, c, d};
    if (++wave.arrived == 32) {
        wave.arrived = 0;
        wave.meetings++;
    } else {
        while (wave.meetings == meeting) give_way();
    }
    return wave.given[meeting % 2];
}

inline void __syncwarp() { meet(); }

inline void __syncthreads() {
    Block& own = block();
    const u64 barrier = own.barriers;
    if (++own.arrived == own.running) {
        own.arrived = 0;
        own.barriers++;
    } else {
        while (own.barriers == barrier) give_way();
    }
}

static void (*kernel_call)();

static void fiber_main() {
    kernel_call();
    fiber().ended = true;
    block().running--;
    give_way();
}

static void run_cluster(dim3 first, u32 cluster, u32 threads) {
    const size_t bytes = __stop_shared_memory - __start_shared_memory;
    blocks = std::vector<Block>(cluster);
    for (Block& own : blocks) {
        own.running = threads;
        own.waves.resize((threads + 31) / 32);
        own.fibers.resize(threads);
        own.shared.resize(bytes);
        for (size_t i = 0; i + 2 <= bytes; i += 2) memcpy(&own.shared[i], "\xff\x7f", 2);  // NaN in 16 bits and in 32
        for (Fiber& f : own.fibers) {
            f.stack.resize(128 << 10);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.data();
            f.context.uc_stack.ss_size = f.stack.size();
            makecontext(&f.context, fiber_main, 0);
        }
    }
    for (u32 turn = 0, running = 1; running; turn++) {
        if (turn == 1000000) fail("threads wait for each other");
        running = 0;
        for (this_block = 0; this_block < cluster; this_block++) {
            memcpy(__start_shared_memory, block().shared.data(), bytes);
            blockIdx = {first.x + this_block, first.y, first.z};
            for (int more = 0; more < 50; more++)  // before the next block's turn, which costs two copies
                for (this_thread = 0; this_thread < threads; this_thread++)
                    if (!fiber().ended) {
                        threadIdx = {this_thread, 0, 0};
                        swapcontext(&scheduler, &fiber().context);
                    }
            memcpy(block().shared.data(), __start_shared_memory, bytes);
            running += block().running;
        }
    }
}

// ---- the launch: arguments in slots of 8 bytes, as driver.py passes them

template <typename... P, size_t... I>
void call_with(void (*kernel)(P...), const u64* slots, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<const std::remove_cv_t<P>*>(slots + I)...);
}

template <typename... P>
void call_with(void (*kernel)(P...), const u64* slots) {
    call_with(kernel, slots, std::index_sequence_for<P...>());
}

static const u64* kernel_slots;
