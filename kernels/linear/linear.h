// y = x * weight^T + bias for few rows of x, all of one dtype. The weights are read once: up to
// some 32 rows that is what the product is bound by, at the speed of memory.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace pyfast {

struct LinearParams {
  const void* x;       // [m, k]
  const void* weight;  // [n, k]
  const void* bias;    // [n], or null
  void* y;             // [m, n]
  DType dtype;         // float32, bfloat16 or float16
  int64_t m;           // up to kMostLinearRows
  int64_t n;
  int64_t k;
};

constexpr int64_t kMostLinearRows = 128;

PYFAST_CPU_PRODUCT_KERNEL(linear_cpu, LinearParams);

}  // namespace pyfast
