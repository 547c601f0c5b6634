// The plain case of a CUDA step, that of most training: dense aligned operands, the parameter and
// its gradient of one type, the states of one, nothing of what only some optimizers do. Here all is
// known when compiled, so that a thread has the loads of all operands in flight at once: nothing is
// converted before. Elements go to threads in units of 16 bytes of the widest type, so that a warp
// moves whole lines.
#pragma once

#include "optimizer_operands.cuh"

namespace pyfast::PYFAST_ISA {

// States are a bit each.
template <OptimizerRule kRuleOf, int kStatesOf>
struct PlainRule {
  static constexpr OptimizerRule kRule = kRuleOf;
  static constexpr int kStates = kStatesOf;
};

template <typename ParameterT, typename StateT>
struct PlainTypes {
  using P = ParameterT;  // and of the gradient
  using S = StateT;
};

PYFAST_HD constexpr int plain_rule_key(OptimizerRule rule, int states) {
  return static_cast<int>(rule) * 8 + states;
}

// Calls f with the rule and the states; false where the general case has to do it.
template <typename F>
__device__ __forceinline__ bool dispatch_plain_rule(int key, const F& f) {
  switch (key) {
    case plain_rule_key(OptimizerRule::kAdam, 3):
      return f(PlainRule<OptimizerRule::kAdam, 3>());
    case plain_rule_key(OptimizerRule::kAdam, 7):
      return f(PlainRule<OptimizerRule::kAdam, 7>());
    case plain_rule_key(OptimizerRule::kSgd, 0):
      return f(PlainRule<OptimizerRule::kSgd, 0>());
    case plain_rule_key(OptimizerRule::kSgd, 1):
      return f(PlainRule<OptimizerRule::kSgd, 1>());
    case plain_rule_key(OptimizerRule::kRmsprop, 1):
      return f(PlainRule<OptimizerRule::kRmsprop, 1>());
    case plain_rule_key(OptimizerRule::kRmsprop, 3):
      return f(PlainRule<OptimizerRule::kRmsprop, 3>());
    case plain_rule_key(OptimizerRule::kAdamax, 3):
      return f(PlainRule<OptimizerRule::kAdamax, 3>());
    default:
      return false;
  }
}

template <typename F>
__device__ __forceinline__ bool dispatch_plain_types(DType p, DType s, const F& f) {
  if (p == DType::kFloat32 && s == p) return f(PlainTypes<float, float>());
  if (p == DType::kBFloat16 && s == p) return f(PlainTypes<BFloat16, BFloat16>());
  if (p == DType::kBFloat16 && s == DType::kFloat32) return f(PlainTypes<BFloat16, float>());
  if (p == DType::kFloat16 && s == p) return f(PlainTypes<Float16, Float16>());
  return false;
}

// Sets the states that there are, as bits, and their type. False: not plain. Without branches, all
// that is looked up is on its way at once.
__device__ __forceinline__ bool is_plain(const OptimizerTensor& t,
                                         const OptimizerNumbers<double>& n, int* states,
                                         DType* state_type) {
  uintptr_t operands[kNumOptimizerOperands];
#pragma unroll
  for (int i = 0; i < kNumOptimizerOperands; ++i) {
    operands[i] = reinterpret_cast<uintptr_t>(t.operands[i]);
  }
  unsigned differs = static_cast<unsigned>(t.layout >= 0) | t.int8_states |
                     (t.flags & kStochasticRounding) | (operands[kEma] != 0) |
                     (operands[kMaster] != 0) | n.has_l1 | n.has_threshold |
                     (t.dtypes[kGradient] != t.dtypes[kParameter]);
  const DType types[kMaxOptimizerStates] = {t.dtypes[kState0], t.dtypes[kState1],
                                            t.dtypes[kState2]};
  uintptr_t address = operands[kParameter] | operands[kGradient];
  *states = operands[kState0] != 0;
  *state_type = *states != 0 ? types[0] : t.dtypes[kParameter];
#pragma unroll
  for (int i = 0; i < kMaxOptimizerStates; ++i) {
    const bool is_there = operands[kState0 + i] != 0;
    differs |= static_cast<unsigned>(is_there) & (types[i] != *state_type);
    *states |= static_cast<int>(is_there) << i;
    address |= operands[kState0 + i];
  }
  return (differs | (address & 15)) == 0;
}

// What plain_numbers() takes as given. False: it is not so.
template <typename Rule>
__device__ __forceinline__ bool has_plain_numbers(const OptimizerNumbers<double>& n) {
  if constexpr (Rule::kRule == OptimizerRule::kSgd) return n.has_momentum == (Rule::kStates == 1);
  if constexpr (Rule::kRule == OptimizerRule::kRmsprop) {
    return !n.centered && n.has_momentum == (Rule::kStates == 3);
  }
  return !n.weight1_from_end && n.amsgrad == (Rule::kStates == 7);
}

template <typename Rule>
__device__ __forceinline__ OptimizerNumbers<float> plain_numbers(OptimizerNumbers<float> n) {
  n.has_scale = true;  // by 1 changes nothing, and is one thing less to look up
  n.has_l1 = n.has_threshold = n.centered = n.weight1_from_end = false;
  n.amsgrad = Rule::kStates == 7;
  n.has_momentum = Rule::kStates == (Rule::kRule == OptimizerRule::kRmsprop ? 3 : 1);
  return n;
}

// Elements 2 `pair` and 2 `pair` + 1.
template <typename T, int kBytes>
__device__ __forceinline__ void unpack(const Words<kBytes>& words, int pair, float (&out)[2]) {
  T values[2];
  memcpy(values, &words.w[pair * static_cast<int>(sizeof(T)) / 2], sizeof values);
  out[0] = to_float(values[0]), out[1] = to_float(values[1]);
}

template <typename T, int kBytes>
__device__ __forceinline__ void pack(const float (&values)[2], int pair, Words<kBytes>* words) {
  T rounded[2];
  from_float(values[0], &rounded[0]), from_float(values[1], &rounded[1]);
  memcpy(&words->w[pair * static_cast<int>(sizeof(T)) / 2], rounded, sizeof rounded);
}

// What a thread does with elements of an item that follow each other: of these it keeps what is in
// memory, and converts two at a time, in place. Few registers let many threads be there at once.
template <typename Rule, typename Types>
struct PlainUnit {
  using P = typename Types::P;
  using S = typename Types::S;
  static constexpr int kSize = 16 / static_cast<int>(sizeof(P) > sizeof(S) ? sizeof(P) : sizeof(S));
  static constexpr int kParameterBytes = kSize * static_cast<int>(sizeof(P));
  static constexpr int kStateBytes = kSize * static_cast<int>(sizeof(S));

