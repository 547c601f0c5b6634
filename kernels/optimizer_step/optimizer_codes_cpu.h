// The rarer forms of an operand: strided, int8 with scales, stochastically rounded, with a master
// copy. Up to 256 elements at a time are brought into a buffer of the type that they are computed
// in and back. Loops are plain, and vectorised by the compiler.
#pragma once

#include "optimizer_codes_lanes.h"

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

// One block of int8 states, of n elements, to `to` and back from it; a tail of a vector goes
// element by element.
inline void decode_block(const uint8_t* codes, float scale, bool is_signed, int n, float* to) {
  using V = Vec<float>;
  int j = 0;
  for (; j + V::kLanes <= n; j += V::kLanes) {
    decode_lanes(codes + j, is_signed, V::broadcast(scale)).store(to + j);
  }
  for (; j < n; ++j) {
    to[j] = (is_signed ? signed_value(codes[j]) : positive_value(codes[j])) * scale;
  }
}

// `begin` is the index of the first element in its tensor. Returns the scale.
inline float encode_block(const float* from, int64_t begin, bool is_signed, uint32_t salt, int n,
                          uint8_t* codes) {
  using V = Vec<float>;
  StagedState staged = {};
  LargestLanes largest;
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    staged.put(static_cast<int>(j), load_lanes<V>(from + j, lanes), is_signed, &largest);
  });
  const uint32_t bits = largest.bits();
  staged.finish(bits);
  float inverse;
  const float scale = code_scale(bits, &inverse);
  DitherLanes dither(begin, salt);
  int j = 0;
  for (; j + DitherGroup::kElements <= n; j += DitherGroup::kElements) {
    staged.encode(j, is_signed, V::broadcast(inverse), DitherGroup(&dither).lanes, codes + j);
  }
  for (; j < n; ++j) {
    const uint32_t d = code_dither(static_cast<uint64_t>(begin + j), salt);
    codes[j] = is_signed ? signed_code(from[j] * inverse, d) : positive_code(from[j] * inverse, d);
  }
  return scale;
}

// The 16 random bits of elements begin to begin + 256, of which `begin` is a multiple.
inline void element_bits(uint64_t key, int64_t begin, uint16_t (&bits)[kOptimizerBlock]) {
  static_assert(kOptimizerBlock == 64 * kKeepBlocks, "one call of Philox");
  random_words256(key, kStochasticRoundingStream, static_cast<uint64_t>(begin) / 64, bits);
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
