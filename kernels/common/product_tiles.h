// Products of pairs of bfloat16 in tiles of AMX: 32 rows by 32 columns at a time, 16 units deep.
// Included by product.h, whose operands these are. On Sapphire Rapids vdpbf16ps runs every other
// cycle, half the speed of float; a product of tiles does the work of 256 of them in 16.
#pragma once

#include "tiles.h"
#include "transpose.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kTallRows = 32;
constexpr int64_t kPanelColumns = 2 * kLanes;
constexpr int64_t kStepUnits = 16;
constexpr int64_t kMaxStripUnits = 128;  // the most that a product may have

// 32 rows of the left operand from `row` on, with whole steps of units: zero behind the last row
// and unit.
template <bool kTransposed>
inline void pack_strip(LeftOperand a, int64_t row, int64_t num_rows, int64_t first_unit,
                       int64_t num_units, uint32_t* to, int64_t stride) {
  auto mask = [](int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count > 0 ? (1u << count) - 1u : 0u);
  };
  for (int64_t u = 0; u < num_units; u += kStepUnits) {
    for (int64_t half = 0; half < kTallRows; half += kLanes) {
      uint32_t* const block = to + half * stride + u;
      const int64_t rows = num_rows - half, units = num_units - u;
      if constexpr (kTransposed) {
        alignas(64) uint32_t part[kStepUnits * kLanes];
        const uint32_t* from = a.data + (first_unit + u) * a.stride + row + half;
        int64_t from_stride = a.stride;
        if (units < kStepUnits || rows < kLanes) {
          for (int64_t i = 0; i < kStepUnits; ++i) {
            _mm512_store_si512(
                part + i * kLanes,
                _mm512_maskz_loadu_epi32(i < units ? mask(rows) : 0, from + i * from_stride));
          }
          from = part;
          from_stride = kLanes;
        }
        transpose_block(from, from_stride, block, stride);
      } else {
        for (int64_t r = 0; r < kLanes; ++r) {
          const uint32_t* const from = a.data + (row + half + r) * a.stride + first_unit + u;
          _mm512_store_si512(block + r * stride,
                             _mm512_maskz_loadu_epi32(r < rows ? mask(units) : 0, from));
        }
      }
    }
  }
}

// c = a * b, or is added to it: 32 rows, one or two vectors of columns, whole steps of units.
template <int kColumns>
inline void multiply_tiles(LeftOperand a, RightOperand b, Product c, int64_t num_units) {
  for (int64_t row = 0; row < kTallRows; row += kLanes) {
    const uint32_t* const left = a.data + row * a.stride;
    float* const sums = c.data + row * c.stride;
    if (c.accumulate) {
      load_tiles<1, kColumns>(sums, c.stride);
    } else {
      zero_tiles<1, kColumns>();
    }
    for (int64_t u = 0; u < num_units; u += kStepUnits) {
      tile_step<PairUnit, 1, kColumns>(reinterpret_cast<const char*>(left + u), a.stride * 4,
                                       b.data + u * b.stride, b.stride * 4, kLanes);
    }
    store_tiles<1, kColumns>(sums, c.stride);
  }
}

// The same with fewer rows of c, and with units behind the last whole step, for which `a` is zero.
template <int kColumns>
inline void multiply_panel(LeftOperand a, RightOperand b, Product c, int64_t num_rows,
                           int64_t num_units) {
  alignas(64) float sums[kTallRows * kPanelColumns];
  alignas(64) uint32_t last[kStepUnits * kPanelColumns];
  auto copy_rows = [&](const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int v = 0; v < kColumns; ++v) {
        Lanes::load(from + r * from_stride + v * kLanes).store(to + r * to_stride + v * kLanes);
      }
    }
  };
  Product out = c;
  if (num_rows < kTallRows) {
    out = {sums, kPanelColumns, c.accumulate};
    if (c.accumulate) copy_rows(c.data, c.stride, sums, kPanelColumns);
  }
  const int64_t whole = num_units / kStepUnits * kStepUnits;
  if (whole > 0) multiply_tiles<kColumns>(a, b, out, whole);
  if (whole < num_units) {
    const Lanes zero = Lanes::broadcast(0.0f);
    for (int64_t i = 0; i < kStepUnits; ++i) {
      const float* const from = reinterpret_cast<const float*>(b.data + (whole + i) * b.stride);
      float* const to = reinterpret_cast<float*>(last + i * kPanelColumns);
      for (int v = 0; v < kColumns; ++v) {
        (whole + i < num_units ? Lanes::load(from + v * kLanes) : zero).store(to + v * kLanes);
      }
    }
    multiply_tiles<kColumns>({a.data + whole, a.stride}, {last, kPanelColumns},
                             {out.data, out.stride, out.accumulate || whole > 0}, kStepUnits);
  }
  if (num_rows < kTallRows) copy_rows(sums, kPanelColumns, c.data, c.stride);
}

// What product.h's multiply() does.
template <bool kTransposed, typename F>
inline void multiply_in_tiles(LeftOperand a, RightOperand b, Product c, int64_t num_rows,
                              const F& extent) {
  alignas(64) uint32_t packed[kTallRows * kMaxStripUnits];
  const Tiles tiles;
  for (int64_t row = 0; row < num_rows; row += kTallRows) {
    const int64_t rows = num_rows - row < kTallRows ? num_rows - row : kTallRows;
    const Extent e = extent(row, row + rows);
    const int64_t units = e.end_unit - e.first_unit;
    if (units <= 0 || e.first_vector >= e.end_vector) continue;
    LeftOperand left = {a.data + row * a.stride + e.first_unit, a.stride};
    if (kTransposed || rows < kTallRows || units % kStepUnits != 0) {
      const int64_t stride = (units + kStepUnits - 1) / kStepUnits * kStepUnits;
      pack_strip<kTransposed>(a, row, rows, e.first_unit, units, packed, stride);
      left = {packed, stride};
    }
    for (int64_t v = e.first_vector; v < e.end_vector; v += 2) {
      const RightOperand right = {b.data + e.first_unit * b.stride + v * kLanes, b.stride};
      const Product out = {c.data + row * c.stride + v * kLanes, c.stride, c.accumulate};
      if (v + 1 < e.end_vector) {
        multiply_panel<2>(left, right, out, rows, units);
      } else {
        multiply_panel<1>(left, right, out, rows, units);
      }
    }
  }
}

}  // namespace pyfast::PYFAST_ISA
