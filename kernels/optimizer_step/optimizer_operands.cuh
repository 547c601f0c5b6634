// How a CUDA thread gets eight elements of each operand of a tensor, whatever its type and layout,
// and puts them back.
#pragma once

#include "../common/launch.cuh"
#include "optimizer_math.h"
#include "optimizer_step.h"

namespace pyfast::PYFAST_ISA {

__device__ __forceinline__ int64_t strided_offset(const OptimizerLayout& layout, int operand,
                                                  int64_t index) {
  int64_t offset = 0;
  for (int d = layout.ndim - 1; d >= 0; --d) {
    const int64_t next = index / layout.sizes[d];
    offset += (index - next * layout.sizes[d]) * layout.strides[operand][d];
    index = next;
  }
  return offset;
}

// Where eight elements of a tensor are: from a row-major index on, `count` of them.
struct Place {
  const OptimizerLayout* layout;  // null: dense
  int64_t first;
  int count;
};

__device__ __forceinline__ int64_t offset_of(const Place& at, int operand, int e) {
  return at.layout == nullptr ? at.first + e : strided_offset(*at.layout, operand, at.first + e);
}

// True when the eight elements follow each other, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ bool is_vectorizable(const T* base, const Place& at) {
  return at.layout == nullptr && at.count == 8 && is_aligned16(base + at.first);
}

// Calls f(e) for the elements one after the other, in a loop that is not unrolled: the code of the
// rare places must stay small.
template <typename F>
__device__ __forceinline__ void one_by_one(const Place& at, const F& f) {
#ifndef PYFAST_CUDA_EMULATION
#pragma unroll 1
#endif
  for (int e = 0; e < at.count; ++e) f(e);
}

// values[e], without an address: values stay in registers.
template <typename C>
__device__ __forceinline__ C element_of(const C (&values)[8], int e) {
  C value = values[0];
#pragma unroll
  for (int k = 1; k < 8; ++k) value = k == e ? values[k] : value;
  return value;
}

template <typename C>
__device__ __forceinline__ void set_element(C value, int e, C (&values)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = k == e ? value : values[k];
}

template <typename C>
__device__ __forceinline__ C load_scalar(const void* base, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<C>(static_cast<const float*>(base)[offset]);
    case DType::kBFloat16:
      return static_cast<C>(to_float(static_cast<const BFloat16*>(base)[offset]));
    case DType::kFloat16:
      return static_cast<C>(to_float(static_cast<const Float16*>(base)[offset]));
    case DType::kFloat64:
      return static_cast<C>(static_cast<const double*>(base)[offset]);
  }
  return C{0};
}

template <typename C>
__device__ __forceinline__ void store_scalar(C value, void* base, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(base)[offset] = static_cast<float>(value);
      return;
    case DType::kBFloat16:
      return from_float(static_cast<float>(value), static_cast<BFloat16*>(base) + offset);
    case DType::kFloat16:
      return from_float(static_cast<float>(value), static_cast<Float16*>(base) + offset);
    case DType::kFloat64:
      static_cast<double*>(base)[offset] = static_cast<double>(value);
      return;
  }
}

// Eight or sixteen bytes as they are in memory.
template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t w[kBytes / 4];
};

// One access. In assembly: of an address that comes from a table compilers do not know that it is
// in global memory, and split the access into words. Volatile, so that they stay in order.
template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_words(const void* from) {
  static_assert(kBytes == 8 || kBytes == 16, "no such access");
  Words<kBytes> x;
#ifdef PYFAST_CUDA_EMULATION
  cuda_emulation::copy_aligned(&x, from, from, kBytes);
#else
  const size_t address = __cvta_generic_to_global(from);
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
                 : "l"(address));
  } else {
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(x.w[0]), "=r"(x.w[1]) : "l"(address));
  }
#endif
  return x;
}

template <int kBytes>
__device__ __forceinline__ void store_words(const Words<kBytes>& x, void* to) {
  static_assert(kBytes == 8 || kBytes == 16, "no such access");
#ifdef PYFAST_CUDA_EMULATION
  cuda_emulation::copy_aligned(to, &x, to, kBytes);
#else
  const size_t address = __cvta_generic_to_global(to);
  if constexpr (kBytes == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(x.w[0]),
                 "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
                 : "memory");
  } else {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(x.w[0]), "r"(x.w[1])
                 : "memory");
  }
