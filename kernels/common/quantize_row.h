// Rows to int8 values, by the rule of quantize_int8_reference.py. A division takes 16 cycles a
// vector, all that memory allows for the whole work; here quotients come from the reciprocal and
// two corrections by fused multiply-add, which gives the correctly rounded quotient (Markstein
// 1990: an estimate within an ulp, corrected with the exact remainder and the correctly rounded
// reciprocal). For values of half precision one is enough: tried for all significands of 8 and 11
// bits by all of 24. Where scales are so small or large that a step may underflow or overflow, and
// without FMA, it is a division.
#pragma once

#include "lanes.h"
#include "row_blocks.h"

namespace pyfast::PYFAST_ISA {

// n values of x in float32; 0 beyond.
template <typename T>
PYFAST_ALWAYS_INLINE Lanes load_float32(const T* x, int n) {
  return n == kLanes ? Lanes::load(x) : Lanes::load(x, n);
}
PYFAST_ALWAYS_INLINE Lanes load_float32(const double* x, int n) {
  float values[kLanes] = {};
  for (int i = 0; i < n; ++i) values[i] = static_cast<float>(x[i]);
  return Lanes::load(values);
}

template <typename T>
PYFAST_ALWAYS_INLINE Lanes load_smoothed(const T* x, const float* smooth, int64_t j, int n) {
  const Lanes value = load_float32(x + j, n);
  return smooth == nullptr ? value : value * load_float32(smooth + j, n);
}

constexpr uint32_t kInfinityBits = 0x7F800000u;

#if defined(__AVX512F__)

struct MaxBits {
  __m512i v = _mm512_setzero_si512();
  PYFAST_ALWAYS_INLINE void add(Lanes x) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    v = _mm512_max_epu32(v, _mm512_and_si512(_mm512_castps_si512(x.v), mask));
  }
  PYFAST_ALWAYS_INLINE void add(MaxBits other) { v = _mm512_max_epu32(v, other.v); }
  uint32_t largest() const { return _mm512_reduce_max_epu32(v); }
};
PYFAST_ALWAYS_INLINE Lanes minimum(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE float largest_of(Lanes a) { return _mm512_reduce_max_ps(a.v); }
PYFAST_ALWAYS_INLINE float smallest_of(Lanes a) { return _mm512_reduce_min_ps(a.v); }

// a / b, correctly rounded; inverse is 1 / b, and a of half precision where there is one
// correction.
template <int kCorrections = 2>
PYFAST_ALWAYS_INLINE Lanes corrected_quotient(Lanes a, Lanes b, Lanes inverse) {
  __m512 q = _mm512_mul_ps(a.v, inverse.v);
#pragma GCC unroll 2
  for (int i = 0; i < kCorrections; ++i) {
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, b.v, a.v), inverse.v, q);
  }
  return {q};
}
// 64 values of symmetric quantization by their own scale: they are within -127..127. Packing
// works on lanes of 16 bytes, whose order is mended at the end.
PYFAST_ALWAYS_INLINE void store_int8(const Lanes (&q)[4], int8_t* to, bool stream) {
  const __m512i low = _mm512_packs_epi32(_mm512_cvtps_epi32(q[0].v), _mm512_cvtps_epi32(q[1].v));
  const __m512i high = _mm512_packs_epi32(_mm512_cvtps_epi32(q[2].v), _mm512_cvtps_epi32(q[3].v));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bytes);
  _mm512_storeu_si512(to, bytes);
}
// round(clamp(q)) + offset, halves to even, saturated to -128..127; n values are stored.
PYFAST_ALWAYS_INLINE void store_int8(Lanes q, float limit, int32_t offset, int8_t* to, int n) {
  const __m512 bound = _mm512_set1_ps(limit);
  const __m512 low = _mm512_sub_ps(_mm512_setzero_ps(), bound);
  const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps(low, _mm512_min_ps(bound, q.v)));
  const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(offset)));
  if (n == kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  _mm_mask_storeu_epi8(to, Lanes::first(n), bytes);
}

#elif defined(__AVX2__)

