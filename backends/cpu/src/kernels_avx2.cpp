// AVX2, FMA, F16C.
#include "kernels.h"
#include <immintrin.h>

namespace awq {
namespace {
#include "simd_avx2.h"
#include "kernels.inc"
}  // namespace
const Kernels kAvx2 = kKernels;
}  // namespace awq
