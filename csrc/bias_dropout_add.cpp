// Matrices are contiguous with one number of elements; the last dimension is the columns.
#include "../kernels/bias_dropout_add/bias_dropout_add.h"

#include "../kernels/common/column_sum.h"
#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

void bias_dropout_add(const Tensor& x, py::object bias, const Tensor& residual, const Tensor& y,
                      py::object seed, int64_t threshold, int64_t stream, double scale,
                      int64_t num_columns, int num_threads) {
  const char* name = "bias_dropout_add";
  BiasDropoutAddParams params = {};
  params.dtype = x.dtype("bias_dropout_add: x");
  if (x.num_elements() == 0) return;
  Operands operands(name, x, params.dtype, num_columns);
  params.x = operands.matrix("x", x);
  params.residual = operands.matrix("residual", residual);
  params.y = operands.matrix("y", y);
  Tensor bias_tensor, seed_tensor;
  params.bias = operands.vector("bias", bias, &bias_tensor, num_columns);
  params.num_rows = operands.num_rows();
  params.num_columns = num_columns;
  params.seed = seed_from(seed, &seed_tensor, x);
  params.threshold = static_cast<uint32_t>(threshold);
  params.stream = static_cast<uint32_t>(stream);
  params.scale = scale;
  run_kernel(name, x, params, num_threads, bias_dropout_add_cpu_table, bias_dropout_add_cuda);
}

void bias_dropout_add_backward(const Tensor& grad, const Tensor& grad_x, py::object partial,
                               py::object grad_bias, py::object seed, int64_t threshold,
                               int64_t stream, double scale, int64_t num_columns, int num_threads) {
  const char* name = "bias_dropout_add_backward";
  BiasDropoutAddBackwardParams params = {};
  params.dtype = grad.dtype("bias_dropout_add_backward: grad");
  if (grad.num_elements() == 0) return;
  Operands operands(name, grad, params.dtype, num_columns);
  params.grad = operands.matrix("grad", grad);
  params.grad_x = operands.matrix("grad_x", grad_x);
  params.num_rows = operands.num_rows();
  Tensor partial_tensor, bias_tensor, seed_tensor;
  params.partial = operands.vector("partial", partial, &partial_tensor,
                                   num_chunks(params.num_rows) * num_columns);
  params.grad_bias = operands.vector("grad_bias", grad_bias, &bias_tensor, num_columns);
  params.num_columns = num_columns;
  params.seed = seed_from(seed, &seed_tensor, grad);
  params.threshold = static_cast<uint32_t>(threshold);
  params.stream = static_cast<uint32_t>(stream);
  params.scale = scale;
  run_kernel(name, grad, params, num_threads, bias_dropout_add_backward_cpu_table,
             bias_dropout_add_backward_cuda);
}

}  // namespace

void bind_bias_dropout_add(py::module_& m) {
  m.def("bias_dropout_add", &bias_dropout_add);
  m.def("bias_dropout_add_backward", &bias_dropout_add_backward);
}

}  // namespace pyfast
