// ExLlama's weight as activations [k, n], for a matrix product by the vendor's library. A thread takes a row of words:
// 8 by 8 weights. The lanes of a wave take neighbouring strips, so that they write rows of 16 bytes each side by side.
#include "exllama.cuh"

constexpr int kWaves = 8;  // of a block, with a row of words each

extern "C" __global__ void __launch_bounds__(kWaves * kLanes) exllama_dequantize(
    const uint4* __restrict__ codes,    // [strips, k / 8, 2] packed weight, see exllama.cuh
    const Scales* __restrict__ scales,  // [strips, groups, 2]
    const u16* __restrict__ zeros,      // [strips, groups, 2]
    uint4* __restrict__ w,              // [k, n / 8] out
    u32 n, u32 k) {
    const u32 strips = n / 8, word_rows = k / 8, groups = k / kGroupSize;
    const u32 strip = blockIdx.x * kLanes + threadIdx.x % kLanes, row = blockIdx.y * kWaves + threadIdx.x / kLanes;
    const bool there = strip < strips && row < word_rows;
    uint4 words[2] = {};
    Scales scale[2] = {};
    u16 zero[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (there) {
            const u64 group = (u64)strip * groups + row * 8 / kGroupSize;
            words[half] = load_once(codes + ((u64)strip * word_rows + row) * 2 + half);
            scale[half] = __ldg(scales + group * 2 + half);
            zero[half] = __ldg(zeros + group * 2 + half);
        }
    let_next_kernel_start();
    wait_for_earlier_kernels();  // `w` may be memory that an earlier kernel still reads
    if (!there) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {  // half a word's depth
        float weights[8][4];       // [column][row]
#pragma unroll
        for (int c = 0; c < 8; c++) {
            four_weights(weights[c], word_of(words[c / 4], c % 4) >> h * 8, zero_pair(zero[c / 4] >> c % 4 * 4 & 15u));
            const float by = element_of(floats_of_scales(scale[c / 4]), c % 4);
#pragma unroll
            for (int j = 0; j < 4; j++) weights[c][j] *= by;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            w[(u64)(row * 8 + h * 4 + j) * strips + strip] = make_uint4(
                activations_of_floats(weights[0][j], weights[1][j]), activations_of_floats(weights[2][j], weights[3][j]),
                activations_of_floats(weights[4][j], weights[5][j]), activations_of_floats(weights[6][j], weights[7][j]));
    }
}
