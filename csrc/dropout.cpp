// dropout(x, y, ...): y may be x. Any strides, any number of dimensions up to 64.
#include "../kernels/dropout/dropout.h"

#include <algorithm>

#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

struct Dimension {
  int64_t size, x_stride, y_stride, mask_stride;
};

// True when `outer` continues `inner` in all three operands, so that they are one dimension.
bool continues(const Dimension& outer, const Dimension& inner) {
  return outer.x_stride == inner.x_stride * inner.size &&
         outer.y_stride == inner.y_stride * inner.size &&
         outer.mask_stride == inner.mask_stride * inner.size;
}

// The dimensions in the order of iteration: y's memory order, merged where possible. Where that
// leaves an innermost dimension along which the mask jumps, the mask's own innermost dimension
// goes there instead: one Philox call then serves eight elements, which outweighs the strides.
int iteration_order(Dimension* dims, int ndim) {
  std::stable_sort(dims, dims + ndim, [](const Dimension& a, const Dimension& b) {
    return a.y_stride != b.y_stride ? a.y_stride > b.y_stride : a.x_stride > b.x_stride;
  });
  int merged = 0;
  for (int d = 1; d < ndim; ++d) {
    if (continues(dims[merged], dims[d])) {
      dims[d].size *= dims[merged].size;
    } else {
      ++merged;
    }
    dims[merged] = dims[d];
  }
  ndim = merged + 1;
  if (dims[ndim - 1].mask_stride > 1) {
    for (int d = 0; d < ndim - 1; ++d) {
      if (dims[d].mask_stride != 1) continue;
      std::rotate(dims + d, dims + d + 1, dims + ndim);
      break;
    }
  }
  return ndim;
}

void dropout(const Tensor& x, const Tensor& y, py::object seed, int64_t threshold, int64_t stream,
             double scale, double shift, double fill, int64_t mask_ndim, int num_threads) {
  require_same_shape("dropout", "y", y, x);
  require_same_device("dropout", "y", y, x);
  DropoutParams params = {};
  params.dtype = x.dtype("dropout: x");
  if (y.dtype("dropout: y") != params.dtype) {
    throw py::type_error("dropout: y must have the dtype of x, got " + y.describe());
  }
  if (x.ndim() > kMaxDims) throw py::value_error("dropout: x has more than 64 dimensions");
  params.num_elements = x.num_elements();
  if (params.num_elements == 0) return;
  mask_ndim = std::min<int64_t>(mask_ndim, x.ndim());

  Dimension dims[kMaxDims + 1];
  int ndim = 0;
  int64_t mask_strides[kMaxDims + 1];
  int64_t mask_stride = 1;
  for (int64_t d = mask_ndim - 1; d >= 0; --d) {
    mask_strides[d] = mask_stride;
    mask_stride *= x.size(static_cast<int>(d));
  }
  Tensor seed_tensor;
  params.seed = seed_from(seed, &seed_tensor, x, mask_ndim, mask_strides);
  for (int d = x.ndim() - 1; d >= 0; --d) {
    if (x.size(d) != 1) {
      dims[ndim++] = {x.size(d), x.stride(d), y.stride(d), d < mask_ndim ? mask_strides[d] : 0};
    }
  }
  if (ndim == 0) dims[ndim++] = {1, 1, 1, 1};
  std::reverse(dims, dims + ndim);
  params.ndim = iteration_order(dims, ndim);
  for (int d = 0; d < params.ndim; ++d) {
    params.sizes[d] = dims[d].size;
    params.x_strides[d] = dims[d].x_stride;
    params.y_strides[d] = dims[d].y_stride;
    params.mask_strides[d] = dims[d].mask_stride;
  }
  params.x = x.data();
  params.y = y.data();
  params.stream = static_cast<uint32_t>(stream);
  params.threshold = static_cast<uint32_t>(threshold);
  params.scale = scale;
  params.shift = shift;
  params.fill = fill;
  run_kernel("dropout", x, params, num_threads, dropout_cpu_table, dropout_cuda);
}

}  // namespace

void bind_dropout(py::module_& m) { m.def("dropout", &dropout); }

}  // namespace pyfast
