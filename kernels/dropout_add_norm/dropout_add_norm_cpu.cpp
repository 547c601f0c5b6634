// A thread takes chunks of 32 rows. A row stays in L1 as floats between its passes: z, then mean,
// variance and y; backward: the two sums of a row and the column sums, then the gradients. The last
// pass prefetches the next row, which is read only after much arithmetic.
// Bound by bytes: x, residual, z and y forward, grad_y, z, grad_x and grad_residual backward.
#include "../common/column_sum.h"
#include "../common/keep_bits.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "dropout_add_norm.h"

namespace pyfast::PYFAST_ISA {
namespace {

template <typename C, int kSums>
struct RowSums {
  C v[kSums];
};

// Sums over a row in the order of dropout_add_norm.h. value(j, lanes, out) puts what belongs to the
// elements j, j + 1, ... of each sum into `out`, zeros after the first `lanes`; every element of
// the row is asked for once.
template <int kSums, int kWarps, typename V, typename C, typename F>
PYFAST_ALWAYS_INLINE RowSums<C, kSums> row_sums_of(int64_t n, const F& value) {
  constexpr int kRegisters = 256 / V::kLanes;
  const int64_t num_full = n / 256, tail = n % 256;
  V sums[kSums][kRegisters];
  V out[kSums];
  for (int r = 0; r < kRegisters; ++r) {
    const int64_t first = r * V::kLanes;
    V warp[kSums][kWarps];
    PYFAST_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      PYFAST_UNROLL
      for (int s = 0; s < kSums; ++s) out[s] = V::broadcast(0);
      if (w < num_full) value(256 * w + first, V::kLanes, out);
      PYFAST_UNROLL
      for (int s = 0; s < kSums; ++s) warp[s][w] = out[s];
    }
    for (int64_t chunk = kWarps; chunk < num_full; chunk += kWarps) {
      PYFAST_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        if (chunk + w >= num_full) break;
        value(256 * (chunk + w) + first, V::kLanes, out);
        PYFAST_UNROLL
        for (int s = 0; s < kSums; ++s) warp[s][w] = warp[s][w] + out[s];
      }
    }
    if (first < tail) {
      const int lanes = tail - first < V::kLanes ? static_cast<int>(tail - first) : V::kLanes;
      value(256 * num_full + first, lanes, out);
      PYFAST_UNROLL
      for (int w = 0; w < kWarps; ++w) {
        if (w != num_full % kWarps) continue;
        PYFAST_UNROLL
        for (int s = 0; s < kSums; ++s) warp[s][w] = warp[s][w] + out[s];
      }
    }
    PYFAST_UNROLL
    for (int s = 0; s < kSums; ++s) {
      PYFAST_UNROLL
      for (int half = kWarps / 2; half > 0; half /= 2) {
        PYFAST_UNROLL
        for (int w = 0; w < half; ++w) warp[s][w] = warp[s][w] + warp[s][w + half];
      }
      sums[s][r] = warp[s][0];
    }
  }
  RowSums<C, kSums> total;
  PYFAST_UNROLL
  for (int s = 0; s < kSums; ++s) {
    PYFAST_UNROLL
    for (int half = kRegisters / 2; half > 0; half /= 2) {
      for (int r = 0; r < half; ++r) sums[s][r] = sums[s][r] + sums[s][r + half];
    }
    // The other backends start at +0: a sum of nothing but -0 is +0.
    total.v[s] = sums[s][0].sum() + C{0};
  }
  return total;
}

template <int kSums, typename V, typename C, typename F>
PYFAST_ALWAYS_INLINE RowSums<C, kSums> row_sums(int64_t n, const F& value) {
  switch (row_warps(n)) {
    case 1:
      return row_sums_of<kSums, 1, V, C>(n, value);
    case 2:
      return row_sums_of<kSums, 2, V, C>(n, value);
    case 4:
      return row_sums_of<kSums, 4, V, C>(n, value);
    default:
      return row_sums_of<kSums, 8, V, C>(n, value);
  }
}

