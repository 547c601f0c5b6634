// Keep bits of many elements on the CPU (bit j of a 64-bit word is the fate of element j of a block
// of 64), and the 16-bit words that they come from. Registers hold one counter per 64-bit lane:
// vpmuludq ignores the upper halves, so garbage may stay there, and a round is two multiplies, two
// shifts and two three-way xors for all lanes.
// Measured on Zen 4 (avx512): 0.43 cycles an element, four blocks in flight; what the first two
// rounds need not compute saves 7 %, and mixing the rounds with the loads and stores of a kernel by
// hand nothing.
#pragma once

#include <cstring>

#include "philox.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyfast::PYFAST_ISA {

// The seed and the use of it, with what a kernel needs to draw bits.
struct KeepRule {
  uint64_t seed;
  uint32_t stream;
  uint32_t threshold;  // 65536 drops everything
};

constexpr int kKeepBlocks = 4;  // 64-element blocks that keep_bits256 fills at once

// Any counters, one after the other.
inline void keep_bits_slow(const KeepRule& rule, uint64_t block, uint64_t* bits) {
  for (int b = 0; b < kKeepBlocks; ++b) {
    uint64_t word = 0;
    for (uint64_t group = 0; group < 8; ++group) {
      word |= static_cast<uint64_t>(
                  keep_bits8(rule.seed, (block + b) * 8 + group, rule.stream, rule.threshold))
              << (8 * group);
    }
    bits[b] = word;
  }
}

// The 16-bit words of elements 64 * block to 64 * (block + kKeepBlocks) - 1, in 64-bit lanes, which
// compilers multiply as 32 x 32 bits.
inline void random_words_slow(uint64_t seed, uint32_t stream, uint64_t block, uint16_t* words) {
  constexpr int kGroups = 8 * kKeepBlocks;
  uint64_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (int i = 0; i < kGroups; ++i) {
    const uint64_t group = block * 8 + static_cast<uint64_t>(i);
    c0[i] = group & 0xFFFFFFFFu;
    c1[i] = group >> 32;
    c2[i] = 0;
    c3[i] = stream;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kGroups; ++i) {
      const uint64_t product0 = c0[i] * kPhiloxMultiplier0;
      const uint64_t product1 = c2[i] * kPhiloxMultiplier1;
      c0[i] = (product1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (product0 >> 32) ^ c3[i] ^ k1;
      c1[i] = product1 & 0xFFFFFFFFu;
      c3[i] = product0 & 0xFFFFFFFFu;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  for (int i = 0; i < kGroups; ++i) {
    const uint64_t both[2] = {c0[i] | c1[i] << 32, c2[i] | c3[i] << 32};
    memcpy(words + 8 * i, both, 16);
  }
}

#if defined(__AVX2__)

// The counter of a group is (low half, high half, 0, stream), and the high half is the same for all
// groups of a call. After the first round c0 is therefore one number and c1 is zero, so that the
// second round needs one product of registers instead of two.
struct FirstRounds {
  // False in the one call of 2^35 elements whose groups differ in the high half, and where
  // everything is dropped.
  bool is_uniform;
  uint32_t key2;               // round 1: c2 = hi(product0) ^ key2
  uint32_t key0, key1, word3;  // round 2: c0 = hi(product1) ^ key0, c2 = c3 ^ key1, c3 = word3

  FirstRounds(const KeepRule& rule, uint64_t block) {
    const uint64_t high = block >> 29;
    const uint32_t k0 = static_cast<uint32_t>(rule.seed);
    const uint32_t k1 = static_cast<uint32_t>(rule.seed >> 32);
    is_uniform = (block + kKeepBlocks - 1) >> 29 == high && rule.threshold <= 0xFFFFu;
    key2 = rule.stream ^ k1;
    const uint64_t product = uint64_t{kPhiloxMultiplier0} * (static_cast<uint32_t>(high) ^ k0);
    key0 = k0 + kPhiloxWeyl0;
    key1 = static_cast<uint32_t>(product >> 32) ^ (k1 + kPhiloxWeyl1);
    word3 = static_cast<uint32_t>(product);
  }
};

#endif

#if defined(__AVX512F__)

// Calls f(i, first, second) with the 16-bit words of the elements of block `block + i`: those of
// its first 32 and of its second 32.
template <typename F>
__attribute__((always_inline)) inline void for_each_words(const FirstRounds& start, uint64_t seed,
                                                          uint64_t block, const F& f) {
  // Counters 0 to 3 sit in the even lanes and 4 to 7 in the odd ones: unpacking restores the order.
  const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  __m512i c0[kKeepBlocks], c1[kKeepBlocks], c2[kKeepBlocks], c3[kKeepBlocks];
#pragma GCC unroll 4
  for (int i = 0; i < kKeepBlocks; ++i) {
    const __m512i group =
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>((block + i) * 8)), lane);
    const __m512i product0 = _mm512_mul_epu32(group, multiplier0);
    const __m512i word2 =
        _mm512_xor_si512(_mm512_srli_epi64(product0, 32), _mm512_set1_epi64(start.key2));
    const __m512i product1 = _mm512_mul_epu32(word2, multiplier1);
    c0[i] = _mm512_xor_si512(_mm512_srli_epi64(product1, 32), _mm512_set1_epi64(start.key0));
    c1[i] = product1;
    c2[i] = _mm512_xor_si512(product0, _mm512_set1_epi64(start.key1));
    c3[i] = _mm512_set1_epi64(start.word3);
  }
  uint32_t k0 = static_cast<uint32_t>(seed) + 2 * kPhiloxWeyl0;
  uint32_t k1 = static_cast<uint32_t>(seed >> 32) + 2 * kPhiloxWeyl1;
#pragma GCC unroll 5
  for (int round = 2; round < kPhiloxRounds; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0);
    const __m512i key1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int i = 0; i < kKeepBlocks; ++i) {
      const __m512i product0 = _mm512_mul_epu32(c0[i], multiplier0);
      const __m512i product1 = _mm512_mul_epu32(c2[i], multiplier1);
      c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[i], key0, 0x96);
      c1[i] = product1;
      c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[i], key1, 0x96);
      c3[i] = product0;
    }
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kKeepBlocks; ++i) {
    const __m512i low = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c1[i], _MM_PERM_CCAA);
    const __m512i high = _mm512_mask_shuffle_epi32(c2[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
    f(i, _mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  }
}

// Elements 64 * block to 64 * (block + kKeepBlocks) - 1.
inline void keep_bits256(const KeepRule& rule, uint64_t block, uint64_t* bits) {
  const FirstRounds start(rule, block);
  if (!start.is_uniform) return keep_bits_slow(rule, block, bits);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(rule.threshold));
  for_each_words(start, rule.seed, block,
                 [&](int i, __m512i first, __m512i second) __attribute__((always_inline)) {
                   const uint64_t low = _mm512_cmpge_epu16_mask(first, threshold);
                   const uint64_t high = _mm512_cmpge_epu16_mask(second, threshold);
                   bits[i] = low | high << 32;
                 });
}

