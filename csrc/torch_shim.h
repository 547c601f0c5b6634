// torch's stable C interface: it reads a tensor without the reference counts and locks of torch's
// DLPack exchange, in a third of the time.
#pragma once

#include <pybind11/pybind11.h>

#include <array>

#include "dlpack.h"

namespace pyfast {

// Looks for the interface, and compares what it says of `probe`, a tensor on the CPU whose type
// offers `api`, with what that says. Whether it is used from now on; never with api null.
bool use_torch_shim(pybind11::handle probe, const dlpack::ExchangeApi* api);

// Fills `view` from a Python tensor of a type that offers torch's exchange `api`. False where the
// interface is not to be had, or the tensor is none that it can show (sparse, a wrapper, a dtype
// that no kernel knows) or has its negative bit set: `api` then gives the view, or the error. The
// memory is the tensor's.
bool view_of_torch_tensor(pybind11::handle tensor, const dlpack::ExchangeApi* api,
                          dlpack::Tensor* view);

bool has_torch_shim();

// Tells autograd that a tensor has changed in place, as torch._C._increment_version does; needs the
// interface.
void bump_torch_version(PyObject* tensor);

// What a Python tensor leads to, and what that does: its storage and its version.
enum class TorchPart { kTensor, kStorage };

// Brings a part of a tensor of a type that offers `api` into cache; those before it should be
// there. Where the parts are is a guess about torch: a wrong one costs time alone.
void prefetch_torch_tensor(pybind11::handle tensor, const dlpack::ExchangeApi* api, TorchPart part);

// Where torch looks when it is asked for the gradient of a tensor, or its flags: a guess as well.
std::array<const void*, 5> torch_places(PyObject* tensor);

}  // namespace pyfast
