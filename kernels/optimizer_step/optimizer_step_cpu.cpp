// One pass over memory: every operand is read once and written once, in chunks that stay in L1. The
// work of all tensors is one list of pieces, which threads take in turns, so that thousands of
// small tensors and a few huge ones cost one parallel region. Bound by bytes (AdamW in float32
// moves 28 a parameter) except in cache, where square root and division take 16 of 18 cycles a
// vector.
#include "../common/parallel.h"
#include "optimizer_codes_cpu.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // elements between a direct update and what follows it

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

// The update of n elements in place. A null state does not exist.
template <OptimizerRule kRule, typename P, typename G, typename S, typename C>
void update_run(P* p, const G* g, States<S> states, int64_t n,
                const OptimizerNumbers<double>& numbers) {
  using V = Vec<C>;
  const OptimizerNumbers<V> rounded = rounded_numbers<V>(numbers);
  S* const s0 = states.s[0];
  S* const s1 = states.s[1];
  S* const s2 = states.s[2];
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    OptimizerValues<V> x;
    x.p = load_lanes<V>(p + j, lanes);
    x.g = load_lanes<V>(g + j, lanes);
    x.s0 = x.s1 = x.s2 = V::broadcast(0);
    if (s0 != nullptr) x.s0 = load_lanes<V>(s0 + j, lanes);
    if (s1 != nullptr) x.s1 = load_lanes<V>(s1 + j, lanes);
    if (s2 != nullptr) x.s2 = load_lanes<V>(s2 + j, lanes);
    optimizer_update<kRule>(x, rounded);
    store_lanes(x.p, p + j, lanes, false);
    if (s0 != nullptr) store_lanes(x.s0, s0 + j, lanes, false);
    if (s1 != nullptr) store_lanes(x.s1, s1 + j, lanes, false);
    if (s2 != nullptr) store_lanes(x.s2, s2 + j, lanes, false);
  });
}

