// The 8-bit mode without VNNI.
#include "kernels.h"
#include <immintrin.h>

namespace awq {
namespace {
#include "simd_avx2.h"

using Integers = __m256i;

inline Integers no_integers() { return _mm256_setzero_si256(); }
inline Floats to_floats(Integers x) { return _mm256_cvtepi32_ps(x); }
// Codes at k = 0, 2, 4, 6 of each column times the bytes of `even`, the others times those of `odd`. Sums of four
// products are at most 4 * 15 * 127 = 7620: they fit 16 bits.
inline Integers accumulate(Integers sums, Words w, int32_t even, int32_t odd) {
    const __m256i low = _mm256_set1_epi8(0xf);
    const __m256i evens = _mm256_maddubs_epi16(_mm256_and_si256(w, low), _mm256_set1_epi32(even));
    const __m256i odds = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi32(w, 4), low), _mm256_set1_epi32(odd));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_add_epi16(evens, odds), _mm256_set1_epi16(1)));
}

#include "int8.inc"
}  // namespace
const Int8Kernels kAvx2Int8 = {quantize, gemv_int8};
}  // namespace awq
