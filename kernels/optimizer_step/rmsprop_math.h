// RMSprop (Hinton 2012), centered as in Graves 2013. States: the mean square, the momentum buffer,
// the mean gradient. The variance of centered RMSprop is kept from falling below zero, where
// rounding puts it in torch, and gives NaN.
//   s = alpha s + (1 - alpha) g g;  d = g / (sqrt(s - a^2) + eps)
//   p -= lr d, or with momentum b = momentum b + d, p -= lr b
#pragma once

#include "optimizer_numbers.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
PYFAST_HD void rmsprop_update(OptimizerValues<V>& x, const OptimizerNumbers<V>& n) {
  x.s0 = x.s0 * n.decay2 + n.weight2 * x.g * x.g;
  V variance = x.s0;
  if (n.centered) {
    x.s2 = blend(x.s2, x.g, n.blend2, n.weight2_from_end);
    variance = maximum(x.s0 - x.s2 * x.s2, Lanes<V>::broadcast(0));
  }
  const V denominator = square_root(variance) + n.eps;
  if (n.has_momentum) {
    x.s1 = n.momentum * x.s1 + x.g / denominator;
    x.p = x.p - n.step_size * x.s1;
  } else {
    x.p = x.p - n.step_size * x.g / denominator;
  }
}

}  // namespace pyfast::PYFAST_ISA
