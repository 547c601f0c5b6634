// Operands of attention's products, converted from the storage types: rows of units, their
// transpose, and pairs of rows side by side. Tails are zero.
#pragma once

#include "../common/transpose.h"
#include "attention_lanes.h"

namespace pyfast::PYFAST_ISA {

// Rows of a tensor: row r begins at data + r * stride and has `size` elements.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t count;
  int64_t size;

  const T* row(int64_t r) const { return data + r * stride; }
};

// Asks for rows ahead of their use, into L2: the hardware does not follow strides of pages.
template <int kLocality = 2, typename T>
PYFAST_ALWAYS_INLINE void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < size; j += kLine) __builtin_prefetch(row + j, 0, kLocality);
}
template <typename T>
inline void prefetch(const Rows<T>& rows) {
  for (int64_t r = 0; r < rows.count; ++r) prefetch_row(rows.row(r), rows.size);
}

inline float to_float(int8_t value) { return static_cast<float>(value); }

template <typename T>
PYFAST_ALWAYS_INLINE Lanes load_lanes_of(const T* from, int64_t n) {
  return n >= kLanes ? Lanes::load(from) : Lanes::load(from, static_cast<int>(n));
}
template <>
PYFAST_ALWAYS_INLINE Lanes load_lanes_of(const int8_t* from, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 valid = n >= kLanes ? 0xFFFF : Lanes::first(static_cast<int>(n));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(valid, from)))};
#else
  float values[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) values[i] = static_cast<float>(from[i]);
  return Lanes::load(values);
#endif
}

#if defined(__AVX512BF16__)
// 32 elements of a row, zero from `n` on.
PYFAST_ALWAYS_INLINE __m512i load_bits(const BFloat16* from, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(from);
  return n > 0 ? _mm512_maskz_loadu_epi16((1u << n) - 1u, from) : _mm512_setzero_si512();
}
PYFAST_ALWAYS_INLINE void copy_pairs(const BFloat16* from, int64_t size, uint32_t* to,
                                     int64_t num_units) {
  for (int64_t u = 0; u < num_units; u += kLanes) {
    _mm512_storeu_si512(to + u, load_bits(from + 2 * u, size - 2 * u));
  }
}
#endif

// The row as units, zero up to num_units, a multiple of kLanes.
template <typename Unit, typename T>
inline void pack_row(const T* from, int64_t size, uint32_t* to, int64_t num_units) {
  if constexpr (Unit::kElements == 1) {
    float* const floats = reinterpret_cast<float*>(to);
    for (int64_t u = 0; u < num_units; u += kLanes) {
      const Lanes value = u < size ? load_lanes_of(from + u, size - u) : Lanes::broadcast(0.0f);
      value.store(floats + u);
    }
  } else if constexpr (sizeof(T) == 2) {
    copy_pairs(from, size, to, num_units);
  } else {
    BFloat16* const pairs = reinterpret_cast<BFloat16*>(to);
    for (int64_t i = 0; i < 2 * num_units; i += kLanes) {
      const Lanes value = i < size ? load_lanes_of(from + i, size - i) : Lanes::broadcast(0.0f);
      value.store(pairs + i);
    }
  }
}

template <typename Unit>
constexpr int64_t units_of(int64_t size) {
  return (size + Unit::kElements - 1) / Unit::kElements;
}
constexpr int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

constexpr int64_t kMaxUnits = 256;  // of a row: the largest head size in floats

// to[unit * stride + row] for all rows, zero up to whole lanes of rows.
template <typename Unit, typename T>
inline void pack_transposed(const Rows<T>& rows, uint32_t* to, int64_t stride) {
  alignas(64) uint32_t block[kLanes * kMaxUnits];
  const int64_t num_units = whole_lanes(units_of<Unit>(rows.size));
  for (int64_t first = 0; first < rows.count; first += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) {
      const bool exists = first + r < rows.count;
      pack_row<Unit>(exists ? rows.row(first + r) : rows.data, exists ? rows.size : 0,
                     block + r * num_units, num_units);
    }
    for (int64_t u = 0; u < num_units; u += kLanes) {
      transpose_block(block + u, num_units, to + u * stride + first, stride);
    }
  }
}

// Two vectors of floats, the elements of even and of odd units, as pairs of bfloat16.
#if defined(__AVX512BF16__)
PYFAST_ALWAYS_INLINE void store_pairs(Lanes even, Lanes odd, uint32_t* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}
#endif

#if defined(__AVX512BF16__)
// 32 elements of two rows as pairs.
PYFAST_ALWAYS_INLINE void store_interleaved(__m512i even, __m512i odd, uint32_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high, odd));
}
// Two rows as pairs; the second may be null.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t size, uint32_t* to,
                       int64_t stride) {
  for (int64_t j = 0; j < stride; j += 32) {
    const __m512i a = load_bits(even + j, size - j);
    const __m512i b = odd == nullptr ? _mm512_setzero_si512() : load_bits(odd + j, size - j);
    store_interleaved(a, b, to + j);
  }
}
#endif

