// Flash attention, backward. A piece of work is a chunk of the keys of one key head; it walks over
// blocks of 256 keys, keeps their gradients, and for each over the queries that see them in blocks
// of 128: two products recompute weights and their gradients, two add to the gradients of keys and
// values, one to that of the queries, which is summed in float for each chunk and over the chunks
// at the end. The gradient of a mask costs one more pass over the block, in cache, and the turns in
// which heads add to it. Bound by arithmetic: 10 * E flops a visible score. Nothing depends on the
// threads.
#include "../common/parallel.h"
#include "../common/workspace.h"
#include "attention.h"
#include "attention_gradient.h"
#include "attention_mask_gradient.h"

namespace pyfast::PYFAST_ISA {
namespace {

// grad_q = scale * (the sums of all chunks), for rows of one head.
template <typename T>
void store_scaled(const float* from, int64_t chunk_stride, int64_t num_chunks, float scale, T* to,
                  int64_t size) {
  const Lanes factor = Lanes::broadcast(scale);
  for (int64_t j = 0; j < size; j += kLanes) {
    Lanes sum = Lanes::load(from + j);
    for (int64_t c = 1; c < num_chunks; ++c) sum = sum + Lanes::load(from + c * chunk_stride + j);
    sum = sum * factor;
    if (j + kLanes <= size) {
      sum.store(to + j);
    } else {
      sum.store(to + j, static_cast<int>(size - j));
    }
  }
}

constexpr int64_t kDeltaRows = 16;

// delta = sum(grad_out * out) - grad_lse of every query.
template <typename T>
void find_delta(const AttentionBackwardParams& params, int num_threads) {
  const AttentionParams& p = params.forward;
  const int64_t num_rows = p.batch * p.heads * p.num_queries;
  parallel_for(num_rows, num_rows * p.value_size < 16384 ? 1 : num_threads,
               [&](int64_t begin, int64_t end, int64_t) {
                 for (int64_t i = begin; i < end;) {
                   const int64_t row = i % p.num_queries, head = i / p.num_queries % p.heads;
                   const int64_t batch = i / p.num_queries / p.heads;
                   const int64_t count =
                       minimum_of(minimum_of<int64_t>(end - i, kDeltaRows), p.num_queries - row);
                   const Rows<T> grads =
                       rows_of<T>(params.grad_out, batch, head, row, count, p.value_size);
                   const Rows<T> outs = rows_of<T>(p.out, batch, head, row, count, p.value_size);
                   prefetch(grads);
                   prefetch(outs);
                   for (int64_t r = 0; r < count; ++r, ++i) {
                     Lanes sum = Lanes::broadcast(0.0f);
                     for (int64_t j = 0; j < p.value_size; j += kLanes) {
                       sum = fused(load_lanes_of(grads.row(r) + j, p.value_size - j),
                                   load_lanes_of(outs.row(r) + j, p.value_size - j), sum);
                     }
                     params.delta[i] = sum.sum() - params.grad_lse[i];
                   }
                 }
               });
}

template <typename T>
class Backward {
  using Unit = typename UnitOf<T>::type;

 public:
  explicit Backward(const AttentionBackwardParams& params)
      : params_(params),
        p_(params.forward),
        dropout_(score_dropout(params.forward)),
        group_(p_.heads / p_.key_heads),
        num_chunks_(num_key_chunks(p_)),
        columns_(whole_lanes(p_.head_size)),
        value_columns_(whole_lanes(p_.value_size)),
        adds_to_mask_(has_mask_of_scores(params)) {}

  void run(int num_threads) {
    const int64_t pieces = num_backward_pieces(p_), heads = pieces / num_chunks_;
    if (adds_to_mask_) {
      const int64_t* const size = params_.grad_mask_size;
      parallel_for(size[0] * size[1] * size[2], num_threads,
                   [&](int64_t begin, int64_t end, int64_t) {
                     for (int64_t i = begin * size[3]; i < end * size[3]; ++i)
                       params_.grad_mask[i] = 0.0f;
                   });
      for (int64_t i = 0; i < pieces; ++i) params_.mask_steps[i] = Counter();
    }
    parallel_for_each(pieces, num_threads, [&](int64_t piece) {
      const int64_t index = piece % heads;
      chunk(index / p_.key_heads, index % p_.key_heads, piece / heads, mask_turn(piece, index));
    });
    if (num_chunks_ == 1) return;
    const int64_t num_rows = p_.batch * p_.heads * p_.num_queries;
    parallel_for(num_rows, num_threads, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / p_.num_queries / p_.heads, head = i / p_.num_queries % p_.heads;
        T* to = row_pointer<T>(params_.grad_q, batch, head, i % p_.num_queries);
        store_scaled(params_.scratch + i * columns_, num_rows * columns_, num_chunks_, p_.scale, to,
                     p_.head_size);
      }
    });
  }

