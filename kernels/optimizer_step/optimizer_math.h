// What happens to an element in a step, around the update of the rule, and how it is stored.
#pragma once

#include "../common/philox.h"
#include "adam_math.h"
#include "adamax_math.h"
#include "rmsprop_math.h"
#include "sgd_math.h"

namespace pyfast::PYFAST_ISA {

template <OptimizerRule kRule, typename V>
PYFAST_HD void optimizer_update(OptimizerValues<V>& x, const OptimizerNumbers<V>& n) {
  if constexpr (kRule != OptimizerRule::kNone) {
    if (n.has_scale) x.g = x.g * n.gradient_scale * n.clip_scale;
    x.p = x.p * n.decay;
    if (n.has_l2) x.g = x.g + n.l2 * x.p;
    if (n.has_l1) x.g = x.g + signed_by(n.l1, x.p);
    if constexpr (kRule == OptimizerRule::kAdam) adam_update(x, n);
    if constexpr (kRule == OptimizerRule::kSgd) sgd_update(x, n);
    if constexpr (kRule == OptimizerRule::kRmsprop) rmsprop_update(x, n);
    if constexpr (kRule == OptimizerRule::kAdamax) adamax_update(x, n);
    if (n.has_threshold) {  // the proximal operator of the l1 norm
      const V left = maximum(magnitude(x.p) - n.threshold, Lanes<V>::broadcast(0));
      x.p = signed_by(left, x.p);
    }
  }
}

// Which states of a rule take both signs: they and the others have different int8 codes.
PYFAST_HD bool is_signed_state(OptimizerRule rule, int state) {
  return rule == OptimizerRule::kRmsprop ? state != 0 : state == 0;
}

// int8 states: a block of 256 elements has a scale, its largest magnitude, and the codes are the
// upper bits of floats: eight steps an octave. Signed values are offset by 2^-15 first, so that
// the steps get even towards an exact zero; the others end at 2^-31 and never become zero, because
// they are divided by. `dither` is in [0, 2^20): floats are linear between the codes, so that
// adding it before the rest is cut off makes the expected value right. NaN, whose bits are not the
// same everywhere, has the highest code.
constexpr uint32_t kSignedCodeBase = 0x38000000u;    // 2^-15
constexpr uint32_t kPositiveCodeBase = 0x30000000u;  // 2^-31

// A Weyl sequence over the elements, begun anew at every step: each element's dither is uniform
// over the steps, and that of neighbours is spread evenly.
constexpr uint32_t kDitherStep = 0x9E3779B1u;

PYFAST_HD uint32_t code_dither(uint64_t element, uint32_t salt) {
  return (static_cast<uint32_t>(element) * kDitherStep + salt) >> 12;
}

PYFAST_HD uint8_t signed_code(float x, uint32_t dither) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t offset = float_to_bits(bits_to_float(bits & 0x7FFFFFFFu) + 0x1p-15f);
  const uint32_t code = (offset - kSignedCodeBase + dither) >> 20;
  if (x != x) return 0x7F;
  return static_cast<uint8_t>((code & 0x7Fu) | ((bits >> 31) << 7));
}

PYFAST_HD float signed_value(uint8_t code) {
  const uint32_t wide = code;
  const float offset = bits_to_float(kSignedCodeBase + ((wide & 0x7Fu) << 20)) - 0x1p-15f;
  return bits_to_float(float_to_bits(offset) | ((wide >> 7) << 31));
}

PYFAST_HD uint8_t positive_code(float x, uint32_t dither) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(x));
  const int32_t smallest = static_cast<int32_t>(kPositiveCodeBase);
  const uint32_t clamped = static_cast<uint32_t>(bits > smallest ? bits : smallest);
  if (x != x) return 0xFF;
  return static_cast<uint8_t>((clamped - kPositiveCodeBase + dither) >> 20);
}

PYFAST_HD float positive_value(uint8_t code) {
  return bits_to_float(kPositiveCodeBase + (static_cast<uint32_t>(code) << 20));
}

// The scale of a block from the largest of its magnitudes as bits (in which NaN is above Inf), and
// its inverse. Scales below the normal range are zero.
PYFAST_HD float code_scale(uint32_t largest, float* inverse) {
  if (largest > 0x7F800000u) largest = 0x7FC00000u;
  const float scale = largest < 0x00800000u ? 0.0f : bits_to_float(largest);
  *inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  return scale;
}

// The random numbers of a parameter at a step: a key for the bits of its elements, and the salt of
// the dither of its states.
struct OptimizerRandom {
  uint64_t key;
  uint32_t salt;
};

PYFAST_HD OptimizerRandom optimizer_random(uint64_t seed, uint64_t step, uint32_t index) {
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), index,
             kStochasticRoundingStream);
  return {words.w[0] | static_cast<uint64_t>(words.w[1]) << 32, words.w[2]};
}

// bfloat16 rounded up with the probability of what is cut off; `bits16` are the element's.
PYFAST_HD BFloat16 stochastic_bfloat16(float x, uint32_t bits16) {
  const uint32_t bits = float_to_bits(x);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>((is_nan ? bits | 0x400000u : bits + bits16) >> 16)};
}

// A float32 as a bfloat16, the nearest (halfway: away from zero), and what is missing to it in
// units of its last place.
PYFAST_HD BFloat16 split_master(float master, int16_t* remainder) {
  const uint32_t bits = float_to_bits(master);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t upper = is_nan ? (bits >> 16) | 0x40u : (bits + 0x8000u) >> 16;
  *remainder = is_nan ? int16_t{0} : static_cast<int16_t>(bits - (upper << 16));
  return {static_cast<uint16_t>(upper)};
}

// Where the two do not belong together (the parameter was set to zero or Inf from outside), the
// parameter alone.
PYFAST_HD float join_master(BFloat16 upper, int16_t remainder) {
  const uint32_t rounded = static_cast<uint32_t>(upper.bits) << 16;
  const uint32_t bits = rounded + static_cast<uint32_t>(static_cast<int32_t>(remainder));
  return bits_to_float((bits & 0x7FFFFFFFu) > 0x7F800000u ? rounded : bits);
}

}  // namespace pyfast::PYFAST_ISA
