// Matrix products of 32-bit units, in register tiles. A unit is one float, or at level avx512_bf16
// a pair of bfloat16 that are multiplied and added in one instruction (vdpbf16ps, twice the speed
// of float on Zen 4; half of it on Sapphire Rapids, where tiles take its place). c[row][column]
// (+)= sum over units u of a[row][u] * b[u][column]: a is read one unit at a time and broadcast, b
// and c in vectors of columns. A tile of 6 rows by 4 vectors keeps 24 sums in registers and reads
// 10 values for them: one multiply-add of a whole vector a cycle, the ceiling of Zen 4, within 3 %
// when b stays in L1. AVX2 has registers for 6 by 2.
#pragma once

#include "lanes.h"

namespace pyfast::PYFAST_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 1;
#endif

// The units: acc += a[unit] * b[unit of each lane].
struct FloatUnit {
  static constexpr int kElements = 1;
  static PYFAST_ALWAYS_INLINE Lanes dot(const uint32_t* a, Lanes b, Lanes acc) {
    return fused(Lanes::broadcast(*reinterpret_cast<const float*>(a)), b, acc);
  }
};

#if defined(__AVX512BF16__)
struct PairUnit {
  static constexpr int kElements = 2;
  static constexpr bool kIsInteger = false;
  static PYFAST_ALWAYS_INLINE Lanes dot(const uint32_t* a, Lanes b, Lanes acc) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(*a));
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)pair, (__m512bh)_mm512_castps_si512(b.v))};
  }
};
#endif

// Zeros behind the elements of a row of units.
inline void clear_units(uint32_t* units, int64_t elements, int64_t element_bytes,
                        int64_t num_units) {
  const int64_t used = elements * element_bytes;
  memset(reinterpret_cast<char*>(units) + used, 0, static_cast<size_t>(num_units * 4 - used));
}

// The left operand: unit u of row r is at data[r * row_stride + u] or, transposed, at
// data[u * row_stride + r].
struct LeftOperand {
  const uint32_t* data;
  int64_t stride;
};
// Columns of vectors: data[u * stride + column].
struct RightOperand {
  const uint32_t* data;
  int64_t stride;
};
struct Product {
  float* data;
  int64_t stride;
  bool accumulate;
};

template <typename Unit, bool kTransposed, int kRows, int kVectors>
inline __attribute__((noinline)) void multiply_tile(LeftOperand a, RightOperand b, Product c,
                                                    int64_t num_units) {
  Lanes sum[kRows][kVectors];
  if (c.accumulate) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = Lanes::load(c.data + r * c.stride + v * kLanes);
    }
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Lanes::broadcast(0.0f);
    }
  }
  const uint32_t* left = a.data;
  const float* right = reinterpret_cast<const float*>(b.data);
  const int64_t left_step = kTransposed ? a.stride : 1;
  const int64_t row_step = kTransposed ? 1 : a.stride;
  for (int64_t u = 0; u < num_units; ++u) {
    Lanes columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = Lanes::load(right + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Unit::dot(left + r * row_step, columns[v], sum[r][v]);
      }
    }
    left += left_step;
    right += b.stride;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v].store(c.data + r * c.stride + v * kLanes);
  }
}

template <typename Unit, bool kTransposed, int kRows>
inline void multiply_strip(LeftOperand a, RightOperand b, Product c, int64_t num_units,
                           int vectors) {
  if (vectors == kTileVectors) {
    return multiply_tile<Unit, kTransposed, kRows, kTileVectors>(a, b, c, num_units);
  }
  if constexpr (kTileVectors > 1) {
    if (vectors == 1) return multiply_tile<Unit, kTransposed, kRows, 1>(a, b, c, num_units);
  }
  if constexpr (kTileVectors > 2) {
    if (vectors == 2) return multiply_tile<Unit, kTransposed, kRows, 2>(a, b, c, num_units);
    return multiply_tile<Unit, kTransposed, kRows, 3>(a, b, c, num_units);
  }
}

// Rows of the next strip where `left` of them are to do: no strip is left with a single row.
inline int strip_rows(int64_t left) {
  if (left >= 2 * kTileRows || left == kTileRows) return kTileRows;
  return static_cast<int>(left > kTileRows ? (left + 1) / 2 : left);
}

// What of a strip of rows there is to compute: columns of c, in vectors, and units of the sum.
struct Extent {
  int64_t first_vector, end_vector;
  int64_t first_unit, end_unit;
};

}  // namespace pyfast::PYFAST_ISA

#if defined(__AMX_TILE__)
#include "product_tiles.h"
#endif

namespace pyfast::PYFAST_ISA {

#if defined(__AMX_TILE__)
template <typename Unit>
constexpr bool kHasTiles = false;
template <>
constexpr bool kHasTiles<PairUnit> = true;  // not of units made from it, which have their own ways
#endif

// extent(first_row, end_row) says what is to be computed; rows and vectors outside are not touched.
template <typename Unit, bool kTransposed, typename F>
inline void multiply(LeftOperand a, RightOperand b, Product c, int64_t num_rows,
                     int64_t num_vectors, const F& extent) {
#if defined(__AMX_TILE__)
  if constexpr (kHasTiles<Unit>) {
    return multiply_in_tiles<kTransposed>(a, b, c, num_rows, extent);
  }
#endif
  for (int64_t panel = 0; panel < num_vectors; panel += kTileVectors) {
    for (int64_t row = 0; row < num_rows;) {
      const int rows = strip_rows(num_rows - row);
      const Extent e = extent(row, row + rows);
      const int64_t first = e.first_vector > panel ? e.first_vector : panel;
      const int64_t panel_end = panel + kTileVectors;
      const int64_t end = e.end_vector < panel_end ? e.end_vector : panel_end;
      if (first < end && e.first_unit < e.end_unit) {
        const LeftOperand left = {kTransposed ? a.data + e.first_unit * a.stride + row
                                              : a.data + row * a.stride + e.first_unit,
                                  a.stride};
        const RightOperand right = {b.data + e.first_unit * b.stride + first * kLanes, b.stride};
        const Product out = {c.data + row * c.stride + first * kLanes, c.stride, c.accumulate};
        const int64_t units = e.end_unit - e.first_unit;
        const int vectors = static_cast<int>(end - first);
        switch (rows) {
          case 1:
            multiply_strip<Unit, kTransposed, 1>(left, right, out, units, vectors);
            break;
          case 2:
            multiply_strip<Unit, kTransposed, 2>(left, right, out, units, vectors);
            break;
          case 3:
            multiply_strip<Unit, kTransposed, 3>(left, right, out, units, vectors);
            break;
          case 4:
            multiply_strip<Unit, kTransposed, 4>(left, right, out, units, vectors);
            break;
          case 5:
            if constexpr (kTileRows > 4)
              multiply_strip<Unit, kTransposed, 5>(left, right, out, units, vectors);
            break;
          case 6:
            if constexpr (kTileRows > 4)
              multiply_strip<Unit, kTransposed, 6>(left, right, out, units, vectors);
            break;
        }
      }
      row += rows;
    }
  }
}

}  // namespace pyfast::PYFAST_ISA
