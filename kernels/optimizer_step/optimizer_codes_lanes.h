// int8 codes a vector at a time: the arithmetic of optimizer_math.h with the fewest instructions.
// The lowest bits of a shifted float are the code itself, because the bases have zeros there.
#pragma once

#include "../common/row_blocks.h"
#include "optimizer_math.h"

namespace pyfast::PYFAST_ISA {

#if defined(__AVX512F__)

inline Vec<float> decode_lanes(const uint8_t* codes, bool is_signed, Vec<float> scale) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  if (!is_signed) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 20);
    const __m512i bits = _mm512_add_epi32(shifted, _mm512_set1_epi32(kPositiveCodeBase));
    return {_mm512_mul_ps(_mm512_castsi512_ps(bits), scale.v)};
  }
  const __m512i wide = _mm512_cvtepi8_epi32(bytes);
  const __m512i low = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7F)), 20);
  const __m512i bits = _mm512_add_epi32(low, _mm512_set1_epi32(kSignedCodeBase));
  const __m512 offset = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p-15f));
  // offset | (wide & sign)
  const __m512i value = _mm512_ternarylogic_epi32(
      _mm512_castps_si512(offset), wide, _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xF8);
  return {_mm512_mul_ps(_mm512_castsi512_ps(value), scale.v)};
}

// The codes of four vectors are packed together: each is in bits 20 to 27 of its lanes.
constexpr int kEncodedVectors = 4;

inline __m512i coded_bits(__m512 x, bool is_signed, __m512 inverse, __m512i dither) {
  const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(x, inverse));
  if (!is_signed) {
    const __m512i clamped = _mm512_max_epi32(bits, _mm512_set1_epi32(kPositiveCodeBase));
    return _mm512_add_epi32(clamped, dither);
  }
  const __m512i absolute = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512 offset = _mm512_add_ps(_mm512_castsi512_ps(absolute), _mm512_set1_ps(0x1p-15f));
  const __m512i code = _mm512_add_epi32(_mm512_castps_si512(offset), dither);
  // 0x07F00000 ? code : bits >> 4
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x07F00000), code, _mm512_srli_epi32(bits, 4),
                                   0xCA);
}

inline void encode_vectors(const float* x, bool is_signed, Vec<float> inverse,
                           const __m512i (&dither)[kEncodedVectors], uint8_t* codes) {
  __m512i bits[kEncodedVectors];
  PYFAST_UNROLL
  for (int i = 0; i < kEncodedVectors; ++i) {
    bits[i] = coded_bits(_mm512_loadu_ps(x + 16 * i), is_signed, inverse.v, dither[i]);
  }
  // Byte i of a lane is the code of vector i.
  const __m512i low =
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x000000FF), _mm512_srli_epi32(bits[0], 20),
                                _mm512_srli_epi32(bits[1], 12), 0xCA);
  const __m512i high =
      _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x00FF0000), _mm512_srli_epi32(bits[2], 4),
                                _mm512_slli_epi32(bits[3], 4), 0xCA);
  const __m512i mixed = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x0000FFFF), low, high, 0xCA);
  // Four lanes of a quarter become four runs of four codes; then runs of the same vector meet.
  const __m512i runs = _mm512_shuffle_epi8(
      mixed,
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(order, runs));
}

// The dither of the elements from a first one on, vector by vector.
class DitherLanes {
 public:
  DitherLanes(int64_t first, uint32_t salt) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const uint32_t start = static_cast<uint32_t>(first) * kDitherStep + salt;
    product_ =
        _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(kDitherStep))),
                         _mm512_set1_epi32(static_cast<int>(start)));
  }
  __m512i next() {
    const __m512i dither = _mm512_srli_epi32(product_, 12);
    product_ = _mm512_add_epi32(product_, _mm512_set1_epi32(static_cast<int>(16 * kDitherStep)));
    return dither;
  }

 private:
  __m512i product_;
};

class LargestLanes {
 public:
  void add(Vec<float> x) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7FFFFFFF));
    largest_ = _mm512_max_epi32(largest_, bits);
  }
  uint32_t bits() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(largest_)); }

 private:
  __m512i largest_ = _mm512_setzero_si512();
};

#else  // plain loops, which the compiler vectorises

inline Vec<float> decode_lanes(const uint8_t* codes, bool is_signed, Vec<float> scale) {
  constexpr int kLanes = Vec<float>::kLanes;
  alignas(64) float values[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    values[i] = is_signed ? signed_value(codes[i]) : positive_value(codes[i]);
  }
  return Vec<float>::load(values) * scale;
}

struct Dither {
  uint32_t v[Vec<float>::kLanes];
};

constexpr int kEncodedVectors = 1;

inline void encode_vectors(const float* x, bool is_signed, Vec<float> inverse,
                           const Dither (&dither)[kEncodedVectors], uint8_t* codes) {
  constexpr int kLanes = Vec<float>::kLanes;
  alignas(64) float values[kLanes];
  (Vec<float>::load(x) * inverse).store(values);
  for (int i = 0; i < kLanes; ++i) {
    codes[i] = is_signed ? signed_code(values[i], dither[0].v[i])
                         : positive_code(values[i], dither[0].v[i]);
  }
}

class DitherLanes {
 public:
  DitherLanes(int64_t first, uint32_t salt) : element_(static_cast<uint32_t>(first)), salt_(salt) {}
  Dither next() {
    Dither dither;
    for (uint32_t i = 0; i < Vec<float>::kLanes; ++i)
      dither.v[i] = code_dither(element_ + i, salt_);
    element_ += Vec<float>::kLanes;
    return dither;
  }

 private:
  uint32_t element_;
  uint32_t salt_;
};

class LargestLanes {
 public:
  void add(Vec<float> x) {
    alignas(64) float values[Vec<float>::kLanes];
    x.store(values);
    for (int i = 0; i < Vec<float>::kLanes; ++i) {
      const int32_t bits = static_cast<int32_t>(float_to_bits(values[i]) & 0x7FFFFFFFu);
      largest_[i] = bits > largest_[i] ? bits : largest_[i];
    }
  }
  uint32_t bits() const {
    int32_t largest = 0;
    for (int32_t bits : largest_) largest = bits > largest ? bits : largest;
    return static_cast<uint32_t>(largest);
  }

 private:
  int32_t largest_[Vec<float>::kLanes] = {};
};

#endif

// The dither of the vectors that are encoded together.
struct DitherGroup {
  static constexpr int kElements = kEncodedVectors * Vec<float>::kLanes;
  explicit DitherGroup(DitherLanes* dither) {
    PYFAST_UNROLL
    for (int i = 0; i < kEncodedVectors; ++i) lanes[i] = dither->next();
  }
  decltype(DitherLanes(0, 0).next()) lanes[kEncodedVectors];
};

}  // namespace pyfast::PYFAST_ISA