template <typename V>
PYFAST_ALWAYS_INLINE V first_lanes(const V& value, int lanes) {
  if (lanes == V::kLanes) return value;
  return select((uint64_t{1} << lanes) - 1, value, V::broadcast(0));
}

template <typename C>
struct Workspace {
  C* row;
  uint64_t* bits;
};

template <typename C>
inline Workspace<C> workspace_of(void* all, int64_t thread, int64_t num_columns) {
  char* mine = static_cast<char*>(all) + thread * workspace_bytes(num_columns);
  const int64_t row_bytes = num_columns * static_cast<int64_t>(sizeof(double));
  return {reinterpret_cast<C*>(mine), reinterpret_cast<uint64_t*>(mine + row_bytes)};
}

template <typename T>
void forward(const T* /*type*/, const DropoutAddNormParams& p, int num_threads) {
  using C = typename ComputeType<T>::type;
  using V = Vec<C>;
  const int64_t n = p.num_columns;
  const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
  const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
  const C* weight = static_cast<const C*>(p.weight);
  const C* bias = static_cast<const C*>(p.bias);
  const C count = static_cast<C>(n);
  const bool stream = streams(static_cast<T*>(p.y), p.num_rows, n, 4);
  const int64_t threads = useful_threads(p.num_rows * n, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t thread) {
    const Workspace<C> space = workspace_of<C>(p.workspace, thread, n);
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    for (int64_t row = begin * kChunkRows; row < row_end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * n;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * n : nullptr;
      T* z = p.z ? static_cast<T*>(p.z) + row * n : nullptr;
      T* y = static_cast<T*>(p.y) + row * n;
      if (rule.threshold != 0) {
        fill_keep_bits(rule, static_cast<uint64_t>(row * n), n, space.bits);
      }
      for_each_vec<V>(n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        V value = load_lanes<V>(x + j, lanes);
        if (rule.threshold != 0) {
          value = select(space.bits[j / 64] >> (j % 64), value * scale, zero);
        }
        if (residual != nullptr) value = load_lanes<V>(residual + j, lanes) + value;
        value = rounded_to<T>(value);
        if (z != nullptr) store_lanes(value, z + j, lanes, stream);
        store_lanes(value, space.row + j, lanes, false);
      });
      C mean = 0;
      if (!p.rms) {
        const auto sum =
            row_sums<1, V, C>(n, [&](int64_t j, int lanes, V(&out)[1]) PYFAST_INLINE_LAMBDA {
              out[0] = load_lanes<V>(space.row + j, lanes);
            });
        mean = sum.v[0] / count;
        static_cast<C*>(p.mean)[row] = mean;
      }
      const V center = V::broadcast(mean);
      const auto squares =
          row_sums<1, V, C>(n, [&](int64_t j, int lanes, V(&out)[1]) PYFAST_INLINE_LAMBDA {
            const V d = load_lanes<V>(space.row + j, lanes) - center;
            out[0] = first_lanes(d * d, lanes);
          });
      const C rstd = C{1} / square_root(squares.v[0] / count + static_cast<C>(p.eps));
      static_cast<C*>(p.rstd)[row] = rstd;
      const V factor = V::broadcast(rstd);
      for_each_vec<V>(n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        prefetch(x + n + j);
        if (residual != nullptr) prefetch(residual + n + j);
        V value = (load_lanes<V>(space.row + j, lanes) - center) * factor;
        if (weight != nullptr) value = value * load_lanes<V>(weight + j, lanes);
        if (bias != nullptr) value = value + load_lanes<V>(bias + j, lanes);
        store_lanes(value, y + j, lanes, stream);
      });
    }
    if (stream) stream_fence();
  };
  parallel_for(num_chunks(p.num_rows), threads, work);
}

