// Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018); decay of the parameter as in AdamW
// (Loshchilov and Hutter 2019) happens before, in optimizer_math.h. States: the first moment, the
// second, its maximum.
//   m += (g - m) (1 - beta1);  v = beta2 v + (1 - beta2) g g
//   p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include "optimizer_numbers.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
PYFAST_HD void adam_update(OptimizerValues<V>& x, const OptimizerNumbers<V>& n) {
  x.s0 = blend(x.s0, x.g, n.weight1, n.weight1_from_end);
  x.s1 = x.s1 * n.decay2 + n.weight2 * x.g * x.g;
  V second = x.s1;
  if (n.amsgrad) second = x.s2 = maximum(x.s2, x.s1);
  x.p = x.p - n.step_size * x.s0 / (square_root(second) * n.root_scale + n.eps);
}

}  // namespace pyfast::PYFAST_ISA
