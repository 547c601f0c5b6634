// The unit in which attention multiplies tensors of a type, and how exact its exponentials are.
#pragma once

#include "../common/product.h"

namespace pyfast::PYFAST_ISA {

// The unit that tensors of type T are multiplied in.
template <typename T>
struct UnitOf {
  using type = FloatUnit;
  static constexpr int kExpDegree = kExactDegree;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BFloat16> {
  using type = PairUnit;
  static constexpr int kExpDegree = kBFloat16Degree;
};
#endif

}  // namespace pyfast::PYFAST_ISA
