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
  // (wide << 20) & 0x07F00000 | base
  const __m512i bits =
      _mm512_ternarylogic_epi32(_mm512_slli_epi32(wide, 20), _mm512_set1_epi32(0x07F00000),
                                _mm512_set1_epi32(static_cast<int>(kSignedCodeBase)), 0xEA);
  const __m512 offset = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p-15f));
  // offset | (wide & sign)
  const __m512i value = _mm512_ternarylogic_epi32(
      _mm512_castps_si512(offset), wide, _mm512_set1_epi32(static_cast<int>(0x80000000u)), 0xF8);
  return {_mm512_mul_ps(_mm512_castsi512_ps(value), scale.v)};
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
  void add(Vec<float> x) { add_magnitude(_mm512_abs_ps(x.v)); }
  void add_magnitude(__m512 x) { largest_ = _mm512_max_epi32(largest_, _mm512_castps_si512(x)); }
  uint32_t bits() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(largest_)); }

 private:
  __m512i largest_ = _mm512_setzero_si512();
};

constexpr int kEncodedVectors = 4;

// The values of a block between their update and their coding: of a signed state the magnitudes,
// and the signs apart, which saves taking them from each vector and putting them into its codes.
class StagedState {
 public:
  void put(int j, Vec<float> x, bool is_signed, LargestLanes* largest) {
    const __m512 magnitude = _mm512_abs_ps(x.v);
    if (is_signed) negative_[j / 16] = _mm512_movepi32_mask(_mm512_castps_si512(x.v));
    _mm512_store_ps(values_ + j, is_signed ? magnitude : x.v);
    largest->add_magnitude(magnitude);
  }

  // Once all are there: their largest magnitude, as bits.
  void finish(uint32_t largest) { is_finite_ = largest < 0x7F800000u; }

  // The codes of four vectors from j on.
  void encode(int j, bool is_signed, Vec<float> inverse, const __m512i (&dither)[kEncodedVectors],
              uint8_t* codes) const {
    if (!is_finite_) return encode_one_by_one(j, is_signed, inverse, dither, codes);
    __m512i bits[kEncodedVectors];  // each with its code in bits 20 to 27 of the lanes
    PYFAST_UNROLL
    for (int i = 0; i < kEncodedVectors; ++i) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(values_ + j + 16 * i), inverse.v);
      const __m512i offset =
          is_signed ? _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(0x1p-15f)))
                    : _mm512_max_epi32(_mm512_castps_si512(x),
                                       _mm512_set1_epi32(static_cast<int>(kPositiveCodeBase)));
      bits[i] = _mm512_add_epi32(offset, dither[i]);
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
    __m512i all = _mm512_permutexvar_epi32(order, runs);
    if (is_signed) {  // the highest bit is set, by the base
      uint64_t negative;
      memcpy(&negative, negative_ + j / 16, sizeof negative);
      all = _mm512_mask_add_epi8(all, ~negative, all, _mm512_set1_epi8(-128));
    }
    _mm512_storeu_si512(codes, all);
  }

 private:
  // NaN, which there may be here, has a code of its own.
  __attribute__((noinline)) void encode_one_by_one(int j, bool is_signed, Vec<float> inverse,
                                                   const __m512i (&dither)[kEncodedVectors],
                                                   uint8_t* codes) const {
    alignas(64) uint32_t dithers[kEncodedVectors * 16];
    for (int i = 0; i < kEncodedVectors; ++i) _mm512_store_si512(dithers + 16 * i, dither[i]);
    for (int i = 0; i < kEncodedVectors * 16; ++i) {
      const bool is_negative = is_signed && (negative_[(j + i) / 16] >> (i % 16) & 1);
      const float x = values_[j + i] * _mm512_cvtss_f32(inverse.v);
      codes[i] =
          is_signed ? signed_code(is_negative ? -x : x, dithers[i]) : positive_code(x, dithers[i]);
    }
  }

  alignas(64) float values_[kOptimizerBlock];
  uint16_t negative_[kOptimizerBlock / 16];
  bool is_finite_;
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

constexpr int kEncodedVectors = 1;

// The values of a block between their update and their coding.
class StagedState {
 public:
  void put(int j, Vec<float> x, bool /*is_signed*/, LargestLanes* largest) {
    x.store(values_ + j);
    largest->add(x);
  }

  void finish(uint32_t /*largest*/) {}

  // The codes of a vector from j on.
  void encode(int j, bool is_signed, Vec<float> inverse, const Dither (&dither)[kEncodedVectors],
              uint8_t* codes) const {
    constexpr int kLanes = Vec<float>::kLanes;
    alignas(64) float x[kLanes];
    (Vec<float>::load(values_ + j) * inverse).store(x);
    for (int i = 0; i < kLanes; ++i) {
      codes[i] =
          is_signed ? signed_code(x[i], dither[0].v[i]) : positive_code(x[i], dither[0].v[i]);
    }
  }

 private:
  alignas(64) float values_[kOptimizerBlock];
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
