// What a step leaves to the next one of its optimizer: memory, whose pages are there already, and
// the addresses of the Python objects that it looked at. With many small tensors those are out of
// cache by then, and looking for them waits for memory at every turn; so they are fetched ahead.
// Nothing is read from these addresses: nothing here can be stale. Whether parameters overlap is
// known as long as they are where they were.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "optimizer_lookup.h"
#include "optimizer_rows.h"
#include "torch_shim.h"

namespace pyfast {

struct OptimizerMemory {
  using Places = std::array<const void*, 24>;
  std::vector<Places> places;  // of each parameter in turn
  std::vector<OptimizerObjects> objects;
  std::vector<py::object> kept;
  std::vector<OptimizerRows> shares;
  std::vector<Extent> extents;  // of the parameters
  bool overlap = false;         // whether some of those do
};

// Fetches what the parameters after this one will be asked for, as far as they are the same ones as
// at the last step, and notes what this one was asked for.
class OptimizerWalk {
 public:
  explicit OptimizerWalk(std::vector<OptimizerMemory::Places>* places) : places_(*places) {}

  void pass(const OptimizerObjects& objects, PyObject* state) {
    constexpr size_t kDistance = 3;
    if (position_ + kDistance < places_.size()) {
      for (const void* place : places_[position_ + kDistance]) __builtin_prefetch(place, 1);
    }
    if (position_ == places_.size()) places_.emplace_back();
    OptimizerMemory::Places& places = places_[position_++];
    size_t count = 0;
    const auto put = [&](const void* place) {
      if (count < places.size()) places[count++] = place;
    };
    for (PyObject* tensor : {objects.parameter, objects.gradient}) {
      put(tensor);
      for (const void* place : torch_places(tensor)) put(place);
    }
    put(state);
    if (PyDict_Check(state)) {
      const char* const keys =
          reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(state)->ma_keys);
      put(keys);
      put(keys + 64);
    }
    for (PyObject* object : objects.states) {
      if (object != nullptr) put(object);
    }
    while (count < places.size()) put(nullptr);
  }

 private:
  std::vector<OptimizerMemory::Places>& places_;
  size_t position_ = 0;
};

}  // namespace pyfast
