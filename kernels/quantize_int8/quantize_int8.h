// Quantization to int8. A block is `block_size` consecutive elements of a row, the last of a row
// may be shorter; it has one scale. The rule, to the bit on every backend
// (quantize_int8_reference.py): everything in float32; v = x * smooth; scale = absmax / 127, or
// with a zero point (max / 2 - min / 2) / 127.5 over the values and 0; 1 where that is 0; value =
// round(v / scale), halves to even, clamped. A block with NaN or Inf: scale NaN, values 0.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace pyfast {

struct QuantizeInt8Params {
  const void* x;          // [num_rows, row_size] of dtype
  const float* scale_in;  // null, one value, or one per block
  bool has_one_scale_in;
  const float* smooth;  // [row_size], or null
  int8_t* values;       // [num_rows, row_size]
  float* scale;         // [num_rows, blocks of a row]
  int32_t* zero_point;  // the same, or null: symmetric
  DType dtype;
  int64_t num_rows;
  int64_t row_size;
  int64_t block_size;
};

PYFAST_CPU_KERNEL(quantize_int8_cpu, QuantizeInt8Params);

const char* quantize_int8_cuda(const QuantizeInt8Params& params, void* stream);

}  // namespace pyfast