#endif
}

template <typename T>
__device__ __forceinline__ Pack<T> load_global(const T* from) {
  const Words<16> words = load_words<16>(from);
  Pack<T> pack;
  memcpy(&pack, &words, 16);
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_global(const Pack<T>& pack, T* to) {
  Words<16> words;
  memcpy(&words, &pack, 16);
  store_words(words, to);
}

// False, with nothing done, where the elements do not follow each other.
template <typename T, typename C>
__device__ __forceinline__ bool load_vector(const void* base, const Place& at, C (&out)[8]) {
  const T* from = static_cast<const T*>(base);
  if (!is_vectorizable(from, at)) return false;
#pragma unroll
  for (int first = 0; first < 8; first += Pack<T>::kSize) {
    const Pack<T> pack = load_global(from + at.first + first);
#pragma unroll
    for (int e = 0; e < Pack<T>::kSize; ++e) out[first + e] = static_cast<C>(to_float(pack.v[e]));
  }
  return true;
}

template <typename T, typename C>
__device__ __forceinline__ bool store_vector(const C (&values)[8], const Place& at, void* base) {
  using Stored = typename ComputeType<T>::type;
  T* to = static_cast<T*>(base);
  if (!is_vectorizable(to, at)) return false;
#pragma unroll
  for (int first = 0; first < 8; first += Pack<T>::kSize) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < Pack<T>::kSize; ++e) {
      from_float(static_cast<Stored>(values[first + e]), &pack.v[e]);
    }
    store_global(pack, to + at.first + first);
  }
  return true;
}

template <typename C>
__device__ __forceinline__ void load_operand(const OptimizerTensor& t, int operand, const Place& at,
                                             C (&out)[8]) {
  const void* base = t.operands[operand];
  const DType dtype = t.dtypes[operand];
  bool done = false;
  if (dtype == DType::kFloat32) done = load_vector<float>(base, at, out);
  if (dtype == DType::kBFloat16) done = load_vector<BFloat16>(base, at, out);
  if (dtype == DType::kFloat16) done = load_vector<Float16>(base, at, out);
  if (sizeof(C) == 8 && dtype == DType::kFloat64) done = load_vector<double>(base, at, out);
  if (done) return;
#pragma unroll
  for (int e = 0; e < 8; ++e) out[e] = C{0};
  one_by_one(at, [&](int e) {
    set_element(load_scalar<C>(base, dtype, offset_of(at, operand, e)), e, out);
  });
}

template <typename C>
__device__ __forceinline__ void store_operand(const C (&values)[8], const OptimizerTensor& t,
                                              int operand, const Place& at) {
  void* base = t.operands[operand];
  const DType dtype = t.dtypes[operand];
  bool done = false;
  if (dtype == DType::kFloat32) done = store_vector<float>(values, at, base);
  if (dtype == DType::kBFloat16) done = store_vector<BFloat16>(values, at, base);
  if (dtype == DType::kFloat16) done = store_vector<Float16>(values, at, base);
  if (sizeof(C) == 8 && dtype == DType::kFloat64) done = store_vector<double>(values, at, base);
  if (done) return;
  one_by_one(at, [&](int e) {
    store_scalar(element_of(values, e), base, dtype, offset_of(at, operand, e));
  });
}

// The eight codes of a thread; those past the end are not touched.
__device__ __forceinline__ void load_codes(const uint8_t* from, int count, uint8_t (&codes)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) codes[e] = 0;
  if (count == 8 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
    const uint64_t word = *reinterpret_cast<const uint64_t*>(from);
#pragma unroll
    for (int e = 0; e < 8; ++e) codes[e] = static_cast<uint8_t>(word >> (8 * e));
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) codes[e] = from[e];
  }
}

__device__ __forceinline__ void store_codes(const uint8_t (&codes)[8], int count, uint8_t* to) {
  if (count == 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    uint64_t word = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) word |= static_cast<uint64_t>(codes[e]) << (8 * e);
    *reinterpret_cast<uint64_t*>(to) = word;
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) to[e] = codes[e];
  }
}

