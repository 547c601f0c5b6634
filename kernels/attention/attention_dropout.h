// Keep bits of attention scores for tiles whose rows are keys and whose lanes are queries. One
// Philox call gives eight keys of one query; 64-bit lanes hold one query each. Column group, head
// and stream are the same for all lanes, so that of the 14 products of seven rounds four are
// scalar: about 0.4 cycles a score on Zen 4.
#pragma once

#include "../common/philox.h"
#include "attention_lanes.h"

namespace pyfast::PYFAST_ISA {

struct ScoreDropout {
  uint64_t seed;
  uint32_t threshold;  // 0: nothing is dropped
  float scale;         // of what is kept
};

constexpr int kGroupKeys = 32;     // one column group of the map: four calls for each query
constexpr int kGroupQueries = 16;  // drawn at once

// Fills bits[key * stride] for 32 keys from `first_key`, a multiple of 32: bit i is the fate of
// query first_query + i.
inline void keep_scores(const ScoreDropout& rule, uint32_t batch_head, int64_t first_key,
                        int64_t first_query, uint16_t* bits, int64_t stride) {
  if (rule.threshold > 0xFFFFu) {
    for (int key = 0; key < kGroupKeys; ++key) bits[key * stride] = 0;
    return;
  }
  const uint32_t k0 = static_cast<uint32_t>(rule.seed);
  const uint32_t k1 = static_cast<uint32_t>(rule.seed >> 32);
  const uint64_t head = uint64_t{kPhiloxMultiplier1} * batch_head;
  const uint32_t high_head = static_cast<uint32_t>(head >> 32);
#if defined(__AVX512F__)
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i threshold = _mm512_set1_epi32(static_cast<int>(rule.threshold << 16));
  const __m512i even = _mm512_add_epi64(_mm512_set1_epi64(first_query),
                                        _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
  const __m512i queries[2] = {even, _mm512_add_epi64(even, _mm512_set1_epi64(1))};
#endif
  for (int pair = 0; pair < 4; ++pair) {
    const uint32_t group = static_cast<uint32_t>(first_key / 32 * 4 + pair);
    // Round 1, then what of rounds 2 and 3 is the same for all queries.
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * group;
    const uint32_t c2_1 = static_cast<uint32_t>(product0 >> 32) ^ kAttentionStream ^ k1;
    const uint32_t c3_1 = static_cast<uint32_t>(product0);
    const uint32_t key0_1 = k0 + kPhiloxWeyl0, key1_1 = k1 + kPhiloxWeyl1;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c2_1;
    const uint32_t c0_2 =
        static_cast<uint32_t>(product1 >> 32) ^ static_cast<uint32_t>(head) ^ key0_1;
    const uint32_t c1_2 = static_cast<uint32_t>(product1);
    const uint32_t key0_2 = key0_1 + kPhiloxWeyl0, key1_2 = key1_1 + kPhiloxWeyl1;
    const uint64_t product2 = uint64_t{kPhiloxMultiplier0} * c0_2;
    const uint32_t high2 = static_cast<uint32_t>(product2 >> 32);
#if defined(__AVX512F__)
    __m512i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i c0_1 = _mm512_xor_si512(queries[i], _mm512_set1_epi64(high_head ^ k0));
      const __m512i p0 = _mm512_mul_epu32(c0_1, multiplier0);
      const __m512i c2_2 =
          _mm512_xor_si512(_mm512_srli_epi64(p0, 32), _mm512_set1_epi64(c3_1 ^ key1_1));
      const __m512i p1 = _mm512_mul_epu32(c2_2, multiplier1);
      c0[i] = _mm512_xor_si512(_mm512_srli_epi64(p1, 32), _mm512_set1_epi64(c1_2 ^ key0_2));
      c1[i] = p1;
      c2[i] = _mm512_xor_si512(p0, _mm512_set1_epi64(high2 ^ key1_2));
      c3[i] = _mm512_set1_epi64(static_cast<uint32_t>(product2));
    }
    uint32_t round_key0 = key0_2 + kPhiloxWeyl0, round_key1 = key1_2 + kPhiloxWeyl1;
#pragma GCC unroll 4
    for (int round = 3; round < kPhiloxRounds; ++round) {
      const __m512i key0 = _mm512_set1_epi64(round_key0), key1 = _mm512_set1_epi64(round_key1);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m512i p0 = _mm512_mul_epu32(c0[i], multiplier0);
        const __m512i p1 = _mm512_mul_epu32(c2[i], multiplier1);
        c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[i], key0, 0x96);
        c1[i] = p1;
        c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[i], key1, 0x96);
        c3[i] = p0;
      }
      round_key0 += kPhiloxWeyl0;
      round_key1 += kPhiloxWeyl1;
    }
    const __m512i words[4][2] = {{c0[0], c0[1]}, {c1[0], c1[1]}, {c2[0], c2[1]}, {c3[0], c3[1]}};
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
      // Even queries are in the low halves of one register, odd ones in those of the other.
      const __m512i all =
          _mm512_mask_shuffle_epi32(words[word][0], 0xAAAA, words[word][1], _MM_PERM_CCAA);
      uint16_t* const to = bits + (8 * word + 2 * pair) * stride;
      to[0] = _mm512_cmpge_epu32_mask(_mm512_slli_epi32(all, 16), threshold);
      to[stride] = _mm512_cmpge_epu32_mask(all, threshold);
    }
#else
    uint32_t c0[kGroupQueries], c1[kGroupQueries], c2[kGroupQueries], c3[kGroupQueries];
    for (int i = 0; i < kGroupQueries; ++i) {
      const uint32_t query = static_cast<uint32_t>(first_query + i);
      const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * (query ^ high_head ^ k0);
      const uint32_t c2_2 = static_cast<uint32_t>(p0 >> 32) ^ c3_1 ^ key1_1;
      const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * c2_2;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1_2 ^ key0_2;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = high2 ^ static_cast<uint32_t>(p0) ^ key1_2;
      c3[i] = static_cast<uint32_t>(product2);
    }
    uint32_t round_key0 = key0_2 + kPhiloxWeyl0, round_key1 = key1_2 + kPhiloxWeyl1;
    for (int round = 3; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kGroupQueries; ++i) {
        const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0[i];
        const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * c2[i];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ round_key0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ round_key1;
        c3[i] = static_cast<uint32_t>(p0);
      }
      round_key0 += kPhiloxWeyl0;
      round_key1 += kPhiloxWeyl1;
    }
    const uint32_t* const words[4] = {c0, c1, c2, c3};
    for (int word = 0; word < 4; ++word) {
      uint32_t low = 0, high = 0;
      for (int i = 0; i < kGroupQueries; ++i) {
        low |= static_cast<uint32_t>((words[word][i] & 0xFFFFu) >= rule.threshold) << i;
        high |= static_cast<uint32_t>((words[word][i] >> 16) >= rule.threshold) << i;
      }
      bits[(8 * word + 2 * pair) * stride] = static_cast<uint16_t>(low);
      bits[(8 * word + 2 * pair + 1) * stride] = static_cast<uint16_t>(high);
    }
#endif
  }
}

}  // namespace pyfast::PYFAST_ISA
