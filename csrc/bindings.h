// One bind_<op> per op; module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>

namespace pyfast {

void bind_empty(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_bias_dropout_add(pybind11::module_& m);
void bind_dropout_add_norm(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_optimizer_step(pybind11::module_& m);
void bind_quantize_int8(pybind11::module_& m);
void bind_int8_linear(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);

}  // namespace pyfast
