// OptimizerPlan: the tensors of one step of an optimizer, found and checked, then stepped. Nothing
// is kept from one step to the next, so that nothing can be stale: building the plan takes about
// 0.2 us a tensor.
#include "../kernels/optimizer_step/optimizer_step.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "../kernels/optimizer_step/optimizer_numbers.h"
#include "bindings.h"
#include "tensor.h"

namespace pyfast {
namespace {

constexpr int64_t kPieceElements = 65536;  // of work that a thread takes at a time

// The names of a parameter's state, each None or a str, in the order of this enum.
enum StateName : int {
  kStep,
  kFirstState,
  kFirstScale = 4,
  kEmaName = 7,
  kRemainder,
  kMasterName,
  kNumNames
};

std::string text_of(const Tensor& tensor) {
  return tensor.view().dtype.bits == 0 ? "no tensor" : tensor.describe();
}

[[noreturn]] void throw_mismatch(const char* name, const Tensor& tensor, const Tensor& parameter) {
  throw py::value_error(std::string("optimizer step: ") + name + " of a parameter of " +
                        parameter.describe() + " does not fit to it, got " + text_of(tensor));
}

bool has_same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.ndim() == b.ndim();
  for (int d = 0; same && d < a.ndim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

bool has_same_strides(const Tensor& a, const Tensor& b) {
  for (int d = 0; d < a.ndim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// True when the elements fill a block of memory, in any order of the dimensions.
bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int d = 0; d < tensor.ndim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// What is on the device already, and where.
struct OptimizerTable {
  std::vector<char> bytes;
  const void* memory = nullptr;
};

class OptimizerPlan {
 public:
  OptimizerPlan(int rule, double gradient_scale, double clip_scale, bool write_gradient)
      : gradient_scale_(gradient_scale), clip_scale_(clip_scale) {
    params_.rule = static_cast<OptimizerRule>(rule);
    params_.write_gradient = write_gradient;
  }

  // Adds the parameters of a group that have a gradient. `states` is a dict by parameter or a list;
  // `grads` may be None for the .grad of each, `indices` None for counting from first_index,
  // `fresh` None for none. Returns the positions of those without a state that `names` asks for,
  // which are not added; or None for a group that the kernels cannot take.
  py::object add_group(const py::list& params, const py::object& grads, const py::object& states,
                       const py::tuple& names, const py::tuple& hyper, uint32_t flags,
                       uint64_t seed, uint32_t first_index, const py::object& indices,
                       const py::object& fresh, const py::tuple& plain_types) {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    const OptimizerSource source = source_from(hyper, flags);
    if (lookup_ == nullptr || !lookup_->is_of(states)) {
      lookup_ = std::make_unique<StateLookup>(states);
    }
    py::list missing;
    const auto size = static_cast<Py_ssize_t>(params.size());
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* const parameter = PyList_GET_ITEM(params.ptr(), i);
      py::object grad =
          grads.is_none()
              ? py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter, grad_name))
              : py::reinterpret_borrow<py::object>(PyList_GetItem(grads.ptr(), i));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      if (!is_plain(parameter, plain_types) || !is_plain(grad.ptr(), plain_types) ||
          is_negated(grad.ptr())) {
        return py::none();
      }
      uint32_t tensor_flags = flags;
      if (!fresh.is_none() && PyObject_IsTrue(PyList_GetItem(fresh.ptr(), i)) == 1) {
        tensor_flags |= kFirstStep;
      }
      const uint32_t index =
          indices.is_none()
              ? first_index + static_cast<uint32_t>(i)
              : static_cast<uint32_t>(PyLong_AsLong(PyList_GetItem(indices.ptr(), i)));
      PyObject* const state = lookup_->find(parameter, i);
      const Outcome outcome =
          add_tensor(parameter, grad, state, names, source, tensor_flags, seed, index);
      if (outcome == Outcome::kUnsupported) return py::none();
      if (outcome == Outcome::kMissing) missing.append(i);
    }
    return missing;
  }

  // Adds gradients alone, to be measured or scaled; false where the kernels cannot take one.
  bool add_gradients(const py::list& grads, const py::tuple& plain_types) {
    for (py::handle grad : grads) {
      Tensor view;
      if (!is_plain(grad.ptr(), plain_types) || is_negated(grad.ptr()) || !assign(&view, grad) ||
          !is_supported(view)) {
        return false;
      }
      OptimizerTensor t = {};
      t.layout = -1;
      set_operand(&t, kGradient, view, view.dtype("gradient"));
      t.dtypes[kParameter] = t.dtypes[kGradient];
      t.num_elements = view.num_elements();
      t.numbers = source_index({});
      if (!is_dense(view)) add_layout(&t, view, {{kGradient, &view}});
      changed_.append(grad);
      if (t.num_elements != 0) tensors_.push_back(t);
    }
    return true;
  }

  double square_sum(int num_threads) {
    make_items(kPieceElements);
    std::vector<double> sums(pieces_.size());
    SquareSumParams params = {tensors_.data(),
                              layouts_.data(),
                              items_.data(),
                              pieces_.data(),
                              static_cast<int64_t>(pieces_.size()) - 1,
                              sums.data()};
    run_cpu_kernel(params, useful_threads(num_threads), square_sum_cpu_table);
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }

  // The parameters that the step changes, and the gradients where it writes to them.
  py::list changed() const { return changed_; }

  // Counts the step, and makes it, on the CPU.
  void run(int num_threads) {
    count_steps();
    make_items(kPieceElements);
    std::vector<OptimizerNumbers<double>> numbers;
    for (const OptimizerSource& source : sources_) {
      numbers.push_back(
          base::optimizer_numbers(params_.rule, source, gradient_scale_, clip_scale_));
    }
    params_.tensors = tensors_.data();
    params_.layouts = layouts_.data();
    params_.numbers = numbers.data();
    params_.items = items_.data();
    params_.pieces = pieces_.data();
    params_.num_pieces = static_cast<int64_t>(pieces_.size()) - 1;
    run_cpu_kernel(params_, useful_threads(num_threads), optimizer_step_cpu_table);
  }

  // The same on CUDA, with a table in `memory`, which holds table_size() bytes. Scalars may be
  // None.
  void run_cuda(OptimizerTable* table, const Tensor& memory, const py::object& gradient_unscale,
                const py::object& clip_scale, const py::object& found_inf) {
    if constexpr (kWithCuda) {
      Tensor holders[3];
      OptimizerCudaParams params = cuda_params(memory);
      params.gradient_unscale = scalar<float>("grad_scale", gradient_unscale, &holders[0], 32);
      params.clip_scale = scalar<double>("clip_scale", clip_scale, &holders[1], 64);
      params.found_inf = scalar<float>("found_inf", found_inf, &holders[2], 32);
      count_steps();
      if (!items_.empty()) launch_cuda(table, memory, params, optimizer_step_cuda);
    }
  }

  // The sum of the squares of all gradients, to the last of `sums` [num_items + 1], float64.
  void square_sum_on_cuda(OptimizerTable* table, const Tensor& memory, const Tensor& sums) {
    if constexpr (kWithCuda) {
      OptimizerCudaParams params = cuda_params(memory);
      if (!sums.has_type(dlpack::kFloat, 64) || sums.num_elements() != num_items() + 1) {
        throw py::value_error("square_sum: sums must be num_items + 1 float64");
      }
      params.sums = static_cast<double*>(sums.data());
      if (!items_.empty()) launch_cuda(table, memory, params, square_sum_cuda);
    }
  }

  int64_t num_items() {
    make_cuda_items();
    return static_cast<int64_t>(items_.size());
  }

  // What the table takes on the device: what is brought there, and room for the numbers.
  int64_t table_size() {
    make_cuda_items();
    return table_sections().total;
  }

 private:
  // Finds the state of each parameter of a list in turn. A dict holds them in the order in which
  // they were first stepped, mostly that of the list: following it saves hashing, a call into
  // Python.
  class StateLookup {
   public:
    explicit StateLookup(const py::object& states) : holder_(states), states_(states.ptr()) {
      if (PyDict_Check(states_)) next();
    }
    bool is_of(const py::object& states) const { return states.ptr() == states_; }
    // Borrowed, or null.
    PyObject* find(PyObject* parameter, Py_ssize_t position) {
      if (PyList_Check(states_)) return PyList_GetItem(states_, position);
      if (key_ == parameter) {
        PyObject* const found = value_;
        next();
        return found;
      }
      PyObject* const found = PyDict_GetItemWithError(states_, parameter);
      if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      return found;
    }

   private:
    void next() {
      if (!PyDict_Next(states_, &place_, &key_, &value_)) key_ = nullptr;
    }
    py::object holder_;
    PyObject* states_;
    PyObject* key_ = nullptr;
    PyObject* value_ = nullptr;
    Py_ssize_t place_ = 0;
  };

  enum class Outcome { kAdded, kMissing, kUnsupported };

  static bool is_plain(PyObject* object, const py::tuple& types) {
    for (size_t i = 0; i < types.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(types.ptr(), i)) {
        return true;
      }
    }
    return false;
  }

