// Products in tiles of AMX (../common/tiles.h). Weight-only, x becomes digits of int8
// (int8_digits.h); for more than 16 rows of bfloat16 weights turn into bfloat16 instead: for one
// panel just before they are used, else once a block.
#pragma once

#include "../common/tiles.h"
#include "int8_tile.h"

#if defined(__AMX_INT8__)

namespace pyfast::PYFAST_ISA {

// The next panel is asked for while one is multiplied.
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

// 16 or 32 rows of units, a multiple of 16 of them, by a panel. Where 16 rows come from memory,
// they are asked for on the way. (32 are not: the hardware reads ahead of them at the speed of
// memory, and half as fast when it is asked to.)
template <typename Unit, int kRows, int kColumns>
inline __attribute__((noinline)) void multiply_tiles(const char* weights, int64_t stride,
                                                     const uint32_t* panel, float* sums,
                                                     int64_t first_unit, int64_t end_unit,
                                                     bool from_memory, Ahead* ahead) {
  Ahead next = *ahead;
  if (first_unit > 0) {
    load_tiles<kRows, kColumns>(sums, kPanel<Unit>);
  } else {
    zero_tiles<kRows, kColumns>();
  }
  for (int64_t u = first_unit; u < end_unit; u += 16) {
    const char* from = weights + u * 4;
    if (kRows == 1 && from_memory) {
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) __builtin_prefetch(from + row * stride + 128, 0, 3);
    }
    tile_step<Unit, kRows, kColumns>(from, stride, panel + u * kPanel<Unit>, 64, kTileUnits);
    next.step();
  }
  store_tiles<kRows, kColumns>(sums, kPanel<Unit>);
  *ahead = next;
}

// Up to 16 rows of k weights, converted 64 columns at a time: the next ones while two steps of
// these are multiplied. Rows beyond the last are those before, and their sums are not used.
template <typename Unit, int kColumns>
inline __attribute__((noinline)) void multiply_converted(const int8_t* weights, int64_t k,
                                                         int64_t rows, const uint32_t* panel,
                                                         float* sums, int64_t num_units) {
  constexpr int64_t kUnits = 32;               // 64 weights of a row
  alignas(64) BFloat16 buffer[2][2][16 * 32];  // [turn][step][row, weight]
  const auto convert = [&](int64_t u, BFloat16(*to)[16 * 32]) PYFAST_INLINE_LAMBDA {
    const int64_t left = k - u * 2;
    const uint64_t used = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
#pragma GCC unroll 4
    for (int row = 0; row < 16; ++row) {
      const int8_t* from = weights + (row < rows ? row : rows - 1) * k + u * 2;
      __builtin_prefetch(from + 256, 0, 3);
      const WeightPairs pairs = weight_pairs(_mm512_maskz_loadu_epi8(used, from));
      _mm512_store_si512(to[0] + row * 32, pairs.first);
      _mm512_store_si512(to[1] + row * 32, pairs.second);
    }
  };
  zero_tiles<1, kColumns>();
  if (num_units > 0) convert(0, buffer[0]);
  for (int64_t u = 0; u < num_units; u += kUnits) {
    const int64_t turn = u / kUnits % 2;
    if (u + kUnits < num_units) convert(u + kUnits, buffer[1 - turn]);
    for (int step = 0; step < 2; ++step) {
      tile_step<Unit, 1, kColumns>(reinterpret_cast<const char*>(buffer[turn][step]), 64,
                                   panel + (u + step * 16) * kPanel<Unit>, 64, kTileUnits);
    }
  }
  store_tiles<1, kColumns>(sums, kPanel<Unit>);
}

}  // namespace pyfast::PYFAST_ISA

#endif
