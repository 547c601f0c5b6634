// How CUDA kernels are launched, and what the kernels over rows share: one thread owns eight
// consecutive elements, which is one Philox call and one or more 16-byte accesses.
// With PYFAST_CUDA_EMULATION the same sources are host C++: cuda_emulation.h gives the CUDA words,
// and launch() runs the threads of a block as fibers.
#pragma once

#ifdef PYFAST_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "dtype.h"
#include "host_device.h"

namespace pyfast::PYFAST_ISA {

// Returns an error text or nullptr.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int block_threads, void* stream,
                   const Arguments&... arguments) {
#ifdef PYFAST_CUDA_EMULATION
  (void)stream;
  return cuda_emulation::run(grid, block_threads, [&] { kernel(arguments...); });
#else
  kernel<<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#endif
}

// 16 bytes, the widest access; `from` and `to` are aligned to them.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
#ifdef PYFAST_CUDA_EMULATION
  Pack<T> pack;
  cuda_emulation::copy_aligned(&pack, from, from, 16);
  return pack;
#else
  return *reinterpret_cast<const Pack<T>*>(from);
#endif
}

template <typename T>
__device__ __forceinline__ void store_pack(const Pack<T>& pack, T* to) {
#ifdef PYFAST_CUDA_EMULATION
  cuda_emulation::copy_aligned(to, &pack, to, 16);
#else
  *reinterpret_cast<Pack<T>*>(to) = pack;
#endif
}

// Eight elements from `from` on, of which the first `count` exist; the others are zero.
// `vectorized` says that all eight exist and are aligned.
template <typename T, typename C>
__device__ __forceinline__ void load8(const T* from, int count, bool vectorized, C (&out)[8]) {
  if (vectorized) {
#pragma unroll
    for (int first = 0; first < 8; first += Pack<T>::kSize) {
      const Pack<T> pack = load_pack(from + first);
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; ++e) out[first + e] = static_cast<C>(to_float(pack.v[e]));
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) out[e] = e < count ? static_cast<C>(to_float(from[e])) : C{0};
  }
}

template <typename T, typename C>
__device__ __forceinline__ void store8(const C (&values)[8], T* to, int count, bool vectorized) {
  if (vectorized) {
#pragma unroll
    for (int first = 0; first < 8; first += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; ++e) from_float(values[first + e], &pack.v[e]);
      store_pack(pack, to + first);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) from_float(values[e], to + e);
    }
  }
}

// How many of eight elements from `first` on exist in a row of `size`.
__device__ __forceinline__ int count8(int64_t first, int64_t size) {
  return size - first >= 8 ? 8 : static_cast<int>(size - first);
}

PYFAST_HD bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;  // null is
}

}  // namespace pyfast::PYFAST_ISA
