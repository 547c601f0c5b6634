// The fast path of int8 states.
#pragma once

#include "optimizer_runs_cpu.h"

namespace pyfast::PYFAST_ISA {

// Whole blocks of a tensor with int8 states, whose gradient is of type P. While one block is
// updated, which keeps the divider busy, the codes of the block before are made, which keeps the
// integer units busy. Bit i of kStates says that there is a state i: known to the compiler, this
// saves a quarter of the time.
template <OptimizerRule kRule, int kStates, typename Parameter, typename P>
class CodedBlocks {
 public:
  // Arrays are fetched `ahead` bytes before their use, if that is not 0.
  CodedBlocks(const OptimizerStepParams& params, const OptimizerTensor& t, int64_t ahead)
      : t_(t),
        numbers_(params.numbers[t.numbers]),
        rounded_(rounded_numbers<V>(numbers_)),
        parameter_(t, numbers_),
        write_gradient_(params.write_gradient),
        ahead_(ahead),
        salt_(optimizer_random(t.seed, static_cast<uint64_t>(numbers_.step), t.index).salt) {}

  void run(int64_t begin, int64_t num_blocks) {
    for (int64_t i = 0; i < num_blocks; ++i) {
      const int64_t first = begin + i * kOptimizerBlock;
      if (i == 0) {
        update<false>(first, i % 2);
      } else {
        update<true>(first, i % 2);
      }
      finish(first);
    }
    encode(begin + (num_blocks - 1) * kOptimizerBlock, (num_blocks - 1) % 2);
  }

 private:
  using V = Vec<float>;

  static constexpr bool exists(int state) { return (kStates >> state) & 1; }

  // Where no option is used, and the compiler knows it, a step is 3 % shorter.
  template <bool kEncodes>
  void update(int64_t begin, int64_t turn) {
    OptimizerNumbers<V> numbers = rounded_;
    const bool has_option = numbers.has_scale || numbers.has_l2 || numbers.has_l1 ||
                            numbers.has_threshold || numbers.amsgrad || numbers.weight1_from_end;
    if (has_option) return update_block<kEncodes>(begin, turn, numbers);
    numbers.has_scale = numbers.has_l2 = numbers.has_l1 = numbers.has_threshold = false;
    numbers.amsgrad = numbers.weight1_from_end = false;
    update_block<kEncodes>(begin, turn, numbers);
  }

  template <bool kEncodes>
  PYFAST_ALWAYS_INLINE void update_block(int64_t begin, int64_t turn,
                                         const OptimizerNumbers<V>& numbers) {
    parameter_.move_to(begin);
    const Parameter p = parameter_;
    const P* const g = at<P>(t_, kGradient, begin);
    uint8_t* const codes[] = {at<uint8_t>(t_, kState0, begin), at<uint8_t>(t_, kState1, begin),
                              at<uint8_t>(t_, kState2, begin)};
    V scales[kMaxOptimizerStates];
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      scales[i] = V::broadcast(exists(i) ? t_.scales[i][begin / kOptimizerBlock] : 0.0f);
    }
    StagedState* const states = states_[turn];
    const StagedState* const before = states_[1 - turn];
    LargestLanes largest[kMaxOptimizerStates];
    DitherLanes dither(begin - kOptimizerBlock, salt_);
    const int64_t ahead = ahead_;
    for (int j = 0; j < kOptimizerBlock; j += DitherGroup::kElements) {
      for (int i = 0; ahead != 0 && i < kMaxOptimizerStates; ++i) {
        if (exists(i)) prefetch_ahead(codes[i] + j, ahead / 4);
      }
      PYFAST_UNROLL
      for (int k = j; k < j + DitherGroup::kElements; k += V::kLanes) {
        if (ahead != 0) {
          p.prefetch(k, ahead);
          prefetch_ahead(g + k, ahead);
        }
        OptimizerValues<V> x;
        x.p = p.template load<V>(k, V::kLanes);
        x.g = V::load(g + k);
        V* const s[] = {&x.s0, &x.s1, &x.s2};
        PYFAST_UNROLL
        for (int i = 0; i < kMaxOptimizerStates; ++i) {
          *s[i] = V::broadcast(0);
          if (exists(i)) {
            *s[i] = decode_lanes(codes[i] + k, is_signed_state(kRule, i), scales[i]);
          }
        }
        optimizer_update<kRule>(x, numbers);
        p.store(x.p, k, V::kLanes);
        PYFAST_UNROLL
        for (int i = 0; i < kMaxOptimizerStates; ++i) {
          if (!exists(i)) continue;
          states[i].put(k, *s[i], is_signed_state(kRule, i), &largest[i]);
        }
      }
      if (kEncodes) {
        const DitherGroup group(&dither);
        PYFAST_UNROLL
        for (int i = 0; i < kMaxOptimizerStates; ++i) {
          if (!exists(i)) continue;
          before[i].encode(j, is_signed_state(kRule, i), inverses_[1 - turn][i], group.lanes,
                           codes[i] + j - kOptimizerBlock);
        }
      }
    }
    for (int i = 0; i < kMaxOptimizerStates; ++i) {
      if (!exists(i)) continue;
      const uint32_t bits = largest[i].bits();
      states[i].finish(bits);
      float inverse;
      t_.scales[i][begin / kOptimizerBlock] = code_scale(bits, &inverse);
      inverses_[turn][i] = V::broadcast(inverse);
    }
  }

  void encode(int64_t begin, int64_t turn) {
    DitherLanes dither(begin, salt_);
    for (int j = 0; j < kOptimizerBlock; j += DitherGroup::kElements) {
      const DitherGroup group(&dither);
      for (int i = 0; i < kMaxOptimizerStates; ++i) {
        if (!exists(i)) continue;
        states_[turn][i].encode(j, is_signed_state(kRule, i), inverses_[turn][i], group.lanes,
                                at<uint8_t>(t_, kState0 + i, begin) + j);
      }
    }
  }

  void finish(int64_t begin) {
    P* const g = at<P>(t_, kGradient, begin);
    if (t_.operands[kEma] != nullptr) {
      average_run(parameter_, at<float>(t_, kEma, begin), kOptimizerBlock, numbers_, ahead_);
    }
    if (t_.flags & kZeroGradient) {
      memset(static_cast<void*>(g), 0, kOptimizerBlock * sizeof(P));
    } else if (write_gradient_) {
      scale_run<P, float>(g, kOptimizerBlock, numbers_);
    }
  }

  const OptimizerTensor& t_;
  const OptimizerNumbers<double>& numbers_;
  OptimizerNumbers<V> rounded_;
  Parameter parameter_;
  bool write_gradient_;
  int64_t ahead_;
  uint32_t salt_;
  V inverses_[2][kMaxOptimizerStates];
  StagedState states_[2][kMaxOptimizerStates];
};

}  // namespace pyfast::PYFAST_ISA
