// The tensors of all groups in two launches: what is plain (optimizer_plain.cuh), a block for each
// item of the table, then all else, with few blocks that look for what is left: most often nothing.
// Of the latter a warp takes 256 elements at a time, a thread eight of them, which are 16 bytes of
// a half type, two accesses of 16 bytes in float32, one call of Philox, and with its warp one block
// of int8 states; types and layouts are looked up in the table, the same for a whole block. AdamW
// moves 28 bytes a parameter in float32, 14 in half types, where its 50 instructions count as well.
#include "../common/launch.cuh"
#include "optimizer_plain.cuh"

#ifdef PYFAST_CUDA_EMULATION
#define __launch_bounds__(...)
#endif

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kWarpElements = 256;
constexpr int kPlainThreads = 128;
constexpr int kPlainBlocks = 7;  // on a multiprocessor at once
constexpr int kFewBlocks = 512;  // enough for all multiprocessors

__device__ __forceinline__ double number_at(const void* pointer, DType type) {
  return type == DType::kFloat64 ? *static_cast<const double*>(pointer)
                                 : static_cast<double>(*static_cast<const float*>(pointer));
}

// Counts the steps that are counted on the device, and computes the numbers of each source.
__global__ void prepare_kernel(OptimizerCudaParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= p.num_sources) return;
  const bool is_skipped = p.found_inf != nullptr && *p.found_inf != 0.0f;
  OptimizerSource source = p.sources[i];
  if (source.step_pointer != nullptr) {
    const double step = number_at(source.step_pointer, source.step_type) + (is_skipped ? 0 : 1);
    source.step = static_cast<int64_t>(step);
    if (source.step_type == DType::kFloat64) {
      *static_cast<double*>(source.step_pointer) = step;
    } else {
      *static_cast<float*>(source.step_pointer) = static_cast<float>(step);
    }
  }
  if (source.lr_pointer != nullptr) {
    source.hyper.lr = number_at(source.lr_pointer, source.lr_type);
  }
  if (source.beta1_pointer != nullptr) {
    source.hyper.beta1 = number_at(source.beta1_pointer, source.beta1_type);
  }
  if (source.beta2_pointer != nullptr) {
    source.hyper.beta2 = number_at(source.beta2_pointer, source.beta2_type);
  }
  double scale = p.gradient_scale;
  if (p.gradient_unscale != nullptr) scale /= static_cast<double>(*p.gradient_unscale);
  const double clip = p.clip_scale != nullptr ? *p.clip_scale : 1.0;
  p.numbers[i] = optimizer_numbers(p.rule, source, scale, clip);
}

template <OptimizerRule kRule, typename C>
__device__ __forceinline__ void update8(C (&p)[8], C (&g)[8], C (&s0)[8], C (&s1)[8], C (&s2)[8],
                                        const OptimizerNumbers<C>& n) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    OptimizerValues<C> x = {p[e], g[e], s0[e], s1[e], s2[e]};
    optimizer_update<kRule>(x, n);
    p[e] = x.p, s0[e] = x.s0, s1[e] = x.s1, s2[e] = x.s2;
  }
}

// The rule is looked up too: what surrounds it is most of the code, and the same for all.
template <typename C>
__device__ __forceinline__ void step_elements(OptimizerRule rule, const OptimizerTensor& t,
                                              const Place& at, const OptimizerNumbers<C>& n,
                                              const OptimizerRandom& random, bool write_gradient) {
  C p[8] = {}, g[8], s0[8] = {}, s1[8] = {}, s2[8] = {};
  load_operand(t, kGradient, at, g);
  load_parameter(t, at, p);
  load_state(t, 0, is_signed_state(rule, 0), at, s0);
  load_state(t, 1, is_signed_state(rule, 1), at, s1);
  load_state(t, 2, is_signed_state(rule, 2), at, s2);
  if (rule == OptimizerRule::kAdam) update8<OptimizerRule::kAdam>(p, g, s0, s1, s2, n);
  if (rule == OptimizerRule::kSgd) update8<OptimizerRule::kSgd>(p, g, s0, s1, s2, n);
  if (rule == OptimizerRule::kRmsprop) update8<OptimizerRule::kRmsprop>(p, g, s0, s1, s2, n);
  if (rule == OptimizerRule::kAdamax) update8<OptimizerRule::kAdamax>(p, g, s0, s1, s2, n);
  store_state(s0, t, 0, is_signed_state(rule, 0), random.salt, at);
  store_state(s1, t, 1, is_signed_state(rule, 1), random.salt, at);
  store_state(s2, t, 2, is_signed_state(rule, 2), random.salt, at);
  if (at.count <= 0) return;
  if (rule != OptimizerRule::kNone) store_parameter(p, t, random.key, at);
  if (t.operands[kEma] != nullptr) {
    load_operand(t, kEma, at, s0);
#pragma unroll
    for (int e = 0; e < 8; ++e) s0[e] = blend(s0[e], p[e], n.ema_weight, n.ema_from_end);
    store_operand(s0, t, kEma, at);
  }
  if (t.flags & kZeroGradient || write_gradient) {
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] = t.flags & kZeroGradient ? C{0} : g[e] * n.gradient_scale;
    store_operand(g, t, kGradient, at);
  }
}

