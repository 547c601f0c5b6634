// Weight-only products of integers. A row of x becomes whole numbers of 8 * D - 2 bits, shared
// exponent and all: x = q * 2^(e - (8 * D - 2)), where 2^e is the least power beyond the row's
// largest magnitude; and q = sum of digit[i] * 256^i with D digits within -128..127. Each digit is
// a row of int8, whose products with the weights are exact; the D sums of a result are joined in
// float32. So an element of x is off by at most 2^(e - 8 * D + 1): 2^-23 of the row's largest for
// three digits (half precisions: results are rounded at 2^-9 and 2^-12), 2^-31 for four (float32),
// and then the sum is as good as exact, whatever its order. The weights are read as they lie: a
// tile of 16 columns has room for five rows of three digits, so that up to five rows run at the
// speed of memory, where converting weights to bfloat16 took half as long again (one row:
// converting them to float a quarter). Rows with NaN or Inf have no digits.
#pragma once

#include "../common/product.h"
#include "../common/quantize_row.h"

namespace pyfast::PYFAST_ISA {

#if defined(__AMX_INT8__)

template <int kDigits>
constexpr int kDigitBits = 8 * kDigits - 2;

// The digits of a row, the least first, each in num_units units, zeros beyond; returns e - bits, or
// NaN and zeros for a row with NaN or Inf.
template <int kDigits, typename T>
inline float digits_of_row(const T* x, const float* smooth, int64_t k, uint32_t* units,
                           int64_t num_units) {
  const uint32_t largest = value_range<true>(x, smooth, k).largest_bits;
  if (largest >= kInfinityBits) {
    memset(units, 0, static_cast<size_t>(kDigits * num_units) * 4);
    return bits_to_float(0x7FC00000u);
  }
  int exponent = 0;
  frexpf(bits_to_float(largest), &exponent);
  const __m512 shift = _mm512_set1_ps(static_cast<float>(kDigitBits<kDigits> - exponent));
  // Bytes of q + bias are the digits plus 128.
  const __m512i bias = _mm512_set1_epi32(static_cast<int>(kDigits == 4 ? 0x80808080u : 0x808080u));
  for_each_vec<Lanes>(0, k, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
    const __m512 value = load_smoothed(x, smooth, j, n).v;
    const __m512i q = _mm512_cvtps_epi32(_mm512_scalef_ps(value, shift));
    __m512i digits = _mm512_xor_si512(_mm512_add_epi32(q, bias), bias);
#pragma GCC unroll 4
    for (int digit = 0; digit < kDigits; ++digit) {
      auto* to = reinterpret_cast<int8_t*>(units + digit * num_units) + j;
      _mm_mask_storeu_epi8(to, Lanes::first(n), _mm512_cvtepi32_epi8(digits));
      digits = _mm512_srli_epi32(digits, 8);
    }
  });
  for (int digit = 0; digit < kDigits; ++digit) {
    clear_units(units + digit * num_units, k, 1, num_units);
  }
  return static_cast<float>(exponent - kDigitBits<kDigits>);
}

// sums[row * kDigits + digit][column] become floats in [row][column], in place.
template <int kDigits>
inline void join_digits(float* sums, int64_t stride, const float* exponents, int64_t rows,
                        int64_t columns) {
  const __m512 base = _mm512_set1_ps(256.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const __m512 exponent = _mm512_set1_ps(exponents[row]);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const float* from = sums + row * kDigits * stride + j;
      __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int digit = kDigits - 1; digit >= 0; --digit) {
        const __m512i sum = _mm512_loadu_si512(from + digit * stride);
        total = _mm512_fmadd_ps(total, base, _mm512_cvtepi32_ps(sum));
      }
      _mm512_storeu_ps(sums + row * stride + j, _mm512_scalef_ps(total, exponent));
    }
  }
}

#endif

}  // namespace pyfast::PYFAST_ISA
