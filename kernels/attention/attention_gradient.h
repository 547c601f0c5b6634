// The weights of a block and the gradients of its scores, recomputed from the logarithm of the
// softmax denominators: p = exp(s - lse), grad_s = p * (grad_p - delta).
#pragma once

#include "attention_block.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kGradientQueries = 128;
constexpr int64_t kGradientKeys = 256;
constexpr int64_t kGradientStride = kGradientQueries + 16;  // an odd number of cache lines
#if defined(__AMX_TILE__)
static_assert(kGradientKeys <= 2 * kMaxStripUnits && kMaxHeadSize <= 2 * kMaxStripUnits);
#endif
constexpr int64_t kGradientKeepStride = kGradientQueries / kGroupQueries;

// Scratch of a thread.
struct GradientWorkspace {
  float* scores;          // [kGradientKeys][kGradientStride], then weights as units along queries
  float* grads;           // the same: gradients of weights, then of scores
  uint32_t* pairs;        // [kGradientKeys / 2][kGradientStride] of scores, pairs along keys
  uint32_t* queries;      // [units][kGradientStride] transposed
  uint32_t* grad_out;     // [units][kGradientStride] transposed
  uint32_t* query_units;  // [kGradientQueries][padded head size]
  uint32_t* value_units;  // [kGradientQueries][padded value size], of grad_out
  uint32_t* key_units;    // [kGradientKeys][padded head size]
  uint32_t* keys;         // [kGradientKeys][units]
  uint32_t* values;       // [kGradientKeys][units]
  float* grad_k;          // [kGradientKeys][padded head size]
  float* grad_v;          // [kGradientKeys][padded value size]
  float* mask;            // [kGradientKeys][kGradientStride], then the gradients of its scores
  uint16_t* keep;         // [kGradientKeys][kGradientKeepStride]
  float* negative_lse;    // [kGradientQueries], -Inf where there is nothing
  float* delta;           // [kGradientQueries]

  // Lays the arrays out from `base` on; returns the bytes that they take.
  int64_t lay_out(const AttentionParams& p, char* base) {
    const int64_t size = whole_lanes(p.head_size), value_size = whole_lanes(p.value_size);
    constexpr int64_t kScores = kGradientKeys * kGradientStride;
    int64_t bytes = 0;
    auto take = [&](auto*& array, int64_t count) {
      array = static_cast<decltype(&*array)>(static_cast<void*>(base + bytes));
      bytes += (count * static_cast<int64_t>(sizeof(*array)) + 63) / 64 * 64;
    };
    take(scores, kScores);
    take(grads, kScores);
    take(pairs, kScores / 2);
    take(queries, size * kGradientStride);
    take(grad_out, value_size * kGradientStride);
    take(query_units, size * kGradientQueries);
    take(value_units, value_size * kGradientQueries);
    take(key_units, size * kGradientKeys);
    take(keys, size * kGradientKeys);
    take(values, value_size * kGradientKeys);
    take(grad_k, size * kGradientKeys);
    take(grad_v, value_size * kGradientKeys);
    take(mask, p.mask_type == MaskType::kNone ? 0 : kScores);
    take(keep, kGradientKeys * kGradientKeepStride);
    take(negative_lse, kGradientQueries);
    take(delta, kGradientQueries);
    return bytes;
  }
};

// Keys and values of a block as left operands.
template <typename T>
struct Keys {
  using Unit = typename UnitOf<T>::type;
  LeftOperand keys, values;

  Keys(const AttentionParams& p, const Head& h, int64_t n0, int64_t num_keys,
       const GradientWorkspace& w)
      : keys(left_operand<Unit>(key_rows<T>(p.k, h, n0, num_keys, p.head_size), w.keys)),
        values(left_operand<Unit>(key_rows<T>(p.v, h, n0, num_keys, p.value_size), w.values)) {}
};

