// Products with few rows; all tensors are contiguous.
#include "../kernels/linear/linear.h"

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

void require(bool holds, const char* argument, const char* expected, const Tensor& tensor) {
  if (holds) return;
  throw py::value_error(std::string("linear: ") + argument + " must be " + expected + ", got " +
                        tensor.describe());
}

void linear(const Tensor& x, const Tensor& weight, py::object bias, const Tensor& y,
            int num_threads) {
  LinearParams params = {};
  params.dtype = x.dtype("linear: x");
  require(params.dtype != DType::kFloat64, "x", "float32, bfloat16 or float16", x);
  require(weight.ndim() == 2, "weight", "a matrix", weight);
  require(x.ndim() >= 1 && x.size(x.ndim() - 1) == weight.size(1), "x",
          "of as many columns as the weight", x);
  params.n = weight.size(0);
  params.k = weight.size(1);
  params.m = 1;
  for (int d = 0; d + 1 < x.ndim(); ++d) params.m *= x.size(d);
  require(params.m <= kMostLinearRows, "x", "of up to 128 rows", x);
  const auto check = [&](const char* argument, const Tensor& tensor, int64_t size) {
    require(tensor.is_cpu() && tensor.is_contiguous() && tensor.num_elements() == size &&
                tensor.dtype("linear") == params.dtype,
            argument, "contiguous on cpu, of x's dtype and of the size that goes with the others",
            tensor);
  };
  check("x", x, params.m * params.k);
  check("weight", weight, params.n * params.k);
  check("y", y, params.m * params.n);
  Tensor bias_tensor;
  if (!bias.is_none()) {
    if (!bias_tensor.assign(bias)) throw py::type_error("linear: bias must be a tensor");
    check("bias", bias_tensor, params.n);
    params.bias = bias_tensor.data();
  }
  params.x = x.data();
  params.weight = weight.data();
  params.y = y.data();
  run_cpu_kernel(params, num_threads, linear_cpu_table);
}

}  // namespace

void bind_linear(py::module_& m) { m.def("linear", &linear); }

}  // namespace pyfast
