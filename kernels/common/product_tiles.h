// Products of pairs of bfloat16 in tiles of AMX: 16 rows by 64 columns at a time, 16 units deep.
// Included by product.h, whose operands these are. On Sapphire Rapids vdpbf16ps runs every other
// cycle, half the speed of float; a product of tiles does the work of 256 of them in 16.
#pragma once

#include "tiles.h"
#include "transpose.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kTileSize = 16;        // rows, and units of a step
constexpr int64_t kMaxStripUnits = 256;  // the most that a product may have
constexpr int64_t kStepUnits = kTileSize * kTileSize;

// 16 rows of the left operand from `row` on, with whole steps of units: zero behind the last.
template <bool kTransposed>
inline void pack_strip(LeftOperand a, int64_t row, int64_t num_rows, int64_t first_unit,
                       int64_t num_units, uint32_t* to, int64_t stride) {
  for (int64_t u = 0; u < num_units; u += kTileSize) {
    const int64_t left = num_units - u;
    const __mmask16 valid = left >= kTileSize ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1u);
    if constexpr (kTransposed) {
      alignas(64) uint32_t units[kStepUnits];
      const uint32_t* from = a.data + (first_unit + u) * a.stride + row;
      int64_t from_stride = a.stride;
      if (left < kTileSize || num_rows < kTileSize) {
        const __mmask16 rows = static_cast<__mmask16>((1u << num_rows) - 1u);
        for (int64_t i = 0; i < kTileSize; ++i) {
          const __mmask16 mask = i < left ? rows : 0;
          _mm512_store_si512(units + i * kTileSize,
                             _mm512_maskz_loadu_epi32(mask, from + i * from_stride));
        }
        from = units;
        from_stride = kTileSize;
      }
      transpose_block(from, from_stride, to + u, stride);
    } else {
      for (int64_t r = 0; r < kTileSize; ++r) {
        const uint32_t* const from = a.data + (row + r) * a.stride + first_unit + u;
        _mm512_store_si512(to + r * stride + u,
                           _mm512_maskz_loadu_epi32(r < num_rows ? valid : 0, from));
      }
    }
  }
}

// c = a * b, or is added to it: 16 rows, up to four vectors of columns, whole steps of units.
template <int kVectors>
inline void multiply_tiles(LeftOperand a, RightOperand b, Product c, int64_t num_units) {
  const int64_t a_bytes = a.stride * 4, b_bytes = b.stride * 4, c_bytes = c.stride * 4;
  if (c.accumulate) {
    PYFAST_TILE_LOAD(0, c.data, c_bytes);
    if constexpr (kVectors > 1) PYFAST_TILE_LOAD(1, c.data + kLanes, c_bytes);
    if constexpr (kVectors > 2) PYFAST_TILE_LOAD(2, c.data + 2 * kLanes, c_bytes);
    if constexpr (kVectors > 3) PYFAST_TILE_LOAD(3, c.data + 3 * kLanes, c_bytes);
  } else {
    zero_tiles();
  }
  for (int64_t u = 0; u < num_units; u += kTileSize) {
    const uint32_t* const right = b.data + u * b.stride;
    PYFAST_TILE_LOAD(4, a.data + u, a_bytes);
    PYFAST_TILE_LOAD(5, right, b_bytes);
    PYFAST_TILE_DOT_PAIRS(0, 4, 5);
    if constexpr (kVectors > 1) {
      PYFAST_TILE_LOAD(6, right + kLanes, b_bytes);
      PYFAST_TILE_DOT_PAIRS(1, 4, 6);
    }
    if constexpr (kVectors > 2) {
      PYFAST_TILE_LOAD(7, right + 2 * kLanes, b_bytes);
      PYFAST_TILE_DOT_PAIRS(2, 4, 7);
    }
    if constexpr (kVectors > 3) {
      PYFAST_TILE_LOAD(5, right + 3 * kLanes, b_bytes);
      PYFAST_TILE_DOT_PAIRS(3, 4, 5);
    }
  }
  PYFAST_TILE_STORE(0, c.data, c_bytes);
  if constexpr (kVectors > 1) PYFAST_TILE_STORE(1, c.data + kLanes, c_bytes);
  if constexpr (kVectors > 2) PYFAST_TILE_STORE(2, c.data + 2 * kLanes, c_bytes);
  if constexpr (kVectors > 3) PYFAST_TILE_STORE(3, c.data + 3 * kLanes, c_bytes);
}

