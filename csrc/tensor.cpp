#include "tensor.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace pyfast {
namespace {

// The exchange table of a tensor type, or null when it has none of the major version we speak.
const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) {
  static PyObject* const attribute = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  py::object capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttr(reinterpret_cast<PyObject*>(type), attribute));
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != 1) api = api->previous;
  return api;
}

// Tensors are nearly always torch.Tensor or Parameter. Their exchange tables are kept: the lookup
// is a tenth of a small call. No other type is kept: reading a tensor of one of these never calls
// Python, which a subclass may.
struct KnownType {
  PyTypeObject* type;
  const dlpack::ExchangeApi* api;
};
KnownType known_types[2] = {};

// Null for other types.
const dlpack::ExchangeApi* known_exchange_api(PyTypeObject* type) {
  for (const KnownType& known : known_types) {
    if (known.type == type) return known.api;
  }
  return nullptr;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  const dlpack::ExchangeApi* api = known_exchange_api(type);
  return api != nullptr ? api : find_exchange_api(type);
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "(";
  for (int d = 0; d < tensor.ndim(); ++d) {
    text += std::to_string(tensor.size(d)) + (d + 1 < tensor.ndim() || d == 0 ? "," : "");
    if (d + 1 < tensor.ndim()) text += " ";
  }
  return text + ")";
}

}  // namespace

Tensor::~Tensor() {
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
}

bool Tensor::set_up(py::handle tensor_type, py::handle parameter_type, py::handle probe) {
  KnownType* known = known_types;
  for (py::handle type : {tensor_type, parameter_type}) {
    auto* const object = reinterpret_cast<PyTypeObject*>(type.ptr());
    *known++ = {object, find_exchange_api(object)};
    type.inc_ref();  // no other type can then have its address
  }
  return use_torch_shim(probe, probe.is_none() ? nullptr : exchange_api(Py_TYPE(probe.ptr())));
}

bool Tensor::assign(py::handle object) {
  api_ = exchange_api(Py_TYPE(object.ptr()));
  if (api_ != nullptr) {
    if (!view_of_torch_tensor(object, api_, &view_) &&
        api_->tensor_from_py_object(object.ptr(), &view_) != 0) {
      throw py::error_already_set();
    }
  } else {
    if (!py::hasattr(object, "__dlpack__")) return false;
    py::object capsule = object.attr("__dlpack__")();
    managed_ = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed_ == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    view_ = managed_->tensor;
  }
  return check_memory();
}

bool Tensor::assign_torch_tensor(py::handle object) {
  api_ = known_exchange_api(Py_TYPE(object.ptr()));
  return api_ != nullptr && view_of_torch_tensor(object, api_, &view_) && check_memory();
}

void Tensor::prefetch(py::handle object, TorchPart part) {
  const dlpack::ExchangeApi* api = known_exchange_api(Py_TYPE(object.ptr()));
  if (api != nullptr) prefetch_torch_tensor(object, api, part);
}

bool Tensor::check_memory() {
  strides_ = view_.strides;
  if (view_.data == nullptr && num_elements() != 0) {
    throw std::runtime_error("a tensor without memory: " + describe());
  }
  return true;
}

int64_t Tensor::num_elements() const {
  int64_t count = 1;
  for (int d = 0; d < ndim(); ++d) count *= size(d);
  return count;
}

int64_t Tensor::contiguous_stride(int d) const {
  int64_t stride = 1;
  for (int e = ndim() - 1; e > d; --e) stride *= size(e);
  return stride;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int d = ndim() - 1; d >= 0; --d) {
    if (size(d) != 1 && stride(d) != expected) return num_elements() == 0;
    expected *= size(d);
  }
  return true;
}