  struct Operands {
    P *p, *g;
    S* s[kMaxOptimizerStates];
  };

  Words<kParameterBytes> p, g;
  Words<kStateBytes> s[kMaxOptimizerStates];

  static __device__ __forceinline__ Operands operands(const OptimizerTensor& t, int64_t begin) {
    Operands found = {static_cast<P*>(t.operands[kParameter]) + begin,
                      static_cast<P*>(t.operands[kGradient]) + begin,
                      {}};
#pragma unroll
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (Rule::kStates >> i & 1) found.s[i] = static_cast<S*>(t.operands[kState0 + i]) + begin;
    }
    return found;
  }

  __device__ __forceinline__ void load(const Operands& from, int first) {
    g = load_words<kParameterBytes>(from.g + first);
    p = load_words<kParameterBytes>(from.p + first);
#pragma unroll
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (Rule::kStates >> i & 1) s[i] = load_words<kStateBytes>(from.s[i] + first);
    }
  }

  __device__ __forceinline__ void store(const Operands& to, int first, bool write_gradient) const {
#pragma unroll
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (Rule::kStates >> i & 1) store_words(s[i], to.s[i] + first);
    }
    store_words(p, to.p + first);
    if (write_gradient) store_words(g, to.g + first);
  }

  // One element, that is the first here.
  __device__ __forceinline__ void load_one(const Operands& from, int first) {
    p = g = {}, s[0] = s[1] = s[2] = {};
    memcpy(&g, from.g + first, sizeof(P));
    memcpy(&p, from.p + first, sizeof(P));
#pragma unroll
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (Rule::kStates >> i & 1) memcpy(&s[i], from.s[i] + first, sizeof(S));
    }
  }

  __device__ __forceinline__ void store_one(const Operands& to, int first,
                                            bool write_gradient) const {
#pragma unroll
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (Rule::kStates >> i & 1) memcpy(to.s[i] + first, &s[i], sizeof(S));
    }
    memcpy(to.p + first, &p, sizeof(P));
    if (write_gradient) memcpy(to.g + first, &g, sizeof(P));
  }

  // What is left of a gradient that is written: only after the step.
  __device__ __forceinline__ void scale_gradient(float scale, bool is_zero) {
#pragma unroll
    for (int pair = 0; pair < kSize / 2; ++pair) {
      float g2[2];
      unpack<P>(g, pair, g2);
      g2[0] = is_zero ? 0.0f : g2[0] * scale;
      g2[1] = is_zero ? 0.0f : g2[1] * scale;
      pack<P>(g2, pair, &g);
    }
  }

  __device__ __forceinline__ void step(int num_pairs, const OptimizerNumbers<float>& n) {
#pragma unroll
    for (int pair = 0; pair < kSize / 2; ++pair) {
      if (pair >= num_pairs) break;
      float p2[2], g2[2], s2[kMaxOptimizerStates][2] = {};
      unpack<P>(p, pair, p2);
      unpack<P>(g, pair, g2);
#pragma unroll
      for (int i = 0; i < kMaxOptimizerStates; ++i) {
        if (Rule::kStates >> i & 1) unpack<S>(s[i], pair, s2[i]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        OptimizerValues<float> x = {p2[e], g2[e], s2[0][e], s2[1][e], s2[2][e]};
        optimizer_update<Rule::kRule>(x, n);
        p2[e] = x.p, s2[0][e] = x.s0, s2[1][e] = x.s1, s2[2][e] = x.s2;
      }
      pack<P>(p2, pair, &p);
#pragma unroll
      for (int i = 0; i < kMaxOptimizerStates; ++i) {
        if (Rule::kStates >> i & 1) pack<S>(s2[i], pair, &s[i]);
      }
    }
  }
};

