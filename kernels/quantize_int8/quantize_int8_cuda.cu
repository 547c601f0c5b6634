// A thread holds eight values a pass in registers. Short quantization blocks belong to a few lanes
// of a warp, those of up to 16384 elements to a thread block. Longer ones are cut into chunks, so
// that one block alone uses the whole GPU: largest values of every chunk, of the block, then the
// values, from a second read. Bound by bytes.
#include "../common/launch.cuh"
#include "../common/quantize.cuh"
#include "quantize_int8.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kShortThreads = 128;
constexpr int kMaxWarps = 16;
constexpr int kMaxPasses = 4;
constexpr int64_t kShortSize = 32 * 8 * 4;  // what a warp holds
constexpr int64_t kChunkSize = 8192;
constexpr int kChunkThreads = 256;

// How a row is cut; aligned: eight elements lie in one block and at multiples of their size.
struct Layout {
  int64_t blocks_per_row;
  int64_t num_blocks;
  bool aligned;
};

// A quantization block, or a chunk of one.
struct Span {
  int64_t index;   // of the block
  int64_t column;  // in the row, of the first element
  int64_t offset;  // of the first element
  int64_t size;
};

__device__ __forceinline__ Span block_span(const QuantizeInt8Params& p, const Layout& layout,
                                           int64_t index) {
  const int64_t row = layout.blocks_per_row == 1 ? index : index / layout.blocks_per_row;
  const int64_t column = (index - row * layout.blocks_per_row) * p.block_size;
  const int64_t rest = p.row_size - column;
  return {index, column, row * p.row_size + column, rest < p.block_size ? rest : p.block_size};
}

// The largest positive and negative value as bits: as integers, signed and unsigned, they have the
// order of the floats, with Inf and NaN at the end. No order of the values changes them.
struct Extremes {
  int32_t high = 0;
  uint32_t low = 0;

  __device__ __forceinline__ void include(const Extremes& other) {
    high = other.high > high ? other.high : high;
    low = other.low > low ? other.low : low;
  }
};

__device__ __forceinline__ void include8(const float (&value)[8], Extremes& extremes) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const uint32_t bits = float_to_bits(value[e]);
    Extremes one;
    one.high = static_cast<int32_t>(bits);
    one.low = bits;
    extremes.include(one);
  }
}

// Over groups of `lanes` neighbours, a power of two. Every lane of the warp calls it.
__device__ __forceinline__ Extremes warp_extremes(Extremes extremes, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    Extremes other;
    other.high = __shfl_xor_sync(kAllLanes, extremes.high, static_cast<unsigned>(offset));
    other.low = __shfl_xor_sync(kAllLanes, extremes.low, static_cast<unsigned>(offset));
    extremes.include(other);
  }
  return extremes;
}

// Over a thread block, in every thread.
__device__ __forceinline__ Extremes block_extremes(Extremes extremes) {
  __shared__ int32_t high[kMaxWarps];
  __shared__ uint32_t low[kMaxWarps];
  extremes = warp_extremes(extremes, 32);
  __syncthreads();  // those of a call before have been read
  if (threadIdx.x % 32 == 0) {
    high[threadIdx.x / 32] = extremes.high;
    low[threadIdx.x / 32] = extremes.low;
  }
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x / 32);
  for (int warp = 0; warp < warps; ++warp) {
    Extremes other;
    other.high = high[warp];
    other.low = low[warp];
    extremes.include(other);
  }
  return extremes;
}

__device__ __forceinline__ Step make_step(const QuantizeInt8Params& p, int64_t index,
                                          const Extremes& extremes) {
  const uint32_t high = static_cast<uint32_t>(extremes.high);
  const uint32_t low = extremes.low >> 31 != 0 ? extremes.low & 0x7FFFFFFFu : 0;
  if (high >= kInfinity || low >= kInfinity) return with_inverse(bits_to_float(kNaN), 0.0f);
  float scale;
  if (p.scale_in != nullptr) {
    scale = p.scale_in[p.has_one_scale_in ? 0 : index];
  } else if (p.zero_point == nullptr) {
    scale = bits_to_float(high > low ? high : low) / 127.0f;
  } else {
    scale = (bits_to_float(high) * 0.5f + bits_to_float(low) * 0.5f) / 127.5f;
  }
  if (scale == 0.0f) scale = 1.0f;
  float zero = 0.0f;
  if (p.zero_point != nullptr && scale == scale) {
    zero = clamp(-128.0f - rintf(-bits_to_float(low) / scale), -128.0f, 127.0f);
  }
  return with_inverse(scale, zero);
}

__device__ __forceinline__ void store_step(const QuantizeInt8Params& p, int64_t index,
                                           const Step& step) {
  p.scale[index] = step.scale;
  if (p.zero_point != nullptr) p.zero_point[index] = static_cast<int32_t>(step.zero);
}

