// y = the sum over parts + bias: the end of a split gemm_mma where blocks cannot read each other's shared memory.
#include "number.cuh"

extern "C" __global__ void __launch_bounds__(256) sum_parts(
    const float4* __restrict__ parts,  // [kSplit, m, n / 4] float32
    const float4* __restrict__ bias,   // [n / 4], or null
    uint2* __restrict__ y,             // [m, n / 4] activations
    u32 n_quads, u64 quads) {          // n / 4; m * n / 4
    let_next_kernel_start();
    wait_for_earlier_kernels();
    for (u64 q = (u64)blockIdx.x * 256 + threadIdx.x; q < quads; q += (u64)gridDim.x * 256) {
        float4 sum = parts[q];
#pragma unroll
        for (int p = 1; p < SPLIT; p++) {
            float4 more = parts[p * quads + q];
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        if (bias != nullptr) {
            float4 more = __ldg(bias + q % n_quads);
            sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        y[q] = make_uint2(activations_of_floats(sum.x, sum.y), activations_of_floats(sum.z, sum.w));
    }
}
