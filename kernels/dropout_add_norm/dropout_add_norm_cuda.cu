// One warp a row of up to 1024 columns (2048 of two bytes), else one block a row: all of a row's
// loads are issued before anything waits for one, and the row stays in registers, as it is stored,
// until it is written; rows that are too wide for that, or not aligned, are read again from cache.
// Backward: blocks for the rows and blocks for the columns of a chunk of 32 rows are neighbours in
// one grid, so that what both read comes from memory once; a second kernel adds the chunks. Bound
// by bytes: x, residual, z and y forward, grad_y, z, grad_x and grad_residual backward.
#include "../common/philox.h"
#include "../common/quantize.cuh"
#include "dropout_add_norm.h"
#include "dropout_add_norm_columns.cuh"
#include "dropout_add_norm_sums.cuh"

namespace pyfast::PYFAST_ISA {
namespace {

template <typename T, typename S>
__global__ void forward_kernel(DropoutAddNormParams p) {
  using C = typename ComputeType<T>::type;
  constexpr bool kAligned = S::kAligned;
  const int64_t n = p.num_columns;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kRows + threadIdx.x / S::kRowThreads;
  if (row >= p.num_rows) return;
  const bool is_first = threadIdx.x % S::kRowThreads == 0;
  const uint64_t seed = p.threshold != 0 ? seed_value(p.seed) : 0;
  const C scale = static_cast<C>(p.scale), size = static_cast<C>(n);
  const T* x = static_cast<const T*>(p.x) + row * n;
  const T* residual = p.residual != nullptr ? static_cast<const T*>(p.residual) + row * n : nullptr;
  T* y = p.y != nullptr ? static_cast<T*>(p.y) + row * n : nullptr;
  T* z = p.z != nullptr ? static_cast<T*>(p.z) + row * n : nullptr;
  T* kept = z != nullptr ? z : y;  // where rows that are not held find their z again
  Raw8<T> held[S::kGroups] = {};

  // What is x becomes z.
  auto add = [&](Raw8<T>& raw, const Raw8<T>& added, int64_t column) {
    C value[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = raw.get(e);
    if (p.threshold != 0) {
      const int64_t first = p.seed.first + row * n + column;
      const uint32_t bits =
          keep_bits8_from(seed, static_cast<uint64_t>(first), p.stream, p.threshold);
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = (bits >> e) & 1 ? value[e] * scale : C{0};
    }
    if (residual != nullptr) {
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = added.get(e) + value[e];
    }
    raw.set(value);
  };
  if constexpr (S::kHolds) {
    for_each_group<S>(n, [&](int group, int64_t column) {
      held[group] = load_raw8<kAligned>(x + column, count8(column, n));
    });
    if (residual != nullptr || p.threshold != 0 || z != nullptr) {
      Raw8<T> added[S::kGroups] = {};
      if (residual != nullptr) {
        for_each_group<S>(n, [&](int group, int64_t column) {
          added[group] = load_raw8<kAligned>(residual + column, count8(column, n));
        });
      }
      for_each_group<S>(n, [&](int group, int64_t column) {
        add(held[group], added[group], column);
        if (z != nullptr) store_raw8<kAligned>(held[group], z + column, count8(column, n));
      });
    }
  } else {
    for_each_group<S>(n, [&](int, int64_t column) {
      const int count = count8(column, n);
      Raw8<T> raw = load_raw8<kAligned>(x + column, count), added = {};
      if (residual != nullptr) added = load_raw8<kAligned>(residual + column, count);
      add(raw, added, column);
      store_raw8<kAligned>(raw, kept + column, count);
    });
  }
  auto fetch = [&](int group, int64_t column) {
    if constexpr (S::kHolds) return held[group];
    return load_raw8<kAligned>(kept + column, count8(column, n));
  };
  C mean = 0, total[1], v[1][8];
  if (!p.rms) {
    thread_sums<S, 0, 1>(
        n,
        [&](int group, int64_t column, C(&out)[1][8]) {
          const Raw8<T> raw = fetch(group, column);
#pragma unroll
          for (int e = 0; e < 8; ++e) out[0][e] = raw.get(e);
        },
        v);
    row_sums<S>(v, total);
    mean = total[0] / size;
    if (is_first) static_cast<C*>(p.mean)[row] = mean;
  }
  thread_sums<S, 0, 1>(
      n,
      [&](int group, int64_t column, C(&out)[1][8]) {
        const Raw8<T> raw = fetch(group, column);
        const int count = count8(column, n);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const C d = raw.get(e) - mean;
          out[0][e] = kAligned || e < count ? d * d : C{0};
        }
      },
      v);
  row_sums<S>(v, total);
  const C rstd = C{1} / square_root(total[0] / size + static_cast<C>(p.eps));
  if (is_first) static_cast<C*>(p.rstd)[row] = rstd;

  auto normalise = [&](int group, int64_t column, C(&out)[8]) {
    const Raw8<T> raw = fetch(group, column);
    const int count = count8(column, n);
    C weight[8], bias[8];
    if (p.weight != nullptr)
      load8(static_cast<const C*>(p.weight) + column, count, kAligned, weight);
    if (p.bias != nullptr) load8(static_cast<const C*>(p.bias) + column, count, kAligned, bias);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      out[e] = (raw.get(e) - mean) * rstd;
      if (p.weight != nullptr) out[e] = out[e] * weight[e];
      if (p.bias != nullptr) out[e] = out[e] + bias[e];
    }
  };
  if (p.values == nullptr) {
    for_each_group<S>(n, [&](int group, int64_t column) {
      C out[8];
      normalise(group, column, out);
      store8(out, y + column, count8(column, n), kAligned);
    });
    return;
  }
  // y as it is rounded; the largest magnitude is found first, and what is held normalised twice.
  auto rounded = [&](int group, int64_t column, C(&out)[8], float (&value)[8]) {
    normalise(group, column, out);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      T stored;
      from_float(out[e], &stored);
      value[e] = static_cast<float>(to_float(stored));
    }
  };
  uint32_t largest = 0;
  for_each_group<S>(n, [&](int group, int64_t column) {
    const int count = count8(column, n);
    C out[8];
    float value[8];
    rounded(group, column, out, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t magnitude = float_to_bits(value[e]) & 0x7FFFFFFFu;
      if ((kAligned || e < count) && magnitude > largest) largest = magnitude;
    }
  });
  largest = row_max<S>(largest);
  const float absmax = bits_to_float(largest);
  const float value_scale = largest >= kInfinity      ? bits_to_float(kNaN)
                            : absmax / 127.0f == 0.0f ? 1.0f
                                                      : absmax / 127.0f;
  if (is_first) p.value_scale[row] = value_scale;
  const Step step = with_inverse(value_scale, 0.0f);
  for_each_group<S>(n, [&](int group, int64_t column) {
    const int count = count8(column, n);
    C out[8];
    float value[8];
    rounded(group, column, out, value);
    // Here and not above: y may be where z is found again.
    if (y != nullptr) store8(out, y + column, count, kAligned);
    store_int8(step, value, p.values + row * n + column, -127.0f, count, kAligned);
  });
}