__device__ __forceinline__ void store_values8(const QuantizeInt8Params& p, const Step& step,
                                              float (&value)[8], int64_t offset, int count,
                                              bool aligned) {
  if (p.zero_point == nullptr) {
    store_int8(step, value, p.values + offset, -127.0f, count, aligned);
  } else {
    store_int8(step, value, p.values + offset, -128.0f, count, aligned);
  }
}

template <typename T>
__device__ __forceinline__ void load_values8(const QuantizeInt8Params& p, const Span& span,
                                             int64_t first, int count, bool aligned,
                                             float (&value)[8]) {
  load8(static_cast<const T*>(p.x) + span.offset + first, count, aligned, value);
  if (p.smooth != nullptr) {
    float smooth[8];
    load8(p.smooth + span.column + first, count, aligned, smooth);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = value[e] * smooth[e];
  }
}

// `lanes` threads, the calling one at place `lane` of them, hold a block.
template <typename T, int kPasses, typename Reduce>
__device__ __forceinline__ void quantize_held(const QuantizeInt8Params& p, const Span& span,
                                              bool aligned, int lane, int lanes,
                                              const Reduce& reduce) {
  float value[kPasses][8];
  Extremes extremes;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t first = (static_cast<int64_t>(pass) * lanes + lane) * 8;
    if (first >= span.size) continue;
    load_values8<T>(p, span, first, count8(first, span.size), aligned, value[pass]);
    include8(value[pass], extremes);
  }
  const Step step = make_step(p, span.index, reduce(extremes));
  if (lane == 0 && span.size > 0) store_step(p, span.index, step);
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t first = (static_cast<int64_t>(pass) * lanes + lane) * 8;
    if (first >= span.size) continue;
    store_values8(p, step, value[pass], span.offset + first, count8(first, span.size), aligned);
  }
}

template <typename T, int kPasses>
__global__ void short_kernel(QuantizeInt8Params p, Layout layout, int lanes) {
  const int blocks = kShortThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blocks;
  int64_t first = static_cast<int64_t>(blockIdx.x) * blocks;
  for (; first < layout.num_blocks; first += step) {
    const int64_t index = first + static_cast<int>(threadIdx.x) / lanes;
    const bool exists = index < layout.num_blocks;
    Span span = block_span(p, layout, exists ? index : 0);
    if (!exists) span.size = 0;
    quantize_held<T, kPasses>(p, span, layout.aligned, lane, lanes, [&](const Extremes& extremes) {
      return warp_extremes(extremes, lanes);
    });
  }
}

template <typename T>
__global__ void block_kernel(QuantizeInt8Params p, Layout layout) {
  for (int64_t index = blockIdx.x; index < layout.num_blocks; index += gridDim.x) {
    quantize_held<T, kMaxPasses>(p, block_span(p, layout, index), layout.aligned,
                                 static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                                 [](const Extremes& extremes) { return block_extremes(extremes); });
  }
}

__device__ __forceinline__ Span chunk_span(const Span& block, int64_t chunk) {
  const int64_t first = chunk * kChunkSize;
  const int64_t rest = block.size - first;
  return {block.index, block.column + first, block.offset + first,
          rest < kChunkSize ? rest : kChunkSize};
}

// Calls f(block, chunk) for the chunks of this thread block. The last block of a row may have
// fewer.
template <typename F>
__device__ __forceinline__ void for_each_chunk(const QuantizeInt8Params& p, const Layout& layout,
                                               int64_t chunks_per_block, const F& f) {
  const int64_t num_chunks = layout.num_blocks * chunks_per_block;
  for (int64_t i = blockIdx.x; i < num_chunks; i += gridDim.x) {
    const int64_t index = i / chunks_per_block;
    const int64_t chunk = i - index * chunks_per_block;
    const Span block = block_span(p, layout, index);
    if (chunk * kChunkSize < block.size) f(block, chunk);
  }
}

// Where the extremes of a chunk wait: the first values of a block of more than one chunk come last.
__device__ __forceinline__ int8_t* extremes_place(const QuantizeInt8Params& p, const Span& block,
                                                  int64_t chunk) {
  return p.values + block.offset + chunk * static_cast<int64_t>(sizeof(Extremes));
}

template <typename T>
__global__ void chunk_extremes_kernel(QuantizeInt8Params p, Layout layout,
                                      int64_t chunks_per_block) {
  for_each_chunk(p, layout, chunks_per_block, [&](const Span& block, int64_t chunk) {
    const Span span = chunk_span(block, chunk);
    Extremes extremes;
    for (int64_t first = threadIdx.x * 8; first < span.size; first += kChunkThreads * 8) {
      float value[8];
      load_values8<T>(p, span, first, count8(first, span.size), layout.aligned, value);
      include8(value, extremes);
    }
    extremes = block_extremes(extremes);
    if (threadIdx.x != 0) return;
    if (block.size <= kChunkSize) {
      store_step(p, block.index, make_step(p, block.index, extremes));
    } else {
      memcpy(extremes_place(p, block, chunk), &extremes, sizeof(Extremes));
    }
  });
}

