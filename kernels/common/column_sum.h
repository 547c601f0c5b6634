// Sums over the rows of a matrix, in an order that is the same for every backend and any number of
// threads: rows are added in chunks of kChunkRows, in row order, and the chunks in chunk order.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyfast {

constexpr int64_t kChunkRows = 32;

inline int64_t num_chunks(int64_t num_rows) { return (num_rows + kChunkRows - 1) / kChunkRows; }

}  // namespace pyfast

namespace pyfast::PYFAST_ISA {

// out[column] = sum over chunks of partial[chunk, column].
template <typename C>
PYFAST_HD void sum_chunks(const C* partial, C* out, int64_t chunks, int64_t num_columns,
                          int64_t column) {
  C sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * num_columns + column];
  out[column] = sum;
}

}  // namespace pyfast::PYFAST_ISA
