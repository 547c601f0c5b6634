// Tensors of any dtypes and layouts, 256 elements at a time through buffers in L1.
#pragma once

#include "optimizer_runs_cpu.h"

namespace pyfast::PYFAST_ISA {

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
      random_ = optimizer_random(t.seed, static_cast<uint64_t>(numbers_.step), t.index);
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
      update_run<kRule, C>(PlainParameter<C>(p), g, states, n, numbers_, 0);
      for (int i = 0; i < kMaxOptimizerStates; ++i) return_state(states.s[i], i, begin, n);
      return_parameter(p, begin, n);
    }
    if (t_.operands[kEma] != nullptr) {
      C* const ema = brought(t_, layout_, kEma, begin, n, buffers_[kEma]);
      average_run(PlainParameter<C>(p), ema, n, numbers_, 0);
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
        element_bits(random_.key, begin, bits);
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
            encode_block(state, begin, is_signed_state(kRule, i), random_.salt, n,
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

}  // namespace pyfast::PYFAST_ISA
