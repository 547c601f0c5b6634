// Products with few rows of x: sums along the rows of the weights, which are read once, at the
// speed of memory. A strip is four rows of weights by up to four of x; lanes are elements of the
// sum, and are added up in the end. Weights of the strips to come are asked for ahead.
//
// A Dot is one such sum: `Weight`, the type in memory; `kStep` elements at a time; weights() and
// values() load them, add() adds their products, sum() adds the lanes. Where kHasExcess, the sums
// of add_excess() are too much in each.
#pragma once

#include "lanes.h"
#include "row_blocks.h"

namespace pyfast::PYFAST_ISA {

constexpr int kStripRows = 4;

// sums[column * stride + row] for the first kRows rows of weights and kColumns rows of x, which are
// `x_stride` units apart and padded with zeros to a whole step.
template <typename Dot, int kRows, int kColumns>
inline __attribute__((noinline)) void dot_strip(const typename Dot::Weight* weights, int64_t k,
                                                const uint32_t* x, int64_t x_stride, float* sums,
                                                int64_t stride, int64_t ahead) {
  constexpr bool kHasExcess = Dot::kHasExcess;
  Dot dot[kRows][kColumns], excess[kRows];
  const auto step = [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const auto w = Dot::weights(weights + r * k + j, n);
      if constexpr (kHasExcess) excess[r].add_excess(w);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        dot[r][c].add(w, Dot::values(x + c * x_stride, j));
      }
    }
  };
  constexpr int kLineElements = 64 / sizeof(typename Dot::Weight);
  constexpr int kLine = Dot::kStep < kLineElements ? kLineElements : Dot::kStep;
  int64_t j = 0;
  for (; j + kLine <= k; j += kLine) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(weights + r * k + j + ahead, 0, 3);
#pragma GCC unroll 8
    for (int part = 0; part < kLine; part += Dot::kStep) step(j + part, Dot::kStep);
  }
  for (; j + Dot::kStep <= k; j += Dot::kStep) step(j, Dot::kStep);
  if (j < k) step(j, static_cast<int>(k - j));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kHasExcess) {
      const int32_t too_large = excess[r].sum();
      for (int c = 0; c < kColumns; ++c) {
        const int32_t sum = dot[r][c].sum() - too_large;
        memcpy(sums + c * stride + r, &sum, 4);
      }
    } else {
      for (int c = 0; c < kColumns; ++c) {
        const auto sum = dot[r][c].sum();
        memcpy(sums + c * stride + r, &sum, 4);
      }
    }
  }
}

template <typename Dot, int kRows>
inline void dot_columns(const typename Dot::Weight* weights, int64_t k, const uint32_t* x,
                        int64_t x_stride, int64_t columns, float* sums, int64_t stride,
                        int64_t ahead) {
  for (int64_t c = 0; c < columns; c += 4) {
    const uint32_t* from = x + c * x_stride;
    float* to = sums + c * stride;
    const int64_t next = c == 0 ? ahead : 0;
    switch (columns - c) {
      case 1:
        dot_strip<Dot, kRows, 1>(weights, k, from, x_stride, to, stride, next);
        break;
      case 2:
        dot_strip<Dot, kRows, 2>(weights, k, from, x_stride, to, stride, next);
        break;
      case 3:
        dot_strip<Dot, kRows, 3>(weights, k, from, x_stride, to, stride, next);
        break;
      default:
        dot_strip<Dot, kRows, 4>(weights, k, from, x_stride, to, stride, next);
    }
  }
}

// sums[column][row] of `rows` rows of weights with `columns` rows of x.
template <typename Dot>
inline void dot_block(const typename Dot::Weight* weights, int64_t rows, int64_t k,
                      const uint32_t* x, int64_t x_stride, int64_t columns, float* sums,
                      int64_t stride) {
  constexpr int64_t kLeast = 2048 / sizeof(typename Dot::Weight);
  const int64_t ahead = kStripRows * k > kLeast ? kStripRows * k : kLeast;
  int64_t row = 0;
  for (; row + kStripRows <= rows; row += kStripRows) {
    dot_columns<Dot, kStripRows>(weights + row * k, k, x, x_stride, columns, sums + row, stride,
                                 ahead);
  }
  for (; row < rows; ++row) {
    dot_columns<Dot, 1>(weights + row * k, k, x, x_stride, columns, sums + row, stride, 0);
  }
}

}  // namespace pyfast::PYFAST_ISA