  // False for tensors that have no memory of their own to show (sparse ones for example).
  static bool assign(Tensor* view, py::handle object) {
    try {
      return view->assign(object);
    } catch (const py::error_already_set&) {
      return false;
    } catch (const std::runtime_error&) {
      return false;
    }
  }

  // True where memory holds the values with the other sign, as that of z.conj().imag does.
  static bool is_negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  // A floating-point tensor on the device of the step.
  bool is_supported(const Tensor& tensor) {
    const bool is_float =
        tensor.has_type(dlpack::kFloat, 32) || tensor.has_type(dlpack::kBFloat, 16) ||
        tensor.has_type(dlpack::kFloat, 16) || tensor.has_type(dlpack::kFloat, 64);
    if (!has_device_) {
      device_ = tensor.device();
      has_device_ = true;
    }
    return is_float && tensor.device().type == device_.type && tensor.device().id == device_.id &&
           (tensor.is_cpu() || (kWithCuda && tensor.is_cuda()));
  }

  // The numbers of a group; lr, beta1 and beta2 may be tensors, on the device too.
  OptimizerSource source_from(const py::tuple& hyper, uint32_t flags) {
    OptimizerSource source = {};
    double numbers[9];
    const void** pointers[] = {&source.lr_pointer, &source.beta1_pointer, &source.beta2_pointer};
    DType* types[] = {&source.lr_type, &source.beta1_type, &source.beta2_type};
    for (size_t i = 0; i < 9; ++i) {
      const py::object number = hyper[i];
      Tensor tensor;
      if (i < 3 && !PyFloat_Check(number.ptr()) && !PyLong_Check(number.ptr()) &&
          assign(&tensor, number) && tensor.is_cuda()) {
        *pointers[i] = tensor.data();
        *types[i] = counted_type("optimizer step: lr and betas", tensor);
        objects_.push_back(number);
        numbers[i] = 0;
      } else {
        numbers[i] = PyFloat_AsDouble(number.ptr());
        if (numbers[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
      }
    }
    source.hyper = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                    numbers[5], numbers[6], numbers[7], numbers[8]};
    source.flags = flags;
    return source;
  }

  static DType counted_type(const char* name, const Tensor& tensor) {
    const bool is_double = tensor.has_type(dlpack::kFloat, 64);
    if (tensor.num_elements() != 1 || (!is_double && !tensor.has_type(dlpack::kFloat, 32))) {
      throw py::value_error(std::string(name) + " must be one float32 or float64, got " +
                            text_of(tensor));
    }
    return is_double ? DType::kFloat64 : DType::kFloat32;
  }

  struct Operand {
    int operand;
    const Tensor* tensor;
  };

  Outcome add_tensor(PyObject* parameter, const py::object& grad, PyObject* state,
                     const py::tuple& names, const OptimizerSource& group, uint32_t flags,
                     uint64_t seed, uint32_t index) {
    Tensor views[kNumOptimizerOperands];
    Tensor& p = views[kParameter];
    Tensor& g = views[kGradient];
    if (!assign(&p, parameter) || !assign(&g, grad) || !is_supported(p) || !is_supported(g)) {
      return Outcome::kUnsupported;
    }
    OptimizerTensor t = {};
    t.flags = flags;
    t.index = index;
    t.seed = seed;
    t.layout = -1;
    t.num_elements = p.num_elements();
    set_operand(&t, kParameter, p, p.dtype("optimizer step: a parameter"));

    const auto find = [&](int name) -> PyObject* {
      PyObject* const key = PyTuple_GET_ITEM(names.ptr(), name);
      if (key == Py_None || state == nullptr) return nullptr;
      PyObject* const found = PyDict_GetItemWithError(state, key);
      if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      return found == Py_None ? nullptr : found;
    };
    const auto wants = [&](int name) { return PyTuple_GET_ITEM(names.ptr(), name) != Py_None; };
    const auto name_of = [&](int name) {
      return PyUnicode_AsUTF8(PyTuple_GET_ITEM(names.ptr(), name));
    };

    PyObject* found[kNumNames];
    for (int name = 0; name < kNumNames; ++name) {
      found[name] = find(name);
      const bool applies = name == kRemainder    ? p.has_type(dlpack::kBFloat, 16)
                           : name == kMasterName ? p.has_type(dlpack::kFloat, 16)
                                                 : true;
      if (wants(name) && applies && found[name] == nullptr) return Outcome::kMissing;
    }

    if (!has_same_shape(g, p)) throw_mismatch("the gradient", g, p);
    require_same_device("optimizer step", "the gradient", g, p);
    set_operand(&t, kGradient, g, g.dtype("optimizer step: a gradient"));

    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      PyObject* const object = found[kFirstState + i];
      if (object == nullptr) continue;
      Tensor& s = views[kState0 + i];
      const char* name = name_of(kFirstState + i);
      if (!s.assign(object) || !has_same_shape(s, p)) throw_mismatch(name, s, p);
      require_same_device("optimizer step", name, s, p);
      if (wants(kFirstScale + i)) {
        t.int8_states = true;
        Tensor scale;
        const int64_t blocks = (t.num_elements + kOptimizerBlock - 1) / kOptimizerBlock;
        if (!scale.assign(found[kFirstScale + i]) || !scale.has_type(dlpack::kFloat, 32) ||
            scale.num_elements() != blocks || !scale.is_contiguous()) {
          throw_mismatch(name_of(kFirstScale + i), scale, p);
        }
        require_same_device("optimizer step", name_of(kFirstScale + i), scale, p);
        if (!s.has_type(dlpack::kUInt, 8) || !s.is_contiguous()) throw_mismatch(name, s, p);
        t.scales[i] = static_cast<float*>(scale.data());
        set_operand(&t, kState0 + i, s, DType::kFloat32);
      } else {
        set_operand(&t, kState0 + i, s, s.dtype(name));
      }
    }
    if (found[kEmaName] != nullptr) {
      Tensor& ema = views[kEma];
      if (!ema.assign(found[kEmaName]) || !has_same_shape(ema, p) ||
          ema.dtype("ema") !=
              (t.dtypes[kParameter] == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32)) {
        throw_mismatch("ema", ema, p);
      }
      require_same_device("optimizer step", "ema", ema, p);
      set_operand(&t, kEma, ema, ema.dtype("ema"));
    }
    add_master(&t, &views[kMaster], p, found);

    OptimizerSource source = group;
    source.flags = flags;
    if (found[kStep] != nullptr) take_step(found[kStep], p, &source);
    t.numbers = source_index(source);

    add_layout_if_needed(&t, views);
    changed_.append(py::handle(parameter));
    if (params_.write_gradient || flags & kZeroGradient) changed_.append(grad);
    objects_.push_back(grad);
    objects_.push_back(py::reinterpret_borrow<py::object>(state != nullptr ? state : Py_None));
    if (t.num_elements != 0) tensors_.push_back(t);
    return Outcome::kAdded;
  }

