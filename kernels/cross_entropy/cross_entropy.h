// The loss of classes, and its gradient, from logits as they are: nothing of their size is made but
// the gradient. loss = (1 - s) * (lse - x[target]) + s * (lse - mean(x)), lse = log(sum(exp(x))),
// which is kept as two numbers: their sum would lose what large logits hide.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"

namespace pyfast {

struct CrossEntropyParams {
  const void* logits;     // [num_rows, num_columns]
  const int64_t* target;  // [num_rows], classes; where it is ignore_index the loss is 0
  float* loss;            // [num_rows]
  float* lse;             // [2, num_rows]: the largest logit, log(sum(exp(x - largest)))
  DType dtype;            // float32, bfloat16 or float16
  int64_t num_rows;
  int64_t num_columns;
  int64_t ignore_index;
  float smoothing;
};

struct CrossEntropyBackwardParams {
  const float* grad;  // [num_rows]
  const void* logits;
  const int64_t* target;
  const float* lse;
  void* grad_logits;
  DType dtype;
  int64_t num_rows;
  int64_t num_columns;
  int64_t ignore_index;
  float smoothing;
};

PYFAST_CPU_KERNEL(cross_entropy_cpu, CrossEntropyParams);
PYFAST_CPU_KERNEL(cross_entropy_backward_cpu, CrossEntropyBackwardParams);

}  // namespace pyfast
