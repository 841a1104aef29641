// Four floats in C++ with vector types that any target has. Everything here is in the including file's unnamed
// namespace: see kernels.h.

constexpr int kWidth = 4;
constexpr int kGemvRows = 2, kFewRows = 3;
constexpr int kPanelRows = 2, kTileStrips = 1;  // 8 sums, four weights, one x: 13 of SSE's 16 registers

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));

inline Floats load(const float* p) {
    Floats x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }

template <class To, class From>
inline To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline uint32_t bits_of(float x) { return same_bits<uint32_t>(x); }
inline float float_of(uint32_t bits) { return same_bits<float>(bits); }
inline float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent is rebased by a product, which gives subnormal halves their value too.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}
inline uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    // Below the smallest normal half, adding 2^-1 rounds at 2^-24, the spacing of subnormal halves.
    if (rest < 0x38800000) return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    return uint16_t(sign | (rest + 0xfff + (rest >> 13 & 1) - (112u << 23)) >> 13);
}
inline uint16_t bfloat_of_float(float x) {
    if (x != x) return 0x7fc0;
    const uint32_t bits = bits_of(x);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Floats broadcast(float x) { return Floats{x, x, x, x}; }
inline Floats load_f16(const uint16_t* p) {
    return Floats{float_of_half(p[0]), float_of_half(p[1]), float_of_half(p[2]), float_of_half(p[3])};
}
inline Floats load_bf16(const uint16_t* p) {
    return same_bits<Floats>(Words{p[0], p[1], p[2], p[3]} << 16);
}
inline Floats load_u8(const uint8_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline void store_f16(uint16_t* p, Floats x) {
    for (int i = 0; i < kWidth; i++) p[i] = half_of_float(x[i]);
}
inline void store_bf16(uint16_t* p, Floats x) {
    for (int i = 0; i < kWidth; i++) p[i] = bfloat_of_float(x[i]);
}

inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats div(Floats a, Floats b) { return a / b; }
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }
inline float sum(Floats x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float largest(Floats x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}
inline Floats nearest(Floats x) {
    return Floats{__builtin_rintf(x[0]), __builtin_rintf(x[1]), __builtin_rintf(x[2]), __builtin_rintf(x[3])};
}
inline Floats power_of_two(Floats n) {  // 2^n for whole n in -126..127
    return same_bits<Floats>((__builtin_convertvector(n, Integers) + 127) << 23);
}

inline Words load_words(const uint8_t* p) {
    Words w;
    __builtin_memcpy(&w, p, sizeof w);
    return w;
}
inline Words upper_half(Words w) { return w >> 16; }
template <int kNibble>  // 0..3
inline Floats scaled_code(Words w) {
    return __builtin_convertvector(Integers(w & (0xfu << (4 * kNibble))), Floats);
}
template <int kNibble>  // 0..7
inline Floats code(Words w) {
    return __builtin_convertvector(Integers(w >> (4 * kNibble) & 0xfu), Floats);
}
