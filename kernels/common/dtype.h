// The floating-point types that cross the boundary, as tags and as storage. Conversions round to
// nearest even and keep NaN and subnormal values: every level and every backend gives the same
// bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pyfast {
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
}

namespace pyfast::PYFAST_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PYFAST_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

PYFAST_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

PYFAST_HD float to_float(float value) { return value; }
PYFAST_HD double to_float(double value) { return value; }
PYFAST_HD float to_float(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}

PYFAST_HD float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // Inf, or NaN made quiet as hardware does
    const uint32_t quiet = magnitude > 0x7C00u ? 0x400000u : 0u;
    return bits_to_float(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13) | quiet);
  }
  if (magnitude < 0x400u) {  // zero and subnormals: an exact multiple of 2^-24
    return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  }
  return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
}

PYFAST_HD void from_float(float value, float* out) { *out = value; }
PYFAST_HD void from_float(double value, double* out) { *out = value; }
PYFAST_HD void from_float(float value, BFloat16* out) {
#ifdef __CUDA_ARCH__  // the same but for the payload of a NaN
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
  return;
#endif
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded);
}

PYFAST_HD void from_float(float value, Float16* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
  return;
#endif
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to Inf
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves a multiple of 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

PYFAST_HD float square_root(float value) { return sqrtf(value); }
PYFAST_HD double square_root(double value) { return sqrt(value); }

// The type in which a storage type is computed.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// Calls f with a null pointer of the storage type that `dtype` names.
template <typename F>
inline void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace pyfast::PYFAST_ISA
