// The table of a step, made of the objects that were found: pointers, dtypes and layouts, checked.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "../kernels/optimizer_step/optimizer_step.h"
#include "optimizer_lookup.h"
#include "tensor.h"

namespace pyfast {

inline DType require_counted(const char* name, const Tensor& tensor) {
  const bool is_double = tensor.has_type(dlpack::kFloat, 64);
  if (tensor.num_elements() != 1 || (!is_double && !tensor.has_type(dlpack::kFloat, 32))) {
    throw py::value_error(std::string(name) + " must be one float32 or float64, got " +
                          text_of(tensor));
  }
  return is_double ? DType::kFloat64 : DType::kFloat32;
}

// Where the memory of a tensor begins and ends.
struct Extent {
  const char* begin;
  const char* end;
  bool operator==(const Extent& other) const { return begin == other.begin && end == other.end; }
  bool operator<(const Extent& other) const { return begin < other.begin; }
};

inline Extent extent_of(const Tensor& tensor) {
  int64_t last = 0;
  for (int d = 0; d < tensor.ndim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const char* const begin = static_cast<const char*>(tensor.data());
  return {begin, begin + (last + 1) * (tensor.view().dtype.bits / 8)};
}

class OptimizerRows {
 public:
  // Begins anew. Without Python, rows are added on any thread while another one holds the GIL; what
  // is refused then must be asked for once more with it, for the reason.
  void begin(bool changes_parameters, bool writes_gradients, bool with_python,
             dlpack::Device device) {
    changes_parameters_ = changes_parameters;
    writes_gradients_ = writes_gradients;
    with_python_ = with_python;
    device_ = device;
    tensors.clear();
    layouts.clear();
    sources.clear();
    steps.clear();
    extents.clear();
    written_gradients.clear();
  }

  std::vector<OptimizerTensor> tensors;
  std::vector<OptimizerLayout> layouts;
  std::vector<OptimizerSource> sources;
  std::vector<std::pair<void*, bool>> steps;  // on the CPU; whether they are double
  std::vector<Extent> extents;                // of the parameters that change
  std::vector<const void*> written_gradients;

  // False for what the kernels cannot take.
  bool add(const OptimizerObjects& objects, const OptimizerGroup& group) {
    Tensor views[kNumOptimizerOperands];
    Tensor& p = views[kParameter];
    Tensor& g = views[kGradient];
    if (!assign(&p, objects.parameter) || !assign(&g, objects.gradient)) return false;
    if (!is_supported(p) || !is_supported(g)) return false;
    PyObject* const* found = objects.states;
    OptimizerTensor t = {};
    t.flags = objects.flags;
    t.index = objects.index;
    t.seed = group.seed;
    t.layout = -1;
    t.num_elements = p.num_elements();
    set_operand(&t, kParameter, p, p.dtype("optimizer step: a parameter"));
    if (!has_same_shape(g, p)) throw_mismatch("the gradient", g, p);
    set_operand(&t, kGradient, g, g.dtype("optimizer step: a gradient"));

    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      PyObject* const object = found[kFirstState + i];
      if (object == nullptr) continue;
      Tensor& s = views[kState0 + i];
      const char* name = name_of(group, kFirstState + i);
      take_state(&s, object, name, p);
      if (found[kFirstScale + i] != nullptr) {
        if (p.has_type(dlpack::kFloat, 64)) throw_mismatch(name, s, p);
        t.int8_states = true;
        Tensor scale;
        const char* scale_name = name_of(group, kFirstScale + i);
        const int64_t blocks = (t.num_elements + kOptimizerBlock - 1) / kOptimizerBlock;
        if (!assign(&scale, found[kFirstScale + i]) || !scale.has_type(dlpack::kFloat, 32) ||
            scale.num_elements() != blocks || !scale.is_contiguous()) {
          throw_mismatch(scale_name, scale, p);
        }
        require_same_device("optimizer step", scale_name, scale, p);
        if (!s.has_type(dlpack::kUInt, 8) || !s.is_contiguous()) throw_mismatch(name, s, p);
        t.scales[i] = static_cast<float*>(scale.data());
        set_operand(&t, kState0 + i, s, DType::kFloat32);
      } else {
        set_operand(&t, kState0 + i, s, s.dtype(name));
      }
    }
    if (found[kEmaName] != nullptr) {
      Tensor& ema = views[kEma];
      take_state(&ema, found[kEmaName], "ema", p);
      const bool is_double = t.dtypes[kParameter] == DType::kFloat64;
      if (!ema.has_type(dlpack::kFloat, is_double ? 64 : 32)) throw_mismatch("ema", ema, p);
      set_operand(&t, kEma, ema, ema.dtype("ema"));
    }
    if (found[kRemainder] != nullptr) {
      Tensor& low = views[kMaster];
      take_state(&low, found[kRemainder], "remainder", p);
      if (!low.has_type(dlpack::kInt, 16)) throw_mismatch("remainder", low, p);
      t.master_is_remainder = true;
      set_operand(&t, kMaster, low, DType::kFloat32);
    } else if (found[kMasterName] != nullptr) {
      Tensor& master = views[kMaster];
      take_state(&master, found[kMasterName], "master", p);
      if (!master.has_type(dlpack::kFloat, 32)) throw_mismatch("master", master, p);
      set_operand(&t, kMaster, master, DType::kFloat32);
    }

    OptimizerSource source = group.source;
    source.flags = objects.flags;
    if (found[kStep] != nullptr) take_step(found[kStep], p, &source);
    t.numbers = source_index(source);
    add_layout_if_needed(&t, views);
    if (writes_gradients_ || objects.flags & kZeroGradient) {
      require_apart("a gradient that is written", g);
      if (t.num_elements != 0) written_gradients.push_back(g.data());
    }
    if (t.num_elements != 0) {
      tensors.push_back(t);
      if (changes_parameters_) extents.push_back(extent_of(p));
    }
    return true;
  }

  // A gradient alone, to be measured or scaled.
  bool add_gradient(PyObject* gradient) {
    Tensor view;
    if (!assign(&view, gradient) || !is_supported(view)) return false;
    OptimizerTensor t = {};
    t.layout = -1;
    set_operand(&t, kGradient, view, view.dtype("gradient"));
    t.dtypes[kParameter] = t.dtypes[kGradient];
    t.num_elements = view.num_elements();
    t.numbers = source_index({});
    if (!view.is_dense()) add_layout(&t, view, {{kGradient, &view}});
    if (writes_gradients_) require_apart("a gradient that is written", view);
    if (t.num_elements != 0) tensors.push_back(t);
    return true;
  }

  // Takes over the rows of another table, after its own.
  void append(OptimizerRows* other) {
    const auto first_source = static_cast<int32_t>(sources.size());
    const auto first_layout = static_cast<int32_t>(layouts.size());
    for (OptimizerTensor& t : other->tensors) {
      t.numbers += first_source;
      if (t.layout >= 0) t.layout += first_layout;
    }
    const auto join = [](auto* all, const auto& more) {
      all->insert(all->end(), more.begin(), more.end());
    };
    join(&tensors, other->tensors);
    join(&layouts, other->layouts);
    join(&sources, other->sources);
    join(&steps, other->steps);
    join(&extents, other->extents);
    join(&written_gradients, other->written_gradients);
  }

 private:
  struct Operand {
    int operand;
    const Tensor* tensor;
  };

  // False for tensors whose memory does not show their values (sparse ones for example).
  bool assign(Tensor* view, PyObject* object) const {
    if (!with_python_) return view->assign_torch_tensor(object);
    return try_assign(view, object) && !(view->api() != nullptr && is_negated(object));
  }

  const char* name_of(const OptimizerGroup& group, int name) const {
    if (!with_python_) return "";
    PyObject* const text = PyTuple_GET_ITEM(group.names.ptr(), name);
    return text == Py_None ? "" : PyUnicode_AsUTF8(text);
  }

  // True where memory holds the values with the other sign, as that of z.conj().imag does.
  static bool is_negated(PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  // A floating-point tensor on the device of the step.
  bool is_supported(const Tensor& tensor) const {
    const bool is_float =
        tensor.has_type(dlpack::kFloat, 32) || tensor.has_type(dlpack::kBFloat, 16) ||
        tensor.has_type(dlpack::kFloat, 16) || tensor.has_type(dlpack::kFloat, 64);
    return is_float && tensor.device().type == device_.type && tensor.device().id == device_.id &&
           (tensor.is_cpu() || (kWithCuda && tensor.is_cuda()));
  }

  void take_state(Tensor* state, PyObject* object, const char* name, const Tensor& p) const {
    if (!assign(state, object) || !has_same_shape(*state, p)) throw_mismatch(name, *state, p);
    require_same_device("optimizer step", name, *state, p);
  }

  static void set_operand(OptimizerTensor* t, int operand, const Tensor& tensor, DType dtype) {
    t->operands[operand] = tensor.data();
    t->dtypes[operand] = dtype;
  }

  // On the CPU: the count after this step; the tensor itself changes when the step is made.
  void take_step(PyObject* object, const Tensor& p, OptimizerSource* source) {
    Tensor tensor;
    const bool is_tensor = assign(&tensor, object);
    if (!is_tensor || !(tensor.is_cpu() || tensor.device().type == p.device().type)) {
      throw py::value_error("optimizer step: step must be on the CPU or with its parameter, got " +
                            text_of(tensor));
    }
    const DType type = require_counted("optimizer step: step", tensor);
    if (!tensor.is_cpu() || kEmulateCuda) {
      source->step_pointer = tensor.data();
      source->step_type = type;
      return;
    }
    const bool is_double = type == DType::kFloat64;
    steps.emplace_back(tensor.data(), is_double);
    const double value =
        is_double ? *static_cast<double*>(tensor.data()) : *static_cast<float*>(tensor.data());
    source->step = static_cast<int64_t>(value) + 1;
  }

  // Neighbours in a group share their source.
  int32_t source_index(const OptimizerSource& source) {
    if (sources.empty() || memcmp(&source, &sources.back(), sizeof source) != 0) {
      sources.push_back(source);
    }
    return static_cast<int32_t>(sources.size()) - 1;
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
    t->layout = static_cast<int32_t>(layouts.size());
    layouts.push_back(layout);
  }

  bool changes_parameters_ = false;
  bool writes_gradients_ = false;
  bool with_python_ = true;
  dlpack::Device device_ = {};
};

}  // namespace pyfast
