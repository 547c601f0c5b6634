// What the forward and the backward pass share: one head of one sequence, which of its scores are
// visible, and the scores of a block. Blocks are held transposed, a row for each key and a lane for
// each query: keys are then read where they are, the softmax runs down the rows, lane by lane, and
// both products that follow read the block as it lies.
#pragma once

#include "attention.h"
#include "attention_dropout.h"
#include "attention_pack.h"

namespace pyfast::PYFAST_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504089f;

template <typename A>
constexpr A minimum_of(A a, A b) {
  return a < b ? a : b;
}
template <typename A>
constexpr A maximum_of(A a, A b) {
  return a > b ? a : b;
}

// One query head of one sequence.
struct Head {
  int64_t batch, head, key_head;
  int64_t sequence;  // number for the dropout map and the slopes
  int64_t num_queries, num_keys;
  int64_t first_query, first_key;  // of the sequence in its packed batch
  int64_t offset;                  // query i stands at key i + offset
  int64_t left, right;
  float slope;

  // The keys [first, end) that queries [m, m_end) may see.
  int64_t first_visible_key(int64_t m) const {
    return maximum_of<int64_t>(0, minimum_of(num_keys, m + offset - left));
  }
  int64_t end_visible_key(int64_t m) const {
    return maximum_of<int64_t>(0, minimum_of(num_keys, m + offset + right + 1));
  }
  // The queries [first, end) that see key j.
  int64_t first_seeing_query(int64_t j) const {
    return maximum_of<int64_t>(0, minimum_of(num_queries, j - right - offset));
  }
  int64_t end_seeing_query(int64_t j) const {
    return maximum_of<int64_t>(0, minimum_of(num_queries, j + left - offset + 1));
  }
};

inline int64_t num_sequences(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr ? p.num_sequences : p.batch;
}

inline Head head_of(const AttentionParams& p, int64_t sequence, int64_t head) {
  Head h = {};
  const bool packed = p.cu_seqlens_q != nullptr;
  h.batch = packed ? 0 : sequence;
  h.sequence = sequence;
  h.head = head;
  h.key_head = head / (p.heads / p.key_heads);
  h.num_queries = p.num_queries;
  h.num_keys = p.num_keys;
  if (packed) {
    h.first_query = p.cu_seqlens_q[sequence];
    h.first_key = p.cu_seqlens_k[sequence];
    h.num_queries = p.cu_seqlens_q[sequence + 1] - h.first_query;
    h.num_keys = p.cu_seqlens_k[sequence + 1] - h.first_key;
  } else if (p.lengths != nullptr) {
    h.num_keys = p.lengths[sequence];
  }
  h.offset = p.bottom_right ? h.num_keys - h.num_queries : 0;
  h.left = p.left;
  h.right = p.right;
  if (p.alibi_slopes != nullptr) {
    h.slope = p.alibi_slopes[sequence * p.slopes_batch_stride + head];
  }
  return h;
}

template <typename T>
inline T* row_pointer(const HeadsView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}
template <typename T>
inline Rows<T> rows_of(const HeadsView& view, int64_t batch, int64_t head, int64_t first,
                       int64_t count, int64_t size) {
  return {row_pointer<T>(view, batch, head, first), view.row_stride, count, size};
}
template <typename T>
inline Rows<T> query_rows(const HeadsView& view, const Head& h, int64_t m, int64_t count,
                          int64_t size) {
  return rows_of<T>(view, h.batch, h.head, h.first_query + m, count, size);
}
template <typename T>
inline Rows<T> key_rows(const HeadsView& view, const Head& h, int64_t n, int64_t count,
                        int64_t size) {
  return rows_of<T>(view, h.batch, h.key_head, h.first_key + n, count, size);
}
// Of lse, delta and the like: [batch, heads, num_queries].
inline int64_t row_index(const AttentionParams& p, const Head& h, int64_t m) {
  return (h.batch * p.heads + h.head) * p.num_queries + h.first_query + m;
}

// A block of scores: keys [n0, n0 + num_keys) by queries [m0, m0 + num_queries).
struct Block {
  int64_t n0, num_keys;
  int64_t m0, num_queries;

  int64_t num_vectors() const { return (num_queries + kLanes - 1) / kLanes; }
};

