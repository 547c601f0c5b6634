// Loops over dense arrays: the update, the average, the scaling of gradients.
#pragma once

#include "optimizer_parameters_cpu.h"

namespace pyfast::PYFAST_ISA {

template <typename Pointer>
struct PointeeOf;
template <typename T>
struct PointeeOf<T*> {
  using type = T;
};

// The states of a tensor as arrays of one type.
template <typename S>
struct States {
  S* s[kMaxOptimizerStates];
};

// The update of n elements in place. A null state does not exist. Arrays are fetched `ahead` bytes
// before their use, if that is not 0.
template <OptimizerRule kRule, typename C, typename Parameter, typename G, typename S>
void update_run(const Parameter& p, const G* g, States<S> states, int64_t n,
                const OptimizerNumbers<double>& numbers, int64_t ahead) {
  using V = Vec<C>;
  const OptimizerNumbers<V> rounded = rounded_numbers<V>(numbers);
  S* const s0 = states.s[0];
  S* const s1 = states.s[1];
  S* const s2 = states.s[2];
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    OptimizerValues<V> x;
    x.p = p.template load<V>(j, lanes);
    x.g = load_lanes<V>(g + j, lanes);
    x.s0 = x.s1 = x.s2 = V::broadcast(0);
    if (ahead != 0) {
      p.prefetch(j, ahead);
      prefetch_ahead(g + j, ahead);
      if (s0 != nullptr) prefetch_ahead(s0 + j, ahead);
      if (s1 != nullptr) prefetch_ahead(s1 + j, ahead);
      if (s2 != nullptr) prefetch_ahead(s2 + j, ahead);
    }
    if (s0 != nullptr) x.s0 = load_lanes<V>(s0 + j, lanes);
    if (s1 != nullptr) x.s1 = load_lanes<V>(s1 + j, lanes);
    if (s2 != nullptr) x.s2 = load_lanes<V>(s2 + j, lanes);
    optimizer_update<kRule>(x, rounded);
    p.store(x.p, j, lanes);
    if (s0 != nullptr) store_lanes(x.s0, s0 + j, lanes, false);
    if (s1 != nullptr) store_lanes(x.s1, s1 + j, lanes, false);
    if (s2 != nullptr) store_lanes(x.s2, s2 + j, lanes, false);
  });
}

template <typename Parameter, typename C>
void average_run(const Parameter& p, C* ema, int64_t n, const OptimizerNumbers<double>& numbers,
                 int64_t ahead) {
  using V = Vec<C>;
  const V weight = V::broadcast(static_cast<C>(numbers.ema_weight));
  const bool from_end = numbers.ema_from_end;
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    if (ahead != 0) prefetch_ahead(ema + j, ahead);
    const V average = load_lanes<V>(ema + j, lanes);
    store_lanes(blend(average, p.template load<V>(j, lanes), weight, from_end), ema + j, lanes,
                false);
  });
}

template <typename G, typename C>
void scale_run(G* g, int64_t n, const OptimizerNumbers<double>& numbers) {
  using V = Vec<C>;
  const V scale = V::broadcast(static_cast<C>(numbers.gradient_scale));
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    store_lanes(load_lanes<V>(g + j, lanes) * scale, g + j, lanes, false);
  });
}

template <typename Pointer>
using Pointee = typename PointeeOf<Pointer>::type;

}  // namespace pyfast::PYFAST_ISA
