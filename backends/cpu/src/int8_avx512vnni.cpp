// The 8-bit mode with VNNI: four products of bytes and their sum in one instruction.
#include "kernels.h"
#include <immintrin.h>

namespace awq {
namespace {
#include "simd_avx512.h"

using Integers = __m512i;

inline Integers no_integers() { return _mm512_setzero_si512(); }
inline Floats to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
// Codes at k = 0, 2, 4, 6 of each column times the bytes of `even`, the others times those of `odd`.
inline Integers accumulate(Integers sums, Words w, int32_t even, int32_t odd) {
    const __m512i low = _mm512_set1_epi8(0xf);
    sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(w, low), _mm512_set1_epi32(even));
    return _mm512_dpbusd_epi32(sums, _mm512_and_si512(_mm512_srli_epi32(w, 4), low), _mm512_set1_epi32(odd));
}

#include "int8.inc"
}  // namespace
const Int8Kernels kAvx512VnniInt8 = {quantize, gemv_int8};
}  // namespace awq
