// Instruction-set levels of the CPU kernels. One source is compiled once per level into the
// namespace of that level; PYFAST_CPU_KERNEL declares the copies and a table of them, and
// selected_level() picks the row once. PYFAST_CPU_ISA lowers the choice.
#pragma once

#include <cstdint>

namespace pyfast {

enum class Isa : int { kGeneric, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

constexpr const char* kIsaNames[] = {"generic",     "avx2",        "avx512",
                                     "avx512_vnni", "avx512_bf16", "amx"};

#ifdef PYFAST_X86_LEVELS
constexpr int kNumIsaLevels = 6;
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

// VNNI is of use to products with weights alone, and AMX to these and to attention: other kernels
// have four copies, which stand in the table in place of those that would be equal.
#define PYFAST_DECLARE_KERNEL(level, name, Params)  \
  namespace level {                                 \
  void name(const Params& params, int num_threads); \
  }
#define PYFAST_KERNEL_TABLE(name, Params) \
  constexpr void (*name##_table[])(const Params&, int num_threads)

#ifdef PYFAST_X86_LEVELS
#define PYFAST_CPU_KERNEL(name, Params)                                                \
  PYFAST_DECLARE_KERNEL(generic, name, Params)                                         \
  PYFAST_DECLARE_KERNEL(avx2, name, Params)                                            \
  PYFAST_DECLARE_KERNEL(avx512, name, Params)                                          \
  PYFAST_DECLARE_KERNEL(avx512_bf16, name, Params)                                     \
  PYFAST_KERNEL_TABLE(name, Params) = {generic::name, avx2::name,        avx512::name, \
                                       avx512::name,  avx512_bf16::name, avx512_bf16::name}
#define PYFAST_CPU_TILE_KERNEL(name, Params)                                           \
  PYFAST_DECLARE_KERNEL(generic, name, Params)                                         \
  PYFAST_DECLARE_KERNEL(avx2, name, Params)                                            \
  PYFAST_DECLARE_KERNEL(avx512, name, Params)                                          \
  PYFAST_DECLARE_KERNEL(avx512_bf16, name, Params)                                     \
  PYFAST_DECLARE_KERNEL(amx, name, Params)                                             \
  PYFAST_KERNEL_TABLE(name, Params) = {generic::name, avx2::name,        avx512::name, \
                                       avx512::name,  avx512_bf16::name, amx::name}
#define PYFAST_CPU_PRODUCT_KERNEL(name, Params)                                            \
  PYFAST_DECLARE_KERNEL(generic, name, Params)                                             \
  PYFAST_DECLARE_KERNEL(avx2, name, Params)                                                \
  PYFAST_DECLARE_KERNEL(avx512, name, Params)                                              \
  PYFAST_DECLARE_KERNEL(avx512_vnni, name, Params)                                         \
  PYFAST_DECLARE_KERNEL(avx512_bf16, name, Params)                                         \
  PYFAST_DECLARE_KERNEL(amx, name, Params)                                                 \
  PYFAST_KERNEL_TABLE(name, Params) = {generic::name,     avx2::name,        avx512::name, \
                                       avx512_vnni::name, avx512_bf16::name, amx::name}
#else
#define PYFAST_CPU_KERNEL(name, Params)        \
  PYFAST_DECLARE_KERNEL(generic, name, Params) \
  PYFAST_KERNEL_TABLE(name, Params) = {generic::name}
#define PYFAST_CPU_TILE_KERNEL(name, Params) PYFAST_CPU_KERNEL(name, Params)
#define PYFAST_CPU_PRODUCT_KERNEL(name, Params) PYFAST_CPU_KERNEL(name, Params)
#endif