// Every chunk has `column_blocks` blocks for its columns and then those for its rows.
template <typename T, typename S>
__global__ void backward_kernel(DropoutAddNormBackwardParams p, int64_t chunks,
                                unsigned column_blocks) {
  using C = typename ComputeType<T>::type;
  constexpr bool kAligned = S::kAligned;
  const unsigned chunk_blocks = column_blocks + static_cast<unsigned>(kChunkRows / S::kRows);
  const int64_t chunk = blockIdx.x / chunk_blocks;
  const int64_t block = blockIdx.x % chunk_blocks;
  if (block < column_blocks) {
    return column_sums<T, S>(p, chunk, chunks, (block * S::kThreads + threadIdx.x) * 8);
  }
  const int64_t n = p.num_columns;
  const int64_t row = chunk * kChunkRows + (block - column_blocks) * S::kRows +
                      static_cast<int64_t>(threadIdx.x / S::kRowThreads);
  if (row >= p.num_rows) return;
  const uint64_t seed = p.threshold != 0 ? seed_value(p.seed) : 0;
  const C scale = static_cast<C>(p.scale), size = static_cast<C>(n);
  const T* z = static_cast<const T*>(p.z) + row * n;
  const T* grad_y = static_cast<const T*>(p.grad_y) + row * n;
  const T* grad_z = p.grad_z != nullptr ? static_cast<const T*>(p.grad_z) + row * n : nullptr;
  Raw8<T> held_z[S::kGroups] = {}, held_grad[S::kGroups] = {}, added[S::kGroups] = {};
  auto load = [&](int group, int64_t column) {
    held_z[group] = load_raw8<kAligned>(z + column, count8(column, n));
    held_grad[group] = load_raw8<kAligned>(grad_y + column, count8(column, n));
  };
  auto load_added = [&](int group, int64_t column) {
    added[group] = load_raw8<kAligned>(grad_z + column, count8(column, n));
  };
  if constexpr (S::kHolds) {
    for_each_group<S>(n, load);
    if (grad_z != nullptr) for_each_group<S>(n, load_added);
  }
  const C mean = p.rms ? C{0} : static_cast<const C*>(p.mean)[row];
  const C rstd = static_cast<const C*>(p.rstd)[row];
  auto fetch = [&](int group, int64_t column, C(&x_hat)[8], C(&weighted)[8]) {
    if constexpr (!S::kHolds) load(group, column);
    C weight[8];
    if (p.weight != nullptr) {
      load8(static_cast<const C*>(p.weight) + column, count8(column, n), kAligned, weight);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x_hat[e] = (held_z[group].get(e) - mean) * rstd;
      weighted[e] = held_grad[group].get(e);
      if (p.weight != nullptr) weighted[e] = weighted[e] * weight[e];
    }
  };
  C totals[2] = {};  // of products, and of gradients for LayerNorm
  auto sum = [&](auto& v) {
    constexpr int kSums = sizeof(v) / sizeof(v[0]);
    thread_sums<S, 0, 1>(
        n,
        [&](int group, int64_t column, C(&out)[kSums][8]) {
          C x_hat[8], weighted[8];
          fetch(group, column, x_hat, weighted);
          const int count = count8(column, n);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            out[0][e] = kAligned || e < count ? weighted[e] * x_hat[e] : C{0};
            if (kSums == 2) out[kSums - 1][e] = kAligned || e < count ? weighted[e] : C{0};
          }
        },
        v);
    row_sums<S>(v, totals);
  };
  C product[1][8], both[2][8];
  if (p.rms) {
    sum(product);
  } else {
    sum(both);
  }
  const C product_mean = totals[0] / size, grad_mean = totals[1] / size;
  for_each_group<S>(n, [&](int group, int64_t column) {
    const int count = count8(column, n);
    const int64_t offset = row * n + column;
    C x_hat[8], weighted[8], out[8];
    fetch(group, column, x_hat, weighted);
    if (!S::kHolds && grad_z != nullptr) load_added(group, column);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      out[e] = (weighted[e] - x_hat[e] * product_mean - grad_mean) * rstd;
      if (grad_z != nullptr) out[e] = out[e] + added[group].get(e);
    }
    if (p.grad_residual != nullptr) {
      store8(out, static_cast<T*>(p.grad_residual) + offset, count, kAligned);
    }
    if (p.threshold != 0) {
      const uint32_t bits = keep_bits8_from(seed, static_cast<uint64_t>(p.seed.first + offset),
                                            p.stream, p.threshold);
#pragma unroll
      for (int e = 0; e < 8; ++e) out[e] = (bits >> e) & 1 ? out[e] * scale : C{0};
    }
    store8(out, static_cast<T*>(p.grad_x) + offset, count, kAligned);
  });
}

