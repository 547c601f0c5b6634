// The tensors of one step of an optimizer: found in Python's objects by the thread that holds the
// GIL, then read and checked by all threads. Both are done anew for every step.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/common/parallel.h"
#include "optimizer_lookup.h"
#include "optimizer_memory.h"
#include "optimizer_rows.h"
#include "tensor.h"
#include "torch_shim.h"

namespace pyfast {

class OptimizerTensors {
 public:
  // Works in the memory that `owner` has from the step before, and gives it back; it may be null.
  OptimizerTensors(bool changes_parameters, bool writes_gradients, OptimizerMemory* owner)
      : changes_parameters_(changes_parameters),
        writes_gradients_(writes_gradients),
        owner_(owner) {
    if (owner_ != nullptr) std::swap(memory_, *owner_);
    if (memory_.shares.empty()) memory_.shares.emplace_back();
    rows().begin(changes_parameters, writes_gradients, true, {});
  }
  OptimizerTensors(const OptimizerTensors&) = delete;
  OptimizerTensors& operator=(const OptimizerTensors&) = delete;
  ~OptimizerTensors() {
    memory_.objects.clear();
    memory_.kept.clear();
    if (owner_ != nullptr) std::swap(memory_, *owner_);
  }

  // Adds the parameters of a group that have a gradient. `states` is a dict by parameter or a list;
  // `grads` may be None for the .grad of each, `indices` None for counting from first_index,
  // `fresh` None for none. Returns the positions of those without a state that `names` asks for,
  // which are added without any; or None for a group that the kernels cannot take.
  py::object add_group(const py::list& params, const py::object& grads, const py::object& states,
                       const py::tuple& names, const py::tuple& hyper, uint32_t flags,
                       uint64_t seed, uint32_t first_index, const py::object& indices,
                       const py::object& fresh, const py::tuple& plain_types) {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    groups_.push_back({source_from(hyper, flags), seed, names});
    if (lookup_ == nullptr || !lookup_->is_of(states)) {
      lookup_ = std::make_unique<StateLookup>(states);
    }
    py::list missing;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      const auto parameter = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(params.ptr(), i));
      py::object grad =
          grads.is_none()
              ? py::reinterpret_steal<py::object>(PyObject_GetAttr(parameter.ptr(), grad_name))
              : py::reinterpret_borrow<py::object>(PyList_GetItem(grads.ptr(), i));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      if (!is_plain(parameter.ptr(), plain_types) || !is_plain(grad.ptr(), plain_types)) {
        return py::none();
      }
      OptimizerObjects found = {};
      found.parameter = parameter.ptr();
      found.gradient = grad.ptr();
      found.group = static_cast<int32_t>(groups_.size()) - 1;
      found.flags = flags;
      if (!fresh.is_none() && PyObject_IsTrue(PyList_GetItem(fresh.ptr(), i)) == 1) {
        found.flags |= kFirstStep;
      }
      found.index = indices.is_none()
                        ? first_index + static_cast<uint32_t>(i)
                        : static_cast<uint32_t>(PyLong_AsLong(PyList_GetItem(indices.ptr(), i)));
      const py::object state = lookup_->find(parameter.ptr(), i);
      const bool is_complete = find_states(state, names, &found);
      walk_.pass(found, state.ptr());
      if (!is_complete) {
        missing.append(i);
        std::fill(std::begin(found.states), std::end(found.states), nullptr);
      }
      kept().push_back(std::move(grad));
      kept().push_back(parameter);
      for (PyObject* object : found.states) {
        if (object != nullptr) kept().push_back(py::reinterpret_borrow<py::object>(object));
      }
      objects().push_back(found);
    }
    return missing;
  }

  // Makes the rows of all that was added; false where the kernels cannot take one. Each thread
  // fills rows of its own. What these refuse is tried once more in turn, with Python, which has the
  // reason.
  bool make_rows(int num_threads) {
    if (objects().empty()) return true;
    Tensor first;
    if (!try_assign(&first, objects()[0].parameter)) return false;
    device_ = first.device();
    const auto count = static_cast<int64_t>(objects().size());
    const auto add = [&](int64_t begin, int64_t end, OptimizerRows* rows) {
      for (int64_t i = begin; i < end; ++i) {
        look_ahead(i, end);
        const OptimizerObjects& found = objects()[static_cast<size_t>(i)];
        if (!rows->add(found, groups_[static_cast<size_t>(found.group)])) return false;
      }
      return true;
    };
    if (has_torch_shim()) {
      if (is_forked_child()) num_threads = 1;
      const int64_t num_shares = std::clamp<int64_t>(count / kMinShare, 1, num_threads);
      std::vector<OptimizerRows>& shares = memory_.shares;
      shares.resize(static_cast<size_t>(num_shares));
      int64_t num_done = 0;
#pragma omp parallel for num_threads(static_cast<int>(num_shares)) \
    reduction(+ : num_done) if (num_shares > 1)
      for (int64_t t = 0; t < num_shares; ++t) {
        OptimizerRows& rows = shares[static_cast<size_t>(t)];
        rows.begin(changes_parameters_, writes_gradients_, false, device_);
        try {
          num_done += add(count * t / num_shares, count * (t + 1) / num_shares, &rows);
        } catch (const std::exception&) {
        }
      }
      if (num_done == num_shares) {
        for (size_t t = 1; t < shares.size(); ++t) shares[0].append(&shares[t]);
        require_own_gradients();
        return true;
      }
    }
    rows().begin(changes_parameters_, writes_gradients_, true, device_);
    if (!add(0, count, &rows())) return false;
    require_own_gradients();
    return true;
  }

  // Adds gradients alone, to be measured or scaled; false where the kernels cannot take one.
  bool add_gradients(const py::list& grads, const py::tuple& plain_types) {
    for (py::handle grad : grads) {
      Tensor view;
      if (!is_plain(grad.ptr(), plain_types) || !try_assign(&view, grad.ptr())) return false;
      if (gradients_.empty()) {
        device_ = view.device();
        rows().begin(changes_parameters_, writes_gradients_, true, device_);
      }
      if (!rows().add_gradient(grad.ptr())) return false;
      gradients_.push_back(py::reinterpret_borrow<py::object>(grad));
    }
    return true;
  }

  // Tells autograd that the parameters have changed, and the gradients where they are written.
  void bump_versions() const {
    py::list changed;
    const auto bump = [&](PyObject* tensor) {
      if (has_torch_shim()) {
        bump_torch_version(tensor);
      } else {
        changed.append(py::handle(tensor));
      }
    };
    for (const OptimizerObjects& found : memory_.objects) {
      if (changes_parameters_) bump(found.parameter);
      if (writes_gradients_ || found.flags & kZeroGradient) bump(found.gradient);
    }
    for (const py::object& gradient : gradients_) bump(gradient.ptr());
    if (!changed.empty()) {
      py::module_::import("torch._C").attr("_increment_version")(changed);
    }
  }

 protected:
  // Whether the memory of a parameter begins before that of another one ends: parameters may then
  // share elements, and are stepped one after the other.
  bool parameters_overlap() {
    std::vector<Extent>& extents = memory_.extents;
    if (extents != rows().extents) {
      extents = rows().extents;
      std::vector<Extent> sorted = extents;
      std::sort(sorted.begin(), sorted.end());
      memory_.overlap = false;
      for (size_t i = 1; i < sorted.size(); ++i) {
        memory_.overlap = memory_.overlap || sorted[i].begin < sorted[i - 1].end;
      }
    }
    return memory_.overlap;
  }

  OptimizerRows& rows() { return memory_.shares[0]; }
  const OptimizerRows& rows() const { return memory_.shares[0]; }

  dlpack::Device device_ = {};

 private:
  static constexpr int64_t kMinShare = 256;  // tensors that are worth a thread

  // One that is written for a parameter would be another one for the next.
  void require_own_gradients() {
    std::vector<const void*> written = rows().written_gradients;
    std::sort(written.begin(), written.end());
    if (std::adjacent_find(written.begin(), written.end()) != written.end()) {
      throw std::runtime_error(
          "optimizer step: a gradient that is written (unscaled or zeroed) must belong to one "
          "parameter, got the same one for two");
    }
  }

  static bool is_plain(PyObject* object, const py::tuple& types) {
    for (size_t i = 0; i < types.size(); ++i) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == PyTuple_GET_ITEM(types.ptr(), i)) {
        return true;
      }
    }
    return false;
  }

  // The states that `names` asks for; false where one is not there.
  static bool find_states(const py::object& state, const py::tuple& names,
                          OptimizerObjects* objects) {
    bool is_complete = true;
    for (int name = 0; name < kNumNames; ++name) {
      PyObject* const key = PyTuple_GET_ITEM(names.ptr(), name);
      if (key == Py_None) continue;
      if (name == kRemainder && !has_type(objects->parameter, dlpack::kBFloat, 16)) continue;
      if (name == kMasterName && !has_type(objects->parameter, dlpack::kFloat, 16)) continue;
      PyObject* found = nullptr;
      if (PyDict_Check(state.ptr())) {
        found = PyDict_GetItemWithError(state.ptr(), key);
        if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
      }
      if (found == nullptr || found == Py_None) {
        is_complete = false;
      } else {
        objects->states[name] = found;
      }
    }
    return is_complete;
  }

  static bool has_type(PyObject* tensor, uint8_t code, int bits) {
    Tensor view;
    return try_assign(&view, tensor) && view.has_type(code, bits);
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
          try_assign(&tensor, number.ptr()) && tensor.is_cuda()) {
        *pointers[i] = tensor.data();
        *types[i] = require_counted("optimizer step: lr and betas", tensor);
        kept().push_back(number);
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

  // Tensors that are read soon, brought into cache in three steps, as each leads to the next.
  void look_ahead(int64_t i, int64_t end) const {
    const auto each = [&](int64_t distance, const auto& look) {
      if (i + distance >= end) return;
      const OptimizerObjects& ahead = memory_.objects[static_cast<size_t>(i + distance)];
      look(ahead.parameter);
      look(ahead.gradient);
      for (PyObject* state : ahead.states) {
        if (state != nullptr) look(state);
      }
    };
    each(12, [](PyObject* object) { __builtin_prefetch(object); });
    each(8, [](PyObject* object) { Tensor::prefetch(object, TorchPart::kTensor); });
    each(4, [](PyObject* object) { Tensor::prefetch(object, TorchPart::kStorage); });
  }

  std::vector<OptimizerObjects>& objects() { return memory_.objects; }
  std::vector<py::object>& kept() { return memory_.kept; }  // their memory is in use

  bool changes_parameters_;
  bool writes_gradients_;
  OptimizerMemory* owner_;
  OptimizerMemory memory_;
  OptimizerWalk walk_{&memory_.places};
  std::unique_ptr<StateLookup> lookup_;
  std::vector<OptimizerGroup> groups_;
  std::vector<py::object> gradients_;
};

}  // namespace pyfast