// Steps an item. `numbers`, in shared memory, is set while the first loads are on their way.
template <typename Rule, typename Types, int kBlockThreads>
__device__ __forceinline__ void step_plain(const OptimizerTensor& t, const OptimizerItem& item,
                                           const OptimizerNumbers<double>& exact,
                                           OptimizerNumbers<float>* numbers, bool write_gradient) {
  using Unit = PlainUnit<Rule, Types>;
  constexpr int kUnits = Rule::kStates == 7 ? 1 : 2;  // in flight
  constexpr int kStride = kBlockThreads * Unit::kSize;
  const bool zero_gradient = t.flags & kZeroGradient;
  write_gradient = write_gradient || zero_gradient;
  // Looked up again after each barrier and store: they would be too many registers to keep.
  const auto at = [&] { return Unit::operands(t, item.begin); };
  const auto n = [&] { return plain_numbers<Rule>(*numbers); };
  const int thread = static_cast<int>(threadIdx.x);
  const int count = item.count - item.count % Unit::kSize;
  Unit units[kUnits];
  int first = thread * Unit::kSize;
  const auto load = [&] {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (first + u * kStride < count) units[u].load(at(), first + u * kStride);
    }
  };
  load();
  if (thread == 0) *numbers = rounded_numbers<float>(exact);
  __syncthreads();
  for (; first < count; first += kUnits * kStride, load()) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (first + u * kStride < count) {
        units[u].step(Unit::kSize / 2, n());
        if (write_gradient) units[u].scale_gradient(n().gradient_scale, zero_gradient);
        units[u].store(at(), first + u * kStride, write_gradient);
      }
    }
  }
  if (thread < item.count - count) {
    units[0].load_one(at(), count + thread);
    units[0].step(1, n());
    if (write_gradient) units[0].scale_gradient(n().gradient_scale, zero_gradient);
    units[0].store_one(at(), count + thread, write_gradient);
  }
}

// Whether an item is plain; if so, calls f with its rule and types.
template <typename F>
__device__ __forceinline__ bool dispatch_plain(OptimizerRule rule, const OptimizerTensor& t,
                                               const OptimizerNumbers<double>& n, const F& f) {
  int states;
  DType state_type;
  if (!is_plain(t, n, &states, &state_type)) return false;
  return dispatch_plain_rule(plain_rule_key(rule, states), [&](auto found) {
    using Rule = decltype(found);
    if (!has_plain_numbers<Rule>(n)) return false;
    return dispatch_plain_types(t.dtypes[kParameter], state_type, [&](auto types) {
      f(Rule(), types);
      return true;
    });
  });
}

}  // namespace pyfast::PYFAST_ISA