// The right operand whose units are rows (pairs of rows): to[unit * stride + column], columns zero
// up to the stride, a multiple of kLanes.
template <typename Unit, typename T>
inline void pack_rows(const Rows<T>& rows, uint32_t* to, int64_t stride) {
  if constexpr (Unit::kElements == 1) {
    for (int64_t r = 0; r < rows.count; ++r) {
      pack_row<Unit>(rows.row(r), rows.size, to + r * stride, stride);
    }
  }
#if defined(__AVX512BF16__)
  if constexpr (Unit::kElements == 2) {
    for (int64_t r = 0; r < rows.count; r += 2) {
      const bool has_odd = r + 1 < rows.count;
      if constexpr (sizeof(T) == 2) {
        interleave(rows.row(r), has_odd ? rows.row(r + 1) : nullptr, rows.size, to + r / 2 * stride,
                   stride);
        continue;
      }
      for (int64_t j = 0; j < stride; j += kLanes) {
        const int64_t left = rows.size - j;
        const Lanes even = left > 0 ? load_lanes_of(rows.row(r) + j, left) : Lanes::broadcast(0.0f);
        const Lanes odd =
            left > 0 && has_odd ? load_lanes_of(rows.row(r + 1) + j, left) : Lanes::broadcast(0.0f);
        store_pairs(even, odd, to + r / 2 * stride + j);
      }
    }
  }
#endif
}

// The rows as a left operand: where they are if they can be read as units there, else packed.
template <typename Unit, typename T>
inline LeftOperand left_operand(const Rows<T>& rows, uint32_t* buffer) {
  constexpr bool kSameType = sizeof(T) * Unit::kElements == 4;
  if constexpr (kSameType) {
    if (rows.size % Unit::kElements == 0 && rows.stride % Unit::kElements == 0) {
      return {reinterpret_cast<const uint32_t*>(rows.data), rows.stride / Unit::kElements};
    }
  }
  const int64_t stride = whole_lanes(units_of<Unit>(rows.size));
  for (int64_t r = 0; r < rows.count; ++r) {
    pack_row<Unit>(rows.row(r), rows.size, buffer + r * stride, stride);
  }
  return {buffer, stride};
}

// The rows as a right operand whose units are rows; `columns` is whole_lanes(rows.size).
template <typename Unit, typename T>
inline RightOperand right_operand(const Rows<T>& rows, uint32_t* buffer, int64_t columns) {
  if constexpr (sizeof(T) == 4 && Unit::kElements == 1) {
    if (rows.size == columns) return {reinterpret_cast<const uint32_t*>(rows.data), rows.stride};
  }
  pack_rows<Unit>(rows, buffer, columns);
  return {buffer, columns};
}

// Rows of a right operand with NaN or Inf. What is masked out has a weight of zero, and zero times
// NaN is NaN: such rows are multiplied as zeros, then added for the weights that are not zero.
constexpr int64_t kMaxBlockRows = 512;
struct UnsafeRows {
  int count = 0;
  int16_t rows[kMaxBlockRows];
};

template <typename T>
inline void find_unsafe(const Rows<T>& rows, UnsafeRows* found) {
  found->count = 0;
  if constexpr (sizeof(T) == 1) return;  // int8
  const Lanes infinity = Lanes::broadcast(bits_to_float(0x7F800000u));
  constexpr uint32_t kAll = (1u << kLanes) - 1u;
  for (int64_t r = 0; r < rows.count; ++r) {
    uint32_t finite = kAll;
    for (int64_t j = 0; j < rows.size; j += kLanes) {
      finite &= less(magnitude(load_lanes_of(rows.row(r) + j, rows.size - j)), infinity);
    }
    if (finite != kAll) found->rows[found->count++] = static_cast<int16_t>(r);
  }
}

// right_operand with zeros in place of the unsafe rows.
template <typename Unit, typename T>
inline RightOperand safe_right_operand(const Rows<T>& rows, uint32_t* buffer, int64_t columns,
                                       const UnsafeRows& unsafe) {
  if (unsafe.count == 0) return right_operand<Unit>(rows, buffer, columns);
  pack_rows<Unit>(rows, buffer, columns);
  for (int i = 0; i < unsafe.count; ++i) {
    const int64_t row = unsafe.rows[i];
    if constexpr (Unit::kElements == 1) {
      for (int64_t j = 0; j < columns; ++j) buffer[row * columns + j] = 0;
    } else {
      const uint32_t other = row % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu;
      for (int64_t j = 0; j < columns; ++j) buffer[row / 2 * columns + j] &= other;
    }
  }
  return {buffer, columns};
}

// The products of the unsafe rows: weights of zero hide them.
template <typename Unit, bool kTransposed, typename T>
inline void add_unsafe(const UnsafeRows& unsafe, const Rows<T>& rows, LeftOperand a, Product c,
                       int64_t num_rows) {
  for (int i = 0; i < unsafe.count; ++i) {
    const int64_t k = unsafe.rows[i];
    const int64_t unit = k / Unit::kElements;
    for (int64_t r = 0; r < num_rows; ++r) {
      const uint32_t bits = kTransposed ? a.data[unit * a.stride + r] : a.data[r * a.stride + unit];
      const float weight = Unit::kElements == 1 ? bits_to_float(bits)
                           : k % 2 == 0         ? bits_to_float(bits << 16)
                                                : bits_to_float(bits & 0xFFFF0000u);
      if (weight == 0.0f) continue;
      for (int64_t j = 0; j < rows.size; ++j) {
        c.data[r * c.stride + j] += weight * to_float(rows.row(k)[j]);
      }
    }
  }
}

}  // namespace pyfast::PYFAST_ISA