// The items that are plain, a block for each.
template <OptimizerRule kRule>
__global__ void __launch_bounds__(kPlainThreads, kPlainBlocks)
    plain_kernel(OptimizerCudaParams params) {
  __shared__ OptimizerNumbers<float> numbers;
  const bool is_skipped = params.found_inf != nullptr && *params.found_inf != 0.0f;
  const OptimizerItem item = params.items[blockIdx.x];
  const OptimizerTensor& t = params.tensors[item.tensor];
  const OptimizerNumbers<double>& exact = params.numbers[t.numbers];
  if (is_skipped) return;
  dispatch_plain(kRule, t, exact, [&](auto rule, auto types) {
    if constexpr (decltype(rule)::kRule == kRule) {
      step_plain<decltype(rule), decltype(types), kPlainThreads>(t, item, exact, &numbers,
                                                                 params.write_gradient);
    }
  });
}

template <typename C>
__device__ __forceinline__ void step_item(const OptimizerCudaParams& params, int64_t index,
                                          bool is_skipped, OptimizerNumbers<C>* numbers) {
  const OptimizerItem item = params.items[index];
  const OptimizerTensor& t = params.tensors[item.tensor];
  const OptimizerNumbers<double>& exact = params.numbers[t.numbers];
  if (threadIdx.x == 0) *numbers = rounded_numbers<C>(exact);
  __syncthreads();
  const OptimizerLayout* layout = t.layout < 0 ? nullptr : &params.layouts[t.layout];
  OptimizerRandom random = {};
  if (t.int8_states || t.flags & kStochasticRounding) {
    random = optimizer_random(t.seed, static_cast<uint64_t>(exact.step), t.index);
  }
  const int64_t lane_first = static_cast<int64_t>(threadIdx.x % 32) * 8;
  for (int64_t begin = static_cast<int64_t>(threadIdx.x / 32) * kWarpElements; begin < item.count;
       begin += kBlockThreads / 32 * kWarpElements) {
    const int64_t left = item.count - begin - lane_first;
    const Place at = {layout, item.begin + begin + lane_first,
                      left < 0   ? 0
                      : left < 8 ? static_cast<int>(left)
                                 : 8};
    if (!is_skipped) {
      step_elements<C>(params.rule, t, at, *numbers, random, params.write_gradient);
    } else if (t.flags & kZeroGradient && at.count > 0) {
      const C zeros[8] = {};
      store_operand(zeros, t, kGradient, at);
    }
  }
  __syncthreads();  // the numbers are another item's now
}

// Whether an item is left to step_kernel<C>.
template <typename C>
__device__ __forceinline__ bool is_left(const OptimizerCudaParams& params, int64_t index,
                                        bool is_skipped) {
  const OptimizerTensor& t = params.tensors[params.items[index].tensor];
  if ((t.dtypes[kParameter] == DType::kFloat64) != (sizeof(C) == 8)) return false;
  const OptimizerNumbers<double>& exact = params.numbers[t.numbers];
  return is_skipped || !dispatch_plain(params.rule, t, exact, [](auto, auto) {});
}

// The items that are left. A block looks at as many as it has threads at once: there may be none.
template <typename C>
__global__ void step_kernel(OptimizerCudaParams params) {
  __shared__ OptimizerNumbers<C> numbers;
  __shared__ bool left[kBlockThreads];
  const bool is_skipped = params.found_inf != nullptr && *params.found_inf != 0.0f;
  const int64_t stride = gridDim.x;
  for (int64_t first = blockIdx.x; first < params.num_items; first += kBlockThreads * stride) {
    const int64_t own = first + threadIdx.x * stride;
    left[threadIdx.x] = own < params.num_items && is_left<C>(params, own, is_skipped);
    __syncthreads();
    for (int i = 0; i < kBlockThreads && first + i * stride < params.num_items; ++i) {
      if (left[i]) step_item<C>(params, first + i * stride, is_skipped, &numbers);
    }
    __syncthreads();
  }
}

