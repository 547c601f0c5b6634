#include <pybind11/pybind11.h>

#include "../kernels/common/cuda_device.h"
#include "../kernels/common/isa.h"
#include "../kernels/common/parallel.h"
#include "bindings.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYFAST_COMPILER;
  py::list levels;
  for (int level = 0; level < pyfast::kNumIsaLevels; ++level) {
    levels.append(pyfast::kIsaNames[level]);
  }
  info["isa_compiled"] = levels;
  info["isa_detected"] = pyfast::kIsaNames[static_cast<int>(pyfast::detected_isa())];
  info["cuda"] = pyfast::kWithCuda;
  info["cuda_emulation"] = pyfast::kEmulateCuda;
  info["cuda_toolkit"] = pyfast::cuda_toolkit_version();
  info["cuda_architectures"] = pyfast::cuda_architectures();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pyfast. The Python package checks arguments; use that.";
  pyfast::install_fork_handler();
  m.def("build_info", &build_info);
  m.def("selected_isa", [] { return pyfast::kIsaNames[static_cast<int>(pyfast::selected_isa())]; });
  m.def("set_selected_isa", [](const char* name) {
    const char* error = pyfast::set_selected_isa(name);
    if (error != nullptr) throw py::value_error(std::string("CPU level '") + name + "': " + error);
  });
  m.def("set_up", &pyfast::Tensor::set_up);
  pyfast::bind_empty(m);
  pyfast::bind_dropout(m);
  pyfast::bind_bias_dropout_add(m);
  pyfast::bind_dropout_add_norm(m);
  pyfast::bind_attention(m);
  pyfast::bind_optimizer_step(m);
  pyfast::bind_quantize_int8(m);
  pyfast::bind_int8_linear(m);
  pyfast::bind_linear(m);
  pyfast::bind_cross_entropy(m);
}
