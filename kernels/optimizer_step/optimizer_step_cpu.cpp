// One pass over memory: every operand is read once and written once, in chunks that stay in L1. The
// work of all tensors is one list of pieces, which threads take in turns, so that thousands of
// small tensors and a few huge ones cost one parallel region. Bound by bytes (AdamW in float32
// moves 28 a parameter) except in cache, where square root and division take 16 of 18 cycles a
// vector.
#include "../common/parallel.h"
#include "optimizer_coded_cpu.h"
#include "optimizer_staged_cpu.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {
namespace {

// How far ahead an item is fetched: what is beyond its end is fetched in vain.
inline int64_t ahead_of(const OptimizerStepParams& params, const OptimizerItem& item) {
  return item.count >= 16384 ? params.prefetch_bytes : 0;
}

// An item whose operands are dense and of these types.
template <OptimizerRule kRule, typename Parameter, typename G, typename S>
void run_direct(const OptimizerStepParams& params, const OptimizerTensor& t,
                const OptimizerItem& item) {
  const OptimizerNumbers<double>& numbers = params.numbers[t.numbers];
  const int64_t ahead = ahead_of(params, item);
  const int64_t end = item.begin + item.count;
  Parameter p(t, numbers);
  for (int64_t begin = item.begin; begin < end; begin += Parameter::kChunk) {
    const int64_t n = end - begin < Parameter::kChunk ? end - begin : Parameter::kChunk;
    p.move_to(begin);
    G* const g = at<G>(t, kGradient, begin);
    if (kRule != OptimizerRule::kNone) {
      const States<S> states = {
          {at<S>(t, kState0, begin), at<S>(t, kState1, begin), at<S>(t, kState2, begin)}};
      update_run<kRule, float>(p, g, states, n, numbers, ahead);
    }
    if (t.operands[kEma] != nullptr) average_run(p, at<float>(t, kEma, begin), n, numbers, ahead);
    if (t.flags & kZeroGradient) {
      memset(static_cast<void*>(g), 0, static_cast<size_t>(n) * sizeof(G));
    } else if (params.write_gradient) {
      scale_run<G, float>(g, n, numbers);
    }
  }
}

// The same for bfloat16 parameters, which may have a remainder or be rounded stochastically.
template <OptimizerRule kRule, typename S>
void run_bfloat16(const OptimizerStepParams& params, const OptimizerTensor& t,
                  const OptimizerItem& item) {
  if constexpr (kRule != OptimizerRule::kNone) {
    if (t.operands[kMaster] != nullptr) {
      return run_direct<kRule, SplitParameter, BFloat16, S>(params, t, item);
    }
    if (t.flags & kStochasticRounding) {
      return run_direct<kRule, StochasticParameter, BFloat16, S>(params, t, item);
    }
  }
  run_direct<kRule, PlainParameter<BFloat16>, BFloat16, S>(params, t, item);
}

// The dense tensors that have a loop of their own; false for others.
template <OptimizerRule kRule>
bool run_dense(const OptimizerStepParams& params, const OptimizerTensor& t,
               const OptimizerItem& item) {
  const DType p = t.dtypes[kParameter], s = t.dtypes[kState0];
  bool fits = t.layout < 0 && !t.int8_states && t.dtypes[kGradient] == p;
  for (int state = kState1; state <= kState2; ++state) {
    fits = fits && (t.operands[state] == nullptr || t.dtypes[state] == s);
  }
  if (!fits) return false;
  const bool same = s == p || t.operands[kState0] == nullptr;
  if (p == DType::kBFloat16 && (same || s == DType::kFloat32)) {
    if (same) {
      run_bfloat16<kRule, BFloat16>(params, t, item);
    } else {
      run_bfloat16<kRule, float>(params, t, item);
    }
  } else if (p == DType::kFloat32 && same) {
    run_direct<kRule, PlainParameter<float>, float, float>(params, t, item);
  } else if (p == DType::kFloat32 && s == DType::kBFloat16) {
    run_direct<kRule, PlainParameter<float>, float, BFloat16>(params, t, item);
  } else if (p == DType::kFloat16 && same && t.operands[kMaster] == nullptr) {
    run_direct<kRule, PlainParameter<Float16>, Float16, Float16>(params, t, item);
  } else {
    return false;
  }
  return true;
}

template <OptimizerRule kRule, typename Parameter, typename P>
void run_coded(const OptimizerStepParams& params, const OptimizerTensor& t, int64_t begin,
               int64_t num_blocks, int64_t ahead) {
  constexpr bool kHasOne = kRule == OptimizerRule::kSgd || kRule == OptimizerRule::kRmsprop;
  constexpr bool kHasTwo = kRule != OptimizerRule::kSgd;
  constexpr bool kHasThree = kRule == OptimizerRule::kAdam;
  if constexpr (kHasThree) {
    if (t.operands[kState2] != nullptr) {
      return CodedBlocks<kRule, 7, Parameter, P>(params, t, ahead).run(begin, num_blocks);
    }
  }
  if constexpr (kHasTwo) {
    if (!kHasOne || t.operands[kState1] != nullptr) {
      return CodedBlocks<kRule, 3, Parameter, P>(params, t, ahead).run(begin, num_blocks);
    }
  }
  if constexpr (kHasOne) {
    CodedBlocks<kRule, 1, Parameter, P>(params, t, ahead).run(begin, num_blocks);
  }
}

// Whole blocks of int8 states that have a loop of their own; returns how many elements that were.
template <OptimizerRule kRule>
int32_t run_blocks(const OptimizerStepParams& params, const OptimizerTensor& t,
                   const OptimizerItem& item) {
  const DType p = t.dtypes[kParameter];
  const int64_t num_blocks = item.count / kOptimizerBlock, ahead = ahead_of(params, item);
  if (!t.int8_states || t.layout >= 0 || t.dtypes[kGradient] != p || num_blocks == 0) return 0;
  int64_t done = 0;
  if constexpr (kRule != OptimizerRule::kNone) {
    if (p == DType::kFloat32) {
      run_coded<kRule, PlainParameter<float>, float>(params, t, item.begin, num_blocks, ahead);
      done = num_blocks * kOptimizerBlock;
    }
  }
  if constexpr (kRule == OptimizerRule::kAdam) {
    if (p == DType::kBFloat16 && t.operands[kMaster] != nullptr) {
      run_coded<kRule, SplitParameter, BFloat16>(params, t, item.begin, num_blocks, ahead);
      done = num_blocks * kOptimizerBlock;
    } else if (p == DType::kBFloat16 && !(t.flags & kStochasticRounding)) {
      run_coded<kRule, PlainParameter<BFloat16>, BFloat16>(params, t, item.begin, num_blocks,
                                                           ahead);
      done = num_blocks * kOptimizerBlock;
    }
  }
  return static_cast<int32_t>(done);
}

template <OptimizerRule kRule>
void run_item(const OptimizerStepParams& params, const OptimizerItem& item) {
  const OptimizerTensor& t = params.tensors[item.tensor];
  if (t.dtypes[kParameter] == DType::kFloat64) return run_staged<kRule, double>(params, t, item);
  if (run_dense<kRule>(params, t, item)) return;
  const int32_t done = run_blocks<kRule>(params, t, item);
  run_staged<kRule, float>(params, t, {item.tensor, item.count - done, item.begin + done});
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