template <typename C>
__device__ __forceinline__ void load_state(const OptimizerTensor& t, int i, bool is_signed,
                                           const Place& at, C (&out)[8]) {
  if (t.operands[kState0 + i] == nullptr) return;
  if (!t.int8_states) return load_operand(t, kState0 + i, at, out);
  uint8_t codes[8];
  load_codes(static_cast<const uint8_t*>(t.operands[kState0 + i]) + at.first, at.count, codes);
  const float scale = at.count > 0 ? t.scales[i][at.first / kOptimizerBlock] : 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    out[e] =
        static_cast<C>((is_signed ? signed_value(codes[e]) : positive_value(codes[e])) * scale);
  }
}

// All threads of a warp store together: their elements share a scale.
template <typename C>
__device__ __forceinline__ void store_state(const C (&values)[8], const OptimizerTensor& t, int i,
                                            bool is_signed, uint32_t salt, const Place& at) {
  if (t.operands[kState0 + i] == nullptr) return;
  if (!t.int8_states) {
    if (at.count > 0) store_operand(values, t, kState0 + i, at);
    return;
  }
  uint32_t largest = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t bits = float_to_bits(static_cast<float>(values[e])) & 0x7FFFFFFFu;
    if (e < at.count && bits > largest) largest = bits;
  }
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, largest, step);
    largest = other > largest ? other : largest;
  }
  float inverse;
  const float scale = code_scale(largest, &inverse);
  if (at.count <= 0) return;
  uint8_t codes[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float x = static_cast<float>(values[e]) * inverse;
    const uint32_t dither = code_dither(static_cast<uint64_t>(at.first + e), salt);
    codes[e] = is_signed ? signed_code(x, dither) : positive_code(x, dither);
  }
  store_codes(codes, at.count, static_cast<uint8_t*>(t.operands[kState0 + i]) + at.first);
  if (threadIdx.x % 32 == 0) t.scales[i][at.first / kOptimizerBlock] = scale;
}

// The parameter as it is computed: with its master copy, unless it was changed from outside.
template <typename C>
__device__ __forceinline__ void load_parameter(const OptimizerTensor& t, const Place& at,
                                               C (&p)[8]) {
  if (t.operands[kParameter] == nullptr) return;
  load_operand(t, kParameter, at, p);
  if (t.operands[kMaster] == nullptr) return;
  if (t.master_is_remainder) {
    const auto* remainder = static_cast<const int16_t*>(t.operands[kMaster]);
    one_by_one(at, [&](int e) {
      const uint32_t bits = float_to_bits(static_cast<float>(element_of(p, e)));
      const BFloat16 upper = {static_cast<uint16_t>(bits >> 16)};
      const float master = join_master(upper, remainder[offset_of(at, kMaster, e)]);
      set_element(static_cast<C>(master), e, p);
    });
    return;
  }
  float master[8];
  load_operand(t, kMaster, at, master);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    Float16 half;
    from_float(master[e], &half);
    if (to_float(half) == static_cast<float>(p[e])) p[e] = static_cast<C>(master[e]);
  }
}

// Stores the parameter; p becomes what is averaged: the master copy or the stored value.
template <typename C>
__device__ __forceinline__ void store_parameter(C (&p)[8], const OptimizerTensor& t, uint64_t key,
                                                const Place& at) {
  if (t.operands[kMaster] != nullptr && t.master_is_remainder) {
    auto* const upper = static_cast<BFloat16*>(t.operands[kParameter]);
    auto* const lower = static_cast<int16_t*>(t.operands[kMaster]);
    one_by_one(at, [&](int e) {
      int16_t remainder;
      const float master = static_cast<float>(element_of(p, e));
      upper[offset_of(at, kParameter, e)] = split_master(master, &remainder);
      lower[offset_of(at, kMaster, e)] = remainder;
    });
    return;
  }
  if (t.operands[kMaster] != nullptr) {
    store_operand(p, t, kMaster, at);
  } else if (t.flags & kStochasticRounding && t.dtypes[kParameter] == DType::kBFloat16) {
    const uint64_t group = static_cast<uint64_t>(at.first) / 8;
    const PhiloxWords words =
        philox(key, static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0,
               kStochasticRoundingStream);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t bits = (words.w[e / 2] >> (16 * (e % 2))) & 0xFFFFu;
      p[e] = static_cast<C>(to_float(stochastic_bfloat16(static_cast<float>(p[e]), bits)));
    }
  }
  store_operand(p, t, kParameter, at);
  if (t.operands[kEma] != nullptr && t.operands[kMaster] == nullptr) {
    load_operand(t, kParameter, at, p);
  }
}

}  // namespace pyfast::PYFAST_ISA
