// Tiles of AMX: 16 rows of 64 bytes. A step is 16 rows of one operand by one to three tiles of the
// other's columns, 16 units deep, in as few registers as there can be: renaming needs free ones,
// and at times few are left (it seems that the core's other thread uses tiles then). Measured on
// Sapphire Rapids, nanoseconds a product with its loads from L1, at such times and at others: 32
// rows by two tiles in eight registers 30 and 7, in six 20 and 7; 16 rows by two in four 14 and 7,
// which is the unit's own speed.
#pragma once

#include "row_blocks.h"

#if defined(__AMX_TILE__)

namespace pyfast::PYFAST_ISA {

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

// Adds the products of one step, 16 units: one tile of rows from `a` on with up to three tiles of
// columns, `next_column` units apart, from `b` on; or two of rows with one of columns.
template <typename Unit, int kRows, int kColumns>
PYFAST_ALWAYS_INLINE void tile_step(const char* a, int64_t stride, const uint32_t* b,
                                    int64_t column_stride, int64_t next_column) {
  PYFAST_TILE_LOAD(6, a, stride);
  PYFAST_TILE_LOAD(7, b, column_stride);
  PYFAST_TILE_DOT(0, 6, 7);
  static_assert(kRows == 1 || (kRows == 2 && kColumns == 1));
  if constexpr (kRows > 1) {
    PYFAST_TILE_LOAD(6, a + 16 * stride, stride);
    PYFAST_TILE_DOT(1, 6, 7);
  }
  if constexpr (kColumns > 1) {
    PYFAST_TILE_LOAD(7, b + next_column, column_stride);
    PYFAST_TILE_DOT(1, 6, 7);
  }
  if constexpr (kColumns > 2) {
    PYFAST_TILE_LOAD(7, b + 2 * next_column, column_stride);
    PYFAST_TILE_DOT(2, 6, 7);
  }
}

template <int kRows, int kColumns>
PYFAST_ALWAYS_INLINE void zero_tiles() {
  PYFAST_TILE_ZERO(0);
  if constexpr (kRows * kColumns > 1) PYFAST_TILE_ZERO(1);
  if constexpr (kRows * kColumns > 2) PYFAST_TILE_ZERO(2);
}

// sums[row][column], rows `columns` apart.
template <int kRows, int kColumns>
PYFAST_ALWAYS_INLINE void load_tiles(const float* sums, int64_t columns) {
  PYFAST_TILE_LOAD(0, sums, columns * 4);
  if constexpr (kRows > 1) PYFAST_TILE_LOAD(1, sums + 16 * columns, columns * 4);
  if constexpr (kColumns > 1) PYFAST_TILE_LOAD(1, sums + 16, columns * 4);
  if constexpr (kColumns > 2) PYFAST_TILE_LOAD(2, sums + 32, columns * 4);
}
template <int kRows, int kColumns>
PYFAST_ALWAYS_INLINE void store_tiles(float* sums, int64_t columns) {
  PYFAST_TILE_STORE(0, sums, columns * 4);
  if constexpr (kRows > 1) PYFAST_TILE_STORE(1, sums + 16 * columns, columns * 4);
  if constexpr (kColumns > 1) PYFAST_TILE_STORE(1, sums + 16, columns * 4);
  if constexpr (kColumns > 2) PYFAST_TILE_STORE(2, sums + 32, columns * 4);
}

}  // namespace pyfast::PYFAST_ISA

#endif
