// How decoding multiplies a query with a key.
#pragma once

#include "attention_pack.h"

namespace pyfast::PYFAST_ISA {

// int8 caches multiply in float, and bfloat16 where there is AMX, thus
// on Intel's processors, as floats of even and of odd elements: there vdpbf16ps takes as long as
// four multiply-adds of floats.
struct WholeUnit : FloatUnit {
  static constexpr int kParts = 1;
};
#if defined(__AVX512BF16__)
struct PairOfOneUnit : PairUnit {
  static constexpr int kParts = 1;
};
#endif
#if defined(__AMX_TILE__)
struct SplitUnit : FloatUnit {
  static constexpr int kParts = 2;
};
#endif
template <typename T, typename TK>
struct DecodeUnit {
  using type = WholeUnit;
};
#if defined(__AVX512BF16__)
template <>
struct DecodeUnit<BFloat16, BFloat16> {
#if defined(__AMX_TILE__)
  using type = SplitUnit;
#else
  using type = PairOfOneUnit;
#endif
};
#endif

#if defined(__AVX512BF16__)
// 32 elements as floats: those with even and those with odd indices.
PYFAST_ALWAYS_INLINE void split_pairs(__m512i elements, Lanes* parts) {
  parts[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(elements, 16))};
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  parts[1] = {_mm512_castsi512_ps(_mm512_and_si512(elements, high))};
}
// The same of floats, and back.
PYFAST_ALWAYS_INLINE void part(Lanes* floats) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const Lanes low = floats[0], high = floats[1];
  floats[0] = {_mm512_permutex2var_ps(low.v, even, high.v)};
  floats[1] = {_mm512_permutex2var_ps(low.v, odd, high.v)};
}
PYFAST_ALWAYS_INLINE void join(Lanes* parts) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Lanes even = parts[0], odd = parts[1];
  parts[0] = {_mm512_permutex2var_ps(even.v, low, odd.v)};
  parts[1] = {_mm512_permutex2var_ps(even.v, high, odd.v)};
}
inline void part_row(uint32_t* row, int64_t num_units) {
  float* const floats = reinterpret_cast<float*>(row);
  for (int64_t j = 0; j < num_units; j += 2 * kLanes) {
    Lanes both[2] = {Lanes::load(floats + j), Lanes::load(floats + j + kLanes)};
    part(both);
    both[0].store(floats + j);
    both[1].store(floats + j + kLanes);
  }
}
#endif

// A step of a key as the unit's operands, and their product with a query.
template <typename Unit, typename TK>
PYFAST_ALWAYS_INLINE void load_parts(const TK* from, int64_t left, Lanes* parts) {
#if defined(__AVX512BF16__)
  if constexpr (Unit::kElements == 2) {
    parts[0] = {_mm512_castsi512_ps(load_bits(from, left))};
    return;
  }
  if constexpr (Unit::kParts == 2) return split_pairs(load_bits(from, left), parts);
#endif
  if constexpr (Unit::kParts == 1 && Unit::kElements == 1) parts[0] = load_lanes_of(from, left);
}
template <typename Unit>
PYFAST_ALWAYS_INLINE Lanes dot_units(Lanes a, Lanes b, Lanes sum) {
#if defined(__AVX512BF16__)
  if constexpr (Unit::kElements == 2) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v))};
  }
#endif
  if constexpr (Unit::kElements == 1) return fused(a, b, sum);
}

}  // namespace pyfast::PYFAST_ISA
