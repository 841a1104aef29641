// Advanced SIMD, which every 64-bit Arm processor has.
#include "kernels.h"
#include <arm_neon.h>

namespace awq {
namespace {
#include "simd_neon.h"
#include "kernels.inc"
}  // namespace
const Kernels kNeon = kKernels;
}  // namespace awq
