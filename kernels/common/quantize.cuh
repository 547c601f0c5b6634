// Eight floats a thread to int8, by the rule of quantize_int8_reference.py.
#pragma once

#include "launch.cuh"

namespace pyfast::PYFAST_ISA {

constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kNaN = 0x7FC00000u;

// What a block's values are computed with. A scale of NaN makes values of 0.
struct Step {
  float scale;
  float inverse;  // NaN where a product with it is not close to the quotient
  float zero;
};

__device__ __forceinline__ Step with_inverse(float scale, float zero) {
  const bool usual = scale > 0x1p-100f && scale < 0x1p100f;
  return {scale, usual ? 1.0f / scale : bits_to_float(kNaN), zero};
}

__device__ __forceinline__ float clamp(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

// Rounded quotients. A product with the inverse differs from the quotient by less than 1e-4 where
// the result is not clamped anyway (two roundings of 2^-24, of at most 256), so that it rounds to
// the same integer unless it is that close to a half: the division, half of the work, is rare.
__device__ __forceinline__ void round8(const Step& step, float (&value)[8]) {
  float rounded[8];
  bool sure = true;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float quotient = value[e] * step.inverse;
    rounded[e] = rintf(quotient);
    sure &= fabsf(quotient - rounded[e]) < 0.4999f;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) value[e] = sure ? rounded[e] : rintf(value[e] / step.scale);
}

// Values from `lowest` to 127, for a zero point of step.zero.
__device__ __forceinline__ void store_int8(const Step& step, float (&value)[8], int8_t* to,
                                           float lowest, int count, bool aligned) {
  uint64_t packed = 0;
  if (step.scale == step.scale) {
    round8(step, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int32_t integer = static_cast<int32_t>(clamp(value[e] + step.zero, lowest, 127.0f));
      packed |= static_cast<uint64_t>(static_cast<uint8_t>(integer)) << (8 * e);
    }
  }
  if (aligned) {
#ifdef PYFAST_CUDA_EMULATION
    cuda_emulation::copy_aligned(to, &packed, to, 8);
#else
    *reinterpret_cast<uint64_t*>(to) = packed;
#endif
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = static_cast<int8_t>(packed >> (8 * e));
    }
  }
}

}  // namespace pyfast::PYFAST_ISA
