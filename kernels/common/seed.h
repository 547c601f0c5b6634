// Where a kernel finds the 64-bit seed: by value, or in device memory (CUDA graphs and compiled
// graphs draw a new one for every replay without the host knowing it).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyfast {

struct Seed {
  uint64_t value;
  const uint64_t* pointer;  // overrides `value` when not null
};

}  // namespace pyfast

namespace pyfast::PYFAST_ISA {

PYFAST_HD uint64_t seed_value(const Seed& seed) {
  return seed.pointer != nullptr ? *seed.pointer : seed.value;
}

}  // namespace pyfast::PYFAST_ISA
