// The numbers of one tensor at one step, from its group's and its step count: computed in double,
// rounded once. V is a scalar or a vector of the type that the tensor is computed in.
#pragma once

#include "optimizer_lanes.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {

template <typename V>
struct OptimizerValues {
  V p, g, s0, s1, s2;
};

// a + (b - a) weight; `from_end` where the weight of b is above a half, and `weight` that of a.
// Exact at both ends, as torch.lerp is.
template <typename V>
PYFAST_HD V blend(V a, V b, V weight, bool from_end) {
  const V way = (b - a) * weight;
  return from_end ? b - way : a + way;
}

PYFAST_HD double blend_weight(double weight, bool* from_end) {
  *from_end = !(weight < 0.5);
  return *from_end ? 1 - weight : weight;
}

PYFAST_HD OptimizerNumbers<double> optimizer_numbers(OptimizerRule rule,
                                                     const OptimizerSource& source,
                                                     double gradient_scale, double clip_scale) {
  const OptimizerHyper& h = source.hyper;
  const uint32_t flags = source.flags;
  const double step = static_cast<double>(source.step);
  OptimizerNumbers<double> n = {};
  n.gradient_scale = gradient_scale;
  n.clip_scale = flags & kMaximize ? -clip_scale : clip_scale;
  n.step_size = h.lr;
  n.root_scale = 1;
  if (rule == OptimizerRule::kAdam || rule == OptimizerRule::kAdamax) {
    n.step_size = h.lr / (1 - pow(h.beta1, step));
    if (rule == OptimizerRule::kAdam) n.root_scale = 1 / sqrt(1 - pow(h.beta2, step));
  }
  n.weight1 = rule == OptimizerRule::kSgd ? 1 - h.dampening
                                          : blend_weight(1 - h.beta1, &n.weight1_from_end);
  n.decay2 = h.beta2;
  n.weight2 = 1 - h.beta2;
  n.blend2 = blend_weight(n.weight2, &n.weight2_from_end);
  n.eps = h.eps;
  n.momentum = h.momentum;
  n.decay = flags & kDecoupledDecay ? 1 - h.lr * h.weight_decay : 1;
  n.l2 = flags & kDecoupledDecay ? 0 : h.weight_decay;
  n.l1 = flags & kDecoupledL1 ? 0 : h.l1;
  n.threshold = flags & kDecoupledL1 ? h.lr * h.l1 : 0;
  n.ema_weight = blend_weight(1 - h.ema_decay, &n.ema_from_end);
  n.amsgrad = flags & kAmsgrad;
  n.nesterov = flags & kNesterov;
  n.centered = flags & kCentered;
  n.has_momentum = h.momentum != 0;
  n.is_first = flags & kFirstStep;
  n.step = source.step;
  n.has_scale = n.gradient_scale != 1 || n.clip_scale != 1;
  n.has_l2 = n.l2 != 0;
  n.has_l1 = n.l1 != 0;
  n.has_threshold = n.threshold != 0;
  return n;
}

// The same in the type that the tensor is computed in.
template <typename V>
PYFAST_HD OptimizerNumbers<V> rounded_numbers(const OptimizerNumbers<double>& n) {
  using C = typename Lanes<V>::Compute;
  const auto cast = [](double x) { return Lanes<V>::broadcast(static_cast<C>(x)); };
  OptimizerNumbers<V> out = {};
  out.gradient_scale = cast(n.gradient_scale);
  out.clip_scale = cast(n.clip_scale);
  out.step_size = cast(n.step_size);
  out.weight1 = cast(n.weight1);
  out.decay2 = cast(n.decay2);
  out.weight2 = cast(n.weight2);
  out.blend2 = cast(n.blend2);
  out.eps = cast(n.eps);
  out.root_scale = cast(n.root_scale);
  out.momentum = cast(n.momentum);
  out.decay = cast(n.decay);
  out.l2 = cast(n.l2);
  out.l1 = cast(n.l1);
  out.threshold = cast(n.threshold);
  out.ema_weight = cast(n.ema_weight);
  out.weight1_from_end = n.weight1_from_end;
  out.weight2_from_end = n.weight2_from_end;
  out.ema_from_end = n.ema_from_end;
  out.amsgrad = n.amsgrad;
  out.nesterov = n.nesterov;
  out.centered = n.centered;
  out.has_momentum = n.has_momentum;
  out.is_first = n.is_first;
  out.step = n.step;
  out.has_scale = n.has_scale;
  out.has_l2 = n.has_l2;
  out.has_l1 = n.has_l1;
  out.has_threshold = n.has_threshold;
  return out;
}

}  // namespace pyfast::PYFAST_ISA