struct MaxBits {
  __m256i v = _mm256_setzero_si256();
  PYFAST_ALWAYS_INLINE void add(Lanes x) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    v = _mm256_max_epu32(v, _mm256_and_si256(_mm256_castps_si256(x.v), mask));
  }
  PYFAST_ALWAYS_INLINE void add(MaxBits other) { v = _mm256_max_epu32(v, other.v); }
  uint32_t largest() const {
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    uint32_t most = 0;
    for (const uint32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
};
PYFAST_ALWAYS_INLINE Lanes minimum(Lanes a, Lanes b) { return {_mm256_min_ps(a.v, b.v)}; }
PYFAST_ALWAYS_INLINE Lanes corrected_quotient(Lanes a, Lanes b, Lanes inverse) {
  __m256 q = _mm256_mul_ps(a.v, inverse.v);
  q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, b.v, a.v), inverse.v, q);
  q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, b.v, a.v), inverse.v, q);
  return {q};
}
PYFAST_ALWAYS_INLINE void store_int8(Lanes q, float limit, int32_t offset, int8_t* to, int n) {
  const __m256 bound = _mm256_set1_ps(limit);
  const __m256 low = _mm256_sub_ps(_mm256_setzero_ps(), bound);
  __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(low, _mm256_min_ps(bound, q.v)));
  whole = _mm256_add_epi32(whole, _mm256_set1_epi32(offset));
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
  memcpy(to, &bytes, static_cast<size_t>(n));
}

#else

