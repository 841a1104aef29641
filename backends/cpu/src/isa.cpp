#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace awq {
namespace {

#if defined(__x86_64__)

struct Processor {
    bool avx2 = false, avx512 = false, vnni = false;
};

// The registers that the operating system saves when it switches threads: without that, using them is illegal or,
// worse, loses them.
uint64_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

Processor processor() {
    Processor found;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return found;
    const uint64_t saved = saved_registers();
    const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
    const bool fma_f16c = (c & bit_AVX) && (c & bit_FMA) && (c & bit_F16C);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    found.avx2 = ymm && fma_f16c && (b & bit_AVX2);
    found.avx512 = found.avx2 && zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) &&
                   (b & bit_AVX512VL);
    found.vnni = found.avx512 && (c & bit_AVX512VNNI);
    return found;
}

#endif

}  // namespace

std::vector<Isa> offered() {
    std::vector<Isa> found;
#if defined(__x86_64__)
    const Processor here = processor();
    if (here.vnni) found.push_back({"avx512", "VNNI", &kAvx512, &kAvx512VnniInt8});
    else if (here.avx512) found.push_back({"avx512", "", &kAvx512, &kAvx2Int8});
    if (here.avx2) found.push_back({"avx2", "", &kAvx2, &kAvx2Int8});
#elif defined(__aarch64__)
    found.push_back({"neon", "", &kNeon, nullptr});
#endif
    found.push_back({"plain", "", &kPlain, nullptr});
    return found;
}

Isa chosen(const std::string& wanted) {
    const std::vector<Isa> found = offered();
    if (wanted.empty()) return found.front();
    std::string names;
    for (const Isa& isa : found) {
        if (isa.name == wanted) return isa;
        names += (names.empty() ? "" : ", ") + isa.name;
    }
    throw std::invalid_argument("AWQ_RT_CPU_ISA is '" + wanted + "'; this processor and operating system offer " +
                                names);
}

}  // namespace awq