// The same with fewer rows of c, and with units behind the last whole step, for which `a` is zero.
template <int kVectors>
inline void multiply_panel(LeftOperand a, RightOperand b, Product c, int64_t num_rows,
                           int64_t num_units) {
  alignas(64) float sums[kTileSize * 4 * kLanes];
  alignas(64) uint32_t last[kTileSize * 4 * kLanes];
  constexpr int64_t kStride = 4 * kLanes;
  Product out = c;
  auto copy_rows = [&](const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        Lanes::load(from + r * from_stride + v * kLanes).store(to + r * to_stride + v * kLanes);
      }
    }
  };
  if (num_rows < kTileSize) {
    out = {sums, kStride, c.accumulate};
    if (c.accumulate) copy_rows(c.data, c.stride, sums, kStride);
  }
  const int64_t whole = num_units / kTileSize * kTileSize;
  if (whole > 0) multiply_tiles<kVectors>(a, b, out, whole);
  if (whole < num_units) {
    const Lanes zero = Lanes::broadcast(0.0f);
    for (int64_t i = 0; i < kTileSize; ++i) {
      const float* const from = reinterpret_cast<const float*>(b.data + (whole + i) * b.stride);
      float* const to = reinterpret_cast<float*>(last + i * kStride);
      for (int v = 0; v < kVectors; ++v) {
        (whole + i < num_units ? Lanes::load(from + v * kLanes) : zero).store(to + v * kLanes);
      }
    }
    multiply_tiles<kVectors>({a.data + whole, a.stride}, {last, kStride},
                             {out.data, out.stride, out.accumulate || whole > 0}, kTileSize);
  }
  if (num_rows < kTileSize) copy_rows(sums, kStride, c.data, c.stride);
}

// The product of up to 16 rows from `row` on; the tiles are configured. `packed` has room for a
// strip of kMaxStripUnits.
template <bool kTransposed>
inline void multiply_strip_in_tiles(LeftOperand a, RightOperand b, Product c, int64_t row,
                                    int64_t num_rows, Extent e, uint32_t* packed) {
  const int64_t units = e.end_unit - e.first_unit;
  if (units <= 0 || e.first_vector >= e.end_vector) return;
  LeftOperand left = {a.data + row * a.stride + e.first_unit, a.stride};
  if (kTransposed || num_rows < kTileSize || units % kTileSize != 0) {
    const int64_t stride = (units + kTileSize - 1) / kTileSize * kTileSize;
    pack_strip<kTransposed>(a, row, num_rows, e.first_unit, units, packed, stride);
    left = {packed, stride};
  }
  for (int64_t v = e.first_vector; v < e.end_vector; v += 4) {
    const RightOperand right = {b.data + e.first_unit * b.stride + v * kLanes, b.stride};
    const Product out = {c.data + row * c.stride + v * kLanes, c.stride, c.accumulate};
    switch (e.end_vector - v) {
      case 1:
        multiply_panel<1>(left, right, out, num_rows, units);
        break;
      case 2:
        multiply_panel<2>(left, right, out, num_rows, units);
        break;
      case 3:
        multiply_panel<3>(left, right, out, num_rows, units);
        break;
      default:
        multiply_panel<4>(left, right, out, num_rows, units);
    }
  }
}

// What product.h's multiply() does.
template <bool kTransposed, typename F>
inline void multiply_in_tiles(LeftOperand a, RightOperand b, Product c, int64_t num_rows,
                              const F& extent) {
  alignas(64) uint32_t packed[kTileSize * kMaxStripUnits];
  const Tiles tiles;
  for (int64_t row = 0; row < num_rows; row += kTileSize) {
    const int64_t rows = num_rows - row < kTileSize ? num_rows - row : kTileSize;
    multiply_strip_in_tiles<kTransposed>(a, b, c, row, rows, extent(row, row + rows), packed);
  }
}

}  // namespace pyfast::PYFAST_ISA
