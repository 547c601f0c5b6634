// Products of a block of weight rows with panels of rows of x. Roles are swapped against the usual
// form: weights are the left operand, read where they lie (32 bits broadcast, or tiles of AMX), and
// x, which is written anew by its quantization anyway, is packed: [unit][row of x]. Sums come out
// transposed, [weight row][row of x]. So no copy of the weights in another layout is ever made.
// Panels of 64 rows by 4,096 bytes stay in L2, the weights of a strip of 6 rows in L1.
#pragma once

#include "../common/transpose.h"
#include "int8_units.h"

namespace pyfast::PYFAST_ISA {

#if defined(__AMX_INT8__)
template <typename Unit>
constexpr bool kUsesTiles = Unit::kElements >= 2;
constexpr int kBlockRows = 128;  // of the weights; a multiple of kLanes
#else
template <typename Unit>
constexpr bool kUsesTiles = false;
#if defined(__AVX512F__)
constexpr int kBlockRows = 48;
#else
constexpr int kBlockRows = 24;
#endif
#endif
// Rows of units in a panel: of x, or of its digits. Three digits of 16 rows are 48.
template <typename Unit>
constexpr int kPanelVectors = kUsesTiles<Unit> ? (Unit::kDigits == 3 ? 3 : 2) : kTileVectors;
template <typename Unit>
constexpr int64_t kPanel = kPanelVectors<Unit> * kLanes;
constexpr int64_t kTileUnits = 256;  // a tile of AMX; panels are made of whole ones
// Units of a row are a multiple of it.
template <typename Unit>
constexpr int64_t kUnitStep = Unit::kElements == 2 && !Unit::kIsInteger ? 32 : kLanes;
constexpr int64_t kBlockUnits = 1024;  // 256 KB of a panel

// Few rows of x are few vectors, and too few sums in flight: the units are dealt out to several
// sums of each, which are added in the end.
template <typename Unit, int kRows, int kVectors, int kParts>
inline __attribute__((noinline)) void multiply_parts(LeftOperand a, RightOperand b, Product c,
                                                     int64_t num_units) {
  Lanes sum[kRows][kVectors][kParts];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) sum[r][v][part] = Lanes::broadcast(0.0f);
    }
  }
  const uint32_t* left = a.data;
  const float* right = reinterpret_cast<const float*>(b.data);
  const auto step = [&](int part) PYFAST_INLINE_LAMBDA {
    Lanes columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = Lanes::load(right + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v][part] = Unit::dot(left + r * a.stride, columns[v], sum[r][v][part]);
      }
    }
    ++left;
    right += b.stride;
  };
  int64_t u = 0;
  for (; u + kParts <= num_units; u += kParts) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) step(part);
  }
  for (; u < num_units; ++u) step(0);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Lanes total = sum[r][v][0];
#pragma GCC unroll 4
      for (int part = 1; part < kParts; ++part) total = added<Unit>(total, sum[r][v][part]);
      float* to = c.data + r * c.stride + v * kLanes;
      if (c.accumulate) total = added<Unit>(total, Lanes::load(to));
      total.store(to);
    }
  }
}

// sums[row][column] of `rows` rows of weights, for `vectors` vectors of columns.
template <typename Unit>
inline void multiply_block(LeftOperand weights, const uint32_t* panel, float* sums, int64_t rows,
                           int64_t vectors, int64_t num_units) {
  if (num_units == 0) {
    memset(sums, 0, static_cast<size_t>(rows * kPanel<Unit>) * sizeof(float));
    return;
  }
  for (int64_t first = 0; first < num_units; first += kBlockUnits) {
    const int64_t end = first + kBlockUnits < num_units ? first + kBlockUnits : num_units;
    const RightOperand right = {panel, kPanel<Unit>};
    const Product product = {sums, kPanel<Unit>, first > 0};
#if defined(__AVX512F__)
    if (vectors <= 2) {
      int64_t row = 0;
      const RightOperand from = {panel + first * kPanel<Unit>, kPanel<Unit>};
      for (; row + kTileRows <= rows; row += kTileRows) {
        const LeftOperand left = {weights.data + row * weights.stride + first, weights.stride};
        const Product to = {sums + row * kPanel<Unit>, kPanel<Unit>, first > 0};
        if (vectors == 1) {
          multiply_parts<Unit, kTileRows, 1, 4>(left, from, to, end - first);
        } else {
          multiply_parts<Unit, kTileRows, 2, 2>(left, from, to, end - first);
        }
      }
      const LeftOperand left = {weights.data + row * weights.stride, weights.stride};
      const Product to = {sums + row * kPanel<Unit>, kPanel<Unit>, first > 0};
      multiply<Unit, false>(left, right, to, rows - row, vectors,
                            [&](int64_t, int64_t) { return Extent{0, vectors, first, end}; });
      continue;
    }
#endif
    multiply<Unit, false>(weights, right, product, rows, vectors,
                          [&](int64_t, int64_t) { return Extent{0, vectors, first, end}; });
  }
}

}  // namespace pyfast::PYFAST_ISA
