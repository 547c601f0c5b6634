// Tiles of AMX: 16 rows of 64 bytes. A step is 32 rows of weights by 32 columns, 16 units deep:
// four tiles loaded, four products. Measured on Sapphire Rapids, nanoseconds a step: 25 for the
// products alone, 39 with operands from L2, 45 with weights in rows of 4 KB, 100 with a panel whose
// rows are 256 bytes apart. (A neighbour on the core's other thread makes a step with four products
// take 160, one with two 50: what counts then is the number of products.) Weight-only, x becomes
// digits of int8 (int8_digits.h); for more than a few rows of bfloat16 weights turn into bfloat16
// instead: for one panel just before they are used, else once a block.
#pragma once

#include "int8_tile.h"

#if defined(__AMX_INT8__)

namespace pyfast::PYFAST_ISA {

// The next panel is asked for while one is multiplied. (Weights are not: the hardware reads 32 rows
// ahead at the speed of memory, and half as fast when it is asked to.)
class Ahead {
 public:
  Ahead(const void* begin, int64_t bytes, int64_t steps)
      : next_(static_cast<const char*>(begin)),
        end_(next_ + bytes),
        lines_((bytes / 64 + steps) / steps) {}
  PYFAST_ALWAYS_INLINE void step() {
    for (int64_t line = 0; line < lines_ && next_ < end_; ++line, next_ += 64) {
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  const char* next_;
  const char* end_;
  int64_t lines_;
};

// The configuration is a thread's. (The compiler's intrinsics do not say that they read memory.)
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

#define PYFAST_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"(from), "r"(stride) : "memory")
#define PYFAST_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define PYFAST_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile::: "memory")
#define PYFAST_TILE_DOT(sum, a, b)                                      \
  do {                                                                  \
    if constexpr (Unit::kIsInteger) {                                   \
      asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::);   \
    } else {                                                            \
      asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum::); \
    }                                                                   \
  } while (false)

// One step: weights from two tiles at `a`, columns from `b`.
template <typename Unit, bool kTwoColumns>
PYFAST_ALWAYS_INLINE void tile_step(const char* a, int64_t stride, const uint32_t* b) {
  constexpr int64_t kPanelBytes = kPanel<Unit> * 4;
  PYFAST_TILE_LOAD(4, a, stride);
  PYFAST_TILE_LOAD(6, b, kPanelBytes);
  PYFAST_TILE_DOT(0, 4, 6);
  PYFAST_TILE_LOAD(5, a + 16 * stride, stride);
  PYFAST_TILE_DOT(2, 5, 6);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_LOAD(7, b + 16, kPanelBytes);
    PYFAST_TILE_DOT(1, 4, 7);
    PYFAST_TILE_DOT(3, 5, 7);
  }
}

PYFAST_ALWAYS_INLINE void zero_tiles() {
  PYFAST_TILE_ZERO(0);
  PYFAST_TILE_ZERO(1);
  PYFAST_TILE_ZERO(2);
  PYFAST_TILE_ZERO(3);
}

template <typename Unit, bool kTwoColumns>
PYFAST_ALWAYS_INLINE void store_tiles(float* sums) {
  constexpr int64_t kPanelBytes = kPanel<Unit> * 4;
  PYFAST_TILE_STORE(0, sums, kPanelBytes);
  PYFAST_TILE_STORE(2, sums + 16 * kPanel<Unit>, kPanelBytes);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_STORE(1, sums + 16, kPanelBytes);
    PYFAST_TILE_STORE(3, sums + 16 * kPanel<Unit> + 16, kPanelBytes);
  }
}

// 32 rows of units, a multiple of 16 of them, by a panel of one or two vectors.
template <typename Unit, bool kTwoColumns>
inline __attribute__((noinline)) void multiply_tiles(const char* weights, int64_t stride,
                                                     const uint32_t* panel, float* sums,
                                                     int64_t num_units, Ahead* ahead) {
  Ahead next = *ahead;
  zero_tiles();
  for (int64_t u = 0; u < num_units; u += 16) {
    tile_step<Unit, kTwoColumns>(weights + u * 4, stride, panel + u * kPanel<Unit>);
    next.step();
  }
  store_tiles<Unit, kTwoColumns>(sums);
  *ahead = next;
}

// Up to 32 rows of k weights, converted 64 columns at a time: the next ones while two steps of
// these are multiplied. Rows beyond the last are those before, and their sums are not used.
template <typename Unit, bool kTwoColumns>
inline __attribute__((noinline)) void multiply_converted(const int8_t* weights, int64_t k,
                                                         int64_t rows, const uint32_t* panel,
                                                         float* sums, int64_t num_units) {
  constexpr int64_t kUnits = 32;               // 64 weights of a row
  alignas(64) BFloat16 buffer[2][2][32 * 32];  // [turn][step][row, weight]
  const auto convert = [&](int64_t u, BFloat16(*to)[32 * 32]) PYFAST_INLINE_LAMBDA {
    const int64_t left = k - u * 2;
    const uint64_t used = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
#pragma GCC unroll 4
    for (int row = 0; row < 32; ++row) {
      const int8_t* from = weights + (row < rows ? row : rows - 1) * k + u * 2;
      __builtin_prefetch(from + 256, 0, 3);
      const WeightPairs pairs = weight_pairs(_mm512_maskz_loadu_epi8(used, from));
      _mm512_store_si512(to[0] + row * 32, pairs.first);
      _mm512_store_si512(to[1] + row * 32, pairs.second);
    }
  };
  zero_tiles();
  if (num_units > 0) convert(0, buffer[0]);
  for (int64_t u = 0; u < num_units; u += kUnits) {
    const int64_t turn = u / kUnits % 2;
    if (u + kUnits < num_units) convert(u + kUnits, buffer[1 - turn]);
    const uint32_t* b = panel + u * kPanel<Unit>;
    for (int step = 0; step < 2; ++step) {
      tile_step<Unit, kTwoColumns>(reinterpret_cast<const char*>(buffer[turn][step]), 64,
                                   b + step * 16 * kPanel<Unit>);
    }
  }
  store_tiles<Unit, kTwoColumns>(sums);
}

}  // namespace pyfast::PYFAST_ISA

#endif
