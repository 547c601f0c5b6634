// The lane type of the CPU kernels: Vec<float> is one register at the levels that have one,
// Vec<double> and the generic level are eight lanes of plain C++. Loads and stores convert from and
// to the storage types of dtype.h; partial ones touch only the first n elements. There is no fma
// here: multiply and add round separately, so that every level and CUDA agree to the bit.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyfast::PYFAST_ISA {

template <typename C>
struct Vec {
  static constexpr int kLanes = 8;
  C v[kLanes];

  static Vec broadcast(C value) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = value;
    return out;
  }
  template <typename T>
  static Vec load(const T* from) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = to_float(from[i]);
    return out;
  }
  template <typename T>
  static Vec load(const T* from, int n) {
    Vec out = broadcast(0);
    for (int i = 0; i < n; ++i) out.v[i] = to_float(from[i]);
    return out;
  }
  template <typename T>
  void store(T* to) const {
    for (int i = 0; i < kLanes; ++i) from_float(v[i], to + i);
  }
  template <typename T>
  void store(T* to, int n) const {
    for (int i = 0; i < n; ++i) from_float(v[i], to + i);
  }
  template <typename T>
  void stream(T* to) const {
    store(to);
  }
  // The value that is left of this one in an array of T.
  template <typename T>
  Vec rounded(const T* /*type*/) const {
    T stored[kLanes];
    store(stored);
    return load(stored);
  }
  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] *= b.v[i];
    return a;
  }
  // Lane i of `a` where bit i is set, else of `b`.
  friend Vec select(uint64_t bits, Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = (bits >> i) & 1 ? a.v[i] : b.v[i];
    return a;
  }
  // Lanes are halved by adding lane i + n / 2 to lane i, until one is left.
  C sum() const {
    C t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = v[i];
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) t[i] += t[i + half];
    }
    return t[0];
  }
};

#if defined(__AVX512F__)

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  __m512 v;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  __m256i to_bfloat16() const {
#if defined(__AVX512BF16__)  // exact but for subnormal values, which it flushes
    if (_mm512_fpclass_ps_mask(v, 0x20) == 0) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
  }
  __m256i to_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  static Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const BFloat16* from) {
    return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec load(const Float16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec load(const float* from, int n) { return {_mm512_maskz_loadu_ps(first(n), from)}; }
  static Vec load(const BFloat16* from, int n) {
    return {widen(_mm256_maskz_loadu_epi16(first(n), from))};
  }
  static Vec load(const Float16* from, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), from))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16());
  }
  void store(Float16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_float16());
  }
  void store(float* to, int n) const { _mm512_mask_storeu_ps(to, first(n), v); }
  void store(BFloat16* to, int n) const { _mm256_mask_storeu_epi16(to, first(n), to_bfloat16()); }
  void store(Float16* to, int n) const { _mm256_mask_storeu_epi16(to, first(n), to_float16()); }
  // Non-temporal: `to` is aligned to the size of what is stored.
  void stream(float* to) const { _mm512_stream_ps(to, v); }
  void stream(BFloat16* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bfloat16());
  }
  void stream(Float16* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_float16());
  }
  Vec rounded(const float* /*type*/) const { return *this; }
  Vec rounded(const BFloat16* /*type*/) const { return {widen(to_bfloat16())}; }
  Vec rounded(const Float16* /*type*/) const { return {_mm512_cvtph_ps(to_float16())}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec select(uint64_t bits, Vec a, Vec b) {
    return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
  }
  float sum() const {
    __m256 t8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 t4 = _mm_add_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
    __m128 t2 = _mm_add_ps(t4, _mm_movehl_ps(t4, t4));
    return _mm_cvtss_f32(_mm_add_ss(t2, _mm_movehdup_ps(t2)));
  }
};

#elif defined(__AVX2__)

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  __m256 v;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 widen(__m128i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
  }
  static __m128i load_words(const void* from, int n) {
    alignas(16) uint16_t words[8] = {};
    memcpy(words, from, static_cast<size_t>(n) * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(words));
  }
  static void store_words(void* to, __m128i value, int n) {
    alignas(16) uint16_t words[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(words), value);
    memcpy(to, words, static_cast<size_t>(n) * 2);
  }
  __m128i to_bfloat16() const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  __m128i to_float16() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  static Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const BFloat16* from) {
    return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec load(const Float16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec load(const float* from, int n) { return {_mm256_maskload_ps(from, first(n))}; }
  static Vec load(const BFloat16* from, int n) { return {widen(load_words(from, n))}; }
  static Vec load(const Float16* from, int n) { return {_mm256_cvtph_ps(load_words(from, n))}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(BFloat16* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_bfloat16());
  }
  void store(Float16* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_float16()); }
  void store(float* to, int n) const { _mm256_maskstore_ps(to, first(n), v); }
  void store(BFloat16* to, int n) const { store_words(to, to_bfloat16(), n); }
  void store(Float16* to, int n) const { store_words(to, to_float16(), n); }
  // Non-temporal: `to` is aligned to the size of what is stored.
  void stream(float* to) const { _mm256_stream_ps(to, v); }
  void stream(BFloat16* to) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_bfloat16());
  }
  void stream(Float16* to) const { _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_float16()); }
  Vec rounded(const float* /*type*/) const { return *this; }
  Vec rounded(const BFloat16* /*type*/) const { return {widen(to_bfloat16())}; }
  Vec rounded(const Float16* /*type*/) const { return {_mm256_cvtph_ps(to_float16())}; }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec select(uint64_t bits, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))};
  }
  float sum() const {
    __m128 t4 = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 t2 = _mm_add_ps(t4, _mm_movehl_ps(t4, t4));
    return _mm_cvtss_f32(_mm_add_ss(t2, _mm_movehdup_ps(t2)));
  }
};

#endif

// Makes non-temporal stores of this thread visible to the others.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace pyfast::PYFAST_ISA
