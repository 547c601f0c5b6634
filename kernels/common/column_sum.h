// Sums over the rows of a matrix, in an order that is the same for every backend and any number of
// threads: rows are added in chunks of kChunkRows, in row order, and the chunks in chunk order.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyfast {

constexpr int64_t kChunkRows = 32;

static inline int64_t num_chunks(int64_t num_rows) {
  return (num_rows + kChunkRows - 1) / kChunkRows;
}

}  // namespace pyfast

namespace pyfast::PYFAST_ISA {

// out[column] = sum over chunks of partial[chunk, column], added in double: chunks may be
// thousands.
template <typename C>
PYFAST_HD void sum_chunks(const C* partial, C* out, int64_t chunks, int64_t num_columns,
                          int64_t column) {
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * num_columns + column];
  out[column] = static_cast<C>(sum);
}

// The same for columns [begin, end), a cache line of partials at a time.
template <typename C>
inline void sum_chunks_of(const C* partial, C* out, int64_t chunks, int64_t num_columns,
                          int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = end - first < kBlock ? end - first : kBlock;
    double sums[kBlock] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const C* row = partial + chunk * num_columns + first;
      for (int64_t j = 0; j < count; ++j) sums[j] += row[j];
    }
    for (int64_t j = 0; j < count; ++j) out[first + j] = static_cast<C>(sums[j]);
  }
}

}  // namespace pyfast::PYFAST_ISA