// The vectors of queries [first, end) of the block that see one of keys [n0 + row, n0 + end_row).
struct Range {
  int64_t first, end;
};
inline Range visible_vectors(const Head& h, const Block& b, int64_t row, int64_t end_row) {
  const int64_t first = maximum_of<int64_t>(0, h.first_seeing_query(b.n0 + row) - b.m0);
  const int64_t end = minimum_of(b.num_queries, h.end_seeing_query(b.n0 + end_row - 1) - b.m0);
  return {first / kLanes, end <= first ? first / kLanes : (end + kLanes - 1) / kLanes};
}
// The vectors of which all lanes are queries that see all of these keys.
inline Range whole_vectors(const Head& h, const Block& b, int64_t row, int64_t end_row) {
  const int64_t first =
      maximum_of<int64_t>(0, h.first_seeing_query(b.n0 + end_row - 1) - b.m0 + kLanes - 1);
  return {first / kLanes, (h.end_seeing_query(b.n0 + row) - b.m0) / kLanes};
}
// The keys of the block that one of its queries [query, end_query) sees.
inline Range visible_rows(const Head& h, const Block& b, int64_t query, int64_t end_query) {
  const int64_t last = minimum_of(b.num_queries, end_query) - 1;
  const int64_t first = maximum_of<int64_t>(0, h.first_visible_key(b.m0 + query) - b.n0);
  const int64_t end = minimum_of(b.num_keys, h.end_visible_key(b.m0 + last) - b.n0);
  return first < end ? Range{first, end} : Range{0, 0};
}
// The keys that all lanes of a vector see: edges need their bits.
inline Range fully_visible_rows(const Head& h, const Block& b, int64_t query) {
  const int64_t last = minimum_of(b.num_queries, query + kLanes) - 1;
  const int64_t first = maximum_of<int64_t>(0, h.first_visible_key(b.m0 + last) - b.n0);
  const int64_t end = minimum_of(b.num_keys, h.end_visible_key(b.m0 + query) - b.n0);
  return first < end ? Range{first, end} : Range{0, 0};
}
// Bits of the lanes of query .. query + kLanes that see the key.
inline uint32_t visible_bits(const Head& h, const Block& b, int64_t row, int64_t query) {
  const int64_t m = b.m0 + query;
  const int64_t first = h.first_seeing_query(b.n0 + row) - m;
  const int64_t end = h.end_seeing_query(b.n0 + row) - m;
  const int64_t low = maximum_of<int64_t>(0, minimum_of<int64_t>(kLanes, first));
  const int64_t high = maximum_of<int64_t>(0, minimum_of<int64_t>(kLanes, end));
  if (high <= low) return 0;
  return static_cast<uint32_t>(((uint64_t{1} << high) - 1) & ~((uint64_t{1} << low) - 1));
}

// How raw products become scores, for one head.
struct ScoreRule {
  float scale;
  float softcap;
  float slope;
  bool has_slopes;
  bool has_mask;
  // True where scores are more than `scale` times the product: each is then computed by score().
  bool is_modified;
  bool has_key_scale;

  bool only_has_mask() const {
    return has_mask && softcap == 0.0f && !has_slopes && !has_key_scale;
  }
  // What a difference of two scores, as they are in memory, is in units of log2.
  float log2_factor() const { return is_modified ? kLog2E : scale * kLog2E; }
};

inline ScoreRule score_rule(const AttentionParams& p, const Head& h) {
  ScoreRule rule = {p.scale,
                    p.softcap,
                    h.slope,
                    p.alibi_slopes != nullptr,
                    p.mask_type != MaskType::kNone,
                    false,
                    p.k_scale.data != nullptr};
  const bool ordinary = p.scale > 0.0f && p.scale < kInfinity;
  rule.is_modified = !ordinary || rule.softcap > 0.0f || rule.has_slopes || rule.has_mask ||
                     p.sinks != nullptr || rule.has_key_scale;
  return rule;
}

// -Inf hides whatever the score is.
PYFAST_ALWAYS_INLINE Lanes masked(Lanes s, Lanes bias) {
  const Lanes hidden = Lanes::broadcast(-kInfinity);
  return select(equal(bias, hidden), hidden, s + bias);
}

// The raw product scaled, capped, biased and masked. `derivative` is that
// of the cap. `bias` is the additive mask.
PYFAST_LANE_FUNCTION Lanes score(const ScoreRule& rule, Lanes raw, Lanes distance, Lanes bias,
                                 Lanes* derivative) {
  Lanes s = raw * Lanes::broadcast(rule.scale);
  if (rule.softcap > 0.0f) {
    const Lanes t = hyperbolic_tangent(quotient(s, Lanes::broadcast(rule.softcap)));
    s = t * Lanes::broadcast(rule.softcap);
    *derivative = Lanes::broadcast(1.0f) - t * t;
  }
  if (rule.has_slopes) s = s - Lanes::broadcast(rule.slope) * magnitude(distance);
  return rule.has_mask ? masked(s, bias) : s;
}

// i' - j of the lanes.
PYFAST_ALWAYS_INLINE Lanes distances(const Head& h, const Block& b, int64_t row, int64_t query) {
  alignas(64) static const float kSteps[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t first = b.m0 + query + h.offset - b.n0 - row;
  return Lanes::load(kSteps) + Lanes::broadcast(static_cast<float>(first));
}

template <typename T>
PYFAST_ALWAYS_INLINE Lanes mask_lanes(const T* from, int64_t n) {
  return load_lanes_of(from, n);
}
template <>
PYFAST_ALWAYS_INLINE Lanes mask_lanes(const uint8_t* from, int64_t n) {
  float values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) values[i] = i < n && from[i] == 0 ? -kInfinity : 0.0f;
  return Lanes::load(values);
}
inline float mask_value(uint8_t value) { return value == 0 ? -kInfinity : 0.0f; }
template <typename T>
inline float mask_value(T value) {
  return to_float(value);
}

