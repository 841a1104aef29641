// What every processor of the architecture runs.
#include "kernels.h"

namespace awq {
namespace {
#include "simd_plain.h"
#include "kernels.inc"
}  // namespace
const Kernels kPlain = kKernels;
}  // namespace awq
