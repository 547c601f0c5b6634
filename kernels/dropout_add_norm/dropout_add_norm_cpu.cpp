// A thread takes chunks of 32 rows and passes twice over each row, which stays in L1 in between:
// forward as floats, backward as it is. The second pass of a row and the first of the next are one
// loop, in the order of the addresses: memory is then busy all the time, and the processor's own
// prefetching keeps up. Apart, or with the sums of a row taken from memory (whose order jumps by
// 256 elements), the passes took twice as long; prefetch instructions did not help. Bound by bytes:
// x, residual, z and y forward, grad_y, z, grad_x and grad_residual backward. A row of y that is
// quantized waits for its scale in L1.
#include "../common/column_sum.h"
#include "../common/parallel.h"
#include "../common/quantize_row.h"
#include "../common/row_blocks.h"
#include "dropout_add_norm.h"

namespace pyfast::PYFAST_ISA {
namespace {

// The sum of a row in the order of dropout_add_norm.h. There are as many slots as lanes of all
// virtual warps; those that no element falls into are zero.
template <typename V, typename C>
PYFAST_ALWAYS_INLINE void add_to_slot(const V& value, C* slots, int64_t num_slots, int64_t j,
                                      int lanes) {
  C* slot = slots + (j & (num_slots - 1));
  store_lanes(j < num_slots ? value : load_lanes<V>(slot, lanes) + value, slot, lanes, false);
}

template <int kWarps, typename V, typename C>
inline C sum_of_warps(const C* slots) {
  constexpr int kRegisters = 256 / V::kLanes;
  V sums[kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    V warps[kWarps];
    PYFAST_UNROLL
    for (int w = 0; w < kWarps; ++w) warps[w] = V::load(slots + 256 * w + r * V::kLanes);
    PYFAST_UNROLL
    for (int half = kWarps / 2; half > 0; half /= 2) {
      PYFAST_UNROLL
      for (int w = 0; w < half; ++w) warps[w] = warps[w] + warps[w + half];
    }
    sums[r] = warps[0];
  }
  PYFAST_UNROLL
  for (int half = kRegisters / 2; half > 0; half /= 2) {
    for (int r = 0; r < half; ++r) sums[r] = sums[r] + sums[r + half];
  }
  // The other backends start at +0: a sum of nothing but -0 is +0.
  return sums[0].sum() + C{0};
}

template <typename V, typename C>
inline C sum_of_slots(const C* slots, int64_t num_slots) {
  switch (num_slots / 256) {
    case 1:
      return sum_of_warps<1, V>(slots);
    case 2:
      return sum_of_warps<2, V>(slots);
    case 4:
      return sum_of_warps<4, V>(slots);
    default:
      return sum_of_warps<8, V>(slots);
  }
}

// The workspace of a thread, zeroed where a row does not fill its slots.
template <typename C>
inline C* workspace_of(void* all, int64_t thread, int64_t num_columns) {
  char* mine = static_cast<char*>(all) + thread * workspace_bytes(num_columns);
  if (num_columns < 256 * row_warps(num_columns)) {
    memset(mine, 0, static_cast<size_t>(sums_bytes(num_columns)));
  }
  return reinterpret_cast<C*>(mine);
}

template <bool kQuantizes, typename T>
void forward(const T* /*type*/, const DropoutAddNormParams& params, int num_threads) {
  const int64_t threads = useful_threads(params.num_rows * params.num_columns, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t thread) {
    using C = typename ComputeType<T>::type;
    using V = Vec<C>;
    const DropoutAddNormParams p = params;  // of its own: no store can change it
    const int64_t n = p.num_columns;
    const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
    const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
    const C* const weight = static_cast<const C*>(p.weight);
    const C* const bias = static_cast<const C*>(p.bias);
    const bool stream = streams(static_cast<T*>(p.y ? p.y : p.z), p.num_rows, n, 4);
    const int64_t num_slots = 256 * row_warps(n);
    C* const square_slots = workspace_of<C>(p.workspace, thread, n);
    C* const kept = square_slots + num_slots;
    T* const rounded = reinterpret_cast<T*>(reinterpret_cast<char*>(square_slots) + sums_bytes(n));
    C* const slots = n > num_slots ? kept + n : kept;
    const int64_t row_begin = begin * kChunkRows;
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    V center = zero, factor = zero;  // of the row before
    for (int64_t row = row_begin; row <= row_end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * n;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * n : nullptr;
      T* z = p.z ? static_cast<T*>(p.z) + row * n : nullptr;
      T* y = p.y ? static_cast<T*>(p.y) + (row - 1) * n : nullptr;
      auto second_pass = [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        V value = (load_lanes<V>(kept + j, lanes) - center) * factor;
        if (weight != nullptr) value = value * load_lanes<V>(weight + j, lanes);
        if (bias != nullptr) value = value + load_lanes<V>(bias + j, lanes);
        if constexpr (kQuantizes) {
          store_lanes(value, rounded + j, lanes, false);
          if (y == nullptr) return;
        }
        store_lanes(value, y + j, lanes, stream);
      };
      for_each_block(rule, p.seed.first + row * n, n,
                     [&](int64_t from, int64_t to, const uint64_t* bits) PYFAST_INLINE_LAMBDA {
                       if (row > row_begin) for_each_vec<V>(from, to, second_pass);
                       if (row == row_end) return;
                       for_each_vec<V>(from, to, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
                         V value = load_lanes<V>(x + j, lanes);
                         value = select(keep_lanes(bits, j), value * scale, zero);
                         if (residual != nullptr)
                           value = load_lanes<V>(residual + j, lanes) + value;
                         if (z != nullptr) store_lanes(value, z + j, lanes, stream);
                         value = value.rounded(x);
                         store_lanes(value, kept + j, lanes, false);
                         if (slots != kept) add_to_slot(value, slots, num_slots, j, lanes);
                       });
                     });
      if (kQuantizes && row > row_begin) {
        const float value_scale = scale_of<true>(value_range<true>(rounded, nullptr, n), 0.0f);
        p.value_scale[row - 1] = value_scale;
        quantize_values(rounded, nullptr, value_scale, false, kMaxInt8, 0, p.values + (row - 1) * n,
                        n);
      }
      if (row == row_end) break;
      C mean = 0;
      if (!p.rms) {
        mean = sum_of_slots<V>(slots, num_slots) / static_cast<C>(n);
        static_cast<C*>(p.mean)[row] = mean;
      }
      center = V::broadcast(mean);
      for_each_vec<V>(0, n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        const V d = load_lanes<V>(kept + j, lanes) - center;
        add_to_slot(d * d, square_slots, num_slots, j, lanes);
      });
      const C variance = sum_of_slots<V>(square_slots, num_slots) / static_cast<C>(n);
      const C rstd = C{1} / square_root(variance + static_cast<C>(p.eps));
      static_cast<C*>(p.rstd)[row] = rstd;
      factor = V::broadcast(rstd);
    }
    if (stream) stream_fence();
  };
  parallel_for(num_chunks(params.num_rows), threads, work);
}

