// Tensors at the boundary. A function bound with pybind11 takes `const Tensor&` and gets a view of
// any object that speaks DLPack: torch tensors through torch's C interface or the exchange table of
// their type (nanoseconds, no libtorch), everything else (numpy) through __dlpack__. The view lives
// as long as the call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../kernels/common/cuda_device.h"
#include "../kernels/common/dtype.h"
#include "../kernels/common/isa.h"
#include "../kernels/common/parallel.h"
#include "../kernels/common/seed.h"
#include "dlpack.h"
#include "torch_shim.h"

namespace pyfast {

namespace py = pybind11;

class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor();

  // Takes torch's two types. Whether torch's C interface reads their tensors from now on: it does
  // if it agrees with DLPack about `probe`, a torch tensor on the CPU; None turns it off.
  static bool set_up(py::handle tensor_type, py::handle parameter_type, py::handle probe);

  // Fills the view from a Python object; false when the object is not a tensor.
  bool assign(py::handle object);

  // The same for a torch tensor, and without Python: on any thread, while another one holds the
  // GIL. False where torch's C interface cannot show it.
  bool assign_torch_tensor(py::handle object);

  // Brings a part of what that reads into cache; parts of a tensor come in turn.
  static void prefetch(py::handle object, TorchPart part);

  void* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  int ndim() const { return view_.ndim; }
  int64_t size(int d) const { return view_.shape[d]; }
  int64_t stride(int d) const { return strides_ != nullptr ? strides_[d] : contiguous_stride(d); }
  int64_t num_elements() const;
  bool is_contiguous() const;
  // True when the elements fill one gapless block, each in a place of its own, in any order.
  bool is_dense() const;
  bool is_cpu() const { return view_.device.type == dlpack::kCpu; }
  bool is_cuda() const { return view_.device.type == dlpack::kCuda; }
  const dlpack::Tensor& view() const { return view_; }
  const dlpack::ExchangeApi* api() const { return api_; }  // null for other libraries than torch
  dlpack::Device device() const { return view_.device; }
  bool has_type(uint8_t code, int bits) const {
    return view_.dtype.code == code && view_.dtype.bits == bits && view_.dtype.lanes == 1;
  }
  // Throws TypeError naming `argument` unless the type is one that kernels compute in.
  DType dtype(const char* argument) const;
  std::string describe() const;  // "(4, 8) bfloat16 on cpu"

  // The stream on which the tensor's library queues work for this device.
  void* current_stream() const;

 private:
  bool check_memory();  // true, or throws
  int64_t contiguous_stride(int d) const;

  dlpack::Tensor view_ = {};
  const int64_t* strides_ = nullptr;
  const dlpack::ExchangeApi* api_ = nullptr;
  dlpack::ManagedTensor* managed_ = nullptr;
};

// Memory for the time of a call, from the pool of large outputs.
class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t bytes);  // 0: no memory; throws std::bad_alloc
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  ~ScratchBlock();
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// A Python int is the seed itself; a tensor of one int64 holds it, on the CPU or where the kernel
// runs. Of a shard the tensor goes on: the index of its first element, and then what `num_steps`
// strides of the whole tensor are, copied to `steps` (which stays as it is for a tensor that is no
// shard). These are read here, which waits for a GPU. `holder` keeps the view alive.
Seed seed_from(py::handle object, Tensor* holder, const Tensor& like, int64_t num_steps = 0,
               int64_t* steps = nullptr);

// Checks that protect memory. Each throws ValueError naming `function` and `argument`.
void require_same_shape(const char* function, const char* argument, const Tensor& tensor,
                        const Tensor& like);
void require_same_device(const char* function, const char* argument, const Tensor& tensor,
                         const Tensor& like);

// The data of a contiguous tensor of `size` elements of a type (dlpack.h), on the device of `like`.
void* typed_data(const char* function, const char* argument, const Tensor& tensor,
                 const Tensor& like, uint8_t code, int bits, int64_t size);

// The operands of an op over the rows of a contiguous matrix `like` of num_columns columns, checked
// as they are asked for: matrices have its number of elements and its dtype, vectors the dtype that
// it is computed in, `typed` what is asked for. An object may be None, which gives null; `holder`
// keeps its view alive.
class Operands {
 public:
  Operands(const char* function, const Tensor& like, DType dtype, int64_t num_columns);
  int64_t num_rows() const { return num_rows_; }
  void* matrix(const char* argument, const Tensor& tensor) const;
  void* matrix(const char* argument, py::handle object, Tensor* holder) const;
  void* vector(const char* argument, py::handle object, Tensor* holder, int64_t size) const;
  void* typed(const char* argument, py::handle object, Tensor* holder, uint8_t code, int bits,
              int64_t size) const;

 private:
  void* checked(const char* argument, const Tensor& tensor, DType dtype, int64_t size) const;

  const char* function_;
  const Tensor& like_;
  DType dtype_;
  DType compute_dtype_;
  int64_t num_rows_;
};

[[noreturn]] void throw_kernel_error(const char* function, const char* text);
[[noreturn]] void throw_unsupported_device(const char* function, const Tensor& tensor);

// Fewer elements take less time than it takes to hand over the GIL.
constexpr int64_t kMinElementsWithoutGil = 4096;

// Runs a kernel that exists for the CPU alone, without the GIL.
template <typename Params>
void run_cpu_kernel(const Params& params, int num_threads,
                    void (*const* cpu_table)(const Params&, int)) {
  py::gil_scoped_release release;
  cpu_table[static_cast<int>(selected_isa())](params, is_forked_child() ? 1 : num_threads);
}

// Runs a kernel where `tensor` lives, without the GIL unless it is very small. A forked child gets
// one CPU thread: the threads of its parent's OpenMP pool do not exist there.
template <typename Params>
void run_kernel(const char* function, const Tensor& tensor, const Params& params, int num_threads,
                void (*const* cpu_table)(const Params&, int),
                const char* (*cuda_launcher)(const Params&, void*)) {
  const char* error = nullptr;
  if (tensor.is_cpu() && !kEmulateCuda) {
    const auto kernel = cpu_table[static_cast<int>(selected_isa())];
    if (tensor.num_elements() < kMinElementsWithoutGil) return kernel(params, 1);
    py::gil_scoped_release release;
    kernel(params, is_forked_child() ? 1 : num_threads);
  } else if (kWithCuda && (tensor.is_cuda() || kEmulateCuda)) {
    void* stream = kEmulateCuda ? nullptr : tensor.current_stream();
    py::gil_scoped_release release;
    const CudaDeviceGuard guard(tensor.device().id);
    error = guard.error() != nullptr ? guard.error() : cuda_launcher(params, stream);
  } else {
    throw_unsupported_device(function, tensor);
  }
  if (error != nullptr) throw_kernel_error(function, error);
}

}  // namespace pyfast

namespace pybind11::detail {

template <>
struct type_caster<pyfast::Tensor> {
 public:
  static constexpr auto name = const_name("Tensor");
  template <typename T>
  using cast_op_type = const pyfast::Tensor&;
  operator const pyfast::Tensor&() { return value_; }
  bool load(handle source, bool) { return value_.assign(source); }

 private:
  pyfast::Tensor value_;
};

}  // namespace pybind11::detail
