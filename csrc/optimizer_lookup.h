// What the boundary of optimizers asks of tensors, and where it finds their states.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../kernels/optimizer_step/optimizer_step.h"
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

// What a group says of its tensors.
struct OptimizerGroup {
  OptimizerSource source;
  uint64_t seed;
  py::tuple names;
};

// The Python objects of a parameter, borrowed.
struct OptimizerObjects {
  PyObject* parameter;
  PyObject* gradient;
  PyObject* states[kNumNames];  // null: none
  int32_t group;
  uint32_t flags;
  uint32_t index;
};

// False for tensors that have no memory of their own to show (sparse ones for example).
inline bool try_assign(Tensor* view, py::handle object) {
  try {
    return view->assign(object);
  } catch (const py::error_already_set&) {
    return false;
  } catch (const std::runtime_error&) {
    return false;
  }
}

inline std::string text_of(const Tensor& tensor) {
  return tensor.view().dtype.bits == 0 ? "no tensor" : tensor.describe();
}

[[noreturn]] inline void throw_mismatch(const char* name, const Tensor& tensor,
                                        const Tensor& parameter) {
  throw py::value_error(std::string("optimizer step: ") + name + " of a parameter of " +
                        parameter.describe() + " does not fit to it, got " + text_of(tensor));
}

// Elements that share memory cannot be written one by one.
inline void require_apart(const char* name, const Tensor& tensor) {
  for (int d = 0; d < tensor.ndim(); ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1 && tensor.num_elements() != 0) {
      throw std::runtime_error(std::string("optimizer step: elements of ") + name + ", " +
                               tensor.describe() +
                               ", share memory: more than one element of the written-to tensor "
                               "refers to a single memory location. Please clone() the tensor");
    }
  }
}

inline bool has_same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.ndim() == b.ndim();
  for (int d = 0; same && d < a.ndim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline bool has_same_strides(const Tensor& a, const Tensor& b) {
  for (int d = 0; d < a.ndim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Finds the state of each parameter of a list in turn. A dict holds them in the order in which
// they were first stepped, mostly that of the list: following it saves hashing, a call into
// Python.
class StateLookup {
 public:
  explicit StateLookup(const py::object& states) : states_(states) {}
  bool is_of(const py::object& states) const { return states.ptr() == states_.ptr(); }
  // None where there is none.
  py::object find(PyObject* parameter, Py_ssize_t position) {
    if (PyList_Check(states_.ptr())) {
      return py::reinterpret_borrow<py::object>(PyList_GetItem(states_.ptr(), position));
    }
    PyObject *key, *value;
    Py_ssize_t next = place_;
    if (PyDict_Next(states_.ptr(), &next, &key, &value) && key == parameter) {
      place_ = next;
      return py::reinterpret_borrow<py::object>(value);
    }
    PyObject* const found = PyDict_GetItemWithError(states_.ptr(), parameter);
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return found == nullptr ? py::none() : py::reinterpret_borrow<py::object>(found);
  }

 private:
  py::object states_;
  Py_ssize_t place_ = 0;
};

}  // namespace pyfast
