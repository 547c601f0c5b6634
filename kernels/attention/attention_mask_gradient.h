// The gradient of an additive mask: that of the scores, summed over the dimensions in which the
// mask is broadcast.
#pragma once

#include "../common/parallel.h"
#include "../common/workspace.h"
#include "attention_gradient.h"

namespace pyfast::PYFAST_ISA {

// True where each score has an element of the mask, though heads and batches may share it: the
// backward pass then adds the gradients of each block as it goes.
inline bool has_mask_of_scores(const AttentionBackwardParams& params) {
  return params.grad_mask != nullptr && params.grad_mask_size[2] == params.forward.num_queries &&
         params.grad_mask_size[3] == params.forward.num_keys;
}

// Who adds to a tile of the mask that several pieces of work share: each after the one before it,
// so that sums have one order, whatever the threads. All pieces go through the same steps.
struct MaskTurn {
  const Counter* previous;  // steps that the piece before has done, or null
  Counter* done;
  int64_t step;

  void wait() const {
    if (previous != nullptr) previous->wait_above(step);
  }
  void pass_on() { step = done->next() + 1; }
};

// grad_mask += the gradients of the scores of a block, which lie where its mask was.
inline void add_mask_gradient(const AttentionBackwardParams& params, const Head& h, const Block& b,
                              const float* grad_scores) {
  const int64_t* const size = params.grad_mask_size;
  const int64_t batch = size[0] == 1 ? 0 : h.batch, head = size[1] == 1 ? 0 : h.head;
  float* const to = params.grad_mask + ((batch * size[1] + head) * size[2] + b.m0) * size[3] + b.n0;
  alignas(64) float transposed[kLanes * kLanes];
  for (int64_t m = 0; m < b.num_queries; m += kLanes) {
    const int64_t queries = minimum_of<int64_t>(kLanes, b.num_queries - m);
    const Range rows = visible_rows(h, b, m, m + queries);
    for (int64_t n = rows.first / kLanes * kLanes; n < rows.end; n += kLanes) {
      const int64_t keys = minimum_of<int64_t>(kLanes, b.num_keys - n);
      transpose_block(reinterpret_cast<const uint32_t*>(grad_scores + n * kGradientStride + m),
                      kGradientStride, reinterpret_cast<uint32_t*>(transposed), kLanes);
      for (int64_t i = 0; i < queries; ++i) {
        float* const at = to + (m + i) * size[3] + n;
        const Lanes sum = load_lanes_of(at, keys) + Lanes::load(transposed + i * kLanes);
        if (keys == kLanes) {
          sum.store(at);
        } else {
          sum.store(at, static_cast<int>(keys));
        }
      }
    }
  }
}

// The gradient of a mask that is broadcast over queries or keys, in a pass of its own. A piece of
// work is a tile of the mask; it sums over all that share the tile, in order, so that nothing
// larger than the mask is kept. Weights and gradients are recomputed for it: two products more.
template <typename T>
class MaskGradient {
 public:
  explicit MaskGradient(const AttentionBackwardParams& params)
      : params_(params), p_(params.forward), dropout_(score_dropout(params.forward)) {}

  void run(int num_threads) {
    const int64_t* const size = params_.grad_mask_size;
    const int64_t query_tiles = tiles(size[2], kGradientQueries);
    const int64_t key_tiles = tiles(size[3], kGradientKeys);
    parallel_for_each(size[0] * size[1] * query_tiles * key_tiles, num_threads, [&](int64_t i) {
      const int64_t key_tile = i % key_tiles, query_tile = i / key_tiles % query_tiles;
      const int64_t head = i / key_tiles / query_tiles % size[1];
      tile(i / key_tiles / query_tiles / size[1], head, query_tile, key_tile);
    });
  }

 private:
  static int64_t tiles(int64_t size, int64_t block) { return (size + block - 1) / block; }

  // The indices of a dimension that share index i of the mask: [first, end).
  static Range shared(int64_t mask_size, int64_t i, int64_t size) {
    return mask_size == 1 ? Range{0, size} : Range{i, i + 1};
  }

