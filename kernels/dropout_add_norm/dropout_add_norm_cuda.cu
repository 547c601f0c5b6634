// One block a row, eight columns a thread and pass, one or two passes held in registers (wider rows
// are read again from cache). Backward: one block a chunk of 32 rows, so that a thread adds up the
// weight and bias gradients of its columns in row order; a second kernel adds the chunks. Bound by
// bytes: x, residual, z and y forward, grad_y, z, grad_x and grad_residual backward.
#include "../common/column_sum.h"
#include "../common/launch.cuh"
#include "../common/philox.h"
#include "../common/quantize.cuh"
#include "dropout_add_norm.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kMaxWarps = 8;

// The sum over the 32 threads and 8 elements of a warp in the order of dropout_add_norm.h, in every
// lane. A step exchanges the half that the partner keeps: 12 shuffles instead of 8 * 5 + 7.
template <typename C>
__device__ __forceinline__ C warp_sum(C (&v)[8]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const unsigned offset = static_cast<unsigned>(half) * 4;
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int e = 0; e < half; ++e) {
      const C send = upper ? v[e] : v[e + half];
      const C keep = upper ? v[e + half] : v[e];
      v[e] = keep + __shfl_xor_sync(kAllLanes, send, offset);
    }
  }
  C sum = v[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 16);
  sum += __shfl_xor_sync(kAllLanes, sum, 8);
  sum += __shfl_xor_sync(kAllLanes, sum, 4);
  return sum;
}

// The same over a block of `warps` warps. Every thread of the block calls it.
template <typename C>
__device__ __forceinline__ C block_sum(C (&v)[8], int warps) {
  if (warps == 1) return warp_sum(v);
  __shared__ C lanes[kMaxWarps][256];
  __shared__ C result;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int column = static_cast<int>(threadIdx.x % 32) * 8;
#pragma unroll
  for (int e = 0; e < 8; ++e) lanes[warp][column + e] = v[e];
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      C tree[kMaxWarps];
#pragma unroll
      for (int w = 0; w < kMaxWarps; ++w) tree[w] = w < warps ? lanes[w][column + e] : C{0};
#pragma unroll
      for (int half = kMaxWarps / 2; half > 0; half /= 2) {
        if (half < warps) {
#pragma unroll
          for (int w = 0; w < half; ++w) tree[w] += tree[w + half];
        }
      }
      v[e] = tree[0];
    }
    const C sum = warp_sum(v);
    if (threadIdx.x == 0) result = sum;
  }
  __syncthreads();
  return result;
}

// The largest of a block's numbers, in every thread. Every thread of the block calls it.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[kMaxWarps];
#pragma unroll
  for (unsigned offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    value = warps[warp] > value ? warps[warp] : value;
  }
  return value;
}

// Calls f(pass, column, count) for the passes of this thread; pass is 0 where none is in registers.
template <int kPasses, typename F>
__device__ __forceinline__ void for_each_pass(int64_t num_columns, const F& f) {
  const int64_t first = static_cast<int64_t>(threadIdx.x) * 8;
  const int64_t step = static_cast<int64_t>(blockDim.x) * 8;
  if constexpr (kPasses > 0) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int64_t column = first + pass * step;
      if (column < num_columns) f(pass, column, count8(column, num_columns));
    }
  } else {
    for (int64_t column = first; column < num_columns; column += step) {
      f(0, column, count8(column, num_columns));
    }
  }
}