// The sum over a block, on its first thread; `shared` has a place for each warp.
__device__ __forceinline__ double block_sum(double value, double* shared) {
#pragma unroll
  for (unsigned step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kBlockThreads / 32; ++warp) total += shared[warp];
  return total;
}

__global__ void square_sum_kernel(OptimizerCudaParams params) {
  __shared__ double shared[kBlockThreads / 32];
  const OptimizerItem item = params.items[blockIdx.x];
  const OptimizerTensor& t = params.tensors[item.tensor];
  const OptimizerLayout* layout = t.layout < 0 ? nullptr : &params.layouts[t.layout];
  double sum = 0;
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * 8; first < item.count;
       first += kBlockThreads * 8) {
    double g[8];
    load_operand(t, kGradient, {layout, item.begin + first, count8(first, item.count)}, g);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += g[e] * g[e];
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) params.sums[blockIdx.x] = sum;
}

// The sum of all items goes behind them.
__global__ void total_kernel(double* sums, int64_t num_items) {
  __shared__ double shared[kBlockThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < num_items; i += kBlockThreads) sum += sums[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) sums[num_items] = sum;
}

struct UploadChunk {
  static constexpr int kSize = 3968;  // the arguments of a launch are 4 KB at most
  char bytes[kSize];
};

__global__ void upload_kernel(UploadChunk chunk, char* to, int size) {
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kBlockThreads) to[i] = chunk.bytes[i];
}

}  // namespace
}  // namespace pyfast::PYFAST_ISA

namespace pyfast {

const char* optimizer_step_cuda(const OptimizerCudaParams& params, void* stream) {
  using namespace PYFAST_ISA;
  const int64_t prepare_blocks = (params.num_sources + kBlockThreads - 1) / kBlockThreads;
  const char* error = launch(prepare_kernel, dim3(static_cast<unsigned>(prepare_blocks)),
                             kBlockThreads, stream, params);
  if (error != nullptr || params.num_items == 0) return error;
  const dim3 grid(static_cast<unsigned>(params.num_items));
  if (params.rule == OptimizerRule::kAdam) {
    error = launch(plain_kernel<OptimizerRule::kAdam>, grid, kPlainThreads, stream, params);
  } else if (params.rule == OptimizerRule::kSgd) {
    error = launch(plain_kernel<OptimizerRule::kSgd>, grid, kPlainThreads, stream, params);
  } else if (params.rule == OptimizerRule::kRmsprop) {
    error = launch(plain_kernel<OptimizerRule::kRmsprop>, grid, kPlainThreads, stream, params);
  } else if (params.rule == OptimizerRule::kAdamax) {
    error = launch(plain_kernel<OptimizerRule::kAdamax>, grid, kPlainThreads, stream, params);
  }
  if (error != nullptr) return error;
  const dim3 few(
      static_cast<unsigned>(params.num_items < kFewBlocks ? params.num_items : kFewBlocks));
  error = launch(step_kernel<float>, few, kBlockThreads, stream, params);
  if (error != nullptr || !params.is_double) return error;
  return launch(step_kernel<double>, few, kBlockThreads, stream, params);
}

const char* square_sum_cuda(const OptimizerCudaParams& params, void* stream) {
  using namespace PYFAST_ISA;
  const dim3 grid(static_cast<unsigned>(params.num_items));
  const char* error = launch(square_sum_kernel, grid, kBlockThreads, stream, params);
  if (error != nullptr) return error;
  return launch(total_kernel, dim3(1), kBlockThreads, stream, params.sums, params.num_items);
}

const char* optimizer_upload_cuda(const OptimizerUploadParams& params, void* stream) {
  using namespace PYFAST_ISA;
  for (int64_t begin = 0; begin < params.size; begin += UploadChunk::kSize) {
    const int64_t left = params.size - begin;
    const int size = static_cast<int>(left < UploadChunk::kSize ? left : UploadChunk::kSize);
    const char* before = params.before == nullptr ? nullptr : params.before + begin;
    const auto bytes = static_cast<size_t>(size);
    if (before != nullptr && memcmp(before, params.from + begin, bytes) == 0) continue;
    UploadChunk chunk;
    memcpy(chunk.bytes, params.from + begin, bytes);
    const char* error =
        launch(upload_kernel, dim3(1), kBlockThreads, stream, chunk, params.to + begin, size);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace pyfast
