// How the loops over dense arrays read and write a parameter: as it is, with a master copy, or
// rounded stochastically.
#pragma once

#include "optimizer_codes_cpu.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {

template <typename T>
T* at(const OptimizerTensor& t, int operand, int64_t begin) {
  T* const base = static_cast<T*>(t.operands[operand]);
  return base == nullptr ? nullptr : base + begin;
}

// Brings what is `bytes` behind a place into cache; there need be no memory. (Not inlined at once,
// GCC takes it for a function without effect, and leaves it out.)
PYFAST_ALWAYS_INLINE void prefetch_ahead(const void* place, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(place) +
                                                   static_cast<uintptr_t>(bytes)),
                     1);
}

// Indices of all of them count from where move_to() was called for.
template <typename P>
class PlainParameter {
 public:
  static constexpr int64_t kChunk = 2048;  // elements between an update and what follows it

  explicit PlainParameter(P* p) : p_(p) {}
  PlainParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& /*numbers*/)
      : base_(at<P>(t, kParameter, 0)) {}

  void move_to(int64_t begin) { p_ = base_ + begin; }
  template <typename V>
  V load(int64_t j, int lanes) const {
    return load_lanes<V>(p_ + j, lanes);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    store_lanes(x, p_ + j, lanes, false);
  }
  void prefetch(int64_t j, int64_t ahead) const { prefetch_ahead(p_ + j, ahead); }

 private:
  P* base_ = nullptr;
  P* p_ = nullptr;
};

// A float32 as a bfloat16 and what is missing to it. Loops over lanes are plain, and vectorised by
// the compiler.
class SplitParameter {
 public:
  static constexpr int64_t kChunk = 2048;

  SplitParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& /*numbers*/) : t_(t) {}

  void move_to(int64_t begin) {
    upper_ = at<BFloat16>(t_, kParameter, begin);
    remainder_ = at<int16_t>(t_, kMaster, begin);
  }
  template <typename V>
  V load(int64_t j, int lanes) const {
    alignas(64) float values[V::kLanes] = {};
    for (int i = 0; i < lanes; ++i) values[i] = join_master(upper_[j + i], remainder_[j + i]);
    return V::load(values);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    alignas(64) float values[V::kLanes];
    x.store(values);
    for (int i = 0; i < lanes; ++i) upper_[j + i] = split_master(values[i], &remainder_[j + i]);
  }
  void prefetch(int64_t j, int64_t ahead) const {
    prefetch_ahead(upper_ + j, ahead);
    prefetch_ahead(remainder_ + j, ahead);
  }

 private:
  const OptimizerTensor& t_;
  BFloat16* upper_ = nullptr;
  int16_t* remainder_ = nullptr;
};

class StochasticParameter {
 public:
  static constexpr int64_t kChunk = kOptimizerBlock;

  StochasticParameter(const OptimizerTensor& t, const OptimizerNumbers<double>& numbers)
      : t_(t), key_(optimizer_random(t.seed, static_cast<uint64_t>(numbers.step), t.index).key) {}

  void move_to(int64_t begin) {
    p_ = at<BFloat16>(t_, kParameter, begin);
    element_bits(key_, begin, bits_);
  }
  template <typename V>
  V load(int64_t j, int lanes) const {
    return load_lanes<V>(p_ + j, lanes);
  }
  template <typename V>
  void store(const V& x, int64_t j, int lanes) const {
    alignas(64) float values[V::kLanes];
    x.store(values);
    for (int i = 0; i < lanes; ++i) p_[j + i] = stochastic_bfloat16(values[i], bits_[j + i]);
  }
  void prefetch(int64_t j, int64_t ahead) const { prefetch_ahead(p_ + j, ahead); }

 private:
  const OptimizerTensor& t_;
  uint64_t key_;
  BFloat16* p_ = nullptr;
  alignas(64) uint16_t bits_[kOptimizerBlock];
};

}  // namespace pyfast::PYFAST_ISA
