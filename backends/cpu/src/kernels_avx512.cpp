// AVX-512 F, BW, DQ, VL, with FMA and F16C.
#include "kernels.h"
#include <immintrin.h>

namespace awq {
namespace {
#include "simd_avx512.h"
#include "kernels.inc"
}  // namespace
const Kernels kAvx512 = kKernels;
}  // namespace awq
