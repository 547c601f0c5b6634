// Matrices are contiguous with one number of elements; the last dimension is the columns.
#include "../kernels/dropout_add_norm/dropout_add_norm.h"

#include <memory>

#include "../kernels/common/column_sum.h"
#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

std::unique_ptr<char[]> make_workspace(const Tensor& tensor, int num_threads, int64_t num_columns) {
  if (!tensor.is_cpu()) return nullptr;
  return std::unique_ptr<char[]>(new char[num_threads * workspace_bytes(num_columns) + 64]);
}

void* aligned(char* pointer) {
  return pointer + (64 - reinterpret_cast<uintptr_t>(pointer) % 64) % 64;
}

void dropout_add_norm(const Tensor& x, py::object residual, py::object weight, py::object bias,
                      py::object y, py::object z, py::object mean, py::object rstd,
                      py::object values, py::object value_scale, py::object seed, int64_t threshold,
                      int64_t stream, double scale, double eps, bool rms, int64_t num_columns,
                      int num_threads) {
  const char* name = "dropout_add_norm";
  DropoutAddNormParams params = {};
  params.dtype = x.dtype("dropout_add_norm: x");
  if (x.num_elements() == 0) return;
  Operands operands(name, x, params.dtype, num_columns);
  Tensor held[9];
  params.num_rows = operands.num_rows();
  params.x = operands.matrix("x", x);
  params.residual = operands.matrix("residual", residual, &held[0]);
  params.weight = operands.vector("weight", weight, &held[1], num_columns);
  params.bias = operands.vector("bias", bias, &held[2], num_columns);
  params.y = operands.matrix("y", y, &held[6]);
  params.z = operands.matrix("z", z, &held[3]);
  params.mean = operands.vector("mean", mean, &held[4], params.num_rows);
  params.rstd = operands.vector("rstd", rstd, &held[5], params.num_rows);
  if (params.rstd == nullptr || (params.mean == nullptr && !rms)) {
    throw py::value_error("dropout_add_norm: rstd is needed, and mean unless rms");
  }
  params.values = static_cast<int8_t*>(
      operands.typed("values", values, &held[7], dlpack::kInt, 8, x.num_elements()));
  params.value_scale = static_cast<float*>(
      operands.typed("value_scale", value_scale, &held[8], dlpack::kFloat, 32, params.num_rows));
  if ((params.values == nullptr) != (params.value_scale == nullptr) ||
      (params.y == nullptr && (params.values == nullptr || params.z == nullptr))) {
    throw py::value_error(
        "dropout_add_norm: values go with value_scale, and y is needed unless there are z and "
        "values");
  }
  Tensor seed_tensor;
  params.seed = seed_from(seed, &seed_tensor, x);
  const auto workspace = make_workspace(x, num_threads, num_columns);
  params.workspace = aligned(workspace.get());
  params.num_columns = num_columns;
  params.threshold = static_cast<uint32_t>(threshold);
  params.stream = static_cast<uint32_t>(stream);
  params.scale = scale;
  params.eps = eps;
  params.rms = rms;
  run_kernel(name, x, params, num_threads, dropout_add_norm_cpu_table, dropout_add_norm_cuda);
}

void dropout_add_norm_backward(const Tensor& grad_y, py::object grad_z, const Tensor& z,
                               py::object weight, py::object mean, py::object rstd,
                               const Tensor& grad_x, py::object grad_residual, py::object partial,
                               py::object grad_weight, py::object grad_bias, py::object seed,
                               int64_t threshold, int64_t stream, double scale, bool rms,
                               int64_t num_columns, int num_threads) {
  const char* name = "dropout_add_norm_backward";
  DropoutAddNormBackwardParams params = {};
  params.dtype = z.dtype("dropout_add_norm_backward: z");
  if (z.num_elements() == 0) return;
  Operands operands(name, z, params.dtype, num_columns);
  Tensor held[8];
  params.num_rows = operands.num_rows();
  params.grad_y = operands.matrix("grad_y", grad_y);
  params.grad_z = operands.matrix("grad_z", grad_z, &held[0]);
  params.z = operands.matrix("z", z);
  params.weight = operands.vector("weight", weight, &held[1], num_columns);
  params.mean = operands.vector("mean", mean, &held[2], params.num_rows);
  params.rstd = operands.vector("rstd", rstd, &held[3], params.num_rows);
  params.grad_x = operands.matrix("grad_x", grad_x);
  params.grad_residual = operands.matrix("grad_residual", grad_residual, &held[4]);
  params.partial =
      operands.vector("partial", partial, &held[5], 2 * num_chunks(params.num_rows) * num_columns);
  params.grad_weight = operands.vector("grad_weight", grad_weight, &held[6], num_columns);
  params.grad_bias = operands.vector("grad_bias", grad_bias, &held[7], num_columns);
  if (params.rstd == nullptr || (params.mean == nullptr && !rms) || params.partial == nullptr ||
      params.grad_weight == nullptr || params.grad_bias == nullptr) {
    throw py::value_error(
        "dropout_add_norm_backward: rstd, partial, grad_weight and grad_bias are needed, and mean "
        "unless rms");
  }
  Tensor seed_tensor;
  params.seed = seed_from(seed, &seed_tensor, z);
  const auto workspace = make_workspace(z, num_threads, num_columns);
  params.workspace = aligned(workspace.get());
  params.num_columns = num_columns;
  params.threshold = static_cast<uint32_t>(threshold);
  params.stream = static_cast<uint32_t>(stream);
  params.scale = scale;
  params.rms = rms;
  run_kernel(name, z, params, num_threads, dropout_add_norm_backward_cpu_table,
             dropout_add_norm_backward_cuda);
}

}  // namespace

void bind_dropout_add_norm(py::module_& m) {
  m.def("dropout_add_norm", &dropout_add_norm);
  m.def("dropout_add_norm_backward", &dropout_add_norm_backward);
}

}  // namespace pyfast