  void count_steps() {
    for (const auto& [pointer, is_double] : steps_) {
      if (is_double) {
        *static_cast<double*>(pointer) += 1;
      } else {
        *static_cast<float*>(pointer) += 1;
      }
    }
  }

  // Where the parts of the table begin.
  struct Sections {
    int64_t sources, tensors, layouts, items, numbers, total;
  };

  Sections table_sections() const {
    const auto after = [](int64_t begin, size_t count, size_t size) {
      return (begin + static_cast<int64_t>(count * size) + 15) / 16 * 16;
    };
    Sections at = {};
    at.tensors = after(0, sources_.size(), sizeof(OptimizerSource));
    at.layouts = after(at.tensors, tensors_.size(), sizeof(OptimizerTensor));
    at.items = after(at.layouts, layouts_.size(), sizeof(OptimizerLayout));
    at.numbers = after(at.items, items_.size(), sizeof(OptimizerItem));
    at.total = after(at.numbers, sources_.size(), sizeof(OptimizerNumbers<double>));
    return at;
  }

  // At most 65536 items, and none smaller than what keeps a block busy.
  void make_cuda_items() {
    int64_t elements = 0;
    for (const OptimizerTensor& t : tensors_) elements += t.num_elements;
    const int64_t blocks = elements / 65536 / kOptimizerBlock + 1;
    make_items(std::max<int64_t>(4096, blocks * kOptimizerBlock), true);
  }

