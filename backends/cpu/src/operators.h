// The linear and the fused operators over whole tensors: scratch memory, and how the work is cut for threads.
// Pointers, sizes and dtypes have been checked. Every result is the same for any number of threads.
#pragma once

#include "kernels.h"

namespace awq {

enum class Family { kAuto, kGemv, kGemm };

struct Runner {
    const Kernels& kernels;
    const Int8Kernels* int8;  // null where the instruction set has none
    int threads;

    void linear(const Shape&, const uint8_t* packed, const void* x, Dtype, int64_t rows, Family, const Output&) const;
    void linear_int8(const Shape&, const uint8_t* packed, const void* x, Dtype, int64_t rows, const Output&) const;
    // x [rows, K] @ weight [N, K].T
    void dense_linear(const void* weight, Dtype weight_dtype, int64_t in_features, int64_t out_features, const void* x,
                      Dtype, int64_t rows, const Output&) const;
    void rms_norm(const void* x, Dtype, const float* weight, float eps, int64_t rows, int64_t width, void* y) const;
    void add_rms_norm(const void* x, void* residual, Dtype, const float* weight, float eps, int64_t rows,
                      int64_t width, void* y) const;
    // gate_up [rows, 2 width] -> y [rows, width]
    void gated_activation(const void* gate_up, Dtype, int activation, int64_t rows, int64_t width, void* y) const;
    // The index of the largest of each row, the first of equal ones; NaN is largest.
    void argmax(const void* x, Dtype, int64_t rows, int64_t width, int64_t* y) const;
    // qkv [batch, count, (heads + 2 kv_heads) head_dim] -> q [batch, heads, count, head_dim], k and v into the caches.
    void rope_append(const Attention&, const void* qkv, const int32_t* first, int64_t batch, int64_t count,
                     void* q) const;
    // qkv [batch, (heads + 2 kv_heads) head_dim] -> y [batch, heads head_dim]
    void decode_attention(const Attention&, const void* qkv, const int32_t* positions, int64_t batch, void* y) const;
};

void pack(const Shape&, const uint8_t* codes, const uint8_t* zeros, const void* scales, uint8_t* packed, int threads);
void unpack(const Shape&, const uint8_t* packed, uint8_t* codes, uint8_t* zeros, void* scales, int threads);

}  // namespace awq