 private:
  // Pieces share tiles of the mask with the same chunk of other heads, or batches, or both.
  MaskTurn mask_turn(int64_t piece, int64_t index) const {
    if (!adds_to_mask_) return {};
    const bool shares_head = params_.grad_mask_size[1] == 1;
    const bool shares_batch = params_.grad_mask_size[0] == 1;
    int64_t back = 0;
    if (shares_head && index % p_.key_heads > 0) {
      back = 1;
    } else if (shares_batch && index >= p_.key_heads) {
      back = shares_head ? 1 : p_.key_heads;
    }
    return {back > 0 ? &params_.mask_steps[piece - back] : nullptr, &params_.mask_steps[piece], 0};
  }

  // Keys [chunk * n, (chunk + 1) * n) of one key head of one sequence.
  void chunk(int64_t sequence, int64_t key_head, int64_t chunk, MaskTurn turn) {
    const Head first = head_of(p_, sequence, key_head * group_);
    const int64_t num_queries = first.num_queries;
    GradientWorkspace w;
    const int64_t fixed = w.lay_out(p_, nullptr);
    const int64_t head_sums = num_queries * columns_;
    const bool alone = num_chunks_ == 1;
    const int64_t sums_bytes = alone ? group_ * head_sums * 4 : 0;
    char* const memory = static_cast<char*>(thread_workspace(fixed + sums_bytes));
    w.lay_out(p_, memory);
    float* grad_q = reinterpret_cast<float*>(memory + fixed);
    if (!alone) {
      grad_q = params_.scratch + chunk * p_.batch * p_.heads * p_.num_queries * columns_ +
               row_index(p_, first, 0) * columns_;
    }
    for (int64_t i = 0; i < group_ * head_sums; ++i) grad_q[i] = 0.0f;
    const int64_t chunk_keys =
        ((first.num_keys + num_chunks_ - 1) / num_chunks_ + kGradientKeys - 1) / kGradientKeys *
        kGradientKeys;
    const int64_t end_key = minimum_of(first.num_keys, (chunk + 1) * chunk_keys);
    for (int64_t n0 = chunk * chunk_keys; n0 < end_key; n0 += kGradientKeys) {
      key_block(sequence, key_head, n0, minimum_of(kGradientKeys, end_key - n0), w, grad_q, &turn);
    }
    if (!alone) return;
    for (int64_t g = 0; g < group_; ++g) {
      for (int64_t m = 0; m < num_queries; ++m) {
        T* to = row_pointer<T>(params_.grad_q, first.batch, first.head + g, first.first_query + m);
        store_scaled(grad_q + (g * num_queries + m) * columns_, 0, 1, p_.scale, to, p_.head_size);
      }
    }
  }

  void key_block(int64_t sequence, int64_t key_head, int64_t n0, int64_t num_keys,
                 const GradientWorkspace& w, float* grad_q, MaskTurn* turn) {
    const Head first = head_of(p_, sequence, key_head * group_);
    const int64_t begin = first.first_seeing_query(n0) / kGradientQueries * kGradientQueries;
    const int64_t end = first.end_seeing_query(n0 + num_keys - 1);
    prefetch_queries(first, begin, end);
    prefetch(key_rows<T>(p_.k, first, n0, num_keys, p_.head_size));
    prefetch(key_rows<T>(p_.v, first, n0, num_keys, p_.value_size));
    const Keys<T> keys(p_, first, n0, num_keys, w);
    const Rows<T> key_rows_ = key_rows<T>(p_.k, first, n0, num_keys, p_.head_size);
    UnsafeRows unsafe;
    if (may_hide(p_)) find_unsafe(key_rows_, &unsafe);
    const RightOperand key_units =
        safe_right_operand<Unit>(key_rows_, w.key_units, columns_, unsafe);
    for (int64_t i = 0; i < num_keys * columns_; ++i) w.grad_k[i] = 0.0f;
    for (int64_t i = 0; i < num_keys * value_columns_; ++i) w.grad_v[i] = 0.0f;
    for (int64_t m0 = begin; m0 < end; m0 += kGradientQueries) {
      const Block b = {n0, num_keys, m0, minimum_of(kGradientQueries, first.num_queries - m0)};
      for (int64_t g = 0; g < group_; ++g) {
        const Head h = head_of(p_, sequence, key_head * group_ + g);
        const ScoreRule rule = score_rule(p_, h);
        const Gradients<T> gradients = {params_, h, rule, dropout_, w, adds_to_mask_};
        gradients.products(b, keys);
        if (g + 1 < group_) {
          prefetch_queries(head_of(p_, sequence, key_head * group_ + g + 1), m0, end);
        } else {
          prefetch_queries(first, m0 + kGradientQueries, end);
        }
        gradients.weigh(b);
        if (adds_to_mask_) {
          if (g == 0) turn->wait();
          add_mask_gradient(params_, h, b, w.mask);
          if (g + 1 == group_) turn->pass_on();
        }
        add_products(h, b, key_units, key_rows_, unsafe, w,
                     grad_q + (g * h.num_queries + m0) * columns_);
      }
    }
    for (int64_t n = 0; n < num_keys; ++n) {
      const int64_t row = first.first_key + n0 + n;
      store_scaled(w.grad_k + n * columns_, 0, 1, p_.scale,
                   row_pointer<T>(params_.grad_k, first.batch, key_head, row), p_.head_size);
      store_scaled(w.grad_v + n * value_columns_, 0, 1,
                   dropout_.threshold != 0 ? dropout_.scale : 1.0f,
                   row_pointer<T>(params_.grad_v, first.batch, key_head, row), p_.value_size);
    }
  }

