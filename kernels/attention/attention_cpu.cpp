// Flash attention, forward. A piece of work is a block of 128 queries of one head, which walks over
// the keys it sees in blocks of 512 (256 in tiles): products, running softmax, and the sum over
// values, whose row is scaled down when the maximum rises. Bound by arithmetic: 4 * E flops a
// visible score. Measured on Zen 4: the products run at 85 to 95 % of the multiply-add ceiling, the
// exponentials take a tenth. With tiles of AMX (product_tiles.h) on Sapphire Rapids, 3 to 4 times
// as fast as with vdpbf16ps, half of the time are products, at a quarter of the ceiling: scores,
// 147 KB, go to L2 and back. Smaller blocks (64 queries, 128 or 64 keys) were 3 to 30 % slower.
#include "../common/parallel.h"
#include "../common/workspace.h"
#include "attention.h"
#include "attention_block.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kQueryBlock = 128;
#if defined(__AMX_TILE__)
constexpr int64_t kKeyBlock = 2 * kMaxStripUnits;
#else
constexpr int64_t kKeyBlock = 512;
#endif
// Rows of scores are an odd number of cache lines apart, so that a column of them uses all sets.
constexpr int64_t kScoreStride = kQueryBlock + 16;
constexpr int64_t kKeepStride = kQueryBlock / kGroupQueries;

// Scratch of a thread.
struct Workspace {
  float* scores;      // [kKeyBlock][kScoreStride], then the weights as units
  uint32_t* queries;  // [units of a head][kQueryBlock], transposed
  uint32_t* keys;     // [kKeyBlock][units of a head]
  uint32_t* values;   // [kKeyBlock][padded value size]
  float* out;         // [kQueryBlock][padded value size]
  float* mask;        // [kKeyBlock][kScoreStride]
  uint16_t* keep;     // [kKeyBlock][kKeepStride]
  float* top;         // [kQueryBlock] running maximum of the scores as they are in memory
  float* sum;         // [kQueryBlock]
  float* shrink;      // [kQueryBlock] what the sums so far are scaled by
};

// Lays the arrays out from `base` on; returns the bytes that they take.
int64_t lay_out(const AttentionParams& p, char* base, Workspace* w) {
  const int64_t size = whole_lanes(p.head_size), value_size = whole_lanes(p.value_size);
  int64_t bytes = 0;
  auto take = [&](auto** array, int64_t count) {
    *array = static_cast<decltype(&**array)>(static_cast<void*>(base + bytes));
    bytes += (count * static_cast<int64_t>(sizeof(**array)) + 63) / 64 * 64;
  };
  take(&w->scores, kKeyBlock * kScoreStride);
  take(&w->queries, size * kQueryBlock);
  take(&w->keys, kKeyBlock * size);
  take(&w->values, kKeyBlock * value_size);
  take(&w->out, kQueryBlock * value_size);
  take(&w->mask, p.mask_type == MaskType::kNone ? 0 : kKeyBlock * kScoreStride);
  take(&w->keep, kKeyBlock * kKeepStride);
  take(&w->top, kQueryBlock);
  take(&w->sum, kQueryBlock);
  take(&w->shrink, kQueryBlock);
  return bytes;
}

struct Context {
  const AttentionParams& p;
  const Head& h;
  const ScoreRule& rule;
  const ScoreDropout& dropout;
  const Workspace& w;
};

