// The sums over a row in the order of dropout_add_norm.h, in every thread of the row: over the
// passes and virtual warps of a thread in registers, over warps through shared memory, over the
// threads and the eight elements with shuffles.
#pragma once

#include "dropout_add_norm_rows.cuh"

namespace pyfast::PYFAST_ISA {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

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

// Adds the upper half to the lower until one is left.
template <int kCount, typename C>
__device__ __forceinline__ C halved(C (&v)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// Where the warps of a row meet: one place for all sums of a kernel.
template <typename C, int kRowWarps, int kMaxSums>
struct Meeting {
  C lanes[kMaxSums][kRowWarps][8][32];
  C elements[kMaxSums][8];
};

template <typename M>
__device__ __forceinline__ M& shared_meeting() {
  __shared__ M meeting;
  return meeting;
}

// The sums over the threads of a row, whose virtual warps are its warps by now; the other backends
// start at +0: a sum of nothing but -0 is +0. With a block a row, every warp adds the threads of
// some of the eight elements. A second call needs no barrier before it: what it overwrites was
// read before the second barrier of the first, or is not written before its own first.
template <typename S, int kMaxSums, int kSums, typename C>
__device__ __forceinline__ void row_sums(C (&v)[kSums][8], C (&sums)[kMaxSums]) {
  if constexpr (S::kRowWarps == 1) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s] = warp_sum(v[s]) + C{0};
  } else {
    auto& shared = shared_meeting<Meeting<C, S::kRowWarps, kMaxSums>>();
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int e = 0; e < 8; ++e) shared.lanes[s][warp][e][lane] = v[s][e];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int first = 0; first < 8; first += S::kRowWarps) {
        const int e = first + warp;
        C warps[S::kRowWarps];
#pragma unroll
        for (int w = 0; w < S::kRowWarps; ++w) warps[w] = shared.lanes[s][w][e][lane];
        C sum = halved(warps);
#pragma unroll
        for (unsigned offset = 16; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (lane == 0) shared.elements[s][e] = sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      C elements[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) elements[e] = shared.elements[s][e];
      sums[s] = halved(elements) + C{0};
    }
  }
}

// The sums of what f(group, column, out) gives, in the thread's part of the order: over the passes,
// then the upper half of its virtual warps is added to the lower.
template <typename S, int kFirst, int kStride, int kSums, typename C, typename F>
__device__ __forceinline__ void thread_sums(int64_t num_columns, const F& f, C (&v)[kSums][8]) {
  if constexpr (kStride < S::kVirtual) {
    C upper[kSums][8];
    thread_sums<S, kFirst, kStride * 2>(num_columns, f, v);
    thread_sums<S, kFirst + kStride, kStride * 2>(num_columns, f, upper);
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[s][e] += upper[s][e];
    }
  } else {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[s][e] = 0;
    }
    for_each_group<S>(num_columns, [&](int group, int64_t column) {
      if (group % S::kVirtual != kFirst) return;
      if (S::kHolds && group < S::kVirtual) return f(group, column, v);
      C more[kSums][8];
      f(group, column, more);
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[s][e] += more[s][e];
      }
    });
  }
}

// The largest of a row's numbers, in every thread of the row.
template <typename S>
__device__ __forceinline__ uint32_t row_max(uint32_t value) {
#pragma unroll
  for (unsigned offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other > value ? other : value;
  }
  if constexpr (S::kRowWarps > 1) {
    __shared__ uint32_t warps[S::kRowWarps];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < S::kRowWarps; ++w) value = warps[w] > value ? warps[w] : value;
  }
  return value;
}

}  // namespace pyfast::PYFAST_ISA