__global__ void scale_kernel(QuantizeInt8Params p, Layout layout) {
  for (int64_t index = blockIdx.x; index < layout.num_blocks; index += gridDim.x) {
    const Span block = block_span(p, layout, index);
    if (block.size <= kChunkSize) continue;
    const int64_t chunks = (block.size + kChunkSize - 1) / kChunkSize;
    Extremes extremes;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kChunkThreads) {
      Extremes other;
      memcpy(&other, extremes_place(p, block, chunk), sizeof(Extremes));
      extremes.include(other);
    }
    extremes = block_extremes(extremes);
    if (threadIdx.x == 0) store_step(p, index, make_step(p, index, extremes));
  }
}

template <typename T>
__global__ void chunk_values_kernel(QuantizeInt8Params p, Layout layout, int64_t chunks_per_block) {
  for_each_chunk(p, layout, chunks_per_block, [&](const Span& block, int64_t chunk) {
    const Span span = chunk_span(block, chunk);
    const float zero =
        p.zero_point != nullptr ? static_cast<float>(p.zero_point[span.index]) : 0.0f;
    const Step step = with_inverse(p.scale[span.index], zero);
    for (int64_t first = threadIdx.x * 8; first < span.size; first += kChunkThreads * 8) {
      const int count = count8(first, span.size);
      float value[8];
      load_values8<T>(p, span, first, count, layout.aligned, value);
      store_values8(p, step, value, span.offset + first, count, layout.aligned);
    }
  });
}

dim3 grid_of(int64_t num_blocks) {
  constexpr int64_t kMaxGrid = 0x7FFFFFFF;
  return dim3(static_cast<unsigned>(num_blocks < kMaxGrid ? num_blocks : kMaxGrid));
}

int power_of_two_from(int64_t size, int least) {
  int power = least;
  while (power < size) power *= 2;
  return power;
}

template <typename T>
const char* quantize(const T* /*type*/, const QuantizeInt8Params& p, void* stream) {
  if (p.num_rows == 0 || p.row_size == 0) return nullptr;
  const int64_t size = p.block_size < p.row_size ? p.block_size : p.row_size;
  const int64_t blocks_per_row = (p.row_size + p.block_size - 1) / p.block_size;
  const bool aligned = p.row_size % 8 == 0 && size % 8 == 0 && is_aligned16(p.x) &&
                       is_aligned16(p.smooth) && is_aligned16(p.values);
  const Layout layout{blocks_per_row, p.num_rows * blocks_per_row, aligned};
  if (size <= kShortSize) {
    const int64_t groups = (size + 7) / 8;
    const int lanes = power_of_two_from(groups < 32 ? groups : 32, 1);
    auto* kernel = groups <= lanes       ? short_kernel<T, 1>
                   : groups <= lanes * 2 ? short_kernel<T, 2>
                                         : short_kernel<T, 4>;
    const int blocks = kShortThreads / lanes;
    return launch(kernel, grid_of((layout.num_blocks + blocks - 1) / blocks), kShortThreads, stream,
                  p, layout, lanes);
  }
  constexpr int64_t kHeld = kMaxPasses * 8;  // by a thread
  if (size <= kMaxWarps * 32 * kHeld) {
    const int threads = power_of_two_from((size + kHeld - 1) / kHeld, 32);
    return launch(block_kernel<T>, grid_of(layout.num_blocks), threads, stream, p, layout);
  }
  const int64_t chunks_per_block = (size + kChunkSize - 1) / kChunkSize;
  const dim3 grid = grid_of(layout.num_blocks * chunks_per_block);
  const char* error =
      launch(chunk_extremes_kernel<T>, grid, kChunkThreads, stream, p, layout, chunks_per_block);
  if (error != nullptr) return error;
  error = launch(scale_kernel, grid_of(layout.num_blocks), kChunkThreads, stream, p, layout);
  if (error != nullptr) return error;
  return launch(chunk_values_kernel<T>, grid, kChunkThreads, stream, p, layout, chunks_per_block);
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA

namespace pyfast {

const char* quantize_int8_cuda(const QuantizeInt8Params& params, void* stream) {
  const char* error = nullptr;
  PYFAST_ISA::dispatch_dtype(
      params.dtype, [&](auto* type) { error = PYFAST_ISA::quantize(type, params, stream); });
  return error;
}

}  // namespace pyfast