// True where some weight may be exactly zero, so that NaN and Inf have to be kept from spreading.
inline bool may_hide(const AttentionParams& p) {
  return p.threshold != 0 || p.mask_type != MaskType::kNone || p.left < kFar || p.right < kFar;
}

template <typename T>
struct Gradients {
  using Unit = typename UnitOf<T>::type;
  const AttentionBackwardParams& params;
  const Head& h;
  const ScoreRule& rule;
  const ScoreDropout& dropout;
  const GradientWorkspace& w;
  bool keeps_grad_scores;  // in place of the mask

  // Raw scores and gradients of weights, and what else weigh() reads.
  void products(const Block& b, const Keys<T>& keys) const {
    const AttentionParams& p = params.forward;
    pack_transposed<Unit>(query_rows<T>(p.q, h, b.m0, b.num_queries, p.head_size), w.queries,
                          kGradientStride);
    pack_transposed<Unit>(query_rows<T>(params.grad_out, h, b.m0, b.num_queries, p.value_size),
                          w.grad_out, kGradientStride);
    auto extent = [&](int64_t num_units) {
      return [&, num_units](int64_t row, int64_t end) -> Extent {
        const Range vectors = visible_vectors(h, b, row, end);
        return {vectors.first, vectors.end, 0, num_units};
      };
    };
    multiply<Unit, false>(keys.keys, {w.queries, kGradientStride},
                          {w.scores, kGradientStride, false}, b.num_keys, b.num_vectors(),
                          extent(units_of<Unit>(p.head_size)));
    multiply<Unit, false>(keys.values, {w.grad_out, kGradientStride},
                          {w.grads, kGradientStride, false}, b.num_keys, b.num_vectors(),
                          extent(units_of<Unit>(p.value_size)));
    load_mask_tile(p, h, b, w.mask, kGradientStride);
    if (dropout.threshold != 0) draw_keep_bits(dropout, p, h, b, w.keep, kGradientKeepStride);
    const int64_t row = row_index(p, h, b.m0);
    // In the units of what it is added to: log2 for plain scores, else that of scores in memory.
    const float unit = is_plain() ? kLog2E : rule.is_modified ? 1.0f : 1.0f / rule.scale;
    for (int64_t m = 0; m < kGradientQueries; ++m) {
      const float lse = m < b.num_queries ? p.lse[row + m] : -kInfinity;
      w.negative_lse[m] = lse == -kInfinity ? -kInfinity : -lse * unit;
      w.delta[m] = m < b.num_queries ? params.delta[row + m] : 0.0f;
    }
  }

  // One vector of scores: the weight after dropout, its gradient with respect to the score, and
  // that with respect to the raw product (times the scale).
  struct Values {
    Lanes weight, grad_score, grad_raw;
  };

  template <bool kPlain>
  PYFAST_ALWAYS_INLINE Values values(const Block& b, int64_t n, int64_t query, bool is_edge,
                                     Lanes factor) const {
    const int64_t at = n * kGradientStride + query;
    const Lanes zero = Lanes::broadcast(0.0f);
    Lanes s = Lanes::load(w.scores + at), grad = Lanes::load(w.grads + at);
    Lanes derivative = Lanes::broadcast(1.0f);
    if constexpr (!kPlain) {
      if (rule.is_modified) {
        const Lanes bias = rule.has_mask ? Lanes::load(w.mask + at) : s;
        s = score(rule, s, distances(h, b, n, query), bias, &derivative);
      }
    }
    const Lanes negative_lse = Lanes::load(w.negative_lse + query);
    Lanes p = power_of_two(kPlain ? fused(s, factor, negative_lse) : (s + negative_lse) * factor);
    if (is_edge) p = select(visible_bits(h, b, n, query), p, zero);
    Lanes kept = p;
    if constexpr (!kPlain) {
      if (dropout.threshold != 0) {
        const uint32_t bits = keep_lanes(w.keep + n * kGradientKeepStride, query);
        kept = select(bits, p, zero);
        grad = select(bits, grad * Lanes::broadcast(dropout.scale), zero);
      }
    }
    Lanes grad_score = p * (grad - Lanes::load(w.delta + query));
    // Zero times what a hidden value has made NaN.
    if (!kPlain || is_edge) grad_score = select(nonzero(p), grad_score, zero);
    Lanes grad_raw = grad_score * derivative;
    if (!kPlain) grad_raw = select(nonzero(p), grad_raw, zero);
    return {kept, grad_score, grad_raw};
  }