template <typename T>
const char* forward(const T* /*type*/, const DropoutAddNormParams& p, void* stream) {
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.x) && is_aligned16(p.residual) &&
                       is_aligned16(p.weight) && is_aligned16(p.bias) && is_aligned16(p.y) &&
                       is_aligned16(p.z) && is_aligned16(p.values);
  return with_shape<sizeof(T) * 2>(p.num_columns, aligned, [&](auto shape) {
    using S = decltype(shape);
    const int64_t blocks = (p.num_rows + S::kRows - 1) / S::kRows;
    return launch(forward_kernel<T, S>, dim3(static_cast<unsigned>(blocks)), S::kThreads, stream,
                  p);
  });
}

template <typename T>
const char* backward(const T* /*type*/, const DropoutAddNormBackwardParams& p, void* stream) {
  using C = typename ComputeType<T>::type;
  const int64_t chunks = num_chunks(p.num_rows);
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.grad_y) && is_aligned16(p.grad_z) &&
                       is_aligned16(p.z) && is_aligned16(p.weight) && is_aligned16(p.grad_x) &&
                       is_aligned16(p.grad_residual) && is_aligned16(p.partial);
  const char* error =
      with_shape<sizeof(T) * 3>(p.num_columns, aligned, [&](auto shape) -> const char* {
        using S = decltype(shape);
        constexpr int64_t kBlockColumns = S::kThreads * 8;
        const int64_t column_blocks = (p.num_columns + kBlockColumns - 1) / kBlockColumns;
        const int64_t blocks = chunks * (column_blocks + kChunkRows / S::kRows);
        return launch(backward_kernel<T, S>, dim3(static_cast<unsigned>(blocks)), S::kThreads,
                      stream, p, chunks, static_cast<unsigned>(column_blocks));
      });
  if (error != nullptr) return error;
  const dim3 grid(static_cast<unsigned>((p.num_columns + 31) / 32), 2);
  return launch(sum_kernel<C>, grid, 32 * (kLoadingWarps + 1), stream,
                static_cast<const C*>(p.partial), static_cast<C*>(p.grad_weight),
                static_cast<C*>(p.grad_bias), chunks, p.num_columns);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA

namespace pyfast {

const char* dropout_add_norm_cuda(const DropoutAddNormParams& params, void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(
      params.dtype, [&](auto* type) { error = PYFAST_ISA::forward(type, params, stream); });
  return error;
}

const char* dropout_add_norm_backward_cuda(const DropoutAddNormBackwardParams& params,
                                           void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(
      params.dtype, [&](auto* type) { error = PYFAST_ISA::backward(type, params, stream); });
  return error;
}

}  // namespace pyfast
