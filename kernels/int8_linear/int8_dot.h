// Few rows of x: sums along the rows of the weights, which are read once, at the speed of memory.
// A strip is four rows of weights by up to four of x; lanes are elements of the sum, and are added
// up in the end. Weights of the strips to come are asked for ahead.
#pragma once

#include "int8_units.h"

namespace pyfast::PYFAST_ISA {

constexpr int kStripRows = 4;

#if defined(__AVX512VNNI__)
// u8 times s8 along 64 elements; x is int8 plus 128.
struct ByteDot {
  using Unit = ByteUnit;
  static constexpr int kStep = 64;
  __m512i v = _mm512_setzero_si512();

  static PYFAST_ALWAYS_INLINE __m512i weights(const int8_t* from, int n) {
    return n == kStep ? _mm512_loadu_si512(from)
                      : _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, from);
  }
  static PYFAST_ALWAYS_INLINE __m512i values(const uint32_t* row, int64_t j) {
    return _mm512_loadu_si512(reinterpret_cast<const char*>(row) + j);
  }
  PYFAST_ALWAYS_INLINE void add(__m512i w, __m512i x) { v = _mm512_dpbusd_epi32(v, x, w); }
  // 128 times the weights, which is what the values of x are too large by.
  PYFAST_ALWAYS_INLINE void add_excess(__m512i w) {
    v = _mm512_dpbusd_epi32(v, _mm512_set1_epi8(static_cast<char>(128)), w);
  }
  int32_t sum() const { return _mm512_reduce_add_epi32(v); }
};
#endif

struct WordDot {
  using Unit = WordUnit;
#if defined(__AVX512F__)
  static constexpr int kStep = 32;
  __m512i v = _mm512_setzero_si512();
  static PYFAST_ALWAYS_INLINE __m512i weights(const int8_t* from, int n) {
    const __m256i bytes = n == kStep ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                     : _mm256_maskz_loadu_epi8((uint32_t{1} << n) - 1, from);
    return _mm512_cvtepi8_epi16(bytes);
  }
  static PYFAST_ALWAYS_INLINE __m512i values(const uint32_t* row, int64_t j) {
    return _mm512_loadu_si512(row + j / 2);
  }
  PYFAST_ALWAYS_INLINE void add(__m512i w, __m512i x) {
    v = _mm512_add_epi32(v, _mm512_madd_epi16(w, x));
  }
  int32_t sum() const { return _mm512_reduce_add_epi32(v); }
#elif defined(__AVX2__)
  static constexpr int kStep = 16;
  __m256i v = _mm256_setzero_si256();
  static PYFAST_ALWAYS_INLINE __m256i weights(const int8_t* from, int n) {
    if (n == kStep) {
      return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    alignas(16) int8_t bytes[kStep] = {};
    memcpy(bytes, from, static_cast<size_t>(n));
    return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static PYFAST_ALWAYS_INLINE __m256i values(const uint32_t* row, int64_t j) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + j / 2));
  }
  PYFAST_ALWAYS_INLINE void add(__m256i w, __m256i x) {
    v = _mm256_add_epi32(v, _mm256_madd_epi16(w, x));
  }
  int32_t sum() const {
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
  }
#else
  static constexpr int kStep = 8;
  struct Words {
    int16_t v[kStep];
  };
  int32_t v[kStep] = {};
  static PYFAST_ALWAYS_INLINE Words weights(const int8_t* from, int n) {
    Words out = {};
    for (int i = 0; i < n; ++i) out.v[i] = from[i];
    return out;
  }
  static PYFAST_ALWAYS_INLINE Words values(const uint32_t* row, int64_t j) {
    Words out;
    memcpy(out.v, row + j / 2, sizeof(out.v));
    return out;
  }
  PYFAST_ALWAYS_INLINE void add(const Words& w, const Words& x) {
    for (int i = 0; i < kStep; ++i) v[i] += int32_t{w.v[i]} * x.v[i];
  }
  int32_t sum() const {
    int32_t total = 0;
    for (const int32_t lane : v) total += lane;
    return total;
  }
#endif
};

struct FloatDot {
  using Unit = FloatWeightUnit;
  static constexpr int kStep = kLanes;
  Lanes v = Lanes::broadcast(0.0f);
  static PYFAST_ALWAYS_INLINE Lanes weights(const int8_t* from, int n) {
    return load_int8(from, n);
  }
  static PYFAST_ALWAYS_INLINE Lanes values(const uint32_t* row, int64_t j) {
    return Lanes::load(reinterpret_cast<const float*>(row) + j);
  }
  PYFAST_ALWAYS_INLINE void add(Lanes w, Lanes x) { v = fused(w, x, v); }
  float sum() const { return v.sum(); }
};

#if defined(__AVX512VBMI__) && !defined(__AMX_INT8__)  // there it is no faster than FloatDot
struct PairDot {
  using Unit = PairWeightUnit;
  static constexpr int kStep = 64;
  __m512 v = _mm512_setzero_ps();
  static PYFAST_ALWAYS_INLINE WeightPairs weights(const int8_t* from, int n) {
    return weight_pairs(n == kStep ? _mm512_loadu_si512(from)
                                   : _mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, from));
  }
  static PYFAST_ALWAYS_INLINE WeightPairs values(const uint32_t* row, int64_t j) {
    return {_mm512_loadu_si512(row + j / 2), _mm512_loadu_si512(row + j / 2 + 16)};
  }
  PYFAST_ALWAYS_INLINE void add(WeightPairs w, WeightPairs x) {
    v = _mm512_dpbf16_ps(v, (__m512bh)w.first, (__m512bh)x.first);
    v = _mm512_dpbf16_ps(v, (__m512bh)w.second, (__m512bh)x.second);
  }
  float sum() const { return Lanes{v}.sum(); }
};
#endif

// sums[column * stride + row] for the first kRows rows of weights and kColumns rows of x, which are
// `x_stride` units apart and padded with zeros to a whole step.
template <typename Dot, int kRows, int kColumns>
inline __attribute__((noinline)) void dot_strip(const int8_t* weights, int64_t k, const uint32_t* x,
                                                int64_t x_stride, float* sums, int64_t stride,
                                                int64_t ahead) {
  constexpr bool kHasExcess = Dot::Unit::kElements == 4;
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
  constexpr int kLine = Dot::kStep < 64 ? 64 : Dot::kStep;
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
inline void dot_columns(const int8_t* weights, int64_t k, const uint32_t* x, int64_t x_stride,
                        int64_t columns, float* sums, int64_t stride, int64_t ahead) {
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
inline void dot_block(const int8_t* weights, int64_t rows, int64_t k, const uint32_t* x,
                      int64_t x_stride, int64_t columns, float* sums, int64_t stride) {
  const int64_t ahead = kStripRows * k > 2048 ? kStripRows * k : 2048;
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
