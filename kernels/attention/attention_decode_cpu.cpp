// Attention of a few queries over many keys. A piece of work is a split of the keys of one key
// head; in chunks of 128 keys all rows read the keys, then the values, which are fetched ahead.
// Bound by the bytes of keys and values: no more arithmetic than hides behind them is spent on a
// row of either. Splits have their own softmax and are combined in order.
#include "../common/parallel.h"
#include "../common/workspace.h"
#include "attention.h"
#include "attention_decode.h"

namespace pyfast::PYFAST_ISA {
namespace {

// One split of the keys that a key head's queries see. Its partial result goes to scratch:
// [batch * heads * num_queries][splits][sum, maximum, values].
template <typename T, typename TK>
void work_on_split(const AttentionParams& p, int64_t batch, int64_t key_head, int64_t split,
                   int64_t splits) {
  const int64_t group = p.heads / p.key_heads;
  const Head first = head_of(p, batch, key_head * group);
  DecodeWorkspace w;
  char* const memory = static_cast<char*>(thread_workspace(w.lay_out(p, nullptr)));
  w.lay_out(p, memory);
  Decode<T, TK> decode(p, first, w);
  const Range visible = decode.visible();
  const int64_t num_keys = visible.end - visible.first;
  const int64_t used = maximum_of<int64_t>(1, minimum_of(splits, num_keys / kMinSplitKeys));
  const int64_t length = ((num_keys + used - 1) / used + 3) / 4 * 4;
  const int64_t begin = minimum_of(visible.end, visible.first + split * length);
  decode.split(begin, minimum_of(visible.end, begin + length));
  const int64_t columns = whole_lanes(p.value_size), size = padded_size(p.value_size) + 2;
  for (int64_t r = 0; r < decode_rows(p); ++r) {
    const int64_t row = (batch * p.heads + first.head) * p.num_queries + r;
    float* const to = p.scratch + (row * splits + split) * size;
    to[0] = w.sum[r];
    to[1] = w.top[r];
    for (int64_t j = 0; j < columns; j += kLanes) {
      Lanes::load(w.out + r * columns + j).store(to + 2 + j);
    }
  }
}

template <typename T>
void combine(const AttentionParams& p, int64_t row, int64_t splits) {
  const int64_t head = row / p.num_queries % p.heads, batch = row / p.num_queries / p.heads;
  const int64_t size = padded_size(p.value_size) + 2;
  const float* const parts = p.scratch + row * splits * size;
  const float sink = p.sinks != nullptr ? p.sinks[head] : -kInfinity;
  float top = sink;
  for (int64_t s = 0; s < splits; ++s) top = maximum_of(top, parts[s * size + 1]);
  const float reached = top == -kInfinity ? 0.0f : top;
  float sum = sink == -kInfinity ? 0.0f : expf(sink - reached);
  float shrink[kEnoughPieces];
  for (int64_t s = 0; s < splits; ++s) {
    shrink[s] = expf(parts[s * size + 1] - reached);
    sum += shrink[s] * parts[s * size];
  }
  T* const to = row_pointer<T>(p.out, batch, head, row % p.num_queries);
  const Lanes factor = Lanes::broadcast(sum == 0.0f ? 0.0f : 1.0f / sum);
  for (int64_t j = 0; j < p.value_size; j += kLanes) {
    Lanes value = Lanes::broadcast(0.0f);
    for (int64_t s = 0; s < splits; ++s) {
      value = fused(Lanes::load(parts + s * size + 2 + j), Lanes::broadcast(shrink[s]), value);
    }
    value = value * factor;
    if (j + kLanes <= p.value_size) {
      value.store(to + j);
    } else {
      value.store(to + j, static_cast<int>(p.value_size - j));
    }
  }
  p.lse[row] = sum == 0.0f ? -kInfinity : reached + logf(sum);
}

template <typename T>
void run(const T* /*type*/, const AttentionParams& p, int num_threads) {
  const int64_t splits = num_splits(p);
  parallel_for_each(p.batch * p.key_heads * splits, num_threads, [&](int64_t piece) {
    const int64_t head = piece / splits;
    if (p.k_scale.data != nullptr) {
      work_on_split<T, int8_t>(p, head / p.key_heads, head % p.key_heads, piece % splits, splits);
    } else {
      work_on_split<T, T>(p, head / p.key_heads, head % p.key_heads, piece % splits, splits);
    }
  });
  for (int64_t row = 0; row < p.batch * p.heads * p.num_queries; ++row) {
    combine<T>(p, row, splits);
  }
}

}  // namespace

void attention_decode_cpu(const AttentionParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return run(static_cast<float*>(nullptr), params, num_threads);
    case DType::kBFloat16:
      return run(static_cast<BFloat16*>(nullptr), params, num_threads);
    case DType::kFloat16:
      return run(static_cast<Float16*>(nullptr), params, num_threads);
    case DType::kFloat64:
      return;  // the reference computes it
  }
}

}  // namespace pyfast::PYFAST_ISA