bool Tensor::is_dense() const {
  if (is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int d = 0; d < ndim(); ++d) {
    if (size(d) != 1) dims.emplace_back(stride(d), size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [dim_stride, dim_size] : dims) {
    if (dim_stride != expected) return false;
    expected *= dim_size;
  }
  return true;
}

DType Tensor::dtype(const char* argument) const {
  if (has_type(dlpack::kFloat, 32)) return DType::kFloat32;
  if (has_type(dlpack::kFloat, 64)) return DType::kFloat64;
  if (has_type(dlpack::kFloat, 16)) return DType::kFloat16;
  if (has_type(dlpack::kBFloat, 16)) return DType::kBFloat16;
  throw py::type_error(std::string(argument) +
                       " must be float32, float64, float16 or bfloat16, got " + describe());
}

std::string Tensor::describe() const {
  const char* name = "type code ";
  switch (view_.dtype.code) {
    case dlpack::kInt:
      name = "int";
      break;
    case dlpack::kUInt:
      name = "uint";
      break;
    case dlpack::kFloat:
      name = "float";
      break;
    case dlpack::kBFloat:
      name = "bfloat";
      break;
    case dlpack::kBool:
      name = "bool";
      break;
  }
  const char* place = is_cpu() ? "cpu" : is_cuda() ? "cuda" : "another device";
  return shape_text(*this) + " " + name + std::to_string(view_.dtype.bits) + " on " + place;
}

void* Tensor::current_stream() const {
  void* stream = nullptr;
  if (api_ == nullptr || api_->current_work_stream == nullptr) {
    throw py::type_error("a CUDA tensor must come from a library that tells its current stream");
  }
  if (api_->current_work_stream(view_.device.type, view_.device.id, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

Seed seed_from(py::handle object, Tensor* holder, const Tensor& like, int64_t num_steps,
               int64_t* steps) {
  if (PyLong_Check(object.ptr())) {
    return {static_cast<uint64_t>(PyLong_AsUnsignedLongLongMask(object.ptr())), nullptr, 0, 0};
  }
  const bool is_tensor = holder->assign(object) && holder->has_type(dlpack::kInt, 64);
  const int64_t count = is_tensor ? holder->num_elements() : 0;
  const bool is_shard = count == 2 || (count > 2 && count == 2 + num_steps);
  if (count != 1 && !(is_shard && holder->ndim() == 1)) {
    throw py::type_error("seed must be an int or a tensor of one int64 (of a shard: of 2" +
                         (num_steps > 0 ? " or " + std::to_string(2 + num_steps) : "") + ")");
  }
  if (count > 1) {
    if (!holder->is_cpu() && !holder->assign(object.attr("cpu")())) {
      throw py::type_error("seed must be a tensor");
    }
    const auto* values = static_cast<const int64_t*>(holder->data());
    const int64_t stride = holder->stride(0);
    for (int64_t i = 0; i < count - 2; ++i) steps[i] = values[(i + 2) * stride];
    return {static_cast<uint64_t>(values[0]), nullptr, values[stride], 0};
  }
  const auto* pointer = static_cast<const uint64_t*>(holder->data());
  if (holder->is_cpu()) return {*pointer, nullptr, 0, 0};
  require_same_device("seed", "seed", *holder, like);
  return {0, pointer, 0, 0};
}

void require_same_shape(const char* function, const char* argument, const Tensor& tensor,
                        const Tensor& like) {
  bool same = tensor.ndim() == like.ndim();
  for (int d = 0; same && d < like.ndim(); ++d) same = tensor.size(d) == like.size(d);
  if (same) return;
  throw py::value_error(std::string(function) + ": " + argument + " must have the shape " +
                        shape_text(like) + ", got " + tensor.describe());
}

void require_same_device(const char* function, const char* argument, const Tensor& tensor,
                         const Tensor& like) {
  if (tensor.device().type == like.device().type && tensor.device().id == like.device().id) return;
  throw py::value_error(std::string(function) + ": " + argument +
                        " must be on one device with the input, got " + tensor.describe());
}

void* typed_data(const char* function, const char* argument, const Tensor& tensor,
                 const Tensor& like, uint8_t code, int bits, int64_t size) {
  require_same_device(function, argument, tensor, like);
  if (!tensor.has_type(code, bits) || tensor.num_elements() != size || !tensor.is_contiguous()) {
    throw py::value_error(std::string(function) + ": " + argument + " must hold " +
                          std::to_string(size) + " contiguous elements of " + std::to_string(bits) +
                          " bits, got " + tensor.describe());
  }
  return tensor.data();
}

Operands::Operands(const char* function, const Tensor& like, DType dtype, int64_t num_columns)
    : function_(function),
      like_(like),
      dtype_(dtype),
      compute_dtype_(dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32) {
  if (num_columns < 1 || like.num_elements() % num_columns != 0) {
    throw py::value_error(std::string(function) + ": rows of " + std::to_string(num_columns) +
                          " do not divide " + like.describe());
  }
  num_rows_ = like.num_elements() / num_columns;
}

void* Operands::matrix(const char* argument, const Tensor& tensor) const {
  return checked(argument, tensor, dtype_, like_.num_elements());
}

void* Operands::matrix(const char* argument, py::handle object, Tensor* holder) const {
  if (object.is_none()) return nullptr;
  if (!holder->assign(object)) throw py::type_error(std::string(argument) + " must be a tensor");
  return matrix(argument, *holder);
}

void* Operands::vector(const char* argument, py::handle object, Tensor* holder,
                       int64_t size) const {
  if (object.is_none()) return nullptr;
  if (!holder->assign(object)) throw py::type_error(std::string(argument) + " must be a tensor");
  return checked(argument, *holder, compute_dtype_, size);
}

void* Operands::typed(const char* argument, py::handle object, Tensor* holder, uint8_t code,
                      int bits, int64_t size) const {
  if (object.is_none()) return nullptr;
  if (!holder->assign(object)) throw py::type_error(std::string(argument) + " must be a tensor");
  return typed_data(function_, argument, *holder, like_, code, bits, size);
}

void* Operands::checked(const char* argument, const Tensor& tensor, DType dtype,
                        int64_t size) const {
  require_same_device(function_, argument, tensor, like_);
  if (!tensor.is_contiguous() || tensor.num_elements() != size || tensor.dtype(argument) != dtype) {
    throw py::value_error(std::string(function_) + ": " + argument + " must be contiguous, with " +
                          std::to_string(size) + " elements of the right dtype, got " +
                          tensor.describe());
  }
  return tensor.data();
}

void throw_kernel_error(const char* function, const char* text) {
  throw std::runtime_error(std::string(function) + ": " + text);
}

void throw_unsupported_device(const char* function, const Tensor& tensor) {
  throw std::runtime_error(std::string(function) + ": this build has no kernel for " +
                           tensor.describe());
}

}  // namespace pyfast
