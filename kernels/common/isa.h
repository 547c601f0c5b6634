// Instruction-set levels of the CPU kernels. One source is compiled once per level into the
// namespace of that level; PYFAST_CPU_KERNEL declares the copies and a table of them, and
// selected_level() picks the row once. PYFAST_CPU_ISA lowers the choice.
#pragma once

#include <cstdint>

namespace pyfast {

enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

#ifdef PYFAST_X86_LEVELS
constexpr int kNumIsaLevels = 4;
#else
constexpr int kNumIsaLevels = 1;
#endif

// The highest level that this processor and operating system run.
Isa detected_isa();

// The level in use: the detected one, or a lower one that PYFAST_CPU_ISA or set_selected_isa named.
Isa selected_isa();

// How many bytes ahead of their use loops over several large arrays fetch them; 0 where the
// processor does that as well by itself. Measured with optimizers: Intel's (Sapphire Rapids,
// virtual) gain 5 to 20 % of a step by it, AMD's (Zen 4) lose up to 5 %.
int64_t prefetch_distance();

// Returns an error text when the level is unknown or above the detected one, else nullptr.
const char* set_selected_isa(const char* name);

}  // namespace pyfast

#ifdef PYFAST_X86_LEVELS
#define PYFAST_CPU_KERNEL(name, Params)                                \
  namespace generic {                                                  \
  void name(const Params& params, int num_threads);                    \
  }                                                                    \
  namespace avx2 {                                                     \
  void name(const Params& params, int num_threads);                    \
  }                                                                    \
  namespace avx512 {                                                   \
  void name(const Params& params, int num_threads);                    \
  }                                                                    \
  namespace avx512_bf16 {                                              \
  void name(const Params& params, int num_threads);                    \
  }                                                                    \
  constexpr void (*name##_table[])(const Params&, int num_threads) = { \
      generic::name, avx2::name, avx512::name, avx512_bf16::name}
#else
#define PYFAST_CPU_KERNEL(name, Params)             \
  namespace generic {                               \
  void name(const Params& params, int num_threads); \
  }                                                 \
  constexpr void (*name##_table[])(const Params&, int num_threads) = {generic::name}
#endif
