#include "cuda_device.h"
#include "launch.cuh"

namespace pyfast {

CudaDeviceGuard::CudaDeviceGuard(int device) {
  int current = -1;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess && current != device) {
    status = cudaSetDevice(device);
    if (status == cudaSuccess) previous_ = current;
  }
  if (status != cudaSuccess) error_ = cudaGetErrorString(status);
}

CudaDeviceGuard::~CudaDeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

#define PYFAST_TEXT_OF(value) #value
#define PYFAST_TEXT(value) PYFAST_TEXT_OF(value)

const char* cuda_toolkit_version() {
#ifdef __CUDACC__
  return PYFAST_TEXT(__CUDACC_VER_MAJOR__) "." PYFAST_TEXT(__CUDACC_VER_MINOR__);
#else
  return "emulated";
#endif
}

const char* cuda_architectures() { return PYFAST_CUDA_ARCHITECTURES; }

}  // namespace pyfast
