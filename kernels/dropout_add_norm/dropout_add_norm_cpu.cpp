// A thread takes chunks of 32 rows. A row stays in L1 as floats between its passes: z, then mean,
// variance and y; backward: x_hat and weight * grad_y with their two sums, then the gradients.
// Bound by bytes: x, residual, z and y forward, grad_y, z, grad_x and grad_residual backward.
#include "../common/column_sum.h"
#include "../common/keep_bits.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "dropout_add_norm.h"

namespace pyfast::PYFAST_ISA {
namespace {

// The sum over a row in the order of dropout_add_norm.h; value(j, lanes) gives elements j, j + 1,
// ... with zeros after the first `lanes`.
template <int kWarps, typename V, typename F>
inline auto row_sum_warps(int64_t n, const F& value) {
  constexpr int kRegisters = 256 / V::kLanes;
  V sums[kRegisters];
  for (int r = 0; r < kRegisters; ++r) {
    V warp[kWarps];
    for (int w = 0; w < kWarps; ++w) {
      warp[w] = V::broadcast(0);
      for (int64_t j = 256 * w + r * V::kLanes; j < n; j += 256 * kWarps) {
        warp[w] = warp[w] + value(j, n - j < V::kLanes ? static_cast<int>(n - j) : V::kLanes);
      }
    }
    for (int half = kWarps / 2; half > 0; half /= 2) {
      for (int w = 0; w < half; ++w) warp[w] = warp[w] + warp[w + half];
    }
    sums[r] = warp[0];
  }
  for (int half = kRegisters / 2; half > 0; half /= 2) {
    for (int r = 0; r < half; ++r) sums[r] = sums[r] + sums[r + half];
  }
  return sums[0].sum();
}

template <typename V, typename F>
inline auto row_sum(int64_t n, const F& value) {
  switch (row_warps(n)) {
    case 1:
      return row_sum_warps<1, V>(n, value);
    case 2:
      return row_sum_warps<2, V>(n, value);
    case 4:
      return row_sum_warps<4, V>(n, value);
    default:
      return row_sum_warps<8, V>(n, value);
  }
}

template <typename V>
inline V first_lanes(const V& value, int lanes) {
  if (lanes == V::kLanes) return value;
  return select((uint64_t{1} << lanes) - 1, value, V::broadcast(0));
}

template <typename C>
struct Workspace {
  C* first;
  C* second;
  uint64_t* bits;
};

template <typename C>
inline Workspace<C> workspace_of(void* all, int64_t thread, int64_t num_columns) {
  char* mine = static_cast<char*>(all) + thread * workspace_bytes(num_columns);
  C* first = reinterpret_cast<C*>(mine);
  return {
      first, first + num_columns,
      reinterpret_cast<uint64_t*>(mine + 2 * num_columns * static_cast<int64_t>(sizeof(double)))};
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
  const bool stream = streams(static_cast<T*>(p.y), p.num_rows, n);
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
      for_each_vec<V>(n, [&](int64_t j, int lanes) {
        V value = load_lanes<V>(x + j, lanes);
        if (rule.threshold != 0) {
          value = select(space.bits[j / 64] >> (j % 64), value * scale, zero);
        }
        if (residual != nullptr) value = load_lanes<V>(residual + j, lanes) + value;
        value = rounded_to<T>(value);
        if (z != nullptr) store_lanes(value, z + j, lanes, stream);
        store_lanes(value, space.first + j, lanes, false);
      });
      C mean = 0;
      if (!p.rms) {
        mean = row_sum<V>(
                   n, [&](int64_t j, int lanes) { return load_lanes<V>(space.first + j, lanes); }) /
               count;
        static_cast<C*>(p.mean)[row] = mean;
      }
      const V center = V::broadcast(mean);
      const C squares = row_sum<V>(n, [&](int64_t j, int lanes) {
        const V d = load_lanes<V>(space.first + j, lanes) - center;
        return first_lanes(d * d, lanes);
      });
      const C rstd = C{1} / square_root(squares / count + static_cast<C>(p.eps));
      static_cast<C*>(p.rstd)[row] = rstd;
      const V factor = V::broadcast(rstd);
      for_each_vec<V>(n, [&](int64_t j, int lanes) {
        V value = (load_lanes<V>(space.first + j, lanes) - center) * factor;
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
  const bool stream = streams(static_cast<T*>(p.grad_x), p.num_rows, n);
  const int64_t threads = useful_threads(p.num_rows * n, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t thread) {
    const Workspace<C> space = workspace_of<C>(p.workspace, thread, n);
    C* const x_hat = space.first;
    C* const weighted = space.second;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      C* const weight_sum = weight_partials + chunk * n;
      C* const bias_sum = bias_partials + chunk * n;
      for_each_vec<V>(n, [&](int64_t j, int lanes) {
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
        for_each_vec<V>(n, [&](int64_t j, int lanes) {
          const V normal = (load_lanes<V>(z + j, lanes) - mean) * rstd;
          const V grad = load_lanes<V>(grad_y + j, lanes);
          store_lanes(normal, x_hat + j, lanes, false);
          store_lanes(weight ? grad * load_lanes<V>(weight + j, lanes) : grad, weighted + j, lanes,
                      false);
          store_lanes(load_lanes<V>(weight_sum + j, lanes) + grad * normal, weight_sum + j, lanes,
                      false);
          store_lanes(load_lanes<V>(bias_sum + j, lanes) + grad, bias_sum + j, lanes, false);
        });
        const V product_mean = V::broadcast(row_sum<V>(n,
                                                       [&](int64_t j, int lanes) {
                                                         return load_lanes<V>(weighted + j, lanes) *
                                                                load_lanes<V>(x_hat + j, lanes);
                                                       }) /
                                            count);
        const V grad_mean =
            p.rms ? zero
                  : V::broadcast(row_sum<V>(n,
                                            [&](int64_t j, int lanes) {
                                              return load_lanes<V>(weighted + j, lanes);
                                            }) /
                                 count);
        if (rule.threshold != 0) {
          fill_keep_bits(rule, static_cast<uint64_t>(row * n), n, space.bits);
        }
        for_each_vec<V>(n, [&](int64_t j, int lanes) {
          const V along = load_lanes<V>(x_hat + j, lanes) * product_mean;
          V grad = (load_lanes<V>(weighted + j, lanes) - along - grad_mean) * rstd;
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
    for (int64_t column = begin; column < end; ++column) {
      sum_chunks(weight_partials, static_cast<C*>(p.grad_weight), chunks, n, column);
      sum_chunks(bias_partials, static_cast<C*>(p.grad_bias), chunks, n, column);
    }
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