  void prefetch_queries(const Head& h, int64_t m0, int64_t end) const {
    if (m0 >= end) return;
    const int64_t count = minimum_of(kGradientQueries, end - m0);
    prefetch(query_rows<T>(p_.q, h, m0, count, p_.head_size));
    prefetch(query_rows<T>(params_.grad_out, h, m0, count, p_.value_size));
  }

  // Adds what the queries of a block contribute to all three gradients.
  void add_products(const Head& h, const Block& b, const RightOperand& key_units,
                    const Rows<T>& key_rows_, const UnsafeRows& unsafe_keys,
                    const GradientWorkspace& w, float* grad_q) {
    const Rows<T> queries = query_rows<T>(p_.q, h, b.m0, b.num_queries, p_.head_size);
    const Rows<T> grads = query_rows<T>(params_.grad_out, h, b.m0, b.num_queries, p_.value_size);
    const int64_t num_units = units_of<Unit>(b.num_queries);
    auto seen_by = [&](int64_t vectors) {
      return [&, vectors](int64_t row, int64_t end) -> Extent {
        const Range seen = visible_vectors(h, b, row, end);
        return {0, vectors, seen.first * kLanes / Unit::kElements,
                minimum_of(num_units, seen.end * kLanes / Unit::kElements)};
      };
    };
    const LeftOperand weights = {reinterpret_cast<const uint32_t*>(w.scores), kGradientStride};
    add<false>(weights, grads, w.value_units, {w.grad_v, value_columns_, true}, b.num_keys,
               seen_by(value_columns_ / kLanes));
    const LeftOperand by_key = {reinterpret_cast<const uint32_t*>(w.grads), kGradientStride};
    add<false>(by_key, queries, w.query_units, {w.grad_k, columns_, true}, b.num_keys,
               seen_by(columns_ / kLanes));
    const LeftOperand by_query = {
        Unit::kElements == 1 ? reinterpret_cast<const uint32_t*>(w.grads) : w.pairs,
        kGradientStride};
    const Product sum = {grad_q, columns_, true};
    multiply<Unit, true>(by_query, key_units, sum, b.num_queries, columns_ / kLanes,
                         [&](int64_t query, int64_t end) -> Extent {
                           const Range rows = visible_rows(h, b, query, end);
                           return {0, columns_ / kLanes, rows.first / Unit::kElements,
                                   units_of<Unit>(rows.end)};
                         });
    add_unsafe<Unit, true>(unsafe_keys, key_rows_, by_query, sum, b.num_queries);
  }

  // c += a * rows, where a weight of zero hides NaN and Inf.
  template <bool kTransposed, typename F>
  void add(LeftOperand a, const Rows<T>& rows, uint32_t* buffer, Product c, int64_t num_rows,
           const F& extent) {
    const int64_t columns = whole_lanes(rows.size);
    UnsafeRows unsafe;
    if (may_hide(p_)) find_unsafe(rows, &unsafe);
    const RightOperand right = safe_right_operand<Unit>(rows, buffer, columns, unsafe);
    multiply<Unit, kTransposed>(a, right, c, num_rows, columns / kLanes, extent);
    add_unsafe<Unit, kTransposed>(unsafe, rows, a, c, num_rows);
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const ScoreDropout dropout_;
  const int64_t group_, num_chunks_, columns_, value_columns_;
  const bool adds_to_mask_;
};

template <typename T>
void backward(const T* /*type*/, const AttentionBackwardParams& params, int num_threads) {
  const AttentionParams& p = params.forward;
  if (p.heads == 0 || p.key_heads == 0) return;
  find_delta<T>(params, num_threads);
  Backward<T>(params).run(num_threads);
  if (params.grad_mask != nullptr && !has_mask_of_scores(params)) {
    MaskGradient<T>(params).run(num_threads);
  }
}

}  // namespace

void attention_backward_cpu(const AttentionBackwardParams& params, int num_threads) {
  switch (params.forward.dtype) {
    case DType::kFloat32:
      return backward(static_cast<float*>(nullptr), params, num_threads);
    case DType::kBFloat16:
      return backward(static_cast<BFloat16*>(nullptr), params, num_threads);
    case DType::kFloat16:
      return backward(static_cast<Float16*>(nullptr), params, num_threads);
    case DType::kFloat64:
      return;  // the reference computes it
  }
}

}  // namespace pyfast::PYFAST_ISA
