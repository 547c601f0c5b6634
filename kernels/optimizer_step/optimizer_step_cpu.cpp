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

constexpr int64_t kChunk = 2048;  // elements between a direct update and what follows it

// How far ahead an item is fetched: what is beyond its end is fetched in vain.
inline int64_t ahead_of(const OptimizerStepParams& params, const OptimizerItem& item) {
  return item.count >= 16384 ? params.prefetch_bytes : 0;
}

// An item whose operands are dense and of these types.
template <OptimizerRule kRule, typename P, typename G, typename S, typename C>
void run_direct(const OptimizerStepParams& params, const OptimizerTensor& t,
                const OptimizerItem& item) {
  const OptimizerNumbers<double>& numbers = params.numbers[t.numbers];
  const int64_t ahead = ahead_of(params, item);
  const int64_t end = item.begin + item.count;
  for (int64_t begin = item.begin; begin < end; begin += kChunk) {
    const int64_t n = end - begin < kChunk ? end - begin : kChunk;
    P* const p = at<P>(t, kParameter, begin);
    G* const g = at<G>(t, kGradient, begin);
    if (kRule != OptimizerRule::kNone) {
      const States<S> states = {
          {at<S>(t, kState0, begin), at<S>(t, kState1, begin), at<S>(t, kState2, begin)}};
      update_run<kRule, P, G, S, C>(p, g, states, n, numbers, ahead);
    }
    if (t.operands[kEma] != nullptr) average_run(p, at<C>(t, kEma, begin), n, numbers, ahead);
    if (t.flags & kZeroGradient) {
      memset(static_cast<void*>(g), 0, static_cast<size_t>(n) * sizeof(G));
    } else if (params.write_gradient) {
      scale_run<G, C>(g, n, numbers);
    }
  }
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

// States are there from the first on.
template <OptimizerRule kRule>
void run_coded(const OptimizerStepParams& params, const OptimizerTensor& t, int64_t begin,
               int64_t num_blocks, int64_t ahead) {
  if (t.operands[kState2] != nullptr) {
    CodedBlocks<kRule, 7>(params, t, ahead).run(begin, num_blocks);
  } else if (t.operands[kState1] != nullptr) {
    CodedBlocks<kRule, 3>(params, t, ahead).run(begin, num_blocks);
  } else {
    CodedBlocks<kRule, 1>(params, t, ahead).run(begin, num_blocks);
  }
}

template <OptimizerRule kRule>
void run_item(const OptimizerStepParams& params, const OptimizerItem& item) {
  const OptimizerTensor& t = params.tensors[item.tensor];
  const DType p = t.dtypes[kParameter], g = t.dtypes[kGradient], s = t.dtypes[kState0];
  if (p == DType::kFloat64) return run_staged<kRule, double>(params, t, item);
  if (is_direct(t) && p == g) {
    const bool same = s == p || t.operands[kState0] == nullptr;
    if (p == DType::kFloat32 && same) {
      return run_direct<kRule, float, float, float, float>(params, t, item);
    }
    if (p == DType::kFloat32 && s == DType::kBFloat16) {
      return run_direct<kRule, float, float, BFloat16, float>(params, t, item);
    }
    if (p == DType::kBFloat16 && same) {
      return run_direct<kRule, BFloat16, BFloat16, BFloat16, float>(params, t, item);
    }
    if (p == DType::kBFloat16 && s == DType::kFloat32) {
      return run_direct<kRule, BFloat16, BFloat16, float, float>(params, t, item);
    }
    if (p == DType::kFloat16 && same) {
      return run_direct<kRule, Float16, Float16, Float16, float>(params, t, item);
    }
  }
  const int64_t num_blocks = item.count / kOptimizerBlock;
  const bool has_gap = t.operands[kState1] == nullptr && t.operands[kState2] != nullptr;
  if (t.int8_states && t.layout < 0 && p == DType::kFloat32 && g == p && num_blocks > 0 &&
      !has_gap) {
    run_coded<kRule>(params, t, item.begin, num_blocks, ahead_of(params, item));
    const int64_t done = num_blocks * kOptimizerBlock;
    const OptimizerItem rest = {item.tensor, static_cast<int32_t>(item.count - done),
                                item.begin + done};
    return run_staged<kRule, float>(params, t, rest);
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
