// Stochastic gradient descent with momentum, as torch defines it (Sutskever et al. 2013 up to where
// the rate enters). State: the momentum buffer, which takes the gradient whole in its first step.
//   b = momentum b + (1 - dampening) g;  p -= lr b, or with Nesterov lr (g + momentum b)
#pragma once

#include "optimizer_numbers.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
PYFAST_HD void sgd_update(OptimizerValues<V>& x, const OptimizerNumbers<V>& n) {
  V direction = x.g;
  if (n.has_momentum) {
    x.s0 = n.is_first ? x.g : n.momentum * x.s0 + n.weight1 * x.g;
    direction = n.nesterov ? x.g + n.momentum * x.s0 : x.s0;
  }
  x.p = x.p - n.step_size * direction;
}

}  // namespace pyfast::PYFAST_ISA