template <typename T, int kPasses>
__global__ void forward_kernel(DropoutAddNormParams p, bool aligned) {
  using C = typename ComputeType<T>::type;
  const int64_t n = p.num_columns;
  const int64_t row = blockIdx.x;
  const int warps = static_cast<int>(blockDim.x / 32);
  const uint64_t seed = seed_value(p.seed);
  const C scale = static_cast<C>(p.scale), size = static_cast<C>(n);
  T* y = p.y != nullptr ? static_cast<T*>(p.y) + row * n : nullptr;
  T* z = p.z != nullptr ? static_cast<T*>(p.z) + row * n : nullptr;
  T* kept = z != nullptr ? z : y;  // where wide rows find their z again
  C cache[kPasses > 0 ? kPasses : 1][8];
  C sum[8] = {};

  for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
    const int64_t offset = row * n + column;
    C value[8];
    load8(static_cast<const T*>(p.x) + offset, count, aligned, value);
    if (p.threshold != 0) {
      const uint32_t bits = keep_bits8_from(seed, static_cast<uint64_t>(p.seed.first + offset),
                                            p.stream, p.threshold);
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = (bits >> e) & 1 ? value[e] * scale : C{0};
    }
    if (p.residual != nullptr) {
      C residual[8];
      load8(static_cast<const T*>(p.residual) + offset, count, aligned, residual);
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = residual[e] + value[e];
    }
    if (kPasses == 0 || z != nullptr) store8(value, kept + column, count, aligned);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      T stored;
      from_float(value[e], &stored);
      cache[pass][e] = static_cast<C>(to_float(stored));
      sum[e] += cache[pass][e];
    }
  });
  C mean = 0;
  if (!p.rms) {
    mean = block_sum(sum, warps) / size;
    if (threadIdx.x == 0) static_cast<C*>(p.mean)[row] = mean;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] = 0;
  for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
    if (kPasses == 0) load8(kept + column, count, aligned, cache[0]);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const C d = cache[pass][e] - mean;
      if (e < count) sum[e] += d * d;
    }
  });
  const C variance = block_sum(sum, warps) / size;
  const C rstd = C{1} / square_root(variance + static_cast<C>(p.eps));
  if (threadIdx.x == 0) static_cast<C*>(p.rstd)[row] = rstd;
  auto normalise = [&](int pass, int64_t column, int count, C(&out)[8]) {
    if (kPasses == 0) load8(kept + column, count, aligned, cache[0]);
    C weight[8], bias[8];
    if (p.weight != nullptr)
      load8(static_cast<const C*>(p.weight) + column, count, aligned, weight);
    if (p.bias != nullptr) load8(static_cast<const C*>(p.bias) + column, count, aligned, bias);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      out[e] = (cache[pass][e] - mean) * rstd;
      if (p.weight != nullptr) out[e] = out[e] * weight[e];
      if (p.bias != nullptr) out[e] = out[e] + bias[e];
    }
  };
  if (p.values == nullptr) {
    for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
      C out[8];
      normalise(pass, column, count, out);
      store8(out, y + column, count, aligned);
    });
    return;
  }
  // y as it is rounded; the largest magnitude is found first, and what is held normalised twice.
  auto rounded = [&](int pass, int64_t column, int count, C(&out)[8], float (&value)[8]) {
    normalise(pass, column, count, out);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      T stored;
      from_float(out[e], &stored);
      value[e] = static_cast<float>(to_float(stored));
    }
  };
  uint32_t largest = 0;
  for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
    C out[8];
    float value[8];
    rounded(pass, column, count, out, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t magnitude = float_to_bits(value[e]) & 0x7FFFFFFFu;
      if (e < count && magnitude > largest) largest = magnitude;
    }
  });
  largest = block_max(largest);
  const float absmax = bits_to_float(largest);
  const float value_scale = largest >= kInfinity      ? bits_to_float(kNaN)
                            : absmax / 127.0f == 0.0f ? 1.0f
                                                      : absmax / 127.0f;
  if (threadIdx.x == 0) p.value_scale[row] = value_scale;
  const Step step = with_inverse(value_scale, 0.0f);
  for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
    C out[8];
    float value[8];
    rounded(pass, column, count, out, value);
    if (p.y != nullptr) store8(out, y + column, count, aligned);
    store_int8(step, value, p.values + row * n + column, -127.0f, count, aligned);
  });
}

