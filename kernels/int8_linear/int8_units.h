// The units of int8 products (see product.h), and how rows of weights and of x become rows of
// units.
//   ByteUnit   four int8 weights times four uint8 values of x (int8 plus 128), vpdpbusd: exact, and
//              128 times the sum of the weights too large
//   WordUnit   two of each, widened to int16, vpmaddwd: exact; (vpmaddubsw would saturate)
//   FloatUnit  weight-only: one weight converted to float
//   PairUnit   weight-only: two weights converted to bfloat16, which holds them exactly; its
//              instructions take subnormal values for 0
//   DigitUnit  weight-only with AMX: ByteUnit, and x as whole numbers of three or four digits of a
//              byte, each digit a row of its own (int8_digits.h)
// In tiles of AMX, ByteUnit's x is int8 and nothing is too large.
#pragma once

#include "../common/product.h"
#include "../common/quantize_row.h"
#include "int8_digits.h"
#include "int8_linear.h"

namespace pyfast::PYFAST_ISA {

// Up to so many rows of x int8_dot.h is faster; up to so many of bfloat16, digits.
#if defined(__AMX_INT8__)
constexpr int64_t kFewRows = 4, kFewRowsOfFloats = 0, kFewRowsOfDigits = 16;
#else
constexpr int64_t kFewRows = 8, kFewRowsOfFloats = 8;
#endif
constexpr int kMaxBlockColumns = 128;  // columns of y that are finished at a time

typedef uint32_t __attribute__((may_alias, aligned(1))) UnalignedWord;

PYFAST_ALWAYS_INLINE int32_t word_at(const uint32_t* from) {
  return static_cast<int32_t>(*reinterpret_cast<const UnalignedWord*>(from));
}

#if defined(__AVX512VNNI__)
constexpr bool kHasBytes = true;
struct ByteUnit {
  static constexpr int kElements = 4, kDigits = 1;
  static constexpr bool kIsInteger = true;
  static PYFAST_ALWAYS_INLINE Lanes dot(const uint32_t* a, Lanes b, Lanes acc) {
    const __m512i sum = _mm512_dpbusd_epi32(_mm512_castps_si512(acc.v), _mm512_castps_si512(b.v),
                                            _mm512_set1_epi32(word_at(a)));
    return {_mm512_castsi512_ps(sum)};
  }
};
#else
constexpr bool kHasBytes = false;
#endif

struct WordUnit {
  static constexpr int kElements = 2, kDigits = 1;
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
  static constexpr int kDigits = 1;
  static constexpr bool kIsInteger = false;
};
#if defined(__AVX512BF16__)
struct PairWeightUnit : PairUnit {
  static constexpr int kDigits = 1;
};
#endif
#if defined(__AMX_INT8__)
template <int kNumDigits>
struct DigitUnit : ByteUnit {
  static constexpr int kDigits = kNumDigits;
};
#endif

// Sums of two parts of a product.
template <typename Unit>
PYFAST_ALWAYS_INLINE Lanes added(Lanes a, Lanes b) {
  if constexpr (!Unit::kIsInteger) return a + b;
#if defined(__AVX512F__)
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
#elif defined(__AVX2__)
  return {
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
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

#if defined(__AVX512VBMI__)
// 64 weights as bfloat16, in the order in which bytes are unpacked: eights 0, 2, 4, 6 in the first
// vector, 1, 3, 5, 7 in the second. Two tables of 128 bytes hold both halves of the bfloat16 of a
// magnitude; -128 has none there.
struct WeightPairs {
  __m512i first, second;
};
PYFAST_ALWAYS_INLINE WeightPairs weight_pairs(__m512i weights) {
  struct Tables {
    alignas(64) uint8_t low[128] = {}, high[128] = {};
    constexpr Tables() {
      for (int value = 1; value < 128; ++value) {
        int exponent = 0;
        while (value >> (exponent + 1) != 0) ++exponent;
        const int mantissa = (value << (7 - exponent)) & 0x7F;
        const int bits = (127 + exponent) << 7 | mantissa;
        low[value] = static_cast<uint8_t>(bits & 0xFF);
        high[value] = static_cast<uint8_t>(bits >> 8);
      }
    }
  };
  static constexpr Tables kTables;
  const __m512i magnitude = _mm512_abs_epi8(weights);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kTables.low), magnitude,
                                               _mm512_load_si512(kTables.low + 64));
  __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kTables.high), magnitude,
                                          _mm512_load_si512(kTables.high + 64));
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  high = _mm512_ternarylogic_epi32(high, weights, sign, 0xF8);  // high | (weights & sign)
  const __mmask64 is_least = _mm512_cmpeq_epi8_mask(weights, sign);
  high = _mm512_mask_blend_epi8(is_least, high, _mm512_set1_epi8(static_cast<char>(0xC3)));
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// 64 values of x, as bfloat16, in the order of weight_pairs.
inline void order_pairs(uint32_t* units, int64_t num_units) {
  for (int64_t u = 0; u < num_units; u += 32) {
    const __m512i a = _mm512_loadu_si512(units + u), b = _mm512_loadu_si512(units + u + 16);
    _mm512_storeu_si512(units + u, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(units + u + 16, _mm512_shuffle_i32x4(a, b, 0xDD));
  }
}
#else
inline void order_pairs(uint32_t*, int64_t) {}
#endif

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
#if defined(__AVX512VBMI__)
    for (int64_t j = 0; j < num_units * 2; j += 64) {
      const int64_t left = k - j;
      const uint64_t used = left >= 64 ? ~uint64_t{0} : left > 0 ? (uint64_t{1} << left) - 1 : 0;
      const WeightPairs both = weight_pairs(_mm512_maskz_loadu_epi8(used, row + j));
      _mm512_storeu_si512(pairs + j, both.first);
      _mm512_storeu_si512(pairs + j + 32, both.second);
    }
#else
    (void)pairs;
    static_assert(Unit::kIsInteger, "this level has no pairs of bfloat16");
#endif
  } else {
    auto* floats = reinterpret_cast<float*>(units);
    for_each_vec<Lanes>(0, k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      store_lanes(load_int8(row + j, n), floats + j, n, false);
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

// A row of x as num_units units (of each digit), zeros beyond; returns its scale, or the exponent
// of its digits. `values` holds k bytes.
template <typename Unit, bool kSigned, typename T>
inline float convert_row(const Int8LinearParams& p, const T* x, int8_t* values, uint32_t* units,
                         int64_t num_units) {
#if defined(__AMX_INT8__)
  if constexpr (Unit::kDigits > 1) {
    return digits_of_row<Unit::kDigits>(x, p.smooth, p.k, units, num_units);
  }
#endif
  if constexpr (Unit::kIsInteger) {
    const ValueRange range = value_range<true>(x, p.smooth, p.k);
    const float given = p.input_scale == nullptr ? 0.0f : *p.input_scale;
    const float scale = scale_of<true>(range, given);
    quantize_values(x, p.smooth, scale, p.input_scale != nullptr, kMaxInt8, 0, values, p.k);
    spread_values<Unit, kSigned>(values, p.k, units, num_units);
    return scale;
  } else if constexpr (Unit::kElements == 2) {
    auto* pairs = reinterpret_cast<BFloat16*>(units);
    for_each_vec<Lanes>(0, p.k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      load_smoothed(x, p.smooth, j, n).store(pairs + j, n);
    });
    clear_units(units, p.k, 2, num_units);
    order_pairs(units, num_units);
  } else {
    auto* floats = reinterpret_cast<float*>(units);
    for_each_vec<Lanes>(0, p.k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
      load_smoothed(x, p.smooth, j, n).store(floats + j, n);
    });
    clear_units(units, p.k, 4, num_units);
  }
  (void)values;
  return 1.0f;
}

}  // namespace pyfast::PYFAST_ISA
