// How a row is spread over threads, and eight elements of it as a thread holds them.
#pragma once

#include "../common/launch.cuh"

namespace pyfast::PYFAST_ISA {

// A row is shared by kRowWarps_ warps. A thread owns eight consecutive elements of each of its
// groups; the groups of one pass belong to kVirtual_ virtual warps of dropout_add_norm.h, as many
// as kRowWarps_ * kVirtual_ is more than a narrow row has: what is added for these is zero. With
// kPasses_ = 0 there are as many passes as the row needs, and nothing is held between two of them.
template <int kRowWarps_, int kVirtual_, int kPasses_, bool kAligned_>
struct Shape {
  static constexpr int kRowWarps = kRowWarps_, kVirtual = kVirtual_, kPasses = kPasses_;
  static constexpr bool kAligned = kAligned_, kHolds = kPasses > 0;
  static constexpr int kGroups = kHolds ? kVirtual * kPasses : 1;
  static constexpr int kRowThreads = kRowWarps * 32;
  static constexpr int kStep = kRowThreads * 8;
  static constexpr int kRows = kRowWarps == 1 ? 4 : 1;  // of a block
  static constexpr int kThreads = kRowThreads * kRows;
  static_assert(kHolds || kVirtual == 1, "a group that is not held has one virtual warp");
};

// Calls f with the shape for a row, of which kHeldBytes an element are held, so that a thread holds
// 64 words or less but in the widest rows.
template <int kHeldBytes, typename F>
const char* with_shape(int64_t num_columns, bool aligned, const F& f) {
  constexpr bool kNarrow = kHeldBytes <= 8;
  if (!aligned) {
    if (num_columns > 1024) return f(Shape<8, 1, 0, false>{});
    return f(Shape<kNarrow ? 1 : 4, kNarrow ? 4 : 1, 1, false>{});
  }
  if (num_columns <= 256) return f(Shape<1, 1, 1, true>{});
  if (num_columns <= 1024) return f(Shape<kNarrow ? 1 : 4, kNarrow ? 4 : 1, 1, true>{});
  if constexpr (kNarrow) {
    constexpr bool kOneWarp = kHeldBytes <= 4;
    if (num_columns <= 2048) return f(Shape<kOneWarp ? 1 : 4, kOneWarp ? 8 : 2, 1, true>{});
    if (num_columns <= 4096) return f(Shape<4, 2, 2, true>{});
    if (num_columns <= 8192) return f(Shape<8, 1, 4, true>{});
    if (num_columns <= 16384) return f(Shape<8, 1, 8, true>{});
  } else {
    if (num_columns <= 2048) return f(Shape<8, 1, 1, true>{});
    if (num_columns <= 4096) return f(Shape<8, 1, 2, true>{});
  }
  return f(Shape<8, 1, 0, true>{});
}

// Calls f(group, column) for the groups of a thread that are in the row; `group` is 0 where none is
// held.
template <typename S, typename F>
__device__ __forceinline__ void for_each_group(int64_t num_columns, const F& f) {
  const int64_t first = static_cast<int64_t>(threadIdx.x % S::kRowThreads) * 8;
  if constexpr (S::kHolds) {
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const int64_t column = first + group * S::kStep;
      if (column < num_columns) f(group, column);
    }
  } else {
    for (int64_t column = first; column < num_columns; column += S::kStep) f(0, column);
  }
}

// Eight elements as memory has them: several loads are in flight before one is converted, and what
// is held takes no more registers than bytes.
template <typename T>
struct Raw8 {
  static constexpr int kWords = 2 * static_cast<int>(sizeof(T));
  uint32_t words[kWords];

  __device__ __forceinline__ T get_stored(int e) const {
    T value;
    if constexpr (sizeof(T) == 2) {
      value.bits = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
    } else {
      memcpy(&value, words + e * static_cast<int>(sizeof(T) / 4), sizeof(T));
    }
    return value;
  }
  __device__ __forceinline__ typename ComputeType<T>::type get(int e) const {
    return to_float(get_stored(e));
  }
  __device__ __forceinline__ void set_stored(int e, T value) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t bits = value.bits;
      words[e / 2] = e % 2 != 0 ? words[e / 2] | bits << 16 : bits;
    } else {
      memcpy(words + e * static_cast<int>(sizeof(T) / 4), &value, sizeof(T));
    }
  }
  __device__ __forceinline__ void set(const typename ComputeType<T>::type (&values)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      T stored;
      from_float(values[e], &stored);
      set_stored(e, stored);
    }
  }
};

// The elements from `from` on, `count` of them where they are not aligned; the others are zero.
template <bool kAligned, typename T>
__device__ __forceinline__ Raw8<T> load_raw8(const T* from, int count) {
  Raw8<T> raw;
  if constexpr (kAligned) {
#pragma unroll
    for (int first = 0; first < Raw8<T>::kWords; first += 4) {
      const Pack<uint32_t> pack = load_pack(reinterpret_cast<const uint32_t*>(from) + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[first + i] = pack.v[i];
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      T value = {};
      if (e < count) value = from[e];
      raw.set_stored(e, value);
    }
  }
  return raw;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_raw8(const Raw8<T>& raw, T* to, int count) {
  if constexpr (kAligned) {
#pragma unroll
    for (int first = 0; first < Raw8<T>::kWords; first += 4) {
      Pack<uint32_t> pack;
#pragma unroll
      for (int i = 0; i < 4; ++i) pack.v[i] = raw.words[first + i];
      store_pack(pack, reinterpret_cast<uint32_t*>(to) + first);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = raw.get_stored(e);
    }
  }
}

}  // namespace pyfast::PYFAST_ISA