// The largest score of each query of a vector; modified and hidden scores are stored.
Lanes find_top(const Context& x, const Block& b, int64_t query, Range rows, Range inner) {
  const ScoreRule rule = x.rule;
  float* const column = x.w.scores + query;
  const Lanes hidden = Lanes::broadcast(-kInfinity);
  Lanes top = hidden;
  auto edges = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Lanes s = Lanes::load(column + n * kScoreStride);
      if (rule.is_modified) {
        if (rule.has_key_scale) {
          s = s *
              Lanes::broadcast(*row_pointer<float>(x.p.k_scale, x.h.batch, x.h.key_head, b.n0 + n));
        }
        Lanes derivative;
        const Lanes bias = rule.has_mask ? Lanes::load(x.w.mask + n * kScoreStride + query) : s;
        s = score(rule, s, distances(x.h, b, n, query), bias, &derivative);
      }
      if (n < inner.first || n >= inner.end) {
        s = select(visible_bits(x.h, b, n, query), s, hidden);
      }
      s.store(column + n * kScoreStride);
      top = maximum(s, top);
    }
  };
  const bool masks_only = rule.only_has_mask();
  if ((rule.is_modified && !masks_only) || inner.first == inner.end) {
    edges(rows.first, rows.end);
    return top;
  }
  edges(rows.first, inner.first);
  Lanes tops[4] = {top, hidden, hidden, hidden};
  const Lanes scale = Lanes::broadcast(rule.scale);
  auto inside = [&](int64_t n, int i) __attribute__((always_inline)) {
    float* const at = column + n * kScoreStride;
    Lanes s = Lanes::load(at);
    if (masks_only) {
      s = masked(s * scale, Lanes::load(x.w.mask + n * kScoreStride + query));
      s.store(at);
    }
    tops[i] = maximum(s, tops[i]);
  };
  int64_t n = inner.first;
  for (; n + 4 <= inner.end; n += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) inside(n + i, i);
  }
  for (; n < inner.end; ++n) inside(n, 0);
  top = maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
  edges(inner.end, rows.end);
  return top;
}

// Turns the scores of a vector of queries into weights, as units, and returns their sum.
template <typename Unit, bool kPlain>
Lanes weigh(const Context& x, const Block& b, int64_t query, Range rows, Lanes factor,
            Lanes negative_top) {
  float* const column = x.w.scores + query;
  const Lanes zero = Lanes::broadcast(0.0f);
  const bool drops = x.dropout.threshold != 0, has_scale = x.p.v_scale.data != nullptr;
  Lanes sum = zero;
  auto weight = [&](int64_t n) __attribute__((always_inline)) {
    const Lanes s = Lanes::load(column + n * kScoreStride);
    Lanes weight = power_of_two(kPlain ? fused(s, factor, negative_top * factor)
                                       : (s + negative_top) * factor);
    sum = sum + weight;
    if constexpr (!kPlain) {
      if (drops) weight = select(keep_lanes(x.w.keep + n * kKeepStride, query), weight, zero);
      if (has_scale) {
        weight = weight * Lanes::broadcast(
                              *row_pointer<float>(x.p.v_scale, x.h.batch, x.h.key_head, b.n0 + n));
      }
    }
    return weight;
  };
  if constexpr (Unit::kElements == 1) {
    for (int64_t n = 0; n < rows.first; ++n) zero.store(column + n * kScoreStride);
    for (int64_t n = rows.first; n < rows.end; ++n) weight(n).store(column + n * kScoreStride);
    for (int64_t n = rows.end; n < b.num_keys; ++n) zero.store(column + n * kScoreStride);
  }
#if defined(__AVX512BF16__)
  if constexpr (Unit::kElements == 2) {
    uint32_t* const units = reinterpret_cast<uint32_t*>(column);
    const int64_t first = rows.first / 2, end = (rows.end + 1) / 2;
    auto edge = [&](int64_t n) { return n >= rows.first && n < rows.end ? weight(n) : zero; };
    for (int64_t u = 0; u < first; ++u) store_pairs(zero, zero, units + u * kScoreStride);
    for (int64_t u = first; u < end; ++u) {
      if (2 * u >= rows.first && 2 * u + 1 < rows.end) {
        const Lanes even = weight(2 * u), odd = weight(2 * u + 1);
        store_pairs(even, odd, units + u * kScoreStride);
      } else {
        store_pairs(edge(2 * u), edge(2 * u + 1), units + u * kScoreStride);
      }
    }
    for (int64_t u = end; u < (b.num_keys + 1) / 2; ++u) {
      store_pairs(zero, zero, units + u * kScoreStride);
    }
  }
#endif
  return sum;
}

