// What the boundary needs to know of CUDA without including its headers.
#pragma once

namespace pyfast {

#ifdef PYFAST_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// The test build that runs CUDA kernels as host code, on CPU tensors.
#ifdef PYFAST_CUDA_EMULATION
constexpr bool kEmulateCuda = true;
#else
constexpr bool kEmulateCuda = false;
#endif

// Makes `device` current for this thread, and the former one again at the end.
class CudaDeviceGuard {
 public:
  explicit CudaDeviceGuard(int device);
  ~CudaDeviceGuard();
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;
  const char* error() const { return error_; }

 private:
  int previous_ = -1;
  const char* error_ = nullptr;
};

// "13.0" and the like of the toolkit that compiled the kernels; "" without CUDA.
const char* cuda_toolkit_version();
// "80-real;80-virtual;90a-real" and the like.
const char* cuda_architectures();

#ifndef PYFAST_WITH_CUDA
inline CudaDeviceGuard::CudaDeviceGuard(int) {}
inline CudaDeviceGuard::~CudaDeviceGuard() {}
inline const char* cuda_toolkit_version() { return ""; }
inline const char* cuda_architectures() { return ""; }
#endif

}  // namespace pyfast

// Declares a launcher, which returns an error text or nullptr; null in a build without CUDA.
// `stream` is a cudaStream_t.
#ifdef PYFAST_WITH_CUDA
#define PYFAST_CUDA_KERNEL(name, Params) const char* name(const Params& params, void* stream)
#else
#define PYFAST_CUDA_KERNEL(name, Params) \
  constexpr const char* (*name)(const Params& params, void* stream) = nullptr
#endif
