// The units of int8 products (see product.h), and how rows of weights and of x become rows of units.
//   ByteUnit   four int8 weights times four uint8 values of x (int8 plus 128), vpdpbusd: exact, and
//              128 times the sum of the weights too large
//   WordUnit   two of each, widened to int16, vpmaddwd: exact; (vpmaddubsw would saturate)
//   FloatUnit  weight-only: one weight converted to float
//   PairUnit   weight-only, bfloat16 x: two weights converted to bfloat16, which holds them exactly
// With AMX, ByteUnit's x is int8 and nothing is too large.
#pragma once

#include "../common/product.h"
#include "../quantize_int8/quantize_row.h"
#include "int8_linear.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kMaxFewRows = 8;      // rows of x that int8_dot.h is faster for
constexpr int kMaxBlockColumns = 64;    // columns of y that are finished at a time

typedef uint32_t __attribute__((may_alias, aligned(1))) UnalignedWord;

PYFAST_ALWAYS_INLINE int32_t word_at(const uint32_t* from) {
  return static_cast<int32_t>(*reinterpret_cast<const UnalignedWord*>(from));
}

#if defined(__AVX512VNNI__)
constexpr bool kHasBytes = true;
struct ByteUnit {
  static constexpr int kElements = 4;
  static constexpr bool kIsInteger = true;
  static PYFAST_ALWAYS_INLINE Lanes dot(const uint32_t* a, Lanes b, Lanes acc) {
    const __m512i sum =
        _mm512_dpbusd_epi32(_mm512_castps_si512(acc.v), _mm512_castps_si512(b.v),
                            _mm512_set1_epi32(word_at(a)));
    return {_mm512_castsi512_ps(sum)};
  }
};
#else
constexpr bool kHasBytes = false;
#endif

struct WordUnit {
  static constexpr int kElements = 2;
  static constexpr bool kIsInteger = true;
  static PYFAST_ALWAYS_INLINE Lanes dot(const uint32_t* a, Lanes b, Lanes acc) {
#if defined(__AVX512F__)
    const __m512i product =
        _mm512_madd_epi16(_mm512_castps_si512(b.v), _mm512_set1_epi32(word_at(a)));
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(acc.v), product))};
#elif defined(__AVX2__)
    const __m256i product =
        _mm256_madd_epi16(_mm256_castps_si256(b.v), _mm256_set1_epi32(word_at(a)));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(acc.v), product))};
#else
    const int32_t low = static_cast<int16_t>(word_at(a)), high = word_at(a) >> 16;
    int32_t lanes[kLanes], sums[kLanes];
    memcpy(lanes, b.v, sizeof(lanes));
    memcpy(sums, acc.v, sizeof(sums));
    for (int i = 0; i < kLanes; ++i) {
      sums[i] += low * static_cast<int16_t>(lanes[i]) + high * (lanes[i] >> 16);
    }
    memcpy(acc.v, sums, sizeof(sums));
    return acc;
#endif
  }
};

struct FloatWeightUnit : FloatUnit {
  static constexpr bool kIsInteger = false;
};
#if defined(__AVX512BF16__)
struct PairWeightUnit : PairUnit {
  static constexpr bool kIsInteger = false;
};
#endif

// Sums of two parts of a product.
template <typename Unit>
PYFAST_ALWAYS_INLINE Lanes added(Lanes a, Lanes b) {
  if constexpr (!Unit::kIsInteger) return a + b;
#if defined(__AVX512F__)
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
#elif defined(__AVX2__)
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
#else
  int32_t left[kLanes], right[kLanes];
  memcpy(left, a.v, sizeof(left));
  memcpy(right, b.v, sizeof(right));
  for (int i = 0; i < kLanes; ++i) left[i] += right[i];
  memcpy(a.v, left, sizeof(left));
  return a;
#endif
}

// Eight or sixteen int8 as floats; 0 beyond n.
PYFAST_ALWAYS_INLINE Lanes load_int8(const int8_t* from, int n) {
#if defined(__AVX512F__)
  const __m128i bytes = n == kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                    : _mm_maskz_loadu_epi8(Lanes::first(n), from);
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#elif defined(__AVX2__)
  int64_t bytes = 0;
  memcpy(&bytes, from, static_cast<size_t>(n));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)))};