template <typename T, int kPasses>
__global__ void backward_kernel(DropoutAddNormBackwardParams p, int64_t chunks, bool aligned) {
  using C = typename ComputeType<T>::type;
  constexpr int kCached = kPasses > 0 ? kPasses : 1;
  const int64_t n = p.num_columns;
  const int64_t chunk = blockIdx.x;
  const int64_t first_row = chunk * kChunkRows;
  const int64_t row_end = first_row + kChunkRows < p.num_rows ? first_row + kChunkRows : p.num_rows;
  const int warps = static_cast<int>(blockDim.x / 32);
  const uint64_t seed = seed_value(p.seed);
  const C scale = static_cast<C>(p.scale), size = static_cast<C>(n);
  C* weight_partial = static_cast<C*>(p.partial) + chunk * n;
  C* bias_partial = weight_partial + chunks * n;
  C weight_sum[kCached][8] = {}, bias_sum[kCached][8] = {};
  C x_hat[kCached][8], weighted[kCached][8];

  for (int64_t row = first_row; row < row_end; ++row) {
    const C mean = p.rms ? C{0} : static_cast<const C*>(p.mean)[row];
    const C rstd = static_cast<const C*>(p.rstd)[row];
    C products[8] = {}, grads[8] = {};
    // x_hat and weight * grad_y of eight columns, and their sums over the rows where `first_time`.
    auto fetch = [&](int pass, int64_t column, int count, bool first_time) {
      C z[8], grad[8], weight[8];
      load8(static_cast<const T*>(p.z) + row * n + column, count, aligned, z);
      load8(static_cast<const T*>(p.grad_y) + row * n + column, count, aligned, grad);
      if (p.weight != nullptr) {
        load8(static_cast<const C*>(p.weight) + column, count, aligned, weight);
      }
      if (kPasses == 0 && first_time) {
        if (row == first_row) {
#pragma unroll
          for (int e = 0; e < 8; ++e) weight_sum[0][e] = bias_sum[0][e] = 0;
        } else {
          load8(weight_partial + column, count, aligned, weight_sum[0]);
          load8(bias_partial + column, count, aligned, bias_sum[0]);
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        x_hat[pass][e] = (z[e] - mean) * rstd;
        weighted[pass][e] = p.weight != nullptr ? grad[e] * weight[e] : grad[e];
        if (first_time) {
          weight_sum[pass][e] += grad[e] * x_hat[pass][e];
          bias_sum[pass][e] += grad[e];
        }
      }
      if (kPasses == 0 && first_time) {
        store8(weight_sum[0], weight_partial + column, count, aligned);
        store8(bias_sum[0], bias_partial + column, count, aligned);
      }
    };
    for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
      fetch(pass, column, count, true);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (e < count) products[e] += weighted[pass][e] * x_hat[pass][e];
        if (e < count) grads[e] += weighted[pass][e];
      }
    });
    const C product_mean = block_sum(products, warps) / size;
    const C grad_mean = p.rms ? C{0} : block_sum(grads, warps) / size;
    for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
      if (kPasses == 0) fetch(pass, column, count, false);
      const int64_t offset = row * n + column;
      C out[8], grad_z[8];
      if (p.grad_z != nullptr) {
        load8(static_cast<const T*>(p.grad_z) + offset, count, aligned, grad_z);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        out[e] = (weighted[pass][e] - x_hat[pass][e] * product_mean - grad_mean) * rstd;
        if (p.grad_z != nullptr) out[e] = out[e] + grad_z[e];
      }
      if (p.grad_residual != nullptr) {
        store8(out, static_cast<T*>(p.grad_residual) + offset, count, aligned);
      }
      if (p.threshold != 0) {
        const uint32_t bits = keep_bits8_from(seed, static_cast<uint64_t>(p.seed.first + offset),
                                              p.stream, p.threshold);
#pragma unroll
        for (int e = 0; e < 8; ++e) out[e] = (bits >> e) & 1 ? out[e] * scale : C{0};
      }
      store8(out, static_cast<T*>(p.grad_x) + offset, count, aligned);
    });
  }
  if constexpr (kPasses > 0) {
    for_each_pass<kPasses>(n, [&](int pass, int64_t column, int count) {
      store8(weight_sum[pass], weight_partial + column, count, aligned);
      store8(bias_sum[pass], bias_partial + column, count, aligned);
    });
  }
}

constexpr int kSumThreads = 128;

template <typename C>
__global__ void sum_kernel(const C* partial, C* grad_weight, C* grad_bias, int64_t chunks,
                           int64_t num_columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (column >= num_columns) return;
  const C* part = partial + blockIdx.y * chunks * num_columns;
  sum_chunks(part, blockIdx.y == 0 ? grad_weight : grad_bias, chunks, num_columns, column);
}

template <typename T>
const char* forward(const T* /*type*/, const DropoutAddNormParams& p, void* stream) {
  const int threads = 32 * row_warps(p.num_columns);
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.x) && is_aligned16(p.residual) &&
                       is_aligned16(p.weight) && is_aligned16(p.bias) && is_aligned16(p.y) &&
                       is_aligned16(p.z) && is_aligned16(p.values);
  auto* kernel = p.num_columns <= threads * 8    ? forward_kernel<T, 1>
                 : p.num_columns <= threads * 16 ? forward_kernel<T, 2>
                                                 : forward_kernel<T, 0>;
  return launch(kernel, dim3(static_cast<unsigned>(p.num_rows)), threads, stream, p, aligned);
}

template <typename T>
const char* backward(const T* /*type*/, const DropoutAddNormBackwardParams& p, void* stream) {
  using C = typename ComputeType<T>::type;
  const int threads = 32 * row_warps(p.num_columns);
  const int64_t chunks = num_chunks(p.num_rows);
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.grad_y) && is_aligned16(p.grad_z) &&
                       is_aligned16(p.z) && is_aligned16(p.weight) && is_aligned16(p.grad_x) &&
                       is_aligned16(p.grad_residual) && is_aligned16(p.partial);
  auto* kernel = p.num_columns <= threads * 8    ? backward_kernel<T, 1>
                 : p.num_columns <= threads * 16 ? backward_kernel<T, 2>
                                                 : backward_kernel<T, 0>;
  const char* error =
      launch(kernel, dim3(static_cast<unsigned>(chunks)), threads, stream, p, chunks, aligned);
  if (error != nullptr) return error;
  const dim3 grid(static_cast<unsigned>((p.num_columns + kSumThreads - 1) / kSumThreads), 2);
  return launch(sum_kernel<C>, grid, kSumThreads, stream, static_cast<const C*>(p.partial),
                static_cast<C*>(p.grad_weight), static_cast<C*>(p.grad_bias), chunks,
                p.num_columns);
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
