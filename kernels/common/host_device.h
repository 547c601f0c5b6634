// PYFAST_HD marks arithmetic that stands once and is compiled for the host and for CUDA.
// PYFAST_ISA is the namespace of one instruction-set level: the build defines it for the files
// that it compiles once per level, so that no inline function of one level is ever linked into
// another. Everything inline in kernels/common lives in that namespace.
#pragma once

#ifdef __CUDACC__
#define PYFAST_HD __host__ __device__ __forceinline__
#else
#define PYFAST_HD inline
#endif

#ifndef PYFAST_ISA
#define PYFAST_ISA base
#endif