#else
  return each_lane([&](int i) { return i < n ? static_cast<float>(from[i]) : 0.0f; });
#endif
}

template <typename F>
PYFAST_ALWAYS_INLINE void for_each_lanes(int64_t size, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) f(j, kLanes);
  if (j < size) f(j, static_cast<int>(size - j));
}

inline void clear_units(uint32_t* units, int64_t elements, int64_t element_bytes,
                        int64_t num_units) {
  const int64_t used = elements * element_bytes;
  memset(reinterpret_cast<char*>(units) + used, 0, static_cast<size_t>(num_units * 4 - used));
}

// A row of k weights as num_units units, zeros beyond.
template <typename Unit>
inline void convert_weights(const int8_t* row, int64_t k, uint32_t* units, int64_t num_units) {
  if constexpr (Unit::kElements == 4) {
    memcpy(units, row, static_cast<size_t>(k));
    clear_units(units, k, 1, num_units);
  } else if constexpr (Unit::kIsInteger) {
    auto* words = reinterpret_cast<int16_t*>(units);
    for (int64_t j = 0; j < k; ++j) words[j] = row[j];
    clear_units(units, k, 2, num_units);
  } else if constexpr (Unit::kElements == 2) {
    auto* pairs = reinterpret_cast<BFloat16*>(units);
    int64_t j = 0;
#if defined(__AVX512BF16__)
    for (; j + 32 <= k; j += 32) {
      const Lanes low = load_int8(row + j, 16), high = load_int8(row + j + 16, 16);
      _mm512_storeu_si512(pairs + j, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
#endif
    for_each_lanes(k - j, [&](int64_t i, int n) PYFAST_INLINE_LAMBDA {
      load_int8(row + j + i, n).store(pairs + j + i, n);
    });
    clear_units(units, k, 2, num_units);
  } else {
    auto* floats = reinterpret_cast<float*>(units);
    for_each_lanes(k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      if (n == kLanes) {
        load_int8(row + j, n).store(floats + j);
      } else {
        load_int8(row + j, n).store(floats + j, n);
      }
    });
    clear_units(units, k, 4, num_units);
  }
}

// A row of int8 as units: plus 128 where bytes are unsigned, widened where they are words.
template <typename Unit, bool kSigned>
inline void spread_values(const int8_t* values, int64_t k, uint32_t* units, int64_t num_units) {
  if constexpr (Unit::kElements == 4) {
    auto* bytes = reinterpret_cast<uint8_t*>(units);
    constexpr uint8_t kOffset = kSigned ? 0 : 128;
    for (int64_t j = 0; j < k; ++j) {
      bytes[j] = static_cast<uint8_t>(static_cast<uint8_t>(values[j]) ^ kOffset);
    }
    clear_units(units, k, 1, num_units);
  } else {
    convert_weights<Unit>(values, k, units, num_units);
  }
}

// Row `row` of x as units, zeros beyond; returns its scale. `values` holds k bytes.
template <typename Unit, bool kSigned, typename T>
inline float convert_row(const Int8LinearParams& p, const T* x, int64_t row, int8_t* values,
                         uint32_t* units, int64_t num_units) {
  if constexpr (Unit::kIsInteger) {
    const ValueRange range = value_range<true>(x, p.smooth, p.k);
    const float given = p.input_scale == nullptr ? 0.0f : *p.input_scale;
    const float scale = scale_of<true>(range, given);
    quantize_values(x, p.smooth, scale, p.input_scale != nullptr, kMaxInt8, 0, values, p.k);
    spread_values<Unit, kSigned>(values, p.k, units, num_units);
    return scale;
  } else if constexpr (Unit::kElements == 2) {
    auto* pairs = reinterpret_cast<BFloat16*>(units);
    for_each_lanes(p.k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      load_smoothed(x, p.smooth, j, n).store(pairs + j, n);
    });
    clear_units(units, p.k, 2, num_units);
  } else {
    auto* floats = reinterpret_cast<float*>(units);
    for_each_lanes(p.k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      load_smoothed(x, p.smooth, j, n).store(floats + j, n);
    });
    clear_units(units, p.k, 4, num_units);
  }
  (void)row;
  (void)values;
  return 1.0f;
}

}  // namespace pyfast::PYFAST_ISA