template <typename T>
void backward(const T* /*type*/, const DropoutAddNormBackwardParams& p, int num_threads) {
  using C = typename ComputeType<T>::type;
  using V = Vec<C>;
  const int64_t n = p.num_columns;
  const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
  const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
  const C* weight = static_cast<const C*>(p.weight);
  const C count = static_cast<C>(n);
  const int64_t chunks = num_chunks(p.num_rows);
  C* const weight_partials = static_cast<C*>(p.partial);
  C* const bias_partials = weight_partials + chunks * n;
  const bool stream = streams(static_cast<T*>(p.grad_x), p.num_rows, n, 4);
  const int64_t threads = useful_threads(p.num_rows * n, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t thread) {
    const Workspace<C> space = workspace_of<C>(p.workspace, thread, n);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      C* const weight_sum = weight_partials + chunk * n;
      C* const bias_sum = bias_partials + chunk * n;
      for_each_vec<V>(n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        store_lanes(zero, weight_sum + j, lanes, false);
        store_lanes(zero, bias_sum + j, lanes, false);
      });
      const int64_t first = chunk * kChunkRows;
      const int64_t row_end = first + kChunkRows < p.num_rows ? first + kChunkRows : p.num_rows;
      for (int64_t row = first; row < row_end; ++row) {
        const T* grad_y = static_cast<const T*>(p.grad_y) + row * n;
        const T* grad_z = p.grad_z ? static_cast<const T*>(p.grad_z) + row * n : nullptr;
        const T* z = static_cast<const T*>(p.z) + row * n;
        T* grad_x = static_cast<T*>(p.grad_x) + row * n;
        T* grad_residual = p.grad_residual ? static_cast<T*>(p.grad_residual) + row * n : nullptr;
        const V mean = V::broadcast(p.rms ? C{0} : static_cast<const C*>(p.mean)[row]);
        const V rstd = V::broadcast(static_cast<const C*>(p.rstd)[row]);
        const auto sums =
            row_sums<2, V, C>(n, [&](int64_t j, int lanes, V(&out)[2]) PYFAST_INLINE_LAMBDA {
              const V x_hat = (load_lanes<V>(z + j, lanes) - mean) * rstd;
              const V grad = load_lanes<V>(grad_y + j, lanes);
              out[1] = weight ? grad * load_lanes<V>(weight + j, lanes) : grad;
              out[0] = out[1] * x_hat;
              const V product = load_lanes<V>(weight_sum + j, lanes) + grad * x_hat;
              store_lanes(product, weight_sum + j, lanes, false);
              store_lanes(load_lanes<V>(bias_sum + j, lanes) + grad, bias_sum + j, lanes, false);
            });
        const V product_mean = V::broadcast(sums.v[0] / count);
        const V grad_mean = p.rms ? zero : V::broadcast(sums.v[1] / count);
        if (rule.threshold != 0) {
          fill_keep_bits(rule, static_cast<uint64_t>(row * n), n, space.bits);
        }
        for_each_vec<V>(n, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
          prefetch(grad_y + n + j);
          prefetch(z + n + j);
          const V x_hat = (load_lanes<V>(z + j, lanes) - mean) * rstd;
          V grad = load_lanes<V>(grad_y + j, lanes);
          if (weight != nullptr) grad = grad * load_lanes<V>(weight + j, lanes);
          grad = (grad - x_hat * product_mean - grad_mean) * rstd;
          if (grad_z != nullptr) grad = grad + load_lanes<V>(grad_z + j, lanes);
          if (grad_residual != nullptr) store_lanes(grad, grad_residual + j, lanes, stream);
          if (rule.threshold != 0) {
            grad = select(space.bits[j / 64] >> (j % 64), grad * scale, zero);
          }
          store_lanes(grad, grad_x + j, lanes, stream);
        });
      }
    }
    if (stream) stream_fence();
  };
  parallel_for(chunks, threads, work);
  parallel_for(n, threads, [&](int64_t begin, int64_t end, int64_t) {
    sum_chunks_of(weight_partials, static_cast<C*>(p.grad_weight), chunks, n, begin, end);
    sum_chunks_of(bias_partials, static_cast<C*>(p.grad_bias), chunks, n, begin, end);
  });
}

}  // namespace

void dropout_add_norm_cpu(const DropoutAddNormParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { forward(type, params, num_threads); });
}

void dropout_add_norm_backward_cpu(const DropoutAddNormBackwardParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { backward(type, params, num_threads); });
}

}  // namespace pyfast::PYFAST_ISA
