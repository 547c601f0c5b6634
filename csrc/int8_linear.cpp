// Products with int8 weights; all tensors are contiguous.
#include "../kernels/int8_linear/int8_linear.h"

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

void require(bool holds, const char* function, const char* argument, const char* expected,
             const Tensor& tensor) {
  if (holds) return;
  throw py::value_error(std::string(function) + ": " + argument + " must be " + expected +
                        ", got " + tensor.describe());
}

bool is_int8(const Tensor& t) { return t.has_type(dlpack::kInt, 8); }
bool is_float32(const Tensor& t) { return t.has_type(dlpack::kFloat, 32); }

void require_contiguous(const char* function, const char* argument, const Tensor& tensor,
                        int64_t size) {
  require(tensor.is_cpu() && tensor.is_contiguous() && tensor.num_elements() == size, function,
          argument, "contiguous on cpu, of the size that goes with the others", tensor);
}

// float32 values that may be None.
const float* floats(const char* argument, py::handle object, Tensor* holder, int64_t size) {
  if (object.is_none()) return nullptr;
  if (!holder->assign(object)) throw py::type_error("int8_linear: a tensor was expected");
  require(is_float32(*holder), "int8_linear", argument, "float32", *holder);
  require_contiguous("int8_linear", argument, *holder, size);
  return static_cast<const float*>(holder->data());
}

// Sizes of x @ weight^T; x and y may have more dimensions than two.
void set_sizes(const char* function, const Tensor& x, const Tensor& weight, const Tensor& y,
               Int8LinearParams* p) {
  require(weight.ndim() == 2 && is_int8(weight), function, "weight", "an int8 matrix", weight);
  require(x.ndim() >= 1 && x.size(x.ndim() - 1) == weight.size(1), function, "x",
          "of as many columns as the weight", x);
  p->n = weight.size(0);
  p->k = weight.size(1);
  p->m = 1;
  for (int d = 0; d + 1 < x.ndim(); ++d) p->m *= x.size(d);
  require_contiguous(function, "weight", weight, p->n * p->k);
  require_contiguous(function, "x", x, p->m * p->k);
  require_contiguous(function, "y", y, p->m * p->n);
  p->x = x.data();
  p->weight = static_cast<const int8_t*>(weight.data());
  p->y = y.data();
  p->x_is_int8 = is_int8(x);
}

void int8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, py::object bias,
                 py::object input_scale, py::object smooth, const Tensor& y, bool weight_only,
                 int activation, int num_threads) {
  const char* name = "int8_linear";
  Int8LinearParams params = {};
  set_sizes(name, x, weight, y, &params);
  require(params.k < (int64_t{1} << 17), name, "weight", "of fewer than 131072 columns", weight);
  if (!params.x_is_int8) params.x_dtype = x.dtype("int8_linear: x");
  params.y_dtype = y.dtype("int8_linear: y");
  require(params.y_dtype != DType::kFloat64 && params.x_dtype != DType::kFloat64, name, "x",
          "float32, bfloat16 or float16", x);
  require(!(params.x_is_int8 && weight_only), name, "x", "floating point with weight_only", x);
  Tensor scale_tensor, bias_tensor, input_scale_tensor, smooth_tensor;
  require(is_float32(weight_scale), name, "weight_scale", "float32", weight_scale);
  require_contiguous(name, "weight_scale", weight_scale, params.n);
  params.weight_scale = static_cast<const float*>(weight_scale.data());
  if (!bias.is_none()) {
    if (!bias_tensor.assign(bias)) throw py::type_error("int8_linear: bias must be a tensor");
    require_contiguous(name, "bias", bias_tensor, params.n);
    params.bias_dtype = bias_tensor.dtype("int8_linear: bias");
    params.bias = bias_tensor.data();
  }
  params.input_scale =
      floats("input_scale", input_scale, &input_scale_tensor, params.x_is_int8 ? params.m : 1);
  params.smooth = floats("smooth", smooth, &smooth_tensor, params.k);
  params.weight_only = weight_only;
  params.activation = static_cast<Activation>(activation);
  run_cpu_kernel(params, num_threads, int8_linear_cpu_table);
}

void int8_mm(const Tensor& a, const Tensor& weight, const Tensor& y, int num_threads) {
  Int8LinearParams params = {};
  set_sizes("int8_mm", a, weight, y, &params);
  require(params.x_is_int8, "int8_mm", "a", "int8", a);
  require(y.has_type(dlpack::kInt, 32), "int8_mm", "y", "int32", y);
  run_cpu_kernel(params, num_threads, int8_linear_cpu_table);
}

}  // namespace

void bind_int8_linear(py::module_& m) {
  m.def("int8_linear", &int8_linear);
  m.def("int8_mm", &int8_mm);
}

}  // namespace pyfast
