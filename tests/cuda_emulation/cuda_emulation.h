// The words of CUDA C++ for a host compiler, so that CI executes kernels without a GPU. Blocks run
// one after another; the threads of a block are fibers that run until they reach a barrier or end.
// PYFAST_EMULATION_ORDER (0, 1, 2) is the order in which fibers are resumed: ascending, descending,
// shuffled anew at every turn. A missing __syncthreads shows as a result that depends on the order.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace cuda_emulation {

struct ThreadState {
  dim3 thread_idx, block_idx, block_dim, grid_dim;
};
extern ThreadState* current;

// Runs every thread of every block; returns the first error that a check reported, or nullptr.
const char* run(dim3 grid, int block_threads, const std::function<void()>& body);

void synchronize();
uint64_t exchange(unsigned mask, uint64_t value, unsigned source_lane);
// Copies `size` bytes; an error unless `device`, one of the two, is aligned to them.
void copy_aligned(void* to, const void* from, const void* device, unsigned size);

}  // namespace cuda_emulation

#define threadIdx (::cuda_emulation::current->thread_idx)
#define blockIdx (::cuda_emulation::current->block_idx)
#define blockDim (::cuda_emulation::current->block_dim)
#define gridDim (::cuda_emulation::current->grid_dim)

inline void __syncthreads() { cuda_emulation::synchronize(); }

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, unsigned lane_mask) {
  static_assert(sizeof(T) <= 8, "wider than a shuffle");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = cuda_emulation::exchange(mask, bits, (threadIdx.x % 32) ^ lane_mask);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
