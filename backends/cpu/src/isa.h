// Which instruction set's kernels run here: the widest that the processor and the operating system offer, or the one
// that AWQ_RT_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace awq {

struct Isa {
    std::string name;      // what AWQ_RT_CPU_ISA may be
    std::string features;  // optional parts of it that are here and used
    const Kernels* kernels;
    const Int8Kernels* int8;  // or null
};

// What this machine offers, the widest first; `plain` is always the last.
std::vector<Isa> offered();

// The one named, or the widest when `wanted` is empty. Throws std::invalid_argument with a sentence.
Isa chosen(const std::string& wanted);

}  // namespace awq