template <typename P, typename C>
void average_run(const P* p, C* ema, int64_t n, const OptimizerNumbers<double>& numbers) {
  using V = Vec<C>;
  const V weight = V::broadcast(static_cast<C>(numbers.ema_weight));
  const bool from_end = numbers.ema_from_end;
  for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
    const V average = load_lanes<V>(ema + j, lanes);
    store_lanes(blend(average, load_lanes<V>(p + j, lanes), weight, from_end), ema + j, lanes,
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

template <typename T>
T* at(const OptimizerTensor& t, int operand, int64_t begin) {
  T* const base = static_cast<T*>(t.operands[operand]);
  return base == nullptr ? nullptr : base + begin;
}

// An item whose operands are dense and of these types.
template <OptimizerRule kRule, typename P, typename G, typename S, typename C>
void run_direct(const OptimizerTensor& t, const OptimizerItem& item,
                const OptimizerNumbers<double>& numbers, bool write_gradient) {
  const int64_t end = item.begin + item.count;
  for (int64_t begin = item.begin; begin < end; begin += kChunk) {
    const int64_t n = end - begin < kChunk ? end - begin : kChunk;
    P* const p = at<P>(t, kParameter, begin);
    G* const g = at<G>(t, kGradient, begin);
    if (kRule != OptimizerRule::kNone) {
      const States<S> states = {
          {at<S>(t, kState0, begin), at<S>(t, kState1, begin), at<S>(t, kState2, begin)}};
      update_run<kRule, P, G, S, C>(p, g, states, n, numbers);
    }
    if (t.operands[kEma] != nullptr) average_run(p, at<C>(t, kEma, begin), n, numbers);
    if (t.flags & kZeroGradient) {
      memset(static_cast<void*>(g), 0, static_cast<size_t>(n) * sizeof(G));
    } else if (write_gradient) {
      scale_run<G, C>(g, n, numbers);
    }
  }
}

// Up to 256 elements of an operand as an array of C: where it is, or in the buffer.
template <typename C>
C* brought(const OptimizerTensor& t, const OptimizerLayout* layout, int operand, int64_t begin,
           int n, C* buffer) {
  if (t.operands[operand] == nullptr) return nullptr;
  C* place = buffer;
  dispatch_dtype(t.dtypes[operand], [&](auto* type) {
    using T = Pointee<decltype(type)>;
    if constexpr (is_same<T, C>) {
      if (layout == nullptr) {
        place = static_cast<C*>(t.operands[operand]) + begin;
        return;
      }
    }
    gather(static_cast<const T*>(t.operands[operand]), layout, operand, begin, n, buffer);
  });
  return place;
}

template <typename C>
void returned(const C* from, const C* buffer, const OptimizerTensor& t,
              const OptimizerLayout* layout, int operand, int64_t begin, int n) {
  if (from != buffer) return;  // null, or written in place
  dispatch_dtype(t.dtypes[operand], [&](auto* type) {
    using T = Pointee<decltype(type)>;
    scatter(from, n, layout, operand, begin, static_cast<T*>(t.operands[operand]));
  });
}

// An item of any dtypes and layouts, 256 elements at a time.
template <OptimizerRule kRule, typename C>
class StagedItem {
 public:
  StagedItem(const OptimizerStepParams& params, const OptimizerTensor& t)
      : params_(params),
        t_(t),
        numbers_(params.numbers[t.numbers]),
        layout_(t.layout < 0 ? nullptr : &params.layouts[t.layout]) {
    if (t.int8_states || t.flags & kStochasticRounding) {
      random_ = optimizer_random(params.seed, static_cast<uint64_t>(t.step), t.index);
    }
  }

  void run(const OptimizerItem& item) {
    const int64_t end = item.begin + item.count;
    for (int64_t begin = item.begin; begin < end; begin += kOptimizerBlock) {
      run_block(begin,
                static_cast<int>(end - begin < kOptimizerBlock ? end - begin : kOptimizerBlock));
    }
  }

 private:
  void run_block(int64_t begin, int n) {
    C* const p = bring_parameter(begin, n);
    C* const g = brought(t_, layout_, kGradient, begin, n, buffers_[kGradient]);
    if (kRule != OptimizerRule::kNone) {
      States<C> states;
      for (int i = 0; i < kMaxOptimizerStates; ++i) states.s[i] = bring_state(i, begin, n);
      update_run<kRule, C, C, C, C>(p, g, states, n, numbers_);
      for (int i = 0; i < kMaxOptimizerStates; ++i) return_state(states.s[i], i, begin, n);
      return_parameter(p, begin, n);
    }
    if (t_.operands[kEma] != nullptr) {
      C* const ema = brought(t_, layout_, kEma, begin, n, buffers_[kEma]);
      average_run(p, ema, n, numbers_);
      returned(ema, buffers_[kEma], t_, layout_, kEma, begin, n);
    }
    if (t_.flags & kZeroGradient) {
      for (int j = 0; j < n; ++j) g[j] = 0;
      returned(g, buffers_[kGradient], t_, layout_, kGradient, begin, n);
    } else if (params_.write_gradient) {
      scale_run<C, C>(g, n, numbers_);
      returned(g, buffers_[kGradient], t_, layout_, kGradient, begin, n);
    }
  }

  // With a master copy: that, unless the parameter is no longer its rounding, because it was
  // changed from outside.
  C* bring_parameter(int64_t begin, int n) {
    C* const p = brought(t_, layout_, kParameter, begin, n, buffers_[kParameter]);
    if constexpr (is_same<C, float>) {
      if (t_.operands[kMaster] == nullptr) return p;
      C* const buffer = buffers_[kParameter];
      if (t_.master_is_remainder) {
        const auto* remainder = static_cast<const int16_t*>(t_.operands[kMaster]);
        for_each_element(layout_, kMaster, begin, n, [&](int j, int64_t offset) {
          const BFloat16 upper = {static_cast<uint16_t>(float_to_bits(buffer[j]) >> 16)};
          buffer[j] = join_master(upper, remainder[offset]);
        });
      } else {
        C* const master = brought(t_, layout_, kMaster, begin, n, buffers_[kMaster]);
        for (int j = 0; j < n; ++j) {
          Float16 half;
          from_float(master[j], &half);
          if (to_float(half) == buffer[j]) buffer[j] = master[j];
        }
      }
      return buffer;
    }
    return p;
  }

  void return_parameter(C* p, int64_t begin, int n) {
    if constexpr (is_same<C, float>) {
      if (t_.operands[kMaster] != nullptr) return return_master(begin, n);
      if (t_.flags & kStochasticRounding && t_.dtypes[kParameter] == DType::kBFloat16) {
        uint16_t bits[kOptimizerBlock];
        element_bits(random_.key, begin, n, bits);
        for (int j = 0; j < n; ++j) p[j] = to_float(stochastic_bfloat16(p[j], bits[j]));
      } else if (t_.operands[kEma] != nullptr && t_.dtypes[kParameter] != DType::kFloat32) {
        dispatch_dtype(t_.dtypes[kParameter], [&](auto* type) {  // the average of what is stored
          using T = Pointee<decltype(type)>;
          if constexpr (!is_same<T, double>) {
            for (int j = 0; j < n; ++j) {
              T stored;
              from_float(p[j], &stored);
              p[j] = to_float(stored);
            }
          }
        });
      }
    }
    returned(p, buffers_[kParameter], t_, layout_, kParameter, begin, n);
  }

  void return_master(int64_t begin, int n) {
    float* const master = reinterpret_cast<float*>(buffers_[kParameter]);
    if (t_.master_is_remainder) {
      BFloat16 upper[kOptimizerBlock];
      int16_t remainder[kOptimizerBlock];
      for (int j = 0; j < n; ++j) upper[j] = split_master(master[j], &remainder[j]);
      auto* const p = static_cast<BFloat16*>(t_.operands[kParameter]);
      auto* const low = static_cast<int16_t*>(t_.operands[kMaster]);
      for_each_element(layout_, kParameter, begin, n,
                       [&](int j, int64_t offset) { p[offset] = upper[j]; });
      for_each_element(layout_, kMaster, begin, n,
                       [&](int j, int64_t offset) { low[offset] = remainder[j]; });
    } else {
      scatter(master, n, layout_, kMaster, begin, static_cast<float*>(t_.operands[kMaster]));
      scatter(master, n, layout_, kParameter, begin,
              static_cast<Float16*>(t_.operands[kParameter]));
    }
  }

  C* bring_state(int i, int64_t begin, int n) {
    if constexpr (is_same<C, float>) {
      if (t_.int8_states && t_.operands[kState0 + i] != nullptr) {
        decode_block(at<uint8_t>(t_, kState0 + i, begin), t_.scales[i][begin / kOptimizerBlock],
                     is_signed_state(kRule, i), n, buffers_[kState0 + i]);
        return buffers_[kState0 + i];
      }
    }
    return brought(t_, layout_, kState0 + i, begin, n, buffers_[kState0 + i]);
  }

  void return_state(const C* state, int i, int64_t begin, int n) {
    if constexpr (is_same<C, float>) {
      if (t_.int8_states && state != nullptr) {
        t_.scales[i][begin / kOptimizerBlock] =
            encode_block(state, begin, is_signed_state(kRule, i), random_.salts[i], n,
                         at<uint8_t>(t_, kState0 + i, begin));
        return;
      }
    }
    returned(state, buffers_[kState0 + i], t_, layout_, kState0 + i, begin, n);
  }

  const OptimizerStepParams& params_;
  const OptimizerTensor& t_;
  const OptimizerNumbers<double>& numbers_;
  const OptimizerLayout* layout_;
  OptimizerRandom random_ = {};
  alignas(64) C buffers_[kNumOptimizerOperands][kOptimizerBlock];
};

template <OptimizerRule kRule, typename C>
void run_staged(const OptimizerStepParams& params, const OptimizerTensor& t,
                const OptimizerItem& item) {
  StagedItem<kRule, C>(params, t).run(item);
}

// Whether everything is dense, and the states are of one type.
bool is_direct(const OptimizerTensor& t) {
  bool same = true;
  for (int state = kState1; state <= kState2; ++state) {
    same = same && (t.operands[state] == nullptr || t.dtypes[state] == t.dtypes[kState0]);
  }
  return same && t.layout < 0 && !t.int8_states && t.operands[kMaster] == nullptr &&
         !(t.flags & kStochasticRounding);
}

template <OptimizerRule kRule>
void run_item(const OptimizerStepParams& params, const OptimizerItem& item) {
  const OptimizerTensor& t = params.tensors[item.tensor];
  const DType p = t.dtypes[kParameter], g = t.dtypes[kGradient], s = t.dtypes[kState0];
  if (p == DType::kFloat64) return run_staged<kRule, double>(params, t, item);
  if (is_direct(t) && p == g) {
    const OptimizerNumbers<double>& numbers = params.numbers[t.numbers];
    const bool write = params.write_gradient;
    const bool same = s == p || t.operands[kState0] == nullptr;
    if (p == DType::kFloat32 && same) {
      return run_direct<kRule, float, float, float, float>(t, item, numbers, write);
    }
    if (p == DType::kFloat32 && s == DType::kBFloat16) {
      return run_direct<kRule, float, float, BFloat16, float>(t, item, numbers, write);
    }
    if (p == DType::kBFloat16 && same) {
      return run_direct<kRule, BFloat16, BFloat16, BFloat16, float>(t, item, numbers, write);
    }
    if (p == DType::kBFloat16 && s == DType::kFloat32) {
      return run_direct<kRule, BFloat16, BFloat16, float, float>(t, item, numbers, write);
    }
    if (p == DType::kFloat16 && same) {
      return run_direct<kRule, Float16, Float16, Float16, float>(t, item, numbers, write);
    }
  }
  run_staged<kRule, float>(params, t, item);
}

template <OptimizerRule kRule>
void run(const OptimizerStepParams& params, int num_threads) {
  parallel_for_each(params.num_pieces, num_threads, [&](int64_t piece) {
    for (int64_t i = params.pieces[piece]; i < params.pieces[piece + 1]; ++i) {
      run_item<kRule>(params, params.items[i]);
    }
  });
}

// Sixteen sums in double, whatever the level: squares of float32 are exact there.
double square_sum(const SquareSumParams& params, const OptimizerItem& item) {
  const OptimizerTensor& t = params.tensors[item.tensor];
  const OptimizerLayout* layout = t.layout < 0 ? nullptr : &params.layouts[t.layout];
  double sums[16] = {};
  const auto add = [&](auto* buffer) {
    for (int64_t begin = 0; begin < item.count; begin += kOptimizerBlock) {
      const int n = static_cast<int>(item.count - begin < kOptimizerBlock ? item.count - begin
                                                                          : kOptimizerBlock);
      const auto* x = brought(t, layout, kGradient, item.begin + begin, n, buffer);
      int j = 0;
      for (; j + 16 <= n; j += 16) {
        for (int l = 0; l < 16; ++l) {
          sums[l] += static_cast<double>(x[j + l]) * static_cast<double>(x[j + l]);
        }
      }
      for (; j < n; ++j) sums[j % 16] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    }
  };
  if (t.dtypes[kGradient] == DType::kFloat64) {
    double buffer[kOptimizerBlock];
    add(buffer);
  } else {
    float buffer[kOptimizerBlock];
    add(buffer);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

void square_sum_cpu(const SquareSumParams& params, int num_threads) {
  parallel_for_each(params.num_pieces, num_threads, [&](int64_t piece) {
    double total = 0;
    for (int64_t i = params.pieces[piece]; i < params.pieces[piece + 1]; ++i) {
      total += square_sum(params, params.items[i]);
    }
    params.sums[piece] = total;
  });
}

void optimizer_step_cpu(const OptimizerStepParams& params, int num_threads) {
  switch (params.rule) {
    case OptimizerRule::kNone:
      return run<OptimizerRule::kNone>(params, num_threads);
    case OptimizerRule::kAdam:
      return run<OptimizerRule::kAdam>(params, num_threads);
    case OptimizerRule::kSgd:
      return run<OptimizerRule::kSgd>(params, num_threads);
    case OptimizerRule::kRmsprop:
      return run<OptimizerRule::kRmsprop>(params, num_threads);
    case OptimizerRule::kAdamax:
      return run<OptimizerRule::kAdamax>(params, num_threads);
  }
}

}  // namespace pyfast::PYFAST_ISA
