#include "variant.h"

#include <cstdlib>
#include <cstring>

namespace sui {
namespace {

// The best this machine has; SUI_FAST_CPU=baseline or avx2 asks for less (tests, comparisons).
InstructionSet find() {
#if SUI_X86
  const char* asked = std::getenv("SUI_FAST_CPU");
  const auto within = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && within("avx512")) return InstructionSet::avx512;
  if (avx2 && within("avx2")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace

InstructionSet chosen_instruction_set() {
  static const InstructionSet found = find();
  return found;
}

const char* instruction_set() {
  switch (chosen_instruction_set()) {
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace sui