  OptimizerCudaParams cuda_params(const Tensor& memory) {
    make_cuda_items();
    const Sections at = table_sections();
    if (memory.num_elements() < at.total || !memory.has_type(dlpack::kUInt, 8)) {
      throw py::value_error("optimizer step: the table does not fit into its memory");
    }
    char* const base = static_cast<char*>(memory.data());
    OptimizerCudaParams params = {};
    params.rule = params_.rule;
    params.sources = reinterpret_cast<const OptimizerSource*>(base);
    params.tensors = reinterpret_cast<OptimizerTensor*>(base + at.tensors);
    params.layouts = reinterpret_cast<const OptimizerLayout*>(base + at.layouts);
    params.items = reinterpret_cast<const OptimizerItem*>(base + at.items);
    params.numbers = reinterpret_cast<OptimizerNumbers<double>*>(base + at.numbers);
    params.num_sources = static_cast<int64_t>(sources_.size());
    params.num_items = static_cast<int64_t>(items_.size());
    params.gradient_scale = gradient_scale_;
    params.write_gradient = params_.write_gradient;
    for (const OptimizerTensor& t : tensors_) {
      params.is_double = params.is_double || t.dtypes[kParameter] == DType::kFloat64;
    }
    return params;
  }

  template <typename T>
  const T* scalar(const char* name, const py::object& object, Tensor* holder, int bits) {
    if (object.is_none()) return nullptr;
    if (!assign(holder, object) || holder->num_elements() != 1 ||
        !holder->has_type(dlpack::kFloat, bits) || holder->device().type != device_.type) {
      throw py::value_error(std::string("optimizer step: ") + name + " must be one float" +
                            std::to_string(bits) + " with the parameters, got " + text_of(*holder));
    }
    return static_cast<const T*>(holder->data());
  }

