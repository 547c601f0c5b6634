#include "torch_shim.h"

#include <dlfcn.h>

#include <cstring>

namespace pyfast {
namespace {

namespace py = pybind11;

using Handle = void*;  // at::Tensor*, AtenTensorHandle in torch's header

// Functions of libtorch. Those of torch/csrc/inductor/aoti_torch/c/shim.h return 0 where they could
// answer; the last two are C++ ones, at::native::is_neg and torch::autograd::impl::bump_version.
struct Shim {
  int32_t (*get_data_ptr)(Handle, void**) = nullptr;
  int32_t (*get_dim)(Handle, int64_t*) = nullptr;
  int32_t (*get_sizes)(Handle, int64_t**) = nullptr;
  int32_t (*get_strides)(Handle, int64_t**) = nullptr;
  int32_t (*get_dtype)(Handle, int32_t*) = nullptr;
  int32_t (*get_device_type)(Handle, int32_t*) = nullptr;
  int32_t (*get_device_index)(Handle, int32_t*) = nullptr;
  bool (*is_neg)(Handle) = nullptr;
  void (*bump_version)(Handle) = nullptr;
  const dlpack::ExchangeApi* api = nullptr;  // of the tensors that it reads; null: not to be used
};

template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

// From the libtorch that this process has loaded.
bool find_functions(Shim* shim) {
  void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return library != nullptr && find(library, "aoti_torch_get_data_ptr", &shim->get_data_ptr) &&
         find(library, "aoti_torch_get_dim", &shim->get_dim) &&
         find(library, "aoti_torch_get_sizes", &shim->get_sizes) &&
         find(library, "aoti_torch_get_strides", &shim->get_strides) &&
         find(library, "aoti_torch_get_dtype", &shim->get_dtype) &&
         find(library, "aoti_torch_get_device_type", &shim->get_device_type) &&
         find(library, "aoti_torch_get_device_index", &shim->get_device_index) &&
         find(library, "_ZN2at6native6is_negERKNS_6TensorE", &shim->is_neg) &&
         find(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &shim->bump_version);
}

// A Python tensor holds its C++ tensor, one pointer, right after the head of every object.
Handle handle_of(py::handle tensor) {
  return reinterpret_cast<char*>(tensor.ptr()) + sizeof(PyObject);
}

const char* pointer_at(const void* place) {
  const char* pointer;
  memcpy(&pointer, place, sizeof pointer);
  return pointer;
}

// The lines of bytes begin to end of a structure.
void prefetch(const char* structure, int begin, int end) {
  constexpr uintptr_t kLine = 64;
  const auto first = reinterpret_cast<uintptr_t>(structure + begin) / kLine * kLine;
  for (uintptr_t line = first; line < reinterpret_cast<uintptr_t>(structure + end); line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

// By torch's numbers of its dtypes, which its header keeps as they are.
bool type_from(int32_t number, dlpack::DataType* type) {
  switch (number) {
    case 0:
      *type = {dlpack::kUInt, 8, 1};
      return true;
    case 1:
      *type = {dlpack::kInt, 8, 1};
      return true;
    case 2:
      *type = {dlpack::kInt, 16, 1};
      return true;
    case 3:
      *type = {dlpack::kInt, 32, 1};
      return true;
    case 4:
      *type = {dlpack::kInt, 64, 1};
      return true;
    case 5:
      *type = {dlpack::kFloat, 16, 1};
      return true;
    case 6:
      *type = {dlpack::kFloat, 32, 1};
      return true;
    case 7:
      *type = {dlpack::kFloat, 64, 1};
      return true;
    case 11:
      *type = {dlpack::kBool, 8, 1};
      return true;
    case 15:
      *type = {dlpack::kBFloat, 16, 1};
      return true;
  }
  return false;
}

bool read(const Shim& shim, Handle handle, dlpack::Tensor* view) {
  if (shim.is_neg(handle)) return false;
  int64_t ndim;
  int32_t dtype, device, index;
  if (shim.get_data_ptr(handle, &view->data) != 0 || shim.get_dim(handle, &ndim) != 0 ||
      shim.get_sizes(handle, &view->shape) != 0 || shim.get_strides(handle, &view->strides) != 0 ||
      shim.get_dtype(handle, &dtype) != 0 || shim.get_device_type(handle, &device) != 0 ||
      !type_from(dtype, &view->dtype)) {
    return false;
  }
  constexpr int32_t kTorchCpu = 0, kTorchCuda = 1;
  if (device == kTorchCpu) {
    view->device = {dlpack::kCpu, 0};
  } else if (device == kTorchCuda && shim.get_device_index(handle, &index) == 0) {
    view->device = {dlpack::kCuda, index};
  } else {
    return false;
  }
  view->ndim = static_cast<int32_t>(ndim);
  view->byte_offset = 0;
  return true;
}

// Whether the place of the C++ tensor, and what the functions say of it, is what torch says.
bool agrees(const Shim& shim, py::handle tensor, const dlpack::ExchangeApi* api) {
  const void* const implementation = pointer_at(handle_of(tensor));
  const py::object address = py::getattr(tensor, "_cdata", py::none());
  if (!PyLong_Check(address.ptr()) || PyLong_AsVoidPtr(address.ptr()) != implementation) {
    return false;
  }
  dlpack::Tensor theirs = {}, ours = {};
  if (api->tensor_from_py_object(tensor.ptr(), &theirs) != 0) throw py::error_already_set();
  if (!read(shim, handle_of(tensor), &ours)) return false;
  bool same = ours.data == static_cast<char*>(theirs.data) + theirs.byte_offset &&
              ours.ndim == theirs.ndim &&
              memcmp(&ours.device, &theirs.device, sizeof ours.device) == 0 &&
              memcmp(&ours.dtype, &theirs.dtype, sizeof ours.dtype) == 0;
  for (int d = 0; same && d < ours.ndim; ++d) same = ours.shape[d] == theirs.shape[d];
  return same;
}

Shim active;

}  // namespace

bool use_torch_shim(py::handle probe, const dlpack::ExchangeApi* api) {
  active = {};
  Shim found;
  try {
    if (api == nullptr || !find_functions(&found) || !agrees(found, probe, api)) return false;
  } catch (const py::error_already_set&) {
    return false;
  }
  active = found;
  active.api = api;
  return true;
}

bool view_of_torch_tensor(py::handle tensor, const dlpack::ExchangeApi* api, dlpack::Tensor* view) {
  return api == active.api && read(active, handle_of(tensor), view);
}

bool has_torch_shim() { return active.api != nullptr; }

void bump_torch_version(PyObject* tensor) { active.bump_version(handle_of(tensor)); }

void prefetch_torch_tensor(py::handle tensor, const dlpack::ExchangeApi* api, TorchPart part) {
  if (api != active.api) return;
  const char* const implementation = pointer_at(handle_of(tensor));
  if (part == TorchPart::kTensor) return prefetch(implementation, 16, 184);
  prefetch(pointer_at(implementation + 16), 16, 64);
  prefetch(pointer_at(implementation + 40), 0, 16);
}

std::array<const void*, 5> torch_places(PyObject* tensor) {
  if (active.api == nullptr) return {};
  const char* const implementation = pointer_at(handle_of(tensor));
  const char* const autograd = pointer_at(implementation + 24);
  return {implementation + 16, implementation + 48, implementation + 176, autograd, autograd + 40};
}

}  // namespace pyfast
