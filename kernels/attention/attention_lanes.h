// The unit in which attention multiplies tensors of a type.
#pragma once

#include "../common/product.h"

namespace pyfast::PYFAST_ISA {

// The unit that tensors of type T are multiplied in.
template <typename T>
struct UnitOf {
  using type = FloatUnit;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BFloat16> {
  using type = PairUnit;
};
#endif

}  // namespace pyfast::PYFAST_ISA
