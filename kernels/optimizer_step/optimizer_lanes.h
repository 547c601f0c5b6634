// Arithmetic of the update formulas that vec.h does not have, for scalars (host and CUDA) and for
// vectors. Division and square root are IEEE; maximum gives NaN where one operand is NaN.
#pragma once

#include "../common/vec.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
struct Lanes {  // of scalars
  using Compute = V;
  PYFAST_HD static V broadcast(V value) { return value; }
};
template <typename C>
struct Lanes<Vec<C>> {
  using Compute = C;
  static Vec<C> broadcast(C value) { return Vec<C>::broadcast(value); }
};

template <typename C>
PYFAST_HD C maximum_of_scalars(C a, C b) {
  return a > b || a != a ? a : b;
}
template <typename C>
PYFAST_HD C signed_by_scalar(C magnitude, C x) {
  return x > 0 ? magnitude : x < 0 ? -magnitude : C{0};
}

PYFAST_HD float maximum(float a, float b) { return maximum_of_scalars(a, b); }
PYFAST_HD double maximum(double a, double b) { return maximum_of_scalars(a, b); }
PYFAST_HD float magnitude(float x) { return fabsf(x); }
PYFAST_HD double magnitude(double x) { return fabs(x); }
// `magnitude` with the sign of x; 0 where x is 0 or NaN.
PYFAST_HD float signed_by(float magnitude, float x) { return signed_by_scalar(magnitude, x); }
PYFAST_HD double signed_by(double magnitude, double x) { return signed_by_scalar(magnitude, x); }

template <typename C>
inline Vec<C> operator/(Vec<C> a, Vec<C> b) {
  for (int i = 0; i < Vec<C>::kLanes; ++i) a.v[i] /= b.v[i];
  return a;
}
template <typename C>
inline Vec<C> square_root(Vec<C> x) {
  for (int i = 0; i < Vec<C>::kLanes; ++i) x.v[i] = square_root(x.v[i]);
  return x;
}
template <typename C>
inline Vec<C> maximum(Vec<C> a, Vec<C> b) {
  for (int i = 0; i < Vec<C>::kLanes; ++i) a.v[i] = maximum(a.v[i], b.v[i]);
  return a;
}
template <typename C>
inline Vec<C> magnitude(Vec<C> x) {
  for (int i = 0; i < Vec<C>::kLanes; ++i) x.v[i] = magnitude(x.v[i]);
  return x;
}
template <typename C>
inline Vec<C> signed_by(Vec<C> magnitude, Vec<C> x) {
  for (int i = 0; i < Vec<C>::kLanes; ++i) x.v[i] = signed_by(magnitude.v[i], x.v[i]);
  return x;
}

#if defined(__AVX512F__)
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec<float> square_root(Vec<float> x) { return {_mm512_sqrt_ps(x.v)}; }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), is_nan, a.v)};
}
inline Vec<float> magnitude(Vec<float> x) { return {_mm512_abs_ps(x.v)}; }
inline Vec<float> signed_by(Vec<float> magnitude, Vec<float> x) {
  const __mmask16 is_set = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __m512 sign = _mm512_and_ps(x.v, _mm512_set1_ps(-0.0f));
  return {_mm512_maskz_or_ps(is_set, magnitude.v, sign)};
}
#elif defined(__AVX2__)
inline Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec<float> square_root(Vec<float> x) { return {_mm256_sqrt_ps(x.v)}; }
inline Vec<float> maximum(Vec<float> a, Vec<float> b) {
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, is_nan)};
}
inline Vec<float> magnitude(Vec<float> x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline Vec<float> signed_by(Vec<float> magnitude, Vec<float> x) {
  const __m256 is_set = _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  const __m256 sign = _mm256_and_ps(x.v, _mm256_set1_ps(-0.0f));
  return {_mm256_and_ps(is_set, _mm256_or_ps(magnitude.v, sign))};
}
#endif

}  // namespace pyfast::PYFAST_ISA
