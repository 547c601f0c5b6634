// What the CPU kernels over contiguous rows share: the vectors of a row with its tail, and stores
// that bypass the cache where a whole output does not fit there.
#pragma once

#include "vec.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kStreamBytes = int64_t{32} << 20;  // larger than most last-level caches
constexpr int64_t kMinElementsPerThread = 16384;     // below, a second thread does not pay

inline int64_t useful_threads(int64_t num_elements, int64_t num_threads) {
  const int64_t useful = num_elements / kMinElementsPerThread;
  return num_threads < useful ? num_threads : useful;
}

// True when every row of `to` may be written with Vec::stream.
template <typename T>
inline bool streams(const T* to, int64_t num_rows, int64_t num_columns) {
  const int64_t row_bytes = num_columns * static_cast<int64_t>(sizeof(T));
  return num_rows * row_bytes >= kStreamBytes && (num_rows == 1 || row_bytes % 64 == 0) &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Calls f(j, lanes) for the vectors of a row of n elements.
template <typename V, typename F>
inline void for_each_vec(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + V::kLanes <= n; j += V::kLanes) f(j, static_cast<int>(V::kLanes));
  if (j < n) f(j, static_cast<int>(n - j));
}

template <typename V, typename T>
inline V load_lanes(const T* from, int lanes) {
  return lanes == V::kLanes ? V::load(from) : V::load(from, lanes);
}

template <typename V, typename T>
inline void store_lanes(const V& value, T* to, int lanes, bool stream) {
  if (lanes != V::kLanes) {
    value.store(to, lanes);
  } else if (stream) {
    value.stream(to);
  } else {
    value.store(to);
  }
}

// The value that is left after a store to T and a load.
template <typename T, typename V>
inline V rounded_to(const V& value) {
  if constexpr (sizeof(T) < 4) {
    T stored[V::kLanes];
    value.store(stored);
    return V::load(stored);
  } else {
    return value;
  }
}

}  // namespace pyfast::PYFAST_ISA
