#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace pyfast {
namespace {

Isa detect() {
#ifdef PYFAST_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
  if (!v3) return Isa::kGeneric;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!v4) return Isa::kAvx2;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kGeneric;
#endif
}

std::atomic<int>& selected() {
  static std::atomic<int> level{static_cast<int>(detected_isa())};
  return level;
}

}  // namespace

Isa detected_isa() {
  static const Isa level = detect();
  return level;
}

Isa selected_isa() { return static_cast<Isa>(selected().load(std::memory_order_relaxed)); }

int64_t prefetch_distance() {
#ifdef PYFAST_X86_LEVELS
  static const bool is_intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return is_intel ? 2048 : 0;
#else
  return 0;
#endif
}

const char* set_selected_isa(const char* name) {
  for (int level = 0; level < 4; ++level) {
    if (std::strcmp(name, kIsaNames[level]) != 0) continue;
    if (level > static_cast<int>(detected_isa())) return "this processor does not have that level";
    selected().store(level, std::memory_order_relaxed);
    return nullptr;
  }
  return "the levels are generic, avx2, avx512 and avx512_bf16";
}

}  // namespace pyfast
