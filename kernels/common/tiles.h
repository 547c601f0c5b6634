// Tiles of AMX: 16 rows of 64 bytes. A step is 32 rows of weights by 16 or 32 columns of a packed
// panel, 16 units deep. Sums of weights' tiles 4 and 5 with columns 6 and 7 are in tiles 0 to 3.
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

// Adds the products of one step, 16 units: rows of weights from `a` on, columns from `b` on.
template <typename Unit, bool kTwoColumns>
PYFAST_ALWAYS_INLINE void tile_step(const char* a, int64_t stride, const uint32_t* b,
                                    int64_t panel_bytes) {
  PYFAST_TILE_LOAD(4, a, stride);
  PYFAST_TILE_LOAD(6, b, panel_bytes);
  PYFAST_TILE_DOT(0, 4, 6);
  PYFAST_TILE_LOAD(5, a + 16 * stride, stride);
  PYFAST_TILE_DOT(2, 5, 6);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_LOAD(7, b + 16, panel_bytes);
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

// sums[row][column], rows `columns` apart.
template <bool kTwoColumns>
PYFAST_ALWAYS_INLINE void load_tiles(const float* sums, int64_t columns) {
  PYFAST_TILE_LOAD(0, sums, columns * 4);
  PYFAST_TILE_LOAD(2, sums + 16 * columns, columns * 4);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_LOAD(1, sums + 16, columns * 4);
    PYFAST_TILE_LOAD(3, sums + 16 * columns + 16, columns * 4);
  }
}
template <bool kTwoColumns>
PYFAST_ALWAYS_INLINE void store_tiles(float* sums, int64_t columns) {
  PYFAST_TILE_STORE(0, sums, columns * 4);
  PYFAST_TILE_STORE(2, sums + 16 * columns, columns * 4);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_STORE(1, sums + 16, columns * 4);
    PYFAST_TILE_STORE(3, sums + 16 * columns + 16, columns * 4);
  }
}

}  // namespace pyfast::PYFAST_ISA

#endif
