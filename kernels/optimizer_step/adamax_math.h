// Adamax (Kingma and Ba 2015, section 7.1). States: the first moment, the weighted infinity norm.
//   m += (g - m) (1 - beta1);  u = max(beta2 u, |g| + eps);  p -= lr / (1 - beta1^t) m / u
#pragma once

#include "optimizer_numbers.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
PYFAST_HD void adamax_update(OptimizerValues<V>& x, const OptimizerNumbers<V>& n) {
  x.s0 = blend(x.s0, x.g, n.weight1, n.weight1_from_end);
  x.s1 = maximum(x.s1 * n.decay2, magnitude(x.g) + n.eps);
  x.p = x.p - n.step_size * x.s0 / x.s1;
}

}  // namespace pyfast::PYFAST_ISA