// The additive mask of a block, tile[row * stride + query], where it is visible; a bool mask
// becomes 0 and -Inf. The tile has whole lanes of rows.
template <typename T>
inline void load_mask(const AttentionParams& p, const Head& h, const Block& b, float* tile,
                      int64_t stride) {
  const T* const mask = static_cast<const T*>(p.mask) + h.batch * p.mask_stride[0] +
                        h.head * p.mask_stride[1] + b.m0 * p.mask_stride[2] +
                        b.n0 * p.mask_stride[3];
  const int64_t query_stride = p.mask_stride[2], key_stride = p.mask_stride[3];
  if (query_stride == 0) {  // one value for all queries of a key
    for (int64_t n = 0; n < b.num_keys; ++n) {
      const Lanes value = Lanes::broadcast(mask_value(mask[n * key_stride]));
      for (int64_t v = 0; v < b.num_vectors(); ++v) value.store(tile + n * stride + v * kLanes);
    }
    return;
  }
  alignas(64) float block[kLanes * kLanes] = {};
  for (int64_t m = 0; m < b.num_queries; m += kLanes) {
    const int64_t queries = minimum_of<int64_t>(kLanes, b.num_queries - m);
    for (int64_t n = 0; n < b.num_keys; n += kLanes) {
      const Range seen = visible_vectors(h, b, n, minimum_of(b.num_keys, n + kLanes));
      if (m < seen.first * kLanes || m >= seen.end * kLanes) continue;
      const int64_t keys = minimum_of<int64_t>(kLanes, b.num_keys - n);
      const T* const corner = mask + m * query_stride + n * key_stride;
      uint32_t* const to = reinterpret_cast<uint32_t*>(tile + n * stride + m);
      if constexpr (sizeof(T) == 4) {
        if (key_stride == 1 && queries == kLanes && keys == kLanes) {
          transpose_block(reinterpret_cast<const uint32_t*>(corner), query_stride, to, stride);
          continue;
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        if (key_stride == 1) {
          mask_lanes(corner + i * query_stride, keys).store(block + i * kLanes);
        } else {
          for (int64_t j = 0; j < keys; ++j) {
            block[i * kLanes + j] = mask_value(corner[i * query_stride + j * key_stride]);
          }
        }
      }
      transpose_block(reinterpret_cast<const uint32_t*>(block), kLanes, to, stride);
    }
  }
}

inline void load_mask_tile(const AttentionParams& p, const Head& h, const Block& b, float* tile,
                           int64_t stride) {
  switch (p.mask_type) {
    case MaskType::kNone:
      return;
    case MaskType::kBool:
      return load_mask<uint8_t>(p, h, b, tile, stride);
    case MaskType::kFloat32:
      return load_mask<float>(p, h, b, tile, stride);
    case MaskType::kBFloat16:
      return load_mask<BFloat16>(p, h, b, tile, stride);
    case MaskType::kFloat16:
      return load_mask<Float16>(p, h, b, tile, stride);
  }
}

inline ScoreDropout score_dropout(const AttentionParams& p) {
  const float scale =
      p.threshold < 65536 ? 65536.0f / static_cast<float>(65536 - p.threshold) : 0.0f;
  return {seed_value(p.seed), p.threshold, scale};
}

// Keep bits of a block whose first key is a multiple of 32: bit i of keep[row * stride + i / 16].
inline void draw_keep_bits(const ScoreDropout& rule, const AttentionParams& p, const Head& h,
                           const Block& b, uint16_t* keep, int64_t stride) {
  const uint32_t z = static_cast<uint32_t>(p.seed.first + h.sequence * p.seed.step + h.head);
  for (int64_t row = 0; row < b.num_keys; row += kGroupKeys) {
    const Range vectors = visible_vectors(h, b, row, row + kGroupKeys);
    const int64_t end = vectors.end * kLanes;
    for (int64_t m = vectors.first * kLanes / kGroupQueries * kGroupQueries; m < end;
         m += kGroupQueries) {
      keep_scores(rule, z, b.n0 + row, b.m0 + m, keep + row * stride + m / kGroupQueries, stride);
    }
  }
}
PYFAST_ALWAYS_INLINE uint32_t keep_lanes(const uint16_t* keep, int64_t query) {
  if constexpr (kLanes == 16) return keep[query / 16];
  return reinterpret_cast<const uint8_t*>(keep)[query / 8];
}

}  // namespace pyfast::PYFAST_ISA