// The 16-bit words themselves.
inline void random_words256(uint64_t seed, uint32_t stream, uint64_t block, uint16_t* words) {
  const FirstRounds start({seed, stream, 0}, block);
  if (!start.is_uniform) return random_words_slow(seed, stream, block, words);
  for_each_words(start, seed, block,
                 [&](int i, __m512i first, __m512i second) __attribute__((always_inline)) {
                   _mm512_storeu_si512(words + 64 * i, first);
                   _mm512_storeu_si512(words + 64 * i + 32, second);
                 });
}

#elif defined(__AVX2__)

// Calls f(b, i, even, odd) with the 16-bit words of counters 0 and 2, 1 and 3 of four, each of
// eight elements: the fours i = 0 and 1 of block `block + b`.
template <typename F>
__attribute__((always_inline)) inline void for_each_words(const FirstRounds& start, uint64_t seed,
                                                          uint64_t block, const F& f) {
  constexpr int kInFlight = 2;  // four counters each: 32 elements
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  for (int b = 0; b < kKeepBlocks; ++b) {
    __m256i c0[kInFlight], c1[kInFlight], c2[kInFlight], c3[kInFlight];
    for (int i = 0; i < kInFlight; ++i) {
      const __m256i group =
          _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>((block + b) * 8) + 4 * i), lane);
      const __m256i product0 = _mm256_mul_epu32(group, multiplier0);
      const __m256i word2 =
          _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_set1_epi64x(start.key2));
      const __m256i product1 = _mm256_mul_epu32(word2, multiplier1);
      c0[i] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_set1_epi64x(start.key0));
      c1[i] = product1;
      c2[i] = _mm256_xor_si256(product0, _mm256_set1_epi64x(start.key1));
      c3[i] = _mm256_set1_epi64x(start.word3);
    }
    uint32_t k0 = static_cast<uint32_t>(seed) + 2 * kPhiloxWeyl0;
    uint32_t k1 = static_cast<uint32_t>(seed >> 32) + 2 * kPhiloxWeyl1;