  void launch_cuda(OptimizerTable* table, const Tensor& memory, const OptimizerCudaParams& params,
                   const char* (*launcher)(const OptimizerCudaParams&, void*)) {
    const Sections at = table_sections();
    std::vector<char> bytes(static_cast<size_t>(at.numbers));
    const auto put = [&](int64_t begin, const auto& items) {
      if (!items.empty())
        memcpy(&bytes[static_cast<size_t>(begin)], items.data(), items.size() * sizeof items[0]);
    };
    put(at.sources, sources_);
    put(at.tensors, tensors_);
    put(at.layouts, layouts_);
    put(at.items, items_);
    const char* before = table->bytes.size() == bytes.size() && table->memory == memory.data()
                             ? table->bytes.data()
                             : nullptr;
    void* stream = kEmulateCuda ? nullptr : memory.current_stream();
    const OptimizerUploadParams upload = {static_cast<char*>(memory.data()), bytes.data(), before,
                                          at.numbers};
    const char* error = nullptr;
    {
      py::gil_scoped_release release;
      const CudaDeviceGuard guard(memory.device().id);
      error = guard.error();
      if (error == nullptr) error = optimizer_upload_cuda(upload, stream);
      if (error == nullptr) error = launcher(params, stream);
    }
    if (error != nullptr) throw_kernel_error("optimizer step", error);
    table->bytes = std::move(bytes);
    table->memory = memory.data();
  }

