// wgmma, the matrix instruction of four warps (sm_90a): d [64, kRows] += a [64, 16] * b [16, kRows]. It is
// asynchronous: registers of `d` and `a` belong to the unit from its issue until a wait.
#pragma once

#include "number.cuh"

#if ACTIVATION_HALF
#define WGMMA_TYPE "f16"
#else
#define WGMMA_TYPE "bf16"
#endif

#define WGMMA_0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_8_15 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_16_31 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_32_47 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_48_63 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_64_79 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_80_95 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_96_111 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_112_127 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_0_15 WGMMA_0_7 WGMMA_8_15
#define WGMMA_0_31 WGMMA_0_15 WGMMA_16_31
#define WGMMA_0_63 WGMMA_0_31 WGMMA_32_47 WGMMA_48_63
#define WGMMA_0_127 WGMMA_0_63 WGMMA_64_79 WGMMA_80_95 WGMMA_96_111 WGMMA_112_127

#define WGMMA_SUM(r) "+f"(d[r][0]), "+f"(d[r][1]), "+f"(d[r][2]), "+f"(d[r][3])
#define WGMMA_SUMS_2(r) WGMMA_SUM(r), WGMMA_SUM(r + 1)
#define WGMMA_SUMS_4(r) WGMMA_SUMS_2(r), WGMMA_SUMS_2(r + 2)
#define WGMMA_SUMS_8(r) WGMMA_SUMS_4(r), WGMMA_SUMS_4(r + 4)
#define WGMMA_SUMS_16(r) WGMMA_SUMS_8(r), WGMMA_SUMS_8(r + 8)
#define WGMMA_SUMS_32(r) WGMMA_SUMS_16(r), WGMMA_SUMS_16(r + 16)

#define WGMMA(n, sums, a0, a1, a2, a3, b, add)                                                             \
    "{.reg .pred add; setp.ne.b32 add, %" add ", 0; "                                                      \
    "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." WGMMA_TYPE "." WGMMA_TYPE " {" sums "}, "             \
    "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", add, 1, 1, 0;}"

// d += a * b, or d = a * b without `add`; a is a warp's share [16, 16], b describes 16 of x's columns in shared memory.
__device__ __forceinline__ void wgmma(float (&d)[ROWS / 8][4], const u32 (&a)[4], u64 b, bool add) {
#if ROWS == 16
    asm volatile(WGMMA("16", WGMMA_0_7, "8", "9", "10", "11", "12", "13")
                 : WGMMA_SUMS_2(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#elif ROWS == 32
    asm volatile(WGMMA("32", WGMMA_0_15, "16", "17", "18", "19", "20", "21")
                 : WGMMA_SUMS_4(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#elif ROWS == 64
    asm volatile(WGMMA("64", WGMMA_0_31, "32", "33", "34", "35", "36", "37")
                 : WGMMA_SUMS_8(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#elif ROWS == 128
    asm volatile(WGMMA("128", WGMMA_0_63, "64", "65", "66", "67", "68", "69")
                 : WGMMA_SUMS_16(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#elif ROWS == 256
    asm volatile(WGMMA("256", WGMMA_0_127, "128", "129", "130", "131", "132", "133")
                 : WGMMA_SUMS_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#else
#error "wgmma.cuh serves 16, 32, 64, 128 and 256 rows"
#endif
}

// Registers written before it are ready for the unit.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when all committed groups but the newest `kNewest` are complete.
template <int kNewest>
__device__ __forceinline__ void wgmma_wait_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kNewest) : "memory");
}

// Rows of 128 bytes, swizzled as the unit's 128-byte mode has it, 1024 bytes from one 8 rows to the next.
__device__ __forceinline__ u64 wgmma_description(u32 address) {
    return (u64)(address >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// Changes the registers that each thread of a warpgroup has; taking waits until others have given enough.
template <int kCount>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount));
}
