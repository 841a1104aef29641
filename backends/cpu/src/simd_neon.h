// Four floats. Everything here is in the including file's unnamed namespace: see kernels.h.
#include <arm_neon.h>

constexpr int kWidth = 4;
constexpr int kGemvRows = 2, kFewRows = 4;
constexpr int kPanelRows = 5, kTileStrips = 1;  // 20 sums, four weights, one x: 25 of 32 registers

using Floats = float32x4_t;
using Words = uint32x4_t;

inline Floats broadcast(float x) { return vdupq_n_f32(x); }
inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats x) { vst1q_f32(p, x); }
inline Floats load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Floats load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline Floats load_u8(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    const uint16x8_t halves = vmovl_u8(vcreate_u8(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves)));
}
inline void store_f16(uint16_t* p, Floats x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void store_bf16(uint16_t* p, Floats x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(x, x);
    vst1_u16(p, vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16));
}

inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }   // a b + c
inline Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }  // c - a b
inline float sum(Floats x) { return vaddvq_f32(x); }
inline float largest(Floats x) { return vmaxvq_f32(x); }
inline Floats nearest(Floats x) { return vrndnq_f32(x); }
inline Floats power_of_two(Floats n) {  // 2^n for whole n in -126..127
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

inline Words load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline Words upper_half(Words w) { return vshrq_n_u32(w, 16); }
template <int kNibble>  // 0..3
inline Floats scaled_code(Words w) {
    return vcvtq_f32_u32(vandq_u32(w, vdupq_n_u32(0xfu << (4 * kNibble))));
}
template <int kNibble>  // 0..7
inline Floats code(Words w) {
    const uint32x4_t masked = vandq_u32(w, vdupq_n_u32(0xfu << (4 * kNibble)));
    if constexpr (kNibble == 0) return vcvtq_f32_u32(masked);
    else return vcvtq_n_f32_u32(masked, 4 * kNibble);  // as a fixed-point number: exact
}