struct MaxBits {
  uint32_t v[kLanes] = {};
  void add(Lanes x) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bits = float_to_bits(x.v[i]) & 0x7FFFFFFFu;
      v[i] = bits > v[i] ? bits : v[i];
    }
  }
  void add(MaxBits other) {
    for (int i = 0; i < kLanes; ++i) v[i] = other.v[i] > v[i] ? other.v[i] : v[i];
  }
  uint32_t largest() const {
    uint32_t most = 0;
    for (const uint32_t lane : v) most = lane > most ? lane : most;
    return most;
  }
};
PYFAST_ALWAYS_INLINE Lanes minimum(Lanes a, Lanes b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
PYFAST_ALWAYS_INLINE Lanes corrected_quotient(Lanes a, Lanes b, Lanes /*inverse*/) {
  return quotient(a, b);
}
PYFAST_ALWAYS_INLINE void store_int8(Lanes q, float limit, int32_t offset, int8_t* to, int n) {
  for (int i = 0; i < n; ++i) {
    const float low = q.v[i] > -limit ? q.v[i] : -limit;
    const float clamped = low < limit ? low : limit;
    const int32_t whole = static_cast<int32_t>(rintf(clamped)) + offset;
    to[i] = static_cast<int8_t>(whole < -128 ? -128 : whole > 127 ? 127 : whole);
  }
}

#endif

#if !defined(__AVX512F__)
PYFAST_ALWAYS_INLINE float largest_of(Lanes a) {
  float lanes[kLanes];
  a.store(lanes);
  float most = lanes[0];
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most;
}
PYFAST_ALWAYS_INLINE float smallest_of(Lanes a) { return -largest_of(Lanes::broadcast(0.0f) - a); }
#endif

// What a stretch of values says about its scale.
struct ValueRange {
  uint32_t largest_bits = 0;      // of the magnitudes: from kInfinityBits on there is NaN or Inf
  float low = 0.0f, high = 0.0f;  // at most, at least 0; for finite values alone

  void add(const ValueRange& other) {
    largest_bits = other.largest_bits > largest_bits ? other.largest_bits : largest_bits;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

#if defined(__AVX512F__)
// The largest magnitude of bfloat16 values, 32 at a time, as bits of a float.
inline uint32_t largest_bits_of(const BFloat16* x, int64_t size) {
  const __m512i mask = _mm512_set1_epi16(0x7FFF);
  __m512i most[4] = {};
  int64_t j = 0;
  for (; j + 128 <= size; j += 128) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512i bits = _mm512_loadu_si512(x + j + part * 32);
      most[part] = _mm512_max_epu16(most[part], _mm512_and_si512(bits, mask));
    }
  }
  for (; j < size; j += 32) {
    const uint32_t used = size - j < 32 ? (uint32_t{1} << (size - j)) - 1 : ~uint32_t{0};
    const __m512i bits = _mm512_maskz_loadu_epi16(used, x + j);
    most[0] = _mm512_max_epu16(most[0], _mm512_and_si512(bits, mask));
  }
  most[0] =
      _mm512_max_epu16(_mm512_max_epu16(most[0], most[1]), _mm512_max_epu16(most[2], most[3]));
  const __m512i even = _mm512_slli_epi32(most[0], 16);
  const __m512i odd = _mm512_and_si512(most[0], _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
}
template <typename T>
constexpr bool kHasLargestBits = false;
template <>
constexpr bool kHasLargestBits<BFloat16> = true;
#else
template <typename T>
constexpr bool kHasLargestBits = false;
#endif

template <bool kSymmetric, typename T>
inline ValueRange value_range(const T* x, const float* smooth, int64_t size) {
  if constexpr (kSymmetric && kHasLargestBits<T>) {
    if (smooth == nullptr) {
      ValueRange range;
      range.largest_bits = largest_bits_of(x, size);
      return range;
    }
  }
  MaxBits most[4];
  Lanes low = Lanes::broadcast(0.0f), high = low;
  int64_t j = 0;
  const auto add = [&](int part, int64_t at, int n) PYFAST_INLINE_LAMBDA {
    const Lanes value = load_smoothed(x, smooth, at, n);
    most[part].add(value);
    if constexpr (!kSymmetric) low = minimum(value, low), high = maximum(value, high);
  };
  for (; j + 4 * kLanes <= size; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) add(part, j + part * kLanes, kLanes);
  }
  for (; j < size; j += kLanes) {
    add(0, j, static_cast<int>(size - j < kLanes ? size - j : kLanes));
  }
  for (int part = 1; part < 4; ++part) most[0].add(most[part]);
  ValueRange range;
  range.largest_bits = most[0].largest();
  if constexpr (!kSymmetric) range.low = smallest_of(low), range.high = largest_of(high);
  return range;
}

// The scale of values in a range, or `given` where that is not 0; NaN where there is NaN or Inf.
template <bool kSymmetric>
inline float scale_of(const ValueRange& range, float given) {
  if (range.largest_bits >= kInfinityBits) return bits_to_float(0x7FC00000u);
  const float scale = given != 0.0f ? given
                      : kSymmetric  ? bits_to_float(range.largest_bits) / 127.0f
                                    : (range.high * 0.5f - range.low * 0.5f) / 127.5f;
  return scale == 0.0f ? 1.0f : scale;
}

// The value that stands for 0.
inline int32_t zero_point_of(const ValueRange& range, float scale) {
  if (scale != scale) return 0;
  const float zero = -128.0f - rintf(range.low / scale);
  return static_cast<int32_t>(zero < -128.0f ? -128.0f : zero > 127.0f ? 127.0f : zero);
}

// values = round(x * smooth / scale), past the cache with `stream` (of 64-byte multiples), at most
// kMaxInt8 either way, or plus an offset with saturation; with a scale of NaN they are 0. Where the
// scale is not that of the values, quotients may be large: values are first cut to 128 of it.
constexpr float kMaxInt8 = 127.0f, kNoLimit = 1024.0f;

template <int kCount>
struct Corrections {
  static constexpr int value = kCount;
};

template <typename T>
inline void quantize_values(const T* x, const float* smooth, float scale, bool is_given,
                            float limit, int32_t offset, int8_t* values, int64_t size,
                            [[maybe_unused]] bool stream = false) {
  if (scale != scale) {
    memset(values, 0, static_cast<size_t>(size));
    return;
  }
  const Lanes divisor = Lanes::broadcast(scale), inverse = Lanes::broadcast(1.0f / scale);
  const Lanes most = Lanes::broadcast(128.0f * scale), least = Lanes::broadcast(-128.0f * scale);
  const bool is_extreme = scale < 0x1p-60f || scale > 0x1p60f;
  const auto write = [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
    Lanes value = load_smoothed(x, smooth, j, n);
    if (is_given) value = maximum(least, minimum(most, value));
    const Lanes q =
        is_extreme ? quotient(value, divisor) : corrected_quotient(value, divisor, inverse);
    store_int8(q, limit, offset, values + j, n);
  };
  int64_t j = 0;
#if defined(__AVX512F__)
  if (!is_given && !is_extreme && limit == kMaxInt8) {
    const auto write_all = [&](auto corrections) PYFAST_INLINE_LAMBDA {
      for (; j + 4 * kLanes <= size; j += 4 * kLanes) {
        Lanes q[4];
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          const int64_t at = j + part * kLanes;
          if (part * kLanes * sizeof(T) % 64 == 0) {
            __builtin_prefetch(x + at + size, 0, 2);  // the next row: memory would rest otherwise
          }
          q[part] = corrected_quotient<corrections.value>(load_smoothed(x, smooth, at, kLanes),
                                                          divisor, inverse);
        }
        store_int8(q, values + j, stream);
      }
    };
    if (sizeof(T) == 2 && smooth == nullptr) {
      write_all(Corrections<1>{});
    } else {
      write_all(Corrections<2>{});
    }
  }
#endif
  for (; j + kLanes <= size; j += kLanes) write(j, kLanes);
  if (j < size) write(j, static_cast<int>(size - j));
}

}  // namespace pyfast::PYFAST_ISA
