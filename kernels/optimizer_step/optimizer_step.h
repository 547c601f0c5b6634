// One step of an optimizer (Adam, AdamW, SGD, RMSprop, Adamax, or none: averaging and scaling
// alone) over a list of tensors of any dtypes and layouts. The gradient is unscaled, clipped and
// negated by factors; then follow the update, the rounding of the parameter, and the average of it
// (EMA), in one pass over memory. The formulas are in optimizer_math.h.
#pragma once

#include <cstdint>

#include "../common/cuda_device.h"
#include "../common/dtype.h"
#include "../common/isa.h"

namespace pyfast {

enum class OptimizerRule : int { kNone, kAdam, kSgd, kRmsprop, kAdamax };

constexpr int kMaxOptimizerStates = 3;
constexpr int kOptimizerBlock = 256;  // elements that share a scale of int8 states
constexpr int kMaxOptimizerDims = 64;

// The operands of a tensor, in the order of the strides of a layout.
enum OptimizerOperand : int {
  kParameter,
  kGradient,
  kState0,
  kState1,
  kState2,
  kEma,
  kMaster,
  kNumOptimizerOperands,
};

// What is done with a tensor.
enum OptimizerFlag : uint32_t {
  kAmsgrad = 1,
  kNesterov = 2,
  kCentered = 4,
  kDecoupledDecay = 8,  // weight decay of the parameter, not of the gradient
  kDecoupledL1 = 16,    // soft threshold of the parameter, not a subgradient
  kMaximize = 32,
  kStochasticRounding = 64,  // of a bfloat16 parameter
  kZeroGradient = 128,
  kFirstStep = 256,  // SGD: the momentum buffer takes the gradient as it is
};

// The numbers of a parameter group. Adam and Adamax: beta1, beta2. RMSprop: beta2 is alpha.
struct OptimizerHyper {
  double lr, beta1, beta2, eps, weight_decay, momentum, dampening, l1, ema_decay;
};

// What the numbers of tensors that share a group and a step count are made of. A pointer, into the
// memory of the device, overrides the number beside it.
struct OptimizerSource {
  OptimizerHyper hyper;
  int64_t step;        // the one that is being made; the first is 1
  void* step_pointer;  // what has been counted so far; the CUDA kernel counts on
  const void* lr_pointer;
  const void* beta1_pointer;
  const void* beta2_pointer;
  DType step_type, lr_type, beta1_type, beta2_type;  // of the pointers: float32 or float64
  uint32_t flags;
};

// The numbers of a tensor at one step, made of a source by optimizer_numbers(): in double, or
// rounded to scalars or vectors of the type that the tensor is computed in.
template <typename V>
struct OptimizerNumbers {
  V gradient_scale, clip_scale;  // the sign of clip_scale is that of maximize
  V step_size, weight1, decay2, weight2, blend2, eps, root_scale, momentum;
  V decay, l2, l1, threshold, ema_weight;
  bool weight1_from_end, weight2_from_end, ema_from_end;
  bool amsgrad, nesterov, centered, has_momentum, is_first;
  bool has_scale, has_l2, has_l1, has_threshold;
  int64_t step;
};

// One tensor. All operands but the codes of int8 states have the shape of the parameter.
struct OptimizerTensor {
  void* operands[kNumOptimizerOperands];  // null: there is none
  float* scales[kMaxOptimizerStates];     // of int8 states: [ceil(num_elements / 256)]
  int64_t num_elements;
  uint64_t seed;  // of stochastic rounding and of the dither of int8 states
  DType dtypes[kNumOptimizerOperands];
  uint32_t flags;
  int32_t numbers;  // index
  int32_t layout;   // index; -1: one dense layout for all operands
  uint32_t index;   // of the parameter in its optimizer: enters the random bits
  bool int8_states;
  bool master_is_remainder;  // int16: the low half of a float32 whose upper half is the parameter
};

// Strides of a tensor whose operands differ in layout; elements are counted in row-major order.
struct OptimizerLayout {
  int32_t ndim;
  int64_t sizes[kMaxOptimizerDims];
  int64_t strides[kNumOptimizerOperands][kMaxOptimizerDims];  // elements
};

// A range of one tensor; ranges begin at multiples of kOptimizerBlock.
struct OptimizerItem {
  int32_t tensor;
  int32_t count;  // elements
  int64_t begin;
};

struct OptimizerStepParams {
  OptimizerRule rule;
  const OptimizerTensor* tensors;
  const OptimizerLayout* layouts;
  const OptimizerNumbers<double>* numbers;
  const OptimizerItem* items;
  const int64_t* pieces;  // [num_pieces + 1] first item of each piece of work
  int64_t num_pieces;
  bool write_gradient;     // write the gradient, times gradient_scale, back
  int64_t prefetch_bytes;  // how far ahead large tensors are fetched; 0: not at all
};

// The sum of the squares of the gradients of each piece, in double.
struct SquareSumParams {
  const OptimizerTensor* tensors;
  const OptimizerLayout* layouts;
  const OptimizerItem* items;
  const int64_t* pieces;
  int64_t num_pieces;
  double* sums;  // [num_pieces]
};

// The CUDA kernels take one table, a copy of which is kept on the device.
struct OptimizerCudaParams {
  OptimizerRule rule;
  OptimizerTensor* tensors;
  const OptimizerLayout* layouts;
  const OptimizerSource* sources;
  OptimizerNumbers<double>* numbers;  // of each source: written by a first small kernel
  const OptimizerItem* items;
  int64_t num_sources;
  int64_t num_items;
  double gradient_scale;
  const float* gradient_unscale;  // the gradient is divided by it; may be null
  const double* clip_scale;       // may be null
  const float* found_inf;         // the step is left out where it is not zero; may be null
  bool write_gradient;
  bool is_double;  // whether there are float64 parameters among the tensors
  double* sums;    // of the squares of each item, then of all: square_sum_cuda alone
};

// Brings `size` bytes to the device as arguments of kernels, those alone that differ from `before`:
// graphs capture that, and nothing waits.
struct OptimizerUploadParams {
  char* to;
  const char* from;
  const char* before;  // null: bring all
  int64_t size;
};

PYFAST_CUDA_KERNEL(optimizer_step_cuda, OptimizerCudaParams);
PYFAST_CUDA_KERNEL(square_sum_cuda, OptimizerCudaParams);
PYFAST_CUDA_KERNEL(optimizer_upload_cuda, OptimizerUploadParams);
PYFAST_CPU_KERNEL(optimizer_step_cpu, OptimizerStepParams);
PYFAST_CPU_KERNEL(square_sum_cpu, SquareSumParams);

}  // namespace pyfast
