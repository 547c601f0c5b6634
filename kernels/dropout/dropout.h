// Dropout: y = keep ? x * scale + shift : fill, for plain (shift -0.0, fill 0), alpha and feature
// dropout, and for the backward pass of each, which is the same map with another shift and fill.
// The mask is a strided operand of its own: mask_strides turn an element's coordinates into the
// index that decides its fate, so that channels (feature dropout) and any memory order are layouts.
#pragma once

#include <cstdint>

#include "../common/cuda_device.h"
#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/seed.h"

namespace pyfast {

constexpr int kMaxDims = 64;

struct DropoutParams {
  const void* x;
  void* y;  // may be x
  DType dtype;
  int ndim;                        // at least 1; dimensions are in the order of iteration
  int64_t sizes[kMaxDims];         // [ndim], none is zero
  int64_t x_strides[kMaxDims];     // [ndim], elements
  int64_t y_strides[kMaxDims];     // [ndim], elements
  int64_t mask_strides[kMaxDims];  // [ndim], mask indices
  int64_t num_elements;
  Seed seed;
  uint32_t stream;
  uint32_t threshold;  // an element is kept iff its 16 bits are at least this; 65536 drops all
  double scale;
  double shift;
  double fill;
};

PYFAST_CPU_KERNEL(dropout_cpu, DropoutParams);
PYFAST_CUDA_KERNEL(dropout_cuda, DropoutParams);

}  // namespace pyfast