template <typename Unit>
void softmax(const Context& x, const Block& b) {
  const Lanes factor = Lanes::broadcast(x.rule.log2_factor());
  const bool plain = !x.rule.is_modified && x.dropout.threshold == 0;
  for (int64_t v = 0; v < b.num_vectors(); ++v) {
    const int64_t query = v * kLanes;
    const Range rows = visible_rows(x.h, b, query, query + kLanes);
    const Range inner = fully_visible_rows(x.h, b, query);
    const Lanes old_top = Lanes::load(x.w.top + query);
    const Lanes top = maximum(find_top(x, b, query, rows, inner), old_top);
    // -Inf - -Inf is not a number: a query that has seen nothing counts from zero.
    const Lanes zero = Lanes::broadcast(0.0f);
    const Lanes reached = select(equal(top, Lanes::broadcast(-kInfinity)), zero, top);
    const Lanes shrink = power_of_two((old_top - reached) * factor);
    const Lanes negative = zero - reached;
    const Lanes sum = plain ? weigh<Unit, true>(x, b, query, rows, factor, negative)
                            : weigh<Unit, false>(x, b, query, rows, factor, negative);
    top.store(x.w.top + query);
    shrink.store(x.w.shrink + query);
    fused(Lanes::load(x.w.sum + query), shrink, sum).store(x.w.sum + query);
  }
}