  // True where kPlain serves the block: what hides values elsewhere is an edge.
  bool is_plain() const { return !rule.is_modified && dropout.threshold == 0; }

  Lanes factor() const { return Lanes::broadcast(rule.log2_factor()); }

  // Puts weights and gradients in place of scores and gradients of weights, as units.
  void weigh(const Block& b) const {
    if (is_plain()) return weigh_rows<true>(b);
    weigh_rows<false>(b);
  }

  template <bool kPlain>
  void weigh_rows(const Block& b) const {
    const Lanes f = factor(), zero = Lanes::broadcast(0.0f);
    constexpr int kRows = Unit::kElements, kVectors = Unit::kElements;
    for (int64_t n = 0; n < b.num_keys; n += kRows) {
      const int64_t num_rows = minimum_of<int64_t>(kRows, b.num_keys - n);
      const Range seen = visible_vectors(h, b, n, n + num_rows);
      const Range whole = whole_vectors(h, b, n, n + num_rows);
      for (int64_t v = 0; v < b.num_vectors(); v += kVectors) {
        Values values_[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) {
          for (int i = 0; i < kVectors; ++i) {
            const int64_t query = (v + i) * kLanes;
            if (r >= num_rows || v + i < seen.first || v + i >= seen.end) {
              values_[r][i] = {zero, zero, zero};
            } else if (v + i >= whole.first && v + i < whole.end) {
              values_[r][i] = values<kPlain>(b, n + r, query, false, f);
            } else {
              values_[r][i] = values<kPlain>(b, n + r, query, true, f);
            }
          }
        }
        store(values_, n, v * kLanes);
        if (!kPlain && keeps_grad_scores) {
          for (int r = 0; r < kRows; ++r) {
            float* const row = w.mask + (n + r) * kGradientStride + v * kLanes;
            for (int i = 0; i < kVectors; ++i) values_[r][i].grad_score.store(row + i * kLanes);
          }
        }
      }
    }
  }

  PYFAST_ALWAYS_INLINE void store(const Values (*values_)[1], int64_t n, int64_t query) const {
    values_[0][0].weight.store(w.scores + n * kGradientStride + query);
    values_[0][0].grad_raw.store(w.grads + n * kGradientStride + query);
  }
#if defined(__AVX512BF16__)
  // Two keys by 32 queries: pairs along queries, and those of the gradients along keys too.
  PYFAST_ALWAYS_INLINE void store(const Values (*values_)[2], int64_t n, int64_t query) const {
    __m512i grads[2];
    for (int r = 0; r < 2; ++r) {
      const Values& low = values_[r][0];
      const Values& high = values_[r][1];
      float* const row = w.scores + (n + r) * kGradientStride;
      _mm512_storeu_si512(reinterpret_cast<BFloat16*>(row) + query,
                          (__m512i)_mm512_cvtne2ps_pbh(high.weight.v, low.weight.v));
      grads[r] = (__m512i)_mm512_cvtne2ps_pbh(high.grad_raw.v, low.grad_raw.v);
      float* const grad_row = w.grads + (n + r) * kGradientStride;
      _mm512_storeu_si512(reinterpret_cast<BFloat16*>(grad_row) + query, grads[r]);
    }
    store_interleaved(grads[0], grads[1], w.pairs + n / 2 * kGradientStride + query);
  }
#endif
};

}  // namespace pyfast::PYFAST_ISA
