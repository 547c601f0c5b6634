// Where a kernel finds the 64-bit seed: by value, or in device memory (CUDA graphs and compiled
// graphs draw a new one for every replay without the host knowing it). A tensor that is a shard of
// a larger one has the mask that it would have there: its indices begin at `first`.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pyfast {

struct Seed {
  uint64_t value;
  const uint64_t* pointer;  // overrides `value` when not null
  int64_t first;            // the index of the first element, or of the first head
  int64_t step;             // of attention, from one sequence to the next: the number of heads
};

}  // namespace pyfast

namespace pyfast::PYFAST_ISA {

PYFAST_HD uint64_t seed_value(const Seed& seed) {
  return seed.pointer != nullptr ? *seed.pointer : seed.value;
}

}  // namespace pyfast::PYFAST_ISA
