// One pass over chunks of 32 rows, block by block: keep bits are drawn, then applied. Bound by
// bytes: x, residual and y forward, grad and grad_x backward.
#include "../common/column_sum.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "bias_dropout_add.h"

namespace pyfast::PYFAST_ISA {
namespace {

template <typename T>
void forward(const T* /*type*/, const BiasDropoutAddParams& params, int num_threads) {
  const int64_t threads = useful_threads(params.num_rows * params.num_columns, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t) {
    using C = typename ComputeType<T>::type;
    using V = Vec<C>;
    const BiasDropoutAddParams p = params;  // of its own: no store can change it
    const int64_t n = p.num_columns;
    const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
    const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
    const C* const bias = static_cast<const C*>(p.bias);
    const bool stream = streams(static_cast<T*>(p.y), p.num_rows, n, 3);
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    for (int64_t row = begin * kChunkRows; row < row_end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * n;
      const T* residual = static_cast<const T*>(p.residual) + row * n;
      T* y = static_cast<T*>(p.y) + row * n;
      for_each_block(rule, p.seed.first + row * n, n,
                     [&](int64_t from, int64_t to, const uint64_t* bits) PYFAST_INLINE_LAMBDA {
                       for_each_vec<V>(from, to, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
                         V value = load_lanes<V>(x + j, lanes);
                         if (bias != nullptr) value = value + load_lanes<V>(bias + j, lanes);
                         value = select(keep_lanes(bits, j), value * scale, zero);
                         store_lanes(load_lanes<V>(residual + j, lanes) + value, y + j, lanes,
                                     stream);
                       });
                     });
    }
    if (stream) stream_fence();
  };
  parallel_for(num_chunks(params.num_rows), threads, work);
}

template <typename T>
void backward(const T* /*type*/, const BiasDropoutAddBackwardParams& params, int num_threads) {
  using C = typename ComputeType<T>::type;
  const int64_t threads = useful_threads(params.num_rows * params.num_columns, num_threads);
  const int64_t chunks = num_chunks(params.num_rows);
  C* const partials = static_cast<C*>(params.partial);
  auto work = [&](int64_t begin, int64_t end, int64_t) {
    using V = Vec<C>;
    const BiasDropoutAddBackwardParams p = params;  // of its own: no store can change it
    const int64_t n = p.num_columns;
    const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
    const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
    const bool stream = streams(static_cast<T*>(p.grad_x), p.num_rows, n, 2);
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    for (int64_t row = begin * kChunkRows; row < row_end; ++row) {
      const T* grad = static_cast<const T*>(p.grad) + row * n;
      T* grad_x = static_cast<T*>(p.grad_x) + row * n;
      C* const partial = partials + row / kChunkRows * n;
      const bool is_first = row % kChunkRows == 0;
      for_each_block(rule, p.seed.first + row * n, n,
                     [&](int64_t from, int64_t to, const uint64_t* bits) PYFAST_INLINE_LAMBDA {
                       for_each_vec<V>(from, to, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
                         const V kept = load_lanes<V>(grad + j, lanes) * scale;
                         const V value = select(keep_lanes(bits, j), kept, zero);
                         store_lanes(value, grad_x + j, lanes, stream);
                         const V total = is_first ? zero : load_lanes<V>(partial + j, lanes);
                         store_lanes(total + value, partial + j, lanes, false);
                       });
                     });
    }
    if (stream) stream_fence();
  };
  parallel_for(chunks, threads, work);
  const int64_t n = params.num_columns;
  parallel_for(n, threads, [&](int64_t begin, int64_t end, int64_t) {
    sum_chunks_of(partials, static_cast<C*>(params.grad_bias), chunks, n, begin, end);
  });
}

}  // namespace

void bias_dropout_add_cpu(const BiasDropoutAddParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { forward(type, params, num_threads); });
}

void bias_dropout_add_backward_cpu(const BiasDropoutAddBackwardParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { backward(type, params, num_threads); });
}

}  // namespace pyfast::PYFAST_ISA
