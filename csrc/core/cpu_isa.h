// Which of the instruction sets that files are compiled for this CPU can run.
#pragma once

#include <string>
#include <vector>

namespace pybackdoor {

bool has_avx2();    // AVX2 and F16C
bool has_avx512();  // AVX-512 F, BW, DQ, VL and VBMI

// Names of the usable ones, best first; the last is "portable".
std::vector<std::string> cpu_isas();

}  // namespace pybackdoor
