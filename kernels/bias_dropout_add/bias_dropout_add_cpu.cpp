// One pass over chunks of 32 rows. A row is cut into blocks of 256 columns: the keep bits of a
// block are drawn, then applied. Bound by bytes: x, residual and y forward, grad and grad_x
// backward.
#include "../common/column_sum.h"
#include "../common/keep_bits.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "bias_dropout_add.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kBlock = 256;

// Calls f(row, first column, count, bits) for every block of the rows.
template <typename F>
PYFAST_ALWAYS_INLINE void for_each_block(int64_t row_begin, int64_t row_end, int64_t num_columns,
                                         const KeepRule& rule, const F& f) {
  uint64_t bits[2 * kKeepBlocks];
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t column = 0; column < num_columns; column += kBlock) {
      const int64_t count = num_columns - column < kBlock ? num_columns - column : kBlock;
      fill_keep_bits(rule, static_cast<uint64_t>(row * num_columns + column), count, bits);
      f(row, column, count, bits);
    }
  }
}

template <typename T>
void forward(const T* /*type*/, const BiasDropoutAddParams& p, int num_threads) {
  using C = typename ComputeType<T>::type;
  using V = Vec<C>;
  const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
  const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
  const C* bias = static_cast<const C*>(p.bias);
  const bool stream = streams(static_cast<T*>(p.y), p.num_rows, p.num_columns, 3);
  auto work = [&](int64_t begin, int64_t end, int64_t) {
    const int64_t row_end = end * kChunkRows < p.num_rows ? end * kChunkRows : p.num_rows;
    for_each_block(
        begin * kChunkRows, row_end, p.num_columns, rule,
        [&](int64_t row, int64_t column, int64_t count, const uint64_t* bits) PYFAST_INLINE_LAMBDA {
          const int64_t offset = row * p.num_columns + column;
          const T* x = static_cast<const T*>(p.x) + offset;
          const T* residual = static_cast<const T*>(p.residual) + offset;
          T* y = static_cast<T*>(p.y) + offset;
          for_each_vec<V>(count, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
            V value = load_lanes<V>(x + j, lanes);
            if (bias != nullptr) value = value + load_lanes<V>(bias + column + j, lanes);
            value = select(bits[j / 64] >> (j % 64), value * scale, zero);
            store_lanes(load_lanes<V>(residual + j, lanes) + value, y + j, lanes, stream);
          });
        });
    if (stream) stream_fence();
  };
  parallel_for(num_chunks(p.num_rows), useful_threads(p.num_rows * p.num_columns, num_threads),
               work);
}

template <typename T>
void backward(const T* /*type*/, const BiasDropoutAddBackwardParams& p, int num_threads) {
  using C = typename ComputeType<T>::type;
  using V = Vec<C>;
  const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
  const V scale = V::broadcast(static_cast<C>(p.scale)), zero = V::broadcast(0);
  C* partials = static_cast<C*>(p.partial);
  const bool stream = streams(static_cast<T*>(p.grad_x), p.num_rows, p.num_columns, 2);
  const int64_t threads = useful_threads(p.num_rows * p.num_columns, num_threads);
  auto work = [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      C* partial = partials + chunk * p.num_columns;
      for_each_vec<V>(p.num_columns, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
        store_lanes(zero, partial + j, lanes, false);
      });
      const int64_t first = chunk * kChunkRows;
      const int64_t row_end = first + kChunkRows < p.num_rows ? first + kChunkRows : p.num_rows;
      for_each_block(first, row_end, p.num_columns, rule,
                     [&](int64_t row, int64_t column, int64_t count, const uint64_t* bits)
                         PYFAST_INLINE_LAMBDA {
                           const int64_t offset = row * p.num_columns + column;
                           const T* grad = static_cast<const T*>(p.grad) + offset;
                           T* grad_x = static_cast<T*>(p.grad_x) + offset;
                           for_each_vec<V>(count, [&](int64_t j, int lanes) PYFAST_INLINE_LAMBDA {
                             const V kept = load_lanes<V>(grad + j, lanes) * scale;
                             const V value = select(bits[j / 64] >> (j % 64), kept, zero);
                             store_lanes(value, grad_x + j, lanes, stream);
                             C* sum = partial + column + j;
                             store_lanes(load_lanes<V>(sum, lanes) + value, sum, lanes, false);
                           });
                         });
    }
    if (stream) stream_fence();
  };
  parallel_for(num_chunks(p.num_rows), threads, work);
  parallel_for(p.num_columns, threads, [&](int64_t begin, int64_t end, int64_t) {
    sum_chunks_of(partials, static_cast<C*>(p.grad_bias), num_chunks(p.num_rows), p.num_columns,
                  begin, end);
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
