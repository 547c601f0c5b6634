// Few rows of x with int8 weights: what a step along them is (../common/row_dots.h).
#pragma once

#include "../common/row_dots.h"
#include "int8_units.h"

namespace pyfast::PYFAST_ISA {

#if defined(__AVX512VNNI__)
// u8 times s8 along 64 elements; x is int8 plus 128.
struct ByteDot {
  using Unit = ByteUnit;
  using Weight = int8_t;
  static constexpr bool kHasExcess = true;
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
  using Weight = int8_t;
  static constexpr bool kHasExcess = false;
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
  using Weight = int8_t;
  static constexpr bool kHasExcess = false;
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
  using Weight = int8_t;
  static constexpr bool kHasExcess = false;
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

}  // namespace pyfast::PYFAST_ISA
