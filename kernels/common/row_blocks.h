// What the CPU kernels over contiguous rows share: the keep bits of a block of columns, its vectors
// with the tail, and stores that bypass the cache where a whole output does not fit there.
#pragma once

#include "keep_bits.h"
#include "vec.h"

// A loop body is worth inlining twice: once for whole vectors, once for the tail.
#define PYFAST_ALWAYS_INLINE inline __attribute__((always_inline))
#define PYFAST_INLINE_LAMBDA __attribute__((always_inline))
#define PYFAST_UNROLL _Pragma("GCC unroll 8")

namespace pyfast::PYFAST_ISA {

constexpr int64_t kStreamBytes = int64_t{32} << 20;  // larger than most last-level caches
constexpr int64_t kMinElementsPerThread = 16384;     // below, a second thread does not pay

inline int64_t useful_threads(int64_t num_elements, int64_t num_threads) {
  const int64_t useful = num_elements / kMinElementsPerThread;
  return num_threads < useful ? num_threads : useful;
}

// True when every row of `to`, one of `num_operands` matrices of its size, may be written with
// Vec::stream, and all of them together do not fit into the cache.
template <typename T>
inline bool streams(const T* to, int64_t num_rows, int64_t num_columns, int64_t num_operands) {
  const int64_t row_bytes = num_columns * static_cast<int64_t>(sizeof(T));
  return num_operands * num_rows * row_bytes >= kStreamBytes &&
         (num_rows == 1 || row_bytes % 64 == 0) && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Calls f(begin, end, bits) for one block of the columns of a row after the other; keep_lanes finds
// the fate of a column in `bits`. Small blocks leave the processor room to draw the bits of one
// while it waits for the memory of another; those that do not start at a multiple of 64 elements
// have a word more to draw, and are larger. `first` is the index of the row's first element.
template <typename F>
PYFAST_ALWAYS_INLINE void for_each_block(const KeepRule& rule, int64_t first, int64_t num_columns,
                                         const F& f) {
  uint64_t bits[24];  // keep_words(1024)
  const int64_t block = (num_columns | first) % 64 == 0 ? 256 : 1024;
  for (int64_t begin = 0; begin < num_columns; begin += block) {
    const int64_t count = num_columns - begin < block ? num_columns - begin : block;
    fill_keep_bits(rule, static_cast<uint64_t>(first + begin), count, bits);
    f(begin, begin + count, bits - begin / 64);
  }
}

// The fate of the columns from j on, in the lowest bits.
inline uint64_t keep_lanes(const uint64_t* bits, int64_t j) { return bits[j / 64] >> (j % 64); }

// Calls f(j, lanes) for the vectors of columns begin to end.
template <typename V, typename F>
PYFAST_ALWAYS_INLINE void for_each_vec(int64_t begin, int64_t end, const F& f) {
  int64_t j = begin;
  for (; j + V::kLanes <= end; j += V::kLanes) f(j, static_cast<int>(V::kLanes));
  if (j < end) f(j, static_cast<int>(end - j));
}

template <typename V, typename T>
PYFAST_ALWAYS_INLINE V load_lanes(const T* from, int lanes) {
  return lanes == V::kLanes ? V::load(from) : V::load(from, lanes);
}

template <typename V, typename T>
PYFAST_ALWAYS_INLINE void store_lanes(const V& value, T* to, int lanes, bool stream) {
  if (lanes != V::kLanes) {
    value.store(to, lanes);
  } else if (stream) {
    value.stream(to);
  } else {
    value.store(to);
  }
}

}  // namespace pyfast::PYFAST_ISA
