// Rows, by threads. A row of a vocabulary stays in L2: its maximum and the sum of its powers are
// two passes over memory read once, and the gradient a third one, written in the dtype of the
// logits. torch converts the logits to float32, writes their logarithms, and in the backward pass a
// matrix of zeros, their gradient, and its conversion: some 30 bytes an element, against 6 here.
#include <cmath>

#include "../common/lanes.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "cross_entropy.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kBlock = 4096;  // columns whose sum is in float32; blocks are added in float64

// n values; `rest` beyond.
template <typename T>
PYFAST_ALWAYS_INLINE Lanes load_padded(const T* from, int n, float rest) {
  if (n == kLanes) return Lanes::load(from);
  float lanes[kLanes];
  Lanes::broadcast(rest).store(lanes);
  Lanes::load(from, n).store(lanes, n);
  return Lanes::load(lanes);
}

PYFAST_ALWAYS_INLINE Lanes exponential(Lanes x) {
  return power_of_two(x * Lanes::broadcast(kLog2E));
}

template <typename T>
inline float largest_of_row(const T* x, int64_t size) {
  Lanes most[4];
  for (Lanes& part : most) part = Lanes::broadcast(-INFINITY);
  int64_t j = 0;
  for (; j + 4 * kLanes <= size; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      most[part] = maximum(most[part], Lanes::load(x + j + part * kLanes));
    }
  }
  for_each_vec<Lanes>(j, size, [&](int64_t at, int n) PYFAST_INLINE_LAMBDA {
    most[0] = maximum(most[0], load_padded(x + at, n, -INFINITY));
  });
  float lanes[kLanes];
  maximum(maximum(most[0], most[1]), maximum(most[2], most[3])).store(lanes);
  float largest = lanes[0];
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

template <typename T>
inline double sum_of_powers(const T* x, int64_t size, float largest) {
  const Lanes shift = Lanes::broadcast(largest);
  double total = 0.0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t end = first + kBlock < size ? first + kBlock : size;
    Lanes sum[4];
    for (Lanes& part : sum) part = Lanes::broadcast(0.0f);
    int64_t j = first;
    for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        sum[part] = sum[part] + exponential(Lanes::load(x + j + part * kLanes) - shift);
      }
    }
    for_each_vec<Lanes>(j, end, [&](int64_t at, int n) PYFAST_INLINE_LAMBDA {
      sum[0] = sum[0] + exponential(load_padded(x + at, n, -INFINITY) - shift);
    });
    total += static_cast<double>(((sum[0] + sum[1]) + (sum[2] + sum[3])).sum());
  }
  return total;
}

template <typename T>
inline double sum_of_row(const T* x, int64_t size) {
  double total = 0.0;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t end = first + kBlock < size ? first + kBlock : size;
    Lanes sum = Lanes::broadcast(0.0f);
    for_each_vec<Lanes>(first, end, [&](int64_t at, int n) PYFAST_INLINE_LAMBDA {
      sum = sum + load_padded(x + at, n, 0.0f);
    });
    total += static_cast<double>(sum.sum());
  }
  return total;
}

template <typename T>
void forward_row(const CrossEntropyParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.logits) + row * p.num_columns;
  const int64_t target = p.target[row];
  p.loss[row] = p.lse[row] = p.lse[p.num_rows + row] = 0.0f;
  if (target == p.ignore_index) return;
  const float largest = largest_of_row(x, p.num_columns);
  const double log_sum = std::log(sum_of_powers(x, p.num_columns, largest));
  const double top = static_cast<double>(largest);
  double loss = (top - static_cast<double>(static_cast<float>(to_float(x[target])))) + log_sum;
  if (p.smoothing != 0.0f) {
    const double mean = sum_of_row(x, p.num_columns) / static_cast<double>(p.num_columns);
    const double share = static_cast<double>(p.smoothing);
    loss = (1.0 - share) * loss + share * ((top - mean) + log_sum);
  }
  p.lse[row] = largest;
  p.lse[p.num_rows + row] = static_cast<float>(log_sum);
  p.loss[row] = static_cast<float>(loss);
}

template <typename T>
void backward_row(const CrossEntropyBackwardParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.logits) + row * p.num_columns;
  T* to = static_cast<T*>(p.grad_logits) + row * p.num_columns;
  const int64_t target = p.target[row];
  if (target == p.ignore_index) {
    memset(to, 0, static_cast<size_t>(p.num_columns) * sizeof(T));
    return;
  }
  const Lanes largest = Lanes::broadcast(p.lse[row]);
  const Lanes log_sum = Lanes::broadcast(p.lse[p.num_rows + row]);
  const Lanes grad = Lanes::broadcast(p.grad[row]);
  const Lanes even = Lanes::broadcast(p.smoothing / static_cast<float>(p.num_columns));
  for_each_vec<Lanes>(0, p.num_columns, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
    const Lanes share = exponential(load_padded(x + j, n, 0.0f) - largest - log_sum);
    store_lanes((share - even) * grad, to + j, n, false);
  });
  const Lanes share = exponential(load_padded(x + target, 1, 0.0f) - largest - log_sum);
  const Lanes rest = share - Lanes::broadcast(1.0f - p.smoothing);
  ((rest - even) * grad).store(to + target, 1);
}

template <typename Params, typename F>
void for_each_row(const Params& p, int64_t num_threads, const F& f) {
  const int64_t threads = useful_threads(p.num_rows * p.num_columns, num_threads);
  parallel_for(p.num_rows, threads, [&](int64_t begin, int64_t end, int64_t) {
    dispatch_dtype(p.dtype, [&](auto* type) {
      if constexpr (sizeof(*type) <= 4) {
        for (int64_t row = begin; row < end; ++row) f(type, row);
      }
    });
  });
}

}  // namespace

void cross_entropy_cpu(const CrossEntropyParams& params, int num_threads) {
  for_each_row(params, num_threads, [&](auto* type, int64_t row) {
    forward_row<std::remove_pointer_t<decltype(type)>>(params, row);
  });
}

void cross_entropy_backward_cpu(const CrossEntropyBackwardParams& params, int num_threads) {
  for_each_row(params, num_threads, [&](auto* type, int64_t row) {
    backward_row<std::remove_pointer_t<decltype(type)>>(params, row);
  });
}

}  // namespace pyfast::PYFAST_ISA
