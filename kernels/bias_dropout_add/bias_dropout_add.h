// y = residual + (keep ? (x + bias) * scale : 0), and its backward pass
// grad_x = keep ? grad * scale : 0, grad_bias = column sums of grad_x.
// Computed in float (double for double), rounded once. Matrices are contiguous.
#pragma once

#include <cstdint>

#include "../common/cuda_device.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/seed.h"

namespace pyfast {

struct BiasDropoutAddParams {
  const void* x;         // [num_rows, num_columns]
  const void* bias;      // [num_columns] in the compute type, or null
  const void* residual;  // [num_rows, num_columns]
  void* y;               // [num_rows, num_columns]
  DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  Seed seed;
  uint32_t stream;
  uint32_t threshold;
  double scale;
};

struct BiasDropoutAddBackwardParams {
  const void* grad;  // [num_rows, num_columns]
  void* grad_x;      // [num_rows, num_columns]
  void* partial;     // [num_chunks, num_columns] in the compute type: scratch
  void* grad_bias;   // [num_columns] in the compute type
  DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  Seed seed;
  uint32_t stream;
  uint32_t threshold;
  double scale;
};

PYFAST_CPU_KERNEL(bias_dropout_add_cpu, BiasDropoutAddParams);
PYFAST_CPU_KERNEL(bias_dropout_add_backward_cpu, BiasDropoutAddBackwardParams);
PYFAST_CUDA_KERNEL(bias_dropout_add_cuda, BiasDropoutAddParams);
PYFAST_CUDA_KERNEL(bias_dropout_add_backward_cuda, BiasDropoutAddBackwardParams);

}  // namespace pyfast
