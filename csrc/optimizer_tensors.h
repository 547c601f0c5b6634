// The tensors of one step of an optimizer, found and checked. Nothing is kept from one step to the
// next, so that nothing can be stale.
#pragma once

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../kernels/optimizer_step/optimizer_step.h"
#include "optimizer_lookup.h"
#include "tensor.h"

namespace pyfast {

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

class OptimizerTensors {
 public:
  OptimizerTensors(bool changes_parameters, bool writes_gradients)
      : changes_parameters_(changes_parameters), writes_gradients_(writes_gradients) {}

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
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      const auto holder = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
      PyObject* const parameter = holder.ptr();
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
      const py::object state = lookup_->find(parameter, i);
      const Outcome outcome =
          add_tensor(holder, grad, state, names, source, tensor_flags, seed, index);
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
      if (!view.is_dense()) add_layout(&t, view, {{kGradient, &view}});
      if (writes_gradients_) require_apart("a gradient that is written", view);
      changed_.append(grad);
      if (t.num_elements != 0) tensors_.push_back(t);
    }
    return true;
  }

  // The parameters that the step changes, and the gradients where it writes to them.
  py::list changed() const { return changed_; }

 protected:
  static bool assign_view(Tensor* view, py::handle object) { return assign(view, object); }

  std::vector<OptimizerTensor> tensors_;
  std::vector<OptimizerLayout> layouts_;
  std::vector<OptimizerSource> sources_;
  std::vector<std::pair<void*, bool>> steps_;  // on the CPU; whether they are double
  bool has_device_ = false;
  dlpack::Device device_ = {};

 private:
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

  Outcome add_tensor(const py::object& parameter, const py::object& grad, const py::object& state,
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
      if (key == Py_None || !PyDict_Check(state.ptr())) return nullptr;
      PyObject* const found = PyDict_GetItemWithError(state.ptr(), key);
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
        if (p.has_type(dlpack::kFloat, 64)) throw_mismatch(name, s, p);
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
    if (changes_parameters_) changed_.append(parameter);
    if (writes_gradients_ || flags & kZeroGradient) {
      require_apart("a gradient that is written", g);
      changed_.append(grad);
    }
    objects_.push_back(grad);
    objects_.push_back(parameter);
    for (PyObject* object : found) {
      if (object != nullptr) objects_.push_back(py::reinterpret_borrow<py::object>(object));
    }
    if (t.num_elements != 0) tensors_.push_back(t);
    return Outcome::kAdded;
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
    if (!tensor.is_cpu() || kEmulateCuda) {
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
    if (changes_parameters_) require_apart("a parameter", p);
    const bool by_index = t->int8_states || t->flags & kStochasticRounding;
    bool straight = by_index ? p.is_contiguous() : p.is_dense();
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

  bool changes_parameters_;
  bool writes_gradients_;
  std::unique_ptr<StateLookup> lookup_;
  py::list changed_;
  std::vector<py::object> objects_;  // keep their memory while kernels run
};

}  // namespace pyfast