template <typename T, typename TK>
void attend(const Context& x, int64_t m0, int64_t num_queries) {
  using Unit = typename UnitOf<T>::type;
  const AttentionParams& p = x.p;
  const Head& h = x.h;
  const Workspace& w = x.w;
  const int64_t value_columns = whole_lanes(p.value_size);
  const int64_t num_units = units_of<Unit>(p.head_size);
  const float sink = p.sinks != nullptr ? p.sinks[h.head] : -kInfinity;
  for (int64_t m = 0; m < kQueryBlock; ++m) {
    w.top[m] = sink;
    w.sum[m] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  const int64_t first_key = h.first_visible_key(m0) / kGroupKeys * kGroupKeys;
  const int64_t end_key = h.end_visible_key(m0 + num_queries - 1);
  prefetch(query_rows<T>(p.q, h, m0, num_queries, p.head_size));
  auto prefetch_keys = [&](int64_t n0) {
    const int64_t num_keys = minimum_of(kKeyBlock, end_key - n0);
    if (num_keys > 0) prefetch(key_rows<TK>(p.k, h, n0, num_keys, p.head_size));
  };
  prefetch_keys(first_key);
  for (int64_t i = 0; i < num_queries * value_columns; ++i) w.out[i] = 0.0f;
  pack_transposed<Unit>(query_rows<T>(p.q, h, m0, num_queries, p.head_size), w.queries,
                        kQueryBlock);
  const RightOperand queries = {w.queries, kQueryBlock};
  const bool may_hide =
      x.dropout.threshold != 0 || x.rule.has_mask || h.left < kFar || h.right < kFar;
  for (int64_t n0 = first_key; n0 < end_key; n0 += kKeyBlock) {
    const Block b = {n0, minimum_of(kKeyBlock, end_key - n0), m0, num_queries};
    const LeftOperand keys =
        left_operand<Unit>(key_rows<TK>(p.k, h, n0, b.num_keys, p.head_size), w.keys);
    prefetch(key_rows<TK>(p.v, h, n0, b.num_keys, p.value_size));
    multiply<Unit, false>(keys, queries, {w.scores, kScoreStride, false}, b.num_keys,
                          b.num_vectors(), [&](int64_t row, int64_t end) -> Extent {
                            const Range vectors = visible_vectors(h, b, row, end);
                            return {vectors.first, vectors.end, 0, num_units};
                          });
    load_mask_tile(p, h, b, w.mask, kScoreStride);
    if (x.dropout.threshold != 0) draw_keep_bits(x.dropout, p, h, b, w.keep, kKeepStride);
    softmax<Unit>(x, b);
    prefetch_keys(n0 + kKeyBlock);
    if (n0 != first_key || p.sinks != nullptr) {
      for (int64_t m = 0; m < num_queries; ++m) {
        if (w.shrink[m] == 1.0f) continue;
        const Lanes shrink = Lanes::broadcast(w.shrink[m]);
        float* const row = w.out + m * value_columns;
        for (int64_t j = 0; j < value_columns; j += kLanes) {
          (Lanes::load(row + j) * shrink).store(row + j);
        }
      }
    }
    const Rows<TK> value_rows = key_rows<TK>(p.v, h, n0, b.num_keys, p.value_size);
    UnsafeRows unsafe;
    if (may_hide) find_unsafe(value_rows, &unsafe);
    const RightOperand values =
        safe_right_operand<Unit>(value_rows, w.values, value_columns, unsafe);
    const LeftOperand weights = {reinterpret_cast<const uint32_t*>(w.scores), kScoreStride};
    const Product out = {w.out, value_columns, true};
    multiply<Unit, true>(weights, values, out, num_queries, value_columns / kLanes,
                         [&](int64_t query, int64_t end) -> Extent {
                           const Range rows = visible_rows(h, b, query, end);
                           return {0, value_columns / kLanes, rows.first / Unit::kElements,
                                   units_of<Unit>(rows.end)};
                         });
    add_unsafe<Unit, true>(unsafe, value_rows, weights, out, num_queries);
  }
  const float scale = x.dropout.threshold != 0 ? x.dropout.scale : 1.0f;
  const float unit = x.rule.is_modified ? 1.0f : x.rule.scale;
  for (int64_t m = 0; m < num_queries; ++m) {
    const float sum = w.sum[m];
    const Lanes factor = Lanes::broadcast(sum == 0.0f ? 0.0f : scale / sum);
    const float* const from = w.out + m * value_columns;
    T* const to = row_pointer<T>(p.out, h.batch, h.head, h.first_query + m0 + m);
    for (int64_t j = 0; j < p.value_size; j += kLanes) {
      const Lanes value = Lanes::load(from + j) * factor;
      if (j + kLanes <= p.value_size) {
        value.store(to + j);
      } else {
        value.store(to + j, static_cast<int>(p.value_size - j));
      }
    }
    p.lse[row_index(p, h, m0 + m)] = sum == 0.0f ? -kInfinity : w.top[m] * unit + logf(sum);
  }
}

template <typename T>
void forward(const T* /*type*/, const AttentionParams& params, int num_threads) {
  if (params.heads == 0 || params.num_queries == 0) return;
  int64_t longest = params.num_queries;
  if (params.cu_seqlens_q != nullptr) {
    longest = 0;
    for (int64_t s = 0; s < params.num_sequences; ++s) {
      longest = maximum_of(longest, params.cu_seqlens_q[s + 1] - params.cu_seqlens_q[s]);
    }
  }
  const int64_t num_blocks = (longest + kQueryBlock - 1) / kQueryBlock;
  const int64_t num_heads = num_sequences(params) * params.heads;
  const bool is_int8 = params.k_scale.data != nullptr;
  const ScoreDropout dropout = score_dropout(params);
  parallel_for_each(num_heads * num_blocks, num_threads, [&](int64_t piece) {
    const int64_t index = piece / num_blocks;
    const Head h = head_of(params, index / params.heads, index % params.heads);
    // The last queries first: with a causal mask they see most keys.
    const int64_t m0 = (num_blocks - 1 - piece % num_blocks) * kQueryBlock;
    if (m0 >= h.num_queries) return;
    Workspace w;
    char* const memory = static_cast<char*>(thread_workspace(lay_out(params, nullptr, &w)));
    lay_out(params, memory, &w);
    const ScoreRule rule = score_rule(params, h);
    const Context x = {params, h, rule, dropout, w};
    const int64_t num_queries = minimum_of(kQueryBlock, h.num_queries - m0);
    if (is_int8) {
      attend<T, int8_t>(x, m0, num_queries);
    } else {
      attend<T, T>(x, m0, num_queries);
    }
  });
}

}  // namespace

void attention_cpu(const AttentionParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return forward(static_cast<float*>(nullptr), params, num_threads);
    case DType::kBFloat16:
      return forward(static_cast<BFloat16*>(nullptr), params, num_threads);
    case DType::kFloat16:
      return forward(static_cast<Float16*>(nullptr), params, num_threads);
    case DType::kFloat64:
      return;  // the reference computes it
  }
}

}  // namespace pyfast::PYFAST_ISA
