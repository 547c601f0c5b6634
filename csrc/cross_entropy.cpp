// The loss of classes; all tensors are contiguous.
#include "../kernels/cross_entropy/cross_entropy.h"

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

void require(bool holds, const char* argument, const char* expected, const Tensor& tensor) {
  if (holds) return;
  throw py::value_error(std::string("cross_entropy: ") + argument + " must be " + expected +
                        ", got " + tensor.describe());
}

bool is_vector(const Tensor& t, dlpack::TypeCode code, int bits, int64_t size) {
  return t.is_cpu() && t.is_contiguous() && t.num_elements() == size && t.has_type(code, bits);
}

// What both passes share. IndexError, as torch's, for a class that there is not.
template <typename Params>
void set_operands(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                  double smoothing, Params* p) {
  p->dtype = logits.dtype("cross_entropy: logits");
  require(p->dtype != DType::kFloat64 && logits.ndim() == 2 && logits.is_cpu() &&
              logits.is_contiguous(),
          "logits", "a contiguous matrix of float32, bfloat16 or float16 on cpu", logits);
  p->num_rows = logits.size(0);
  p->num_columns = logits.size(1);
  require(is_vector(target, dlpack::kInt, 64, p->num_rows), "target",
          "one int64 for each row, contiguous on cpu", target);
  p->logits = logits.data();
  p->target = static_cast<const int64_t*>(target.data());
  p->ignore_index = ignore_index;
  p->smoothing = static_cast<float>(smoothing);
  for (int64_t row = 0; row < p->num_rows; ++row) {
    const int64_t value = p->target[row];
    if (value != ignore_index && (value < 0 || value >= p->num_columns)) {
      throw py::index_error("Target " + std::to_string(value) + " is out of bounds.");
    }
  }
}

void cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& loss,
                   const Tensor& lse, int64_t ignore_index, double smoothing, int num_threads) {
  CrossEntropyParams params = {};
  set_operands(logits, target, ignore_index, smoothing, &params);
  require(is_vector(loss, dlpack::kFloat, 32, params.num_rows), "loss", "one float32 a row", loss);
  require(is_vector(lse, dlpack::kFloat, 32, 2 * params.num_rows), "lse", "two float32 a row", lse);
  params.loss = static_cast<float*>(loss.data());
  params.lse = static_cast<float*>(lse.data());
  run_cpu_kernel(params, num_threads, cross_entropy_cpu_table);
}

void cross_entropy_backward(const Tensor& grad, const Tensor& logits, const Tensor& target,
                            const Tensor& lse, const Tensor& grad_logits, int64_t ignore_index,
                            double smoothing, int num_threads) {
  CrossEntropyBackwardParams params = {};
  set_operands(logits, target, ignore_index, smoothing, &params);
  require(is_vector(grad, dlpack::kFloat, 32, params.num_rows), "grad", "one float32 a row", grad);
  require(is_vector(lse, dlpack::kFloat, 32, 2 * params.num_rows), "lse", "two float32 a row", lse);
  require(grad_logits.is_cpu() && grad_logits.is_contiguous() &&
              grad_logits.num_elements() == logits.num_elements() &&
              grad_logits.dtype("cross_entropy") == params.dtype,
          "grad_logits", "contiguous on cpu, of the size and dtype of logits", grad_logits);
  params.grad = static_cast<const float*>(grad.data());
  params.lse = static_cast<const float*>(lse.data());
  params.grad_logits = grad_logits.data();
  run_cpu_kernel(params, num_threads, cross_entropy_backward_cpu_table);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", &cross_entropy);
  m.def("cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace pyfast
