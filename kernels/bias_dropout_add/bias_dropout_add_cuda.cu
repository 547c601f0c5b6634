// Forward: one thread, eight columns of one row. Backward: one thread owns eight columns of a chunk
// of 32 rows and adds them up in row order; a second kernel adds the chunks. Bound by bytes.
#include "../common/column_sum.h"
#include "../common/launch.cuh"
#include "../common/philox.h"
#include "bias_dropout_add.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int kBlockThreads = 128;

template <typename T>
__global__ void forward_kernel(BiasDropoutAddParams p, int64_t groups_per_row, int64_t num_groups,
                               bool aligned) {
  using C = typename ComputeType<T>::type;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (group >= num_groups) return;
  const int64_t row = group / groups_per_row;
  const int64_t column = (group - row * groups_per_row) * 8;
  const int64_t offset = row * p.num_columns + column;
  const int count = count8(column, p.num_columns);
  const uint32_t bits = keep_bits8_from(
      seed_value(p.seed), static_cast<uint64_t>(p.seed.first + offset), p.stream, p.threshold);
  const C scale = static_cast<C>(p.scale);
  C value[8], residual[8], bias[8] = {};
  load8(static_cast<const T*>(p.x) + offset, count, aligned, value);
  load8(static_cast<const T*>(p.residual) + offset, count, aligned, residual);
  if (p.bias != nullptr) {
    load8(static_cast<const C*>(p.bias) + column, count, aligned, bias);
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (p.bias != nullptr) value[e] = value[e] + bias[e];
    value[e] = residual[e] + ((bits >> e) & 1 ? value[e] * scale : C{0});
  }
  store8(value, static_cast<T*>(p.y) + offset, count, aligned);
}

template <typename T>
__global__ void backward_kernel(BiasDropoutAddBackwardParams p, bool aligned) {
  using C = typename ComputeType<T>::type;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x) * 8;
  if (column >= p.num_columns) return;
  const int64_t chunk = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
  const int64_t first_row = chunk * kChunkRows;
  if (first_row >= p.num_rows) return;
  const int64_t row_end = first_row + kChunkRows < p.num_rows ? first_row + kChunkRows : p.num_rows;
  const int count = count8(column, p.num_columns);
  const uint64_t seed = seed_value(p.seed);
  const C scale = static_cast<C>(p.scale);
  C sum[8] = {};
  for (int64_t row = first_row; row < row_end; ++row) {
    const int64_t offset = row * p.num_columns + column;
    const uint32_t bits =
        keep_bits8_from(seed, static_cast<uint64_t>(p.seed.first + offset), p.stream, p.threshold);
    C value[8];
    load8(static_cast<const T*>(p.grad) + offset, count, aligned, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      value[e] = (bits >> e) & 1 ? value[e] * scale : C{0};
      sum[e] += value[e];
    }
    store8(value, static_cast<T*>(p.grad_x) + offset, count, aligned);
  }
  store8(sum, static_cast<C*>(p.partial) + chunk * p.num_columns + column, count, aligned);
}

template <typename C>
__global__ void sum_kernel(const C* partial, C* out, int64_t chunks, int64_t num_columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (column < num_columns) sum_chunks(partial, out, chunks, num_columns, column);
}

unsigned num_blocks(int64_t threads) {
  return static_cast<unsigned>((threads + kBlockThreads - 1) / kBlockThreads);
}

template <typename T>
const char* forward(const T* /*type*/, const BiasDropoutAddParams& p, void* stream) {
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.x) && is_aligned16(p.residual) &&
                       is_aligned16(p.y) && is_aligned16(p.bias);
  const int64_t groups_per_row = (p.num_columns + 7) / 8;
  const int64_t num_groups = p.num_rows * groups_per_row;
  return launch(forward_kernel<T>, dim3(num_blocks(num_groups)), kBlockThreads, stream, p,
                groups_per_row, num_groups, aligned);
}

template <typename T>
const char* backward(const T* /*type*/, const BiasDropoutAddBackwardParams& p, void* stream) {
  using C = typename ComputeType<T>::type;
  const bool aligned = p.num_columns % 8 == 0 && is_aligned16(p.grad) && is_aligned16(p.grad_x) &&
                       is_aligned16(p.partial);
  const int64_t chunks = num_chunks(p.num_rows);
  constexpr int64_t kMaxGridY = 65535;
  const int64_t grid_y = chunks < kMaxGridY ? chunks : kMaxGridY;
  const dim3 grid(num_blocks((p.num_columns + 7) / 8), static_cast<unsigned>(grid_y),
                  static_cast<unsigned>((chunks + grid_y - 1) / grid_y));
  const char* error = launch(backward_kernel<T>, grid, kBlockThreads, stream, p, aligned);
  if (error != nullptr) return error;
  return launch(sum_kernel<C>, dim3(num_blocks(p.num_columns)), kBlockThreads, stream,
                static_cast<const C*>(p.partial), static_cast<C*>(p.grad_bias), chunks,
                p.num_columns);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA

namespace pyfast {

const char* bias_dropout_add_cuda(const BiasDropoutAddParams& params, void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(
      params.dtype, [&](auto* type) { error = PYFAST_ISA::forward(type, params, stream); });
  return error;
}

const char* bias_dropout_add_backward_cuda(const BiasDropoutAddBackwardParams& params,
                                           void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(
      params.dtype, [&](auto* type) { error = PYFAST_ISA::backward(type, params, stream); });
  return error;
}

}  // namespace pyfast
