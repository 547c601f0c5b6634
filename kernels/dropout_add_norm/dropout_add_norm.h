// z = residual + dropout(x), rounded to the storage type; y = norm(z) * weight + bias, where norm
// is LayerNorm or RMSNorm over the columns. Backward: dz = d norm + grad_z, grad_residual = dz,
// grad_x = keep ? dz * scale : 0, grad_weight and grad_bias are column sums. Computed in float
// (double for double). Matrices are contiguous; weight, bias, mean, rstd and their gradients are in
// the compute type. With `values`, y (as it is rounded) is also quantized to int8, each row by the
// rule of quantize_int8_reference.py with a scale of its own.
//
// Row sums have one order on every backend. Element i of a row belongs to virtual thread
// (i / 8) % 32 of virtual warp (i / 256) % W, with W = row_warps(num_columns); a lane adds its
// elements in order; then the upper half of the warps, of the threads, and of the 8 elements of a
// thread is added to the lower half until one sum is left.
#pragma once

#include <cstdint>

#include "../common/cuda_device.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/seed.h"

namespace pyfast {

struct DropoutAddNormParams {
  const void* x;         // [num_rows, num_columns]
  const void* residual;  // [num_rows, num_columns] or null: zero
  const void* weight;    // [num_columns] or null: one
  const void* bias;      // [num_columns] or null: zero
  void* y;               // [num_rows, num_columns] or null: not wanted (with values alone)
  void* z;               // [num_rows, num_columns] or null: not wanted
  void* mean;            // [num_rows]; null for RMSNorm
  void* rstd;            // [num_rows]
  int8_t* values;        // [num_rows, num_columns] or null: not wanted
  float* value_scale;    // [num_rows], with values
  void* workspace;       // CPU: workspace_bytes per thread
  DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  Seed seed;
  uint32_t stream;
  uint32_t threshold;
  double scale;
  double eps;
  bool rms;
};

struct DropoutAddNormBackwardParams {
  const void* grad_y;   // [num_rows, num_columns]
  const void* grad_z;   // [num_rows, num_columns] or null: zero
  const void* z;        // [num_rows, num_columns]
  const void* weight;   // [num_columns] or null: one
  const void* mean;     // [num_rows]; null for RMSNorm
  const void* rstd;     // [num_rows]
  void* grad_x;         // [num_rows, num_columns]
  void* grad_residual;  // [num_rows, num_columns] or null: not wanted
  void* partial;        // [2, num_chunks, num_columns]: scratch
  void* grad_weight;    // [num_columns]
  void* grad_bias;      // [num_columns]
  void* workspace;      // CPU: workspace_bytes per thread
  DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  Seed seed;
  uint32_t stream;
  uint32_t threshold;
  double scale;
  bool rms;
};

// The virtual warps of a row, a power of two from 1 to 8.
static inline int row_warps(int64_t num_columns) {
  int warps = 1;
  while (warps < 8 && int64_t{256} * warps < num_columns) warps *= 2;
  return warps;
}

// Of one CPU thread: a row and the lanes of all virtual warps twice, in the compute type; and a row
// of y.
static inline int64_t sums_bytes(int64_t num_columns) {
  return (num_columns + 3 * 256 * row_warps(num_columns)) * 8 / 64 * 64;
}
static inline int64_t workspace_bytes(int64_t num_columns) {
  return sums_bytes(num_columns) + (num_columns + 7) / 8 * 64;
}

PYFAST_CPU_KERNEL(dropout_add_norm_cpu, DropoutAddNormParams);
PYFAST_CPU_KERNEL(dropout_add_norm_backward_cpu, DropoutAddNormBackwardParams);
PYFAST_CUDA_KERNEL(dropout_add_norm_cuda, DropoutAddNormParams);
PYFAST_CUDA_KERNEL(dropout_add_norm_backward_cuda, DropoutAddNormBackwardParams);

}  // namespace pyfast
