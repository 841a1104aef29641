// What the portable half (linear.cpp, module.cpp) and the instruction sets' halves (kernels_*.cpp) know of each other:
// plain structs and one table of functions. Kernel files include no C++ library, and what they share is always inlined:
// a function compiled with wide instructions and merged with its equals by the linker could be the copy that a small
// processor then runs.
#pragma once

#include <cstdint>

#define AWQ_INLINE [[gnu::always_inline]] inline

namespace awq {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };  // f64: biases only

AWQ_INLINE constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
AWQ_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kStrip = 16;  // columns of a strip: one 512-bit word of eight codes each
constexpr int kWord = 8;    // codes of one column in a 32-bit word: k ascending from the low nibble
constexpr int kWordBytes = kStrip * 4;
constexpr int64_t kLargestHead = 512;  // of attention

// A packed weight [K, N]: strips of 16 columns, each strip whole before the next, each group of a strip in one piece,
// so that a kernel reads everything once and in order:
//
//   codes   uint32 [words][16]   word w of column c holds k = 8w .. 8w + 7 of the group, zeros past its end
//   scales  [16]                 as the checkpoint has them; 0 past column N
//   zeros   uint8 [16]           0 past column N
//
// The padded K is groups * words * 8: rows of x are laid out the same way where that differs from K.
struct Shape {
    int64_t in_features, out_features, group_size;
    Dtype scale_dtype;

    AWQ_INLINE int64_t groups() const { return in_features / group_size; }
    AWQ_INLINE int64_t words() const { return ceil_div(group_size, kWord); }  // of a group
    AWQ_INLINE int64_t padded() const { return groups() * words() * kWord; }
    AWQ_INLINE int64_t strips() const { return ceil_div(out_features, kStrip); }
    AWQ_INLINE int64_t scales_at() const { return words() * kWordBytes; }
    AWQ_INLINE int64_t zeros_at() const { return scales_at() + kStrip * bytes_of(scale_dtype); }
    AWQ_INLINE int64_t group_bytes() const { return zeros_at() + kStrip; }
    AWQ_INLINE int64_t strip_bytes() const { return groups() * group_bytes(); }
};

struct Output {
    void* y;           // [rows, N]
    Dtype dtype;
    const void* bias;  // [N] or null
    Dtype bias_dtype;
};

// Rows of x as the 8-bit mode has them: per group and row, x = scale * q with q in -127..127.
struct Quantized {
    const int8_t* q;      // [rows][padded], in each word of eight: k = 0, 2, 4, 6, 1, 3, 5, 7
    const float* scales;  // [rows][groups]
    const float* sums;    // [rows][groups], of q
};

struct Attention {
    int64_t heads, kv_heads, head_dim, rotary_dim;
    int64_t window;  // 0 for none
    float scale, softcap, norm_eps;  // softcap 0 for none
    bool interleaved;
    const float *cos, *sin;  // [positions, rotary_dim / 2]
    const float *q_norm, *k_norm, *slopes;  // or null
    Dtype dtype;
    void *k_cache, *v_cache;  // [batch, kv_heads, S, head_dim], strides in elements
    int64_t k_batch_stride, k_head_stride, v_batch_stride, v_head_stride;
};

// One instruction set's kernels.
struct Kernels {
    int few_rows;     // up to this many `gemv` is faster than tiles: a core of an EPYC (Zen 4), 2026-11-22
    int panel_rows;   // rows of a panel of x, of `multiply`
    int tile_strips;  // strips of a tile, of `dequantize` and `multiply`

    // x [rows, K] -> float32 [rows, padded], null for no need of it, and the sum of each group [rows, groups].
    void (*prepare)(const Shape&, const void* x, Dtype, int64_t rows, float* padded, float* sums);
    // Strips first..last of y, from prepared rows.
    void (*gemv)(const Shape&, const uint8_t* packed, const float* x, const float* sums, int rows, const Output&,
                 int64_t first, int64_t last);
    // Rows 0..rows of x, at most `panel_rows`, -> panel float32 [padded][rows].
    void (*pack_panel)(const Shape&, const void* x, Dtype, int rows, float* panel);
    // Words first..last of `count` strips -> tile float32 [k][tile_strips * 16].
    void (*dequantize)(const Shape&, const uint8_t* strip, int count, int64_t first, int64_t last, float* tile);
    // c [rows][tile_strips * 16] += panel [depth][rows] x tile [depth][tile_strips * 16]
    void (*multiply)(const float* panel, const float* tile, int64_t depth, int rows, float* c);
    // c [rows][tile_strips * 16], plus bias, -> columns from `column` on of y.
    void (*store)(const Shape&, const float* c, int rows, int64_t row, int64_t column, const Output&);

    // y[first..last] of each row = x [rows, K] float32 @ weight [N, K].T
    void (*dense)(const void* weight, Dtype, int64_t in_features, const float* x, int64_t rows, int64_t out_features,
                  const Output&, int64_t first, int64_t last);

    void (*to_float)(const void* x, Dtype, int64_t count, float* y);
    void (*rms_norm)(const void* x, Dtype, const float* weight, float eps, int64_t width, void* y);
    void (*add)(void* residual, const void* x, Dtype, int64_t count);
    void (*gated)(const void* gate, const void* up, Dtype, int activation, int64_t count, void* y);
    // The head of q, k or v at `x` -> y, normalised by `norm` and rotated to `position` where they are given.
    void (*place_head)(const Attention&, const void* x, const float* norm, int64_t position, bool rotate, void* y);
    // One head of one row over the cache up to `position`. `q` [head_dim] of the dtype; `scores` [position + 1].
    void (*attend)(const Attention&, const void* q, int64_t batch, int64_t head, int64_t position, float* scores,
                   void* y);
};

// The 8-bit mode of one instruction set.
struct Int8Kernels {
    void (*quantize)(const Shape&, const void* x, Dtype, int64_t rows, int8_t* q, float* scales, float* sums);
    void (*gemv)(const Shape&, const uint8_t* packed, const Quantized&, int rows, const Output&, int64_t first,
                 int64_t last);
};

enum Activation { kSilu, kGelu, kGeluTanh, kRelu };

#if defined(__x86_64__)
extern const Kernels kAvx512, kAvx2;
extern const Int8Kernels kAvx512VnniInt8, kAvx2Int8;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif
extern const Kernels kPlain;

}  // namespace awq
