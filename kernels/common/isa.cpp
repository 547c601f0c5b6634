#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef PYFAST_X86_LEVELS
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyfast {
namespace {

#ifdef PYFAST_X86_LEVELS
// The tiles' registers are 8 KB a thread, which Linux saves only for processes that ask.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBf16 = 1u << 22;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & (kTiles | kInt8 | kBf16)) != (kTiles | kInt8 | kBf16)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::kAvx512;
  const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (!bf16) return Isa::kAvx512Vnni;
  return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
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
  for (int level = 0; level <= static_cast<int>(Isa::kAmx); ++level) {
    if (std::strcmp(name, kIsaNames[level]) != 0) continue;
    if (level > static_cast<int>(detected_isa())) return "this processor does not have that level";
    selected().store(level, std::memory_order_relaxed);
    return nullptr;
  }
  return "the levels are generic, avx2, avx512, avx512_vnni, avx512_bf16 and amx";
}

}  // namespace pyfast
