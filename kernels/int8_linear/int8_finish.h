// From sums to results: scales, bias, activation, rounding; in this order, each step rounded.
#pragma once

#include "int8_units.h"

namespace pyfast::PYFAST_ISA {

// erfc(x) for x >= 0, to a relative 1.2e-7 (Press et al., Numerical Recipes, section 6.2).
PYFAST_LANE_FUNCTION Lanes erfc_of_positive(Lanes x) {
  constexpr float kTerms[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                              0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const Lanes one = Lanes::broadcast(1.0f);
  const Lanes t = quotient(one, fused(Lanes::broadcast(0.5f), x, one));
  Lanes power = Lanes::broadcast(0.17087277f);
  for (const float term : kTerms) power = fused(power, t, Lanes::broadcast(term));
  power = power - x * x;
  return t * power_of_two(power * Lanes::broadcast(1.44269504f));
}

PYFAST_LANE_FUNCTION Lanes gelu(Lanes x) {
  const Lanes zero = Lanes::broadcast(0.0f), two = Lanes::broadcast(2.0f);
  const Lanes tail = erfc_of_positive(magnitude(x) * Lanes::broadcast(0.707106781f));
  const Lanes share = select(less(x, zero), tail, two - tail);
  return Lanes::broadcast(0.5f) * x * share;
}

PYFAST_LANE_FUNCTION Lanes gelu_tanh(Lanes x) {
  const Lanes cubic = fused(Lanes::broadcast(0.044715f) * x * x, x, x);
  const Lanes share = hyperbolic_tangent(Lanes::broadcast(0.797884561f) * cubic);
  return Lanes::broadcast(0.5f) * x * (Lanes::broadcast(1.0f) + share);
}

PYFAST_LANE_FUNCTION Lanes silu(Lanes x) {
  const Lanes one = Lanes::broadcast(1.0f), zero = Lanes::broadcast(0.0f);
  const Lanes e = power_of_two(magnitude(x) * Lanes::broadcast(-1.44269504f));
  return quotient(select(less(x, zero), x * e, x), one + e);
}

PYFAST_ALWAYS_INLINE Lanes activate(Lanes x, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return maximum(Lanes::broadcast(0.0f), x);  // NaN stays
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
  }
  return x;
}

// What a block of columns of y is made with, in float32.
struct ColumnTerms {
  float scale[kMaxBlockColumns];
  float bias[kMaxBlockColumns];
  int32_t excess[kMaxBlockColumns];  // of the integer sums; 0 if there is none

  void load(const Int8LinearParams& p, int64_t first, int64_t count) {
    if (p.weight_scale != nullptr) {
      memcpy(scale, p.weight_scale + first, static_cast<size_t>(count) * sizeof(float));
    }
    if (p.bias == nullptr) return;
    dispatch_dtype(p.bias_dtype, [&](auto* type) {
      const auto* from = static_cast<decltype(type)>(const_cast<void*>(p.bias)) + first;
      for (int64_t i = 0; i < count; ++i) bias[i] = static_cast<float>(to_float(from[i]));
    });
  }
};

template <bool kInteger>
PYFAST_ALWAYS_INLINE Lanes sum_at(const float* sums, const int32_t* excess) {
  if constexpr (!kInteger) return Lanes::load(sums);
#if defined(__AVX512F__)
  const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(excess));
  return {_mm512_cvtepi32_ps(sum)};
#elif defined(__AVX2__)
  const auto load = [](const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  };
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(load(sums), load(excess)))};
#else
  int32_t whole[kLanes];
  memcpy(whole, sums, sizeof(whole));
  return each_lane([&](int i) { return static_cast<float>(whole[i] - excess[i]); });
#endif
}

// `count` results of one row of y from sums that have room for whole vectors.
template <bool kInteger, typename Y>
inline void finish_row(const Int8LinearParams& p, const ColumnTerms& terms, const float* sums,
                       float row_scale, Y* y, int64_t count) {
  const Lanes scale = Lanes::broadcast(row_scale);
  const bool has_bias = p.bias != nullptr;
  const Activation activation = p.activation;
  for_each_vec<Lanes>(0, count, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
    Lanes value = sum_at<kInteger>(sums + j, terms.excess + j);
    if constexpr (kInteger) value = value * scale;
    value = value * Lanes::load(terms.scale + j);
    if (has_bias) value = value + Lanes::load(terms.bias + j);
    if (activation != Activation::kNone) value = activate(value, activation);
    store_lanes(value, y + j, n, false);
  });
}

// Rows of y: sums[row][column] at `stride`, for the columns from `first` on.
template <bool kInteger>
inline void finish(const Int8LinearParams& p, const ColumnTerms& terms, const float* sums,
                   int64_t stride, const float* row_scales, int64_t first_row, int64_t rows,
                   int64_t first, int64_t count) {
  if (p.weight_scale == nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      int32_t* y = static_cast<int32_t*>(p.y) + (first_row + r) * p.n + first;
      for (int64_t j = 0; j < count; ++j) {
        int32_t sum;
        memcpy(&sum, sums + r * stride + j, 4);
        y[j] = static_cast<int32_t>(static_cast<uint32_t>(sum) -
                                    static_cast<uint32_t>(terms.excess[j]));
      }
    }
    return;
  }
  dispatch_dtype(p.y_dtype, [&](auto* type) {
    using Y = decltype(type);
    if constexpr (sizeof(*type) <= 4) {
      for (int64_t r = 0; r < rows; ++r) {
        finish_row<kInteger>(p, terms, sums + r * stride, row_scales[r],
                             static_cast<Y>(p.y) + (first_row + r) * p.n + first, count);
      }
    }
  });
}

}  // namespace pyfast::PYFAST_ISA