  static void set_operand(OptimizerTensor* t, int operand, const Tensor& tensor, DType dtype) {
    t->operands[operand] = tensor.data();
    t->dtypes[operand] = dtype;
  }

  static void add_master(OptimizerTensor* t, Tensor* master, const Tensor& p,
                         PyObject* const* found) {
    const DType dtype = t->dtypes[kParameter];
    if (dtype == DType::kBFloat16 && found[kRemainder] != nullptr) {
      if (!master->assign(found[kRemainder]) || !has_same_shape(*master, p) ||
          !master->has_type(dlpack::kInt, 16)) {
        throw_mismatch("remainder", *master, p);
      }
      t->master_is_remainder = true;
    } else if (dtype == DType::kFloat16 && found[kMasterName] != nullptr) {
      if (!master->assign(found[kMasterName]) || !has_same_shape(*master, p) ||
          !master->has_type(dlpack::kFloat, 32)) {
        throw_mismatch("master", *master, p);
      }
    } else {
      return;
    }
    require_same_device("optimizer step", "the master weights", *master, p);
    set_operand(t, kMaster, *master, DType::kFloat32);
  }

  // On the CPU: the count after this step; the tensor itself changes when the step is made.
  void take_step(PyObject* object, const Tensor& p, OptimizerSource* source) {
    Tensor tensor;
    const bool is_tensor = assign(&tensor, object);
    if (!is_tensor || !(tensor.is_cpu() || tensor.device().type == p.device().type)) {
      throw py::value_error("optimizer step: step must be on the CPU or with its parameter, got " +
                            text_of(tensor));
    }
    const DType type = counted_type("optimizer step: step", tensor);
    if (!tensor.is_cpu()) {
      source->step_pointer = tensor.data();
      source->step_type = type;
      return;
    }
    const bool is_double = type == DType::kFloat64;
    steps_.emplace_back(tensor.data(), is_double);
    const double value =
        is_double ? *static_cast<double*>(tensor.data()) : *static_cast<float*>(tensor.data());
    source->step = static_cast<int64_t>(value) + 1;
  }

  // Neighbours in a group share their source.
  int32_t source_index(const OptimizerSource& source) {
    if (sources_.empty() || memcmp(&source, &sources_.back(), sizeof source) != 0) {
      sources_.push_back(source);
    }
    return static_cast<int32_t>(sources_.size()) - 1;
  }

  // Random bits and int8 codes go by the row-major index; otherwise any order of memory will do, if
  // all operands share it.
  void add_layout_if_needed(OptimizerTensor* t, const Tensor* views) {
    const Tensor& p = views[kParameter];
    for (int d = 0; d < p.ndim(); ++d) {
      if (p.stride(d) == 0 && p.size(d) > 1 && t->num_elements != 0) {
        throw std::runtime_error("optimizer step: elements of a parameter of " + p.describe() +
                                 " share memory");
      }
    }
    const bool by_index = t->int8_states || t->flags & kStochasticRounding;
    bool straight = by_index ? p.is_contiguous() : is_dense(p);
    for (int operand = 0; operand < kNumOptimizerOperands; ++operand) {
      if (t->operands[operand] == nullptr) continue;
      straight = straight && has_same_strides(views[operand], p);
    }
    if (straight) return;
    std::vector<Operand> used;
    for (int operand = 0; operand < kNumOptimizerOperands; ++operand) {
      if (t->operands[operand] != nullptr) used.push_back({operand, &views[operand]});
    }
    add_layout(t, p, used);
  }

