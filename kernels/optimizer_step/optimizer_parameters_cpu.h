// How the loops over dense arrays read and write a parameter: as it is, with a master copy, or
// rounded stochastically.
#pragma once

#include "optimizer_codes_cpu.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {

template <typename T>
T* at(const OptimizerTensor& t, int operand, int64_t begin) {
  T* const base = static_cast<T*>(t.operands[operand]);
  return base == nullptr ? nullptr : base + begin;
}

// Brings what is `bytes` behind a place into cache; there need be no memory. (Not inlined at once,
// GCC takes it for a function without effect, and leaves it out.)
PYFAST_ALWAYS_INLINE void prefetch_ahead(const void* place, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) +
                                                   static_cast<uintptr_t>(bytes)),
                     1);
}

// Indices of all of them count from where move_to() was called for.
template <typename P>
class PlainParameter {
 public:
  static constexpr int64_t kChunk = 2048;  // elements between an update and what follows it

  explicit PlainParameter(P* p) : p_(p) {}
  PlainParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& /*numbers*/)
      : base_(at<P>(t, kParameter, 0)) {}

  void move_to(int64_t begin) { p_ = base_ + begin; }
  template <typename V>
  V load(int64_t j, int lanes) const {
    return load_lanes<V>(p_ + j, lanes);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    store_lanes(x, p_ + j, lanes, false);
  }
  PYFAST_ALWAYS_INLINE void prefetch(int64_t j, int64_t ahead) const {
    prefetch_ahead(p_ + j, ahead);
  }

 private:
  P* base_ = nullptr;
  P* p_ = nullptr;
};

// Vectors of join_master(), split_master() and stochastic_bfloat16().
#if defined(__AVX512F__)

inline __m512i words(const void* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

inline Vec<float> join_lanes(const BFloat16* upper, const int16_t* remainder) {
  const __m512i rounded = _mm512_slli_epi32(words(upper), 16);
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(remainder));
  const __m512i bits = _mm512_add_epi32(rounded, _mm512_cvtepi16_epi32(low));
  const __m512 joined = _mm512_castsi512_ps(bits);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(joined, joined, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(joined, is_nan, _mm512_castsi512_ps(rounded))};
}