#pragma GCC unroll 5
    for (int round = 2; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(k0);
      const __m256i key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
      for (int i = 0; i < kInFlight; ++i) {
        const __m256i product0 = _mm256_mul_epu32(c0[i], multiplier0);
        const __m256i product1 = _mm256_mul_epu32(c2[i], multiplier1);
        c0[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[i]), key0);
        c1[i] = product1;
        c2[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[i]), key1);
        c3[i] = product0;
      }
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    for (int i = 0; i < kInFlight; ++i) {
      const __m256i low = _mm256_blend_epi32(c0[i], _mm256_slli_epi64(c1[i], 32), 0xAA);
      const __m256i high = _mm256_blend_epi32(c2[i], _mm256_slli_epi64(c3[i], 32), 0xAA);
      f(b, i, _mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high));
    }
  }
}

inline void keep_bits256(const KeepRule& rule, uint64_t block, uint64_t* bits) {
  const FirstRounds start(rule, block);
  if (!start.is_uniform) return keep_bits_slow(rule, block, bits);
  const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(rule.threshold));
  for_each_words(
      start, rule.seed, block,
      [&](int b, int i, __m256i even, __m256i odd) __attribute__((always_inline)) {
        const __m256i keep_even = _mm256_cmpeq_epi16(_mm256_max_epu16(even, threshold), even);
        const __m256i keep_odd = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, threshold), odd);
        const int mask = _mm256_movemask_epi8(_mm256_packs_epi16(keep_even, keep_odd));
        const uint64_t word = static_cast<uint32_t>(mask);
        bits[b] = i == 0 ? word : bits[b] | word << 32;
      });
}

// The 16-bit words themselves.
inline void random_words256(uint64_t seed, uint32_t stream, uint64_t block, uint16_t* words) {
  const FirstRounds start({seed, stream, 0}, block);
  if (!start.is_uniform) return random_words_slow(seed, stream, block, words);
  for_each_words(start, seed, block,
                 [&](int b, int i, __m256i even, __m256i odd) __attribute__((always_inline)) {
                   auto* const to = reinterpret_cast<__m256i*>(words + 64 * b + 32 * i);
                   _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
                   _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
                 });
}

#else

inline void keep_bits256(const KeepRule& rule, uint64_t block, uint64_t* bits) {
  keep_bits_slow(rule, block, bits);
}

inline void random_words256(uint64_t seed, uint32_t stream, uint64_t block, uint16_t* words) {
  random_words_slow(seed, stream, block, words);
}

#endif

// Fills bits[0 .. ceil(count / 64)) so that bit j of the sequence is the fate of element first + j.
// The buffer holds keep_words(count) words; bits past `count` are unspecified.
inline int64_t keep_words(int64_t count) {
  return ((count + 63) / 64 + kKeepBlocks) / kKeepBlocks * kKeepBlocks + kKeepBlocks;
}

inline void fill_keep_bits(const KeepRule& rule, uint64_t first, int64_t count, uint64_t* bits) {
  const uint64_t block = first / 64;
  const uint32_t shift = static_cast<uint32_t>(first % 64);
  const int64_t num_words = (count + 63) / 64;
  if (rule.threshold == 0) {
    for (int64_t w = 0; w < num_words; ++w) bits[w] = ~uint64_t{0};
    return;
  }
  for (int64_t w = 0; w < num_words + (shift != 0); w += kKeepBlocks) {
    keep_bits256(rule, block + static_cast<uint64_t>(w), bits + w);
  }
  if (shift == 0) return;
  for (int64_t w = 0; w < num_words; ++w) {
    bits[w] = (bits[w] >> shift) | (bits[w + 1] << (64 - shift));
  }
}

}  // namespace pyfast::PYFAST_ISA