  void add_layout(OptimizerTensor* t, const Tensor& shape, const std::vector<Operand>& operands) {
    if (shape.ndim() > kMaxOptimizerDims) {
      throw py::value_error("optimizer step: a parameter has more than 64 dimensions");
    }
    OptimizerLayout layout = {};
    for (int d = 0; d < shape.ndim(); ++d) {
      if (shape.size(d) == 1) continue;
      bool continues = layout.ndim > 0;
      for (const Operand& o : operands) {
        continues = continues && layout.strides[o.operand][layout.ndim - 1] ==
                                     o.tensor->stride(d) * shape.size(d);
      }
      if (!continues) ++layout.ndim;
      const int last = layout.ndim - 1;
      layout.sizes[last] = continues ? layout.sizes[last] * shape.size(d) : shape.size(d);
      for (const Operand& o : operands) layout.strides[o.operand][last] = o.tensor->stride(d);
    }
    if (layout.ndim == 0) layout.sizes[layout.ndim++] = 1;
    t->layout = static_cast<int32_t>(layouts_.size());
    layouts_.push_back(layout);
  }

  // Pieces are cut where a count of elements over all tensors is full, at blocks of a tensor; with
  // `apart`, which is for CUDA, no item is larger than a piece, wherever that began.
  void make_items(int64_t piece_elements, bool apart = false) {
    items_.clear();
    pieces_.assign(1, 0);
    total_elements_ = 0;
    int64_t room = piece_elements;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int64_t size = tensors_[i].num_elements;
      total_elements_ += size;
      for (int64_t begin = 0; begin < size;) {
        if (apart) room = piece_elements;
        const int64_t blocks = (room + kOptimizerBlock - 1) / kOptimizerBlock;
        const int64_t count = std::min(size - begin, blocks * kOptimizerBlock);
        items_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(count), begin});
        begin += count;
        room -= count;
        if (room <= 0) {
          pieces_.push_back(static_cast<int64_t>(items_.size()));
          room = piece_elements;
        }
      }
    }
    if (pieces_.back() != static_cast<int64_t>(items_.size())) {
      pieces_.push_back(static_cast<int64_t>(items_.size()));
    }
  }

  int useful_threads(int num_threads) const {
    return static_cast<int>(std::min<int64_t>(num_threads, 1 + total_elements_ / 32768));
  }

  OptimizerStepParams params_ = {};
  double gradient_scale_, clip_scale_;
  int64_t total_elements_ = 0;
  bool has_device_ = false;
  dlpack::Device device_ = {};
  std::unique_ptr<StateLookup> lookup_;
  std::vector<OptimizerTensor> tensors_;
  std::vector<OptimizerLayout> layouts_;
  std::vector<OptimizerSource> sources_;
  std::vector<OptimizerItem> items_;
  std::vector<int64_t> pieces_;
  std::vector<std::pair<void*, bool>> steps_;
  py::list changed_;
  std::vector<py::object> objects_;  // keep their memory while kernels run
};

}  // namespace

void bind_optimizer_step(py::module_& m) {
  py::class_<OptimizerTable>(m, "OptimizerTable").def(py::init<>());
  py::class_<OptimizerPlan>(m, "OptimizerPlan")
      .def(py::init<int, double, double, bool>())
      .def("add_group", &OptimizerPlan::add_group)
      .def("add_gradients", &OptimizerPlan::add_gradients)
      .def("square_sum", &OptimizerPlan::square_sum)
      .def("changed", &OptimizerPlan::changed)
      .def("run", &OptimizerPlan::run)
      .def("run_cuda", &OptimizerPlan::run_cuda)
      .def("square_sum_on_cuda", &OptimizerPlan::square_sum_on_cuda)
      .def("num_items", &OptimizerPlan::num_items)
      .def("table_size", &OptimizerPlan::table_size);
}

}  // namespace pyfast
