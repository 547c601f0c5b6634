// The gradients of weight and bias: sums over the rows of a chunk, then over the chunks.
#pragma once

#include "../common/column_sum.h"
#include "dropout_add_norm.h"
#include "dropout_add_norm_rows.cuh"

namespace pyfast::PYFAST_ISA {

// The sums over the rows of a chunk of eight columns, which have their place in `partial`.
template <typename T, typename S>
__device__ __forceinline__ void column_sums(const DropoutAddNormBackwardParams& p, int64_t chunk,
                                            int64_t chunks, int64_t column) {
  using C = typename ComputeType<T>::type;
  constexpr int kInFlight = sizeof(T) > 4 ? 2 : 4;
  const int64_t n = p.num_columns;
  if (column >= n) return;
  const int count = count8(column, n);
  const int64_t first_row = chunk * kChunkRows;
  const int64_t row_end = first_row + kChunkRows < p.num_rows ? first_row + kChunkRows : p.num_rows;
  C weight_sum[8] = {}, bias_sum[8] = {};
  Raw8<T> z[kInFlight], grad[kInFlight];
  C mean[kInFlight], rstd[kInFlight];
  auto load = [&](int i, int64_t row) {
    z[i] = load_raw8<S::kAligned>(static_cast<const T*>(p.z) + row * n + column, count);
    grad[i] = load_raw8<S::kAligned>(static_cast<const T*>(p.grad_y) + row * n + column, count);
    mean[i] = p.rms ? C{0} : static_cast<const C*>(p.mean)[row];
    rstd[i] = static_cast<const C*>(p.rstd)[row];
  };
  auto add = [&](int i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      weight_sum[e] += grad[i].get(e) * ((z[i].get(e) - mean[i]) * rstd[i]);
      bias_sum[e] += grad[i].get(e);
    }
  };
  int64_t row = first_row;
  for (; row + kInFlight <= row_end; row += kInFlight) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) load(i, row + i);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(i);
  }
  for (; row < row_end; ++row) {
    load(0, row);
    add(0);
  }
  C* weight_partial = static_cast<C*>(p.partial) + chunk * n;
  store8(weight_sum, weight_partial + column, count, S::kAligned);
  store8(bias_sum, weight_partial + chunks * n + column, count, S::kAligned);
}

constexpr int kLoadingWarps = 8;
constexpr int kTileChunks = 128;

// The sums of 32 columns over the chunks, in double and in chunk order. Eight warps load the next
// chunks while the ninth adds up the last ones.
template <typename C>
__global__ void sum_kernel(const C* partial, C* grad_weight, C* grad_bias, int64_t chunks,
                           int64_t num_columns) {
  constexpr int kLoads = kTileChunks / kLoadingWarps;
  __shared__ C tile[kTileChunks][32];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const C* part = partial + blockIdx.y * chunks * num_columns + column;
  double sum = 0;
  for (int64_t first = 0; first < chunks; first += kTileChunks) {
    C values[kLoads] = {};
    if (warp < kLoadingWarps && column < num_columns) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t chunk = first + i * kLoadingWarps + warp;
        if (chunk < chunks) values[i] = part[chunk * num_columns];
      }
    }
    __syncthreads();
    if (warp < kLoadingWarps) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) tile[i * kLoadingWarps + warp][lane] = values[i];
    }
    __syncthreads();
    if (warp == kLoadingWarps) {
      const int64_t left = chunks - first;
      const int count = left < kTileChunks ? static_cast<int>(left) : kTileChunks;
#pragma unroll 8
      for (int i = 0; i < count; ++i) sum += tile[i][lane];
    }
  }
  if (warp == kLoadingWarps && column < num_columns) {
    (blockIdx.y == 0 ? grad_weight : grad_bias)[column] = static_cast<C>(sum);
  }
}

}  // namespace pyfast::PYFAST_ISA