  void tile(int64_t batch, int64_t head, int64_t query_tile, int64_t key_tile) {
    const int64_t* const size = params_.grad_mask_size;
    GradientWorkspace w;
    const int64_t fixed = w.lay_out(p_, nullptr);
    constexpr int64_t kSums = kGradientKeys * kGradientStride;
    char* const memory = static_cast<char*>(thread_workspace(fixed + kSums * 4));
    w.lay_out(p_, memory);
    float* const sums = reinterpret_cast<float*>(memory + fixed);
    for (int64_t i = 0; i < kSums; ++i) sums[i] = 0.0f;
    const Range queries = shared(size[2], query_tile, tiles(p_.num_queries, kGradientQueries));
    const Range keys = shared(size[3], key_tile, tiles(p_.num_keys, kGradientKeys));
    const Range batches = shared(size[0], batch, p_.batch), heads = shared(size[1], head, p_.heads);
    for (int64_t b = batches.first; b < batches.end; ++b) {
      for (int64_t z = heads.first; z < heads.end; ++z) {
        const Head h = head_of(p_, b, z);
        const ScoreRule rule = score_rule(p_, h);
        const Gradients<T> gradients = {params_, h, rule, dropout_, w, false};
        for (int64_t j = keys.first; j < keys.end; ++j) {
          const int64_t n0 = j * kGradientKeys;
          const int64_t num_keys = minimum_of(kGradientKeys, p_.num_keys - n0);
          const Keys<T> operands(p_, h, n0, num_keys, w);
          for (int64_t i = queries.first; i < queries.end; ++i) {
            const int64_t m0 = i * kGradientQueries;
            const Block block = {n0, num_keys, m0,
                                 minimum_of(kGradientQueries, p_.num_queries - m0)};
            gradients.products(block, operands);
            add(gradients, block, sums);
          }
        }
      }
    }
    store(sums, batch, head, query_tile * kGradientQueries, key_tile * kGradientKeys);
  }

  void add(const Gradients<T>& gradients, const Block& b, float* sums) const {
    const Lanes factor = gradients.factor();
    for (int64_t n = 0; n < b.num_keys; ++n) {
      const Range seen = visible_vectors(gradients.h, b, n, n + 1);
      for (int64_t v = seen.first; v < seen.end; ++v) {
        float* const at = sums + n * kGradientStride + v * kLanes;
        const auto values = gradients.template values<false>(b, n, v * kLanes, true, factor);
        (Lanes::load(at) + values.grad_score).store(at);
      }
    }
  }

  void store(float* sums, int64_t batch, int64_t head, int64_t m0, int64_t n0) const {
    const int64_t* const size = params_.grad_mask_size;
    const bool by_query = size[2] != 1, by_key = size[3] != 1;
    const int64_t num_queries = by_query ? minimum_of(kGradientQueries, size[2] - m0) : 1;
    const int64_t num_keys = by_key ? minimum_of(kGradientKeys, size[3] - n0) : 1;
    float* const to = params_.grad_mask + ((batch * size[1] + head) * size[2] + m0) * size[3] + n0;
    if (!by_key) {  // the sum over all rows, in row 0
      for (int64_t n = 1; n < kGradientKeys; ++n) {
        for (int64_t m = 0; m < kGradientQueries; ++m) sums[m] += sums[n * kGradientStride + m];
      }
    }
    for (int64_t n = 0; n < num_keys; ++n) {
      const float* const row = sums + n * kGradientStride;
      if (by_query) {
        for (int64_t m = 0; m < num_queries; ++m) to[m * size[3] + n] = row[m];
      } else {
        float sum = 0.0f;
        for (int64_t m = 0; m < kGradientQueries; ++m) sum += row[m];
        to[n] = sum;
      }
    }
  }

  const AttentionBackwardParams& params_;
  const AttentionParams& p_;
  const ScoreDropout dropout_;
};

}  // namespace pyfast::PYFAST_ISA
