// The rarer forms of an operand: strided, int8 with scales, stochastically rounded, with a master
// copy. Up to 256 elements at a time are brought into a buffer of the type that they are computed
// in and back. Loops are plain, and vectorised by the compiler.
#pragma once

#include "../common/row_blocks.h"
#include "optimizer_math.h"

namespace pyfast::PYFAST_ISA {

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

template <typename T>
void store_scalar(double value, T* to) {
  from_float(static_cast<typename ComputeType<T>::type>(value), to);
}

// A place in a strided tensor, from a row-major index on.
class StridedPosition {
 public:
  StridedPosition(const OptimizerLayout& layout, int operand, int64_t index)
      : layout_(layout), strides_(layout.strides[operand]) {
    for (int d = layout.ndim - 1; d >= 0; --d) {
      coordinates_[d] = index % layout.sizes[d];
      index /= layout.sizes[d];
      offset_ += coordinates_[d] * strides_[d];
    }
  }
  int64_t offset() const { return offset_; }
  void advance() {
    for (int d = layout_.ndim - 1; d >= 0; --d) {
      offset_ += strides_[d];
      if (++coordinates_[d] < layout_.sizes[d]) return;
      offset_ -= coordinates_[d] * strides_[d];
      coordinates_[d] = 0;
    }
  }

 private:
  const OptimizerLayout& layout_;
  const int64_t* strides_;
  int64_t coordinates_[kMaxOptimizerDims];
  int64_t offset_ = 0;
};

// `layout` is null for a dense operand.
template <typename T, typename C>
void gather(const T* from, const OptimizerLayout* layout, int operand, int64_t begin, int n,
            C* to) {
  if (layout == nullptr) {
    int j = 0;
    if constexpr (!is_same<T, double>) {
      for (; j + Vec<C>::kLanes <= n; j += Vec<C>::kLanes) {
        Vec<C>::load(from + begin + j).store(to + j);
      }
    }
    for (; j < n; ++j) to[j] = static_cast<C>(to_float(from[begin + j]));
    return;
  }
  StridedPosition position(*layout, operand, begin);
  for (int j = 0; j < n; ++j, position.advance()) {
    to[j] = static_cast<C>(to_float(from[position.offset()]));
  }
}

template <typename T, typename C>
void scatter(const C* from, int n, const OptimizerLayout* layout, int operand, int64_t begin,
             T* to) {
  if (layout == nullptr) {
    int j = 0;
    if constexpr (is_same<C, float> && !is_same<T, double>) {
      for (; j + Vec<C>::kLanes <= n; j += Vec<C>::kLanes) {
        Vec<C>::load(from + j).store(to + begin + j);
      }
    }
    for (; j < n; ++j) store_scalar(static_cast<double>(from[j]), to + begin + j);
    return;
  }
  StridedPosition position(*layout, operand, begin);
  for (int j = 0; j < n; ++j, position.advance()) {
    store_scalar(static_cast<double>(from[j]), to + position.offset());
  }
}

// One block of int8 states; all of its elements are in it.
inline void decode_block(const uint8_t* __restrict__ codes, float scale, bool is_signed, int n,
                         float* __restrict__ to) {
  if (is_signed) {
    for (int j = 0; j < n; ++j) to[j] = signed_value(codes[j]) * scale;
  } else {
    for (int j = 0; j < n; ++j) to[j] = positive_value(codes[j]) * scale;
  }
}

// `begin` is the index of the first element in its tensor. Returns the scale.
inline float encode_block(const float* __restrict__ from, int64_t begin, bool is_signed,
                          uint32_t salt, int n, uint8_t* __restrict__ codes) {
  int32_t largest = 0;
  for (int j = 0; j < n; ++j) {
    const int32_t bits = static_cast<int32_t>(float_to_bits(from[j]) & 0x7FFFFFFFu);
    largest = bits > largest ? bits : largest;
  }
  float inverse;
  const float scale = code_scale(static_cast<uint32_t>(largest), &inverse);
  const uint32_t first = static_cast<uint32_t>(begin);
  if (is_signed) {
    for (int j = 0; j < n; ++j) {
      codes[j] =
          signed_code(from[j] * inverse, code_dither(first + static_cast<uint32_t>(j), salt));
    }
  } else {
    for (int j = 0; j < n; ++j) {
      codes[j] =
          positive_code(from[j] * inverse, code_dither(first + static_cast<uint32_t>(j), salt));
    }
  }
  return scale;
}

// The 16 random bits of elements begin to begin + n; `begin` is a multiple of 8.
inline void element_bits(uint64_t key, int64_t begin, int n, uint16_t* bits) {
  for (int j = 0; j < n; j += 8) {
    const uint64_t group = static_cast<uint64_t>(begin + j) / 8;
    const PhiloxWords words =
        philox(key, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0,
               kStochasticRoundingStream);
    memcpy(bits + j, words.w, 16);
  }
}

// Calls f(j, offset) for n elements from row-major index `begin` on.
template <typename F>
inline void for_each_element(const OptimizerLayout* layout, int operand, int64_t begin, int n,
                             const F& f) {
  if (layout == nullptr) {
    for (int j = 0; j < n; ++j) f(j, begin + j);
    return;
  }
  StridedPosition position(*layout, operand, begin);
  for (int j = 0; j < n; ++j, position.advance()) f(j, position.offset());
}

}  // namespace pyfast::PYFAST_ISA
