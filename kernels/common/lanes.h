// Lane arithmetic beyond vec.h, for ops that promise no bit equality between levels: fused
// multiply-add, maximum, powers of two, tanh.
#pragma once

#include "vec.h"

namespace pyfast::PYFAST_ISA {

using Lanes = Vec<float>;
constexpr int kLanes = Lanes::kLanes;

#define PYFAST_ALWAYS_INLINE inline __attribute__((always_inline))
// Long functions of lanes: without SIMD they are eight times as long, and inlined everywhere took
// half of the time to compile.
#if defined(__AVX2__)
#define PYFAST_LANE_FUNCTION PYFAST_ALWAYS_INLINE
#else
#define PYFAST_LANE_FUNCTION inline __attribute__((noinline))
#endif

// 2^x on [-0.5, 0.5], to which exp2 is reduced: the polynomial of degree 5 with the smallest
// largest relative error, 7.5e-8. (Degree 4, 2.6e-6, saves no time that can be measured, and shows
// in lse.)
PYFAST_ALWAYS_INLINE float exp2_coefficient(int i) {
  constexpr float kCoefficients[] = {1.00000007f,   0.693146967f,   0.240221197f,
                                     0.0555071327f, 0.00967554133f, 0.0013276472f};
  return kCoefficients[i];
}
constexpr int kExp2Degree = 5;

#if defined(__AVX512F__)

PYFAST_ALWAYS_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// b where either is NaN.
PYFAST_ALWAYS_INLINE Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE Lanes quotient(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE uint32_t nonzero(Lanes a) {
  return _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
PYFAST_ALWAYS_INLINE uint32_t equal(Lanes a, Lanes b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ);
}
PYFAST_ALWAYS_INLINE Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }
// Bits of the lanes that are below b.
PYFAST_ALWAYS_INLINE uint32_t less(Lanes a, Lanes b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}

PYFAST_ALWAYS_INLINE Lanes power_of_two(Lanes x) {
  const __m512 fraction = _mm512_reduce_ps(x.v, 0);  // 0 for -Inf
  __m512 y = _mm512_set1_ps(exp2_coefficient(kExp2Degree));
#pragma GCC unroll 5
  for (int i = kExp2Degree - 1; i >= 0; --i) {
    y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(exp2_coefficient(i)));
  }
  return {_mm512_scalef_ps(y, _mm512_sub_ps(x.v, fraction))};
}

#elif defined(__AVX2__)

PYFAST_ALWAYS_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
PYFAST_ALWAYS_INLINE Lanes maximum(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE Lanes quotient(Lanes a, Lanes b) { return {_mm256_div_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE uint32_t nonzero(Lanes a) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
}
PYFAST_ALWAYS_INLINE uint32_t equal(Lanes a, Lanes b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
PYFAST_ALWAYS_INLINE Lanes magnitude(Lanes a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}
PYFAST_ALWAYS_INLINE uint32_t less(Lanes a, Lanes b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}

PYFAST_ALWAYS_INLINE Lanes power_of_two(Lanes x) {
  const __m256 smallest = _mm256_set1_ps(-126.0f);  // below, the result is 0
  const __m256 clamped =
      _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(smallest, x.v));  // NaN stays
  const __m256 whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 fraction = _mm256_sub_ps(clamped, whole);
  __m256 y = _mm256_set1_ps(exp2_coefficient(kExp2Degree));
  for (int i = kExp2Degree - 1; i >= 0; --i) {
    y = _mm256_fmadd_ps(y, fraction, _mm256_set1_ps(exp2_coefficient(i)));
  }
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  const __m256 vanishes = _mm256_cmp_ps(x.v, smallest, _CMP_LT_OQ);
  return {_mm256_andnot_ps(vanishes, _mm256_mul_ps(y, _mm256_castsi256_ps(exponent)))};
}

#else

template <typename F>
PYFAST_ALWAYS_INLINE Lanes each_lane(const F& f) {
  Lanes out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}
template <typename F>
PYFAST_ALWAYS_INLINE uint32_t lane_bits(const F& f) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(f(i)) << i;
  return bits;
}
PYFAST_ALWAYS_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) { return a * b + c; }
PYFAST_ALWAYS_INLINE Lanes maximum(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
PYFAST_ALWAYS_INLINE Lanes quotient(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
PYFAST_ALWAYS_INLINE uint32_t nonzero(Lanes a) {
  return lane_bits([&](int i) { return !(a.v[i] == 0.0f); });
}
PYFAST_ALWAYS_INLINE uint32_t equal(Lanes a, Lanes b) {
  return lane_bits([&](int i) { return a.v[i] == b.v[i]; });
}
PYFAST_ALWAYS_INLINE Lanes magnitude(Lanes a) {
  return each_lane([&](int i) { return fabsf(a.v[i]); });
}
PYFAST_ALWAYS_INLINE uint32_t less(Lanes a, Lanes b) {
  return lane_bits([&](int i) { return a.v[i] < b.v[i]; });
}

PYFAST_LANE_FUNCTION Lanes power_of_two(Lanes x) {
  Lanes out;
  for (int i = 0; i < kLanes; ++i) {
    const float value = x.v[i];
    const float low = value > -126.0f ? value : -126.0f;
    const float clamped = low < 127.0f ? low : 127.0f;
    const float shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const float fraction = clamped - (shifted - 12582912.0f);
    float y = exp2_coefficient(kExp2Degree);
    for (int d = kExp2Degree - 1; d >= 0; --d) y = y * fraction + exp2_coefficient(d);
    const uint32_t exponent = (float_to_bits(shifted) - 0x4B400000u + 127u) << 23;
    const float power = y * bits_to_float(exponent);
    out.v[i] = value != value ? value : value < -126.0f ? 0.0f : power;
  }
  return out;
}

#endif

// tanh: an odd polynomial near zero, where 1 - 2 / (1 + e^2x) would cancel.
PYFAST_LANE_FUNCTION Lanes hyperbolic_tangent(Lanes x) {
  const Lanes one = Lanes::broadcast(1.0f);
  const Lanes e = power_of_two(x * Lanes::broadcast(2.885390082f));
  const Lanes far = one - quotient(Lanes::broadcast(2.0f), one + e);
  const Lanes x2 = x * x;
  Lanes y = Lanes::broadcast(-0.0088632355f);  // Taylor: -1382/155925
  y = fused(y, x2, Lanes::broadcast(0.021869489f));
  y = fused(y, x2, Lanes::broadcast(-0.053968254f));
  y = fused(y, x2, Lanes::broadcast(0.13333334f));
  y = fused(y, x2, Lanes::broadcast(-0.33333334f));
  const Lanes near = fused(x * x2, y, x);
  return select(less(magnitude(x), Lanes::broadcast(0.3f)), near, far);
}

}  // namespace pyfast::PYFAST_ISA
