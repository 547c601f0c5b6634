// y = activation(x * weight^T), weight int8 with one scale a row, as it lies in memory: nothing is
// packed or kept between calls. The rule is in int8_linear_reference.py.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace pyfast {

// In the order of ACTIVATIONS in the reference.
enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

struct Int8LinearParams {
  const void* x;              // [m, k] of x_dtype, or int8
  const int8_t* weight;       // [n, k]
  const float* weight_scale;  // [n]; null: y gets the int32 sums
  const void* bias;           // [n] of bias_dtype, or null
  const float* input_scale;   // of int8 x: [m]; else one value, or null
  const float* smooth;        // [k], or null
  void* y;                    // [m, n] of y_dtype, or int32
  DType x_dtype;
  DType y_dtype;
  DType bias_dtype;
  Activation activation;
  bool x_is_int8;
  bool weight_only;
  int64_t m;
  int64_t n;
  int64_t k;  // below 2^17, so that no sum overflows
};

PYFAST_CPU_PRODUCT_KERNEL(int8_linear_cpu, Int8LinearParams);

}  // namespace pyfast
