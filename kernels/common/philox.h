// Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):
// a counter and a 64-bit key in, four 32-bit words out. The two maps from an element to its 16 bits
// are a format: once released they never change, because every backend and every saved seed
// depends on them. docs/DESIGN.md states them in words.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyfast::PYFAST_ISA {

// The fourth counter word: which use of a seed draws the bits.
enum Stream : uint32_t {
  kAttentionStream = 0,
  kDropoutStream = 1,
  kDropConnectStream = 2,
  kStochasticRoundingStream = 3,
};

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

struct PhiloxWords {
  uint32_t w[4];
};

PYFAST_HD PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Bit e of the result: is half-word e (word e / 2, low half first) at least `threshold`?
PYFAST_HD uint32_t keep_bits_of(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int pair = 0; pair < 4; ++pair) {
    bits |= static_cast<uint32_t>((words.w[pair] & 0xFFFFu) >= threshold) << (2 * pair);
    bits |= static_cast<uint32_t>((words.w[pair] >> 16) >= threshold) << (2 * pair + 1);
  }
  return bits;
}

// Element-wise map: bit e is the fate of element 8 * group + e.
PYFAST_HD uint32_t keep_bits8(uint64_t seed, uint64_t group, uint32_t stream, uint32_t threshold) {
  return keep_bits_of(
      philox(seed, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, stream),
      threshold);
}

// The same for eight elements from any first element on: one call when it is a multiple of 8.
PYFAST_HD uint32_t keep_bits8_from(uint64_t seed, uint64_t first, uint32_t stream,
                                   uint32_t threshold) {
  const uint32_t shift = static_cast<uint32_t>(first % 8);
  uint32_t bits = keep_bits8(seed, first / 8, stream, threshold) >> shift;
  if (shift != 0) bits |= keep_bits8(seed, first / 8 + 1, stream, threshold) << (8 - shift);
  return bits & 0xFFu;
}

// Attention map, the layout of an MMA accumulator fragment: the word and half of one score. Columns
// c, c + 1, c + 8, c + 9, c + 16, c + 17, c + 24, c + 25 (c % 8 even, c % 32 < 8) share a call.
PYFAST_HD bool keep_score(uint64_t seed, uint32_t row, uint32_t column, uint32_t batch_head,
                          uint32_t threshold) {
  const PhiloxWords words =
      philox(seed, (column / 32) * 4 + (column % 8) / 2, row, batch_head, kAttentionStream);
  const uint32_t word = words.w[(column % 32) / 8];
  return (column % 2 ? word >> 16 : word & 0xFFFFu) >= threshold;
}

}  // namespace pyfast::PYFAST_ISA