inline void split_lanes(Vec<float> x, BFloat16* upper, int16_t* remainder) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
  high = _mm512_mask_or_epi32(high, is_nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __m512i low =
      _mm512_maskz_sub_epi32(static_cast<__mmask16>(~is_nan), bits, _mm512_slli_epi32(high, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), _mm512_cvtepi32_epi16(high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(remainder), _mm512_cvtepi32_epi16(low));
}

inline void store_stochastic(Vec<float> x, const uint16_t* random, BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i sum = _mm512_mask_or_epi32(_mm512_add_epi32(bits, words(random)), is_nan, bits,
                                           _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
}

#elif defined(__AVX2__)

inline __m256i words(const void* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// Of lanes whose upper halves are zero.
inline void store_words(__m256i lanes, void* to) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline __m256i nan_lanes(__m256 x) {
  return _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

inline Vec<float> join_lanes(const BFloat16* upper, const int16_t* remainder) {
  const __m256i rounded = _mm256_slli_epi32(words(upper), 16);
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(remainder));
  const __m256i bits = _mm256_add_epi32(rounded, _mm256_cvtepi16_epi32(low));
  const __m256i is_nan = nan_lanes(_mm256_castsi256_ps(bits));
  return {_mm256_castsi256_ps(_mm256_blendv_epi8(bits, rounded, is_nan))};
}

inline void split_lanes(Vec<float> x, BFloat16* upper, int16_t* remainder) {
  const __m256i bits = _mm256_castps_si256(x.v), is_nan = nan_lanes(x.v);
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i high = _mm256_blendv_epi8(nearest, quiet, is_nan);
  const __m256i low =
      _mm256_andnot_si256(is_nan, _mm256_sub_epi32(bits, _mm256_slli_epi32(high, 16)));
  store_words(high, upper);
  store_words(_mm256_and_si256(low, _mm256_set1_epi32(0xFFFF)), remainder);
}

inline void store_stochastic(Vec<float> x, const uint16_t* random, BFloat16* to) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i sum =
      _mm256_blendv_epi8(_mm256_add_epi32(bits, words(random)), quiet, nan_lanes(x.v));
  store_words(_mm256_srli_epi32(sum, 16), to);
}

#else

inline Vec<float> join_lanes(const BFloat16* upper, const int16_t* remainder) {
  Vec<float> x;
  for (int i = 0; i < Vec<float>::kLanes; ++i) x.v[i] = join_master(upper[i], remainder[i]);
  return x;
}

inline void split_lanes(Vec<float> x, BFloat16* upper, int16_t* remainder) {
  for (int i = 0; i < Vec<float>::kLanes; ++i) upper[i] = split_master(x.v[i], &remainder[i]);
}

inline void store_stochastic(Vec<float> x, const uint16_t* random, BFloat16* to) {
  for (int i = 0; i < Vec<float>::kLanes; ++i) to[i] = stochastic_bfloat16(x.v[i], random[i]);
}

#endif

// A float32 as a bfloat16 and what is missing to it.
class SplitParameter {
 public:
  static constexpr int64_t kChunk = 2048;

  SplitParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& /*numbers*/) : t_(t) {}

  void move_to(int64_t begin) {
    upper_ = at<BFloat16>(t_, kParameter, begin);
    remainder_ = at<int16_t>(t_, kMaster, begin);
  }
  template <typename V>
  V load(int64_t j, int lanes) const {
    if (lanes == V::kLanes) return join_lanes(upper_ + j, remainder_ + j);
    alignas(64) float values[V::kLanes] = {};
    for (int i = 0; i < lanes; ++i) values[i] = join_master(upper_[j + i], remainder_[j + i]);
    return V::load(values);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    if (lanes == V::kLanes) return split_lanes(x, upper_ + j, remainder_ + j);
    alignas(64) float values[V::kLanes];
    x.store(values);
    for (int i = 0; i < lanes; ++i) upper_[j + i] = split_master(values[i], &remainder_[j + i]);
  }
  PYFAST_ALWAYS_INLINE void prefetch(int64_t j, int64_t ahead) const {
    prefetch_ahead(upper_ + j, ahead);
    prefetch_ahead(remainder_ + j, ahead);
  }

 private:
  const OptimizerTensor& t_;
  BFloat16* upper_ = nullptr;
  int16_t* remainder_ = nullptr;
};

class StochasticParameter {
 public:
  static constexpr int64_t kChunk = kOptimizerBlock;

  StochasticParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& numbers)
      : t_(t), key_(optimizer_random(t.seed, static_cast<uint64_t>(numbers.step), t.index).key) {}

  void move_to(int64_t begin) {
    p_ = at<BFloat16>(t_, kParameter, begin);
    element_bits(key_, begin, bits_);
  }
  template <typename V>
  V load(int64_t j, int lanes) const {
    return load_lanes<V>(p_ + j, lanes);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    if (lanes == V::kLanes) return store_stochastic(x, bits_ + j, p_ + j);
    alignas(64) float values[V::kLanes];
    x.store(values);
    for (int i = 0; i < lanes; ++i) p_[j + i] = stochastic_bfloat16(values[i], bits_[j + i]);
  }
  PYFAST_ALWAYS_INLINE void prefetch(int64_t j, int64_t ahead) const {
    prefetch_ahead(p_ + j, ahead);
  }

 private:
  const OptimizerTensor& t_;
  uint64_t key_;
  BFloat16* p_ = nullptr;
  alignas(64) uint16_t bits_[kOptimizerBlock];
};

}  // namespace pyfast::PYFAST_ISA
