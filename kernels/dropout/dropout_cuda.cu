// One thread owns eight elements that follow each other along the innermost dimension: one Philox
// call where their mask indices follow each other too, and 16-byte accesses where everything is
// contiguous and aligned. Bound by bytes: read x, write y; nothing else is stored.
#include "../common/launch.cuh"
#include "../common/philox.h"
#include "dropout.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int kBlockThreads = 256;

__device__ __forceinline__ uint32_t keep_bits_strided(uint64_t seed, uint64_t first, int64_t stride,
                                                      uint32_t stream, uint32_t threshold) {
  if (stride == 1) return keep_bits8_from(seed, first, stream, threshold);
  const uint32_t bit = (keep_bits8(seed, first / 8, stream, threshold) >> (first % 8)) & 1;
  if (stride == 0) return bit ? 0xFFu : 0u;
  uint32_t bits = bit;
  for (int e = 1; e < 8; ++e) {
    const uint64_t index = first + static_cast<uint64_t>(e * stride);
    const uint32_t group_bits = keep_bits8(seed, index / 8, stream, threshold);
    bits |= ((group_bits >> (index % 8)) & 1) << e;
  }
  return bits;
}

template <typename T, bool kVectorized>
__global__ void dropout_kernel(DropoutParams p, int64_t groups_per_row, int64_t num_groups) {
  using C = typename ComputeType<T>::type;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (group >= num_groups) return;
  const int inner = p.ndim - 1;
  int64_t row = group / groups_per_row;
  const int64_t first = (group - row * groups_per_row) * 8;
  const int64_t x_stride = kVectorized ? 1 : p.x_strides[inner];
  const int64_t y_stride = kVectorized ? 1 : p.y_strides[inner];
  int64_t x_offset = first * x_stride;
  int64_t y_offset = first * y_stride;
  int64_t mask = p.seed.first + first * p.mask_strides[inner];
  for (int d = inner - 1; d >= 0; --d) {
    const int64_t coordinate = row % p.sizes[d];
    row /= p.sizes[d];
    x_offset += coordinate * p.x_strides[d];
    y_offset += coordinate * p.y_strides[d];
    mask += coordinate * p.mask_strides[d];
  }
  const T* x = static_cast<const T*>(p.x) + x_offset;
  T* y = static_cast<T*>(p.y) + y_offset;
  const uint32_t bits = keep_bits_strided(seed_value(p.seed), static_cast<uint64_t>(mask),
                                          p.mask_strides[inner], p.stream, p.threshold);
  const C scale = static_cast<C>(p.scale), shift = static_cast<C>(p.shift);
  const C fill = static_cast<C>(p.fill);
  const int count = count8(first, p.sizes[inner]);
  if (kVectorized && count == 8) {
    C value[8];
    load8(x, 8, true, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = (bits >> e) & 1 ? value[e] * scale + shift : fill;
    store8(value, y, 8, true);
    return;
  }
  for (int e = 0; e < count; ++e) {
    const C value = static_cast<C>(to_float(x[e * x_stride]));
    from_float((bits >> e) & 1 ? value * scale + shift : fill, y + e * y_stride);
  }
}

// True when every group of eight is aligned in x and in y.
template <typename T>
bool is_vectorizable(const DropoutParams& p) {
  const int inner = p.ndim - 1;
  if (p.x_strides[inner] != 1 || p.y_strides[inner] != 1) return false;
  if (!is_aligned16(p.x) || !is_aligned16(p.y)) return false;
  for (int d = 0; d < inner; ++d) {
    if (p.x_strides[d] * sizeof(T) % 16 != 0 || p.y_strides[d] * sizeof(T) % 16 != 0) return false;
  }
  return true;
}

template <typename T>
const char* run(const T* /*type*/, const DropoutParams& p, void* stream) {
  const int64_t inner_size = p.sizes[p.ndim - 1];
  const int64_t groups_per_row = (inner_size + 7) / 8;
  const int64_t num_groups = p.num_elements / inner_size * groups_per_row;
  const dim3 grid(static_cast<unsigned>((num_groups + kBlockThreads - 1) / kBlockThreads));
  return launch(is_vectorizable<T>(p) ? dropout_kernel<T, true> : dropout_kernel<T, false>, grid,
                kBlockThreads, stream, p, groups_per_row, num_groups);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA

namespace pyfast {

const char* dropout_cuda(const DropoutParams& params, void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(params.dtype,
                             [&](auto* type) { error = PYFAST_ISA::run(type, params, stream); });
  return error;
}

}  // namespace pyfast
