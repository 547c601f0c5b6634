// Blocks of rows to int8; all tensors are contiguous.
#include "../kernels/quantize_int8/quantize_int8.h"

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

void quantize_int8(const Tensor& x, py::object scale_in, py::object smooth, const Tensor& values,
                   const Tensor& scale, const Tensor& zero_point, int64_t row_size,
                   int64_t block_size, int num_threads) {
  const char* name = "quantize_int8";
  QuantizeInt8Params params = {};
  params.dtype = x.dtype("quantize_int8: x");
  const int64_t size = x.num_elements();
  if (size == 0) return;
  if (row_size < 1 || block_size < 1 || size % row_size != 0 || !x.is_contiguous()) {
    throw py::value_error(
        "quantize_int8: x must be contiguous rows of row_size elements, and "
        "block_size at least 1, got " +
        x.describe());
  }
  params.num_rows = size / row_size;
  params.row_size = row_size;
  params.block_size = block_size < row_size ? block_size : row_size;
  const int64_t num_scales =
      params.num_rows * ((row_size + params.block_size - 1) / params.block_size);
  params.x = x.data();
  params.values =
      static_cast<int8_t*>(typed_data(name, "values", values, x, dlpack::kInt, 8, size));
  params.scale =
      static_cast<float*>(typed_data(name, "scale", scale, x, dlpack::kFloat, 32, num_scales));
  if (zero_point.num_elements() > 0) {
    params.zero_point = static_cast<int32_t*>(
        typed_data(name, "zero_point", zero_point, x, dlpack::kInt, 32, num_scales));
  }
  Tensor scale_tensor, smooth_tensor;
  if (!scale_in.is_none()) {
    if (!scale_tensor.assign(scale_in)) throw py::type_error("quantize_int8: scale: no tensor");
    params.has_one_scale_in = scale_tensor.num_elements() == 1;
    params.scale_in =
        static_cast<const float*>(typed_data(name, "scale", scale_tensor, x, dlpack::kFloat, 32,
                                             params.has_one_scale_in ? 1 : num_scales));
  }
  if (!smooth.is_none()) {
    if (!smooth_tensor.assign(smooth)) throw py::type_error("quantize_int8: smooth: no tensor");
    params.smooth = static_cast<const float*>(
        typed_data(name, "smooth", smooth_tensor, x, dlpack::kFloat, 32, row_size));
  }
  run_kernel(name, x, params, num_threads, quantize_int8_cpu_table, quantize_int8_cuda);
}

}  // namespace

void bind_quantize_int8(py::module_& m) { m.def("quantize_int8", &quantize_int8); }

}  // namespace pyfast
