// What differs between AMD's architectures and between compilers, and nothing else. Freestanding HIP: no vendor header, so
// that hipRTC, ROCm's clang and a plain clang compile the same text.
#pragma once

#ifndef __global__  // hipRTC has these; a clang without ROCm's headers does not
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define __forceinline__ inline __attribute__((always_inline))
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using f16 = _Float16;
using f16x2 = _Float16 __attribute__((ext_vector_type(2)));
using words2 = u32 __attribute__((ext_vector_type(2)));
using words4 = u32 __attribute__((ext_vector_type(4)));
using floats4 = float __attribute__((ext_vector_type(4)));
using floats8 = float __attribute__((ext_vector_type(8)));

#if defined(__GFX9__)
constexpr u32 kWave = 64;
#else
constexpr u32 kWave = 32;
#endif

// Which matrix instruction there is: the first two by their depth, the others by how a wave holds the operands.
#define MATRIX_NONE 0
#define MATRIX_MFMA_16 1
#define MATRIX_MFMA_32 2
#define MATRIX_WMMA_REPEATED 3
#define MATRIX_WMMA_SPLIT 4
#if defined(__gfx950__)
#define MATRIX MATRIX_MFMA_32
#elif defined(__gfx90a__) || defined(__gfx942__)
#define MATRIX MATRIX_MFMA_16
#elif defined(__gfx1100__) || defined(__gfx1101__) || defined(__gfx1102__) || defined(__gfx1103__)
#define MATRIX MATRIX_WMMA_REPEATED
#elif defined(__gfx1200__) || defined(__gfx1201__)
#define MATRIX MATRIX_WMMA_SPLIT
#else
#define MATRIX MATRIX_NONE
#endif

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
    return __builtin_bit_cast(To, from);
}

__device__ __forceinline__ u32 thread_index() { return __builtin_amdgcn_workitem_id_x(); }
__device__ __forceinline__ u32 block_x() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ __forceinline__ u32 block_y() { return __builtin_amdgcn_workgroup_id_y(); }
__device__ __forceinline__ u32 block_z() { return __builtin_amdgcn_workgroup_id_z(); }
__device__ __forceinline__ u32 lane_index() { return thread_index() % kWave; }

struct Index {
    u32 x, y, z;
};

// Blocks of the launch, `threads` work-items along x each: from the dispatch packet, which counts work-items.
__device__ __forceinline__ Index grid_size(u32 threads) {
    auto sizes = (const __attribute__((address_space(4))) u32*)__builtin_amdgcn_dispatch_ptr() + 3;
    return {sizes[0] / threads, sizes[1], sizes[2]};
}

// A number that is the same in all lanes, put into a scalar register: what depends on it alone is computed once a wave.
__device__ __forceinline__ u32 same_for_wave(u32 number) { return __builtin_amdgcn_readfirstlane(number); }
__device__ __forceinline__ u32 wave_index() { return same_for_wave(thread_index() / kWave); }

// The value of lane `lane ^ mask`.
__device__ __forceinline__ float from_lane_xor(float value, u32 mask) {
    return bits_as<float>(__builtin_amdgcn_ds_bpermute((int)((lane_index() ^ mask) * 4), bits_as<int>(value)));
}

// The value of another lane of the same 16; `order` is one of these.
constexpr int kXor1 = 0xB1, kXor2 = 0x4E, kXor3 = 0x1B, kXor7 = 0x141, kXor15 = 0x140;
constexpr int kXor4 = 0x164, kXor8 = 0x168;  // not on CDNA

template <int order>
__device__ __forceinline__ float in_rows(float value) {
    const int bits = bits_as<int>(value);
    return bits_as<float>(__builtin_amdgcn_update_dpp(bits, bits, order, 0xF, 0xF, true));
}

// All threads of the block meet; what they wrote to shared memory is visible after it.
__device__ __forceinline__ void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// The same for the lanes of a wave, which execute together: only the compiler must keep the order.
__device__ __forceinline__ void wave_fence() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}

// The compiler moves nothing across: reads from shared memory for several rows would else all be made early, and spill.
__device__ __forceinline__ void keep_order() { __builtin_amdgcn_sched_barrier(0); }

// The value stays in these registers: a loop's sums would else be copied in each turn.
template <class T>
__device__ __forceinline__ void keep_in_place(T& value) {
    asm("" : "+v"(value));
}

// What lies `bytes` behind `base` in device memory. `base` must be the same for the whole wave: it stays in scalar registers
// and the lanes add 32 bits. Both are hidden from the compiler, which would else make 64-bit addresses for every lane.
template <class T>
__device__ __forceinline__ T load(const void* base, u32 bytes) {
    auto scalar = (const __attribute__((address_space(1))) u8*)base;
    asm("" : "+s"(scalar));
    asm("" : "+v"(bytes));
    return *(const __attribute__((address_space(1))) T*)(scalar + bytes);
}

// Four bytes chosen from eight: 0 to 3 in `selector` are those of `low`, 4 to 7 those of `high`.
__device__ __forceinline__ u32 permuted_bytes(u32 high, u32 low, u32 selector) {
    return __builtin_amdgcn_perm(high, low, selector);
}

// (bits & mask) | over in one instruction. CDNA's instructions of three operands take no constant but from a register, one
// scalar at most; a compiler that sees constants makes two instructions of it instead.
__device__ __forceinline__ u32 and_or(u32 bits, u32 mask, u32 over) {
    asm("" : "+s"(mask));
    asm("" : "+v"(over));
    return (bits & mask) | over;
}

// a.x b.x + a.y b.y + c, the sum in float32.
__device__ __forceinline__ float dot2(f16x2 a, f16x2 b, float c) { return __builtin_amdgcn_fdot2(a, b, c, false); }