template <typename T>
void backward(const T* /*type*/, const DropoutAddNormBackwardParams& params, int num_threads) {
  using C = typename ComputeType<T>::type;
  const int64_t threads = useful_threads(params.num_rows * params.num_columns, num_threads);
  const int64_t chunks = num_chunks(params.num_rows);
  C* const weight_partials = static_cast<C*>(params.partial);
  C* const bias_partials = weight_partials + chunks * params.num_columns;
  auto work = [&](int64_t begin, int64_t end, int64_t thread) {
    using V = Vec<C>;
    const DropoutAddNormBackwardParams p = params;  // of its own: no store can change it
    const int64_t n = p.num_columns;
    const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
    const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
    const C* const weight = static_cast<const C*>(p.weight);
    const bool stream = streams(static_cast<T*>(p.grad_x), p.num_rows, n, 4);
    const bool rms = p.rms;
    const int64_t num_slots = 256 * row_warps(n);
    C* const product_slots = workspace_of<C>(p.workspace, thread, n);
    C* const grad_slots = product_slots + num_slots;
    const int64_t row_begin = begin * kChunkRows;
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    V mean = zero, rstd = zero, product_mean = zero, grad_mean = zero;  // of the row before
    for (int64_t row = row_begin; row <= row_end; ++row) {
      const int64_t before = (row - 1) * n;
      const T* grad_y = static_cast<const T*>(p.grad_y) + before;
      const T* z = static_cast<const T*>(p.z) + before;
      const T* grad_z = p.grad_z ? static_cast<const T*>(p.grad_z) + before : nullptr;
      T* grad_x = static_cast<T*>(p.grad_x) + before;
      T* grad_residual = p.grad_residual ? static_cast<T*>(p.grad_residual) + before : nullptr;
      C* const weight_sum = weight_partials + row / kChunkRows * n;
      C* const bias_sum = bias_partials + row / kChunkRows * n;
      const bool is_first = row % kChunkRows == 0;
      V next_mean = zero, next_rstd = zero;
      if (row < row_end) {
        if (!rms) next_mean = V::broadcast(static_cast<const C*>(p.mean)[row]);
        next_rstd = V::broadcast(static_cast<const C*>(p.rstd)[row]);
      }
      auto first_pass = [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        const V x_hat = (load_lanes<V>(z + n + j, lanes) - next_mean) * next_rstd;
        const V grad = load_lanes<V>(grad_y + n + j, lanes);
        V weight_total = zero, bias_total = zero;
        if (!is_first) {
          weight_total = load_lanes<V>(weight_sum + j, lanes);
          bias_total = load_lanes<V>(bias_sum + j, lanes);
        }
        store_lanes(weight_total + grad * x_hat, weight_sum + j, lanes, false);
        store_lanes(bias_total + grad, bias_sum + j, lanes, false);
        const V weighted = weight ? grad * load_lanes<V>(weight + j, lanes) : grad;
        add_to_slot(weighted * x_hat, product_slots, num_slots, j, lanes);
        if (!rms) add_to_slot(weighted, grad_slots, num_slots, j, lanes);
      };
      for_each_block(rule, p.seed.first + before, n,
                     [&](int64_t from, int64_t to, const uint64_t* bits) PYFAST_INLINE_LAMBDA {
                       if (row < row_end) for_each_vec<V>(from, to, first_pass);
                       if (row == row_begin) return;
                       for_each_vec<V>(from, to, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
                         const V x_hat = (load_lanes<V>(z + j, lanes) - mean) * rstd;
                         V grad = load_lanes<V>(grad_y + j, lanes);
                         if (weight != nullptr) grad = grad * load_lanes<V>(weight + j, lanes);
                         grad = (grad - x_hat * product_mean - grad_mean) * rstd;
                         if (grad_z != nullptr) grad = grad + load_lanes<V>(grad_z + j, lanes);
                         if (grad_residual != nullptr)
                           store_lanes(grad, grad_residual + j, lanes, stream);
                         grad = select(keep_lanes(bits, j), grad * scale, zero);
                         store_lanes(grad, grad_x + j, lanes, stream);
                       });
                     });
      if (row == row_end) break;
      mean = next_mean;
      rstd = next_rstd;
      product_mean = V::broadcast(sum_of_slots<V>(product_slots, num_slots) / static_cast<C>(n));
      if (!rms) {
        grad_mean = V::broadcast(sum_of_slots<V>(grad_slots, num_slots) / static_cast<C>(n));
      }
    }
    if (stream) stream_fence();
  };
  parallel_for(chunks, threads, work);
  const int64_t n = params.num_columns;
  parallel_for(n, threads, [&](int64_t begin, int64_t end, int64_t) {
    sum_chunks_of(weight_partials, static_cast<C*>(params.grad_weight), chunks, n, begin, end);
    sum_chunks_of(bias_partials, static_cast<C*>(params.grad_bias), chunks, n, begin, end);
  });
}

}  // namespace

void dropout_add_norm_cpu(const DropoutAddNormParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) {
    if (params.values == nullptr) {
      forward<false>(type, params, num_threads);
    } else {
      forward<true>(type, params, num_threads);
    }
  });
}

void dropout_add_norm_backward_cpu(const DropoutAddNormBackwardParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { backward(type, params, num_threads); });
}

}  // namespace pyfast::PYFAST_ISA
