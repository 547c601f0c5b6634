// Scaled dot-product attention on the CPU: parameters of the forward pass, of the backward pass,
// and of both with a few queries over a cache. attention_reference.py states what is computed.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "../common/seed.h"

namespace pyfast {

constexpr int64_t kMaxHeadSize = 256;

// A tensor [batch, heads, length, size] whose last dimension is contiguous; strides in elements.
struct HeadsView {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

enum class MaskType : int { kNone, kBool, kFloat32, kBFloat16, kFloat16 };

struct AttentionParams {
  HeadsView q;    // [batch, heads, num_queries, head_size]
  HeadsView k;    // [batch, key_heads, num_keys, head_size]
  HeadsView v;    // [batch, key_heads, num_keys, value_size]
  HeadsView out;  // [batch, heads, num_queries, value_size]
  float* lse;     // [batch, heads, num_queries]
  DType dtype;
  int64_t batch, heads, key_heads, num_queries, num_keys, head_size, value_size;

  MaskType mask_type;
  const void* mask;  // indexed with the strides below, 0 where it is broadcast
  int64_t mask_stride[4];
  const float* alibi_slopes;  // [batch or 1, heads], or null
  int64_t slopes_batch_stride;
  const float* sinks;  // [heads], or null

  // Packed sequences: q and k hold num_sequences of them in their only batch. Null: as they are.
  const int64_t* cu_seqlens_q;  // [num_sequences + 1]
  const int64_t* cu_seqlens_k;
  int64_t num_sequences;

  // A cache: only the first `lengths[batch]` keys count, and may be int8 with a scale per token.
  const int64_t* lengths;  // [batch], or null
  HeadsView k_scale;       // [batch, key_heads, num_keys] float, row_stride is that of a token
  HeadsView v_scale;       // data is null where keys and values have q's type

  Seed seed;
  uint32_t threshold;
  float scale;
  float softcap;
  int64_t left, right;  // kFar for no bound
  bool bottom_right;

  float* scratch;  // of decode: decode_scratch_size floats
};

constexpr int64_t kFar = int64_t{1} << 40;

struct AttentionBackwardParams {
  AttentionParams forward;  // lse and out are inputs
  HeadsView grad_out;       // [batch, heads, num_queries, value_size]
  const float* grad_lse;    // [batch, heads, num_queries]
  float* delta;             // [batch, heads, num_queries]: written, sum(grad_out * out) - grad_lse
  HeadsView grad_q;
  HeadsView grad_k;
  HeadsView grad_v;
  float* grad_mask;  // contiguous, of the mask's sizes below, or null
  int64_t grad_mask_size[4];
  Counter* mask_steps;  // num_backward_pieces of them where there is a grad_mask
  float* scratch;       // attention_backward_scratch_size floats
};

// Keys are cut into chunks that are worked on independently, each with its own sum for grad_q:
// enough pieces for many cores, each of at least kMinChunkKeys. Depends on shapes alone, so that
// the result does not depend on the number of threads.
constexpr int64_t kMinChunkKeys = 512;
constexpr int64_t kEnoughPieces = 64;

inline int64_t num_key_chunks(const AttentionParams& p) {
  const int64_t heads = p.batch * p.key_heads;
  if (p.cu_seqlens_q != nullptr || heads == 0) return 1;
  const int64_t wanted = (kEnoughPieces + heads - 1) / heads;
  const int64_t most = p.num_keys / kMinChunkKeys;
  return wanted < most ? wanted : (most > 1 ? most : 1);
}

inline int64_t num_backward_pieces(const AttentionParams& p) {
  const int64_t sequences = p.cu_seqlens_q != nullptr ? p.num_sequences : p.batch;
  return num_key_chunks(p) * sequences * p.key_heads;
}

inline int64_t padded_size(int64_t size) { return (size + 15) / 16 * 16; }

// Floats: the sums for grad_q of every chunk, where there are several.
inline int64_t attention_backward_scratch_size(const AttentionParams& p) {
  const int64_t chunks = num_key_chunks(p);
  return chunks == 1 ? 0 : chunks * p.batch * p.heads * p.num_queries * padded_size(p.head_size);
}

// A few queries over many keys: bound by the bytes of keys and values. The queries that share a key
// head are rows that read its keys together, and the keys are cut into splits, each with its own
// softmax, that are combined at the end. A block of queries of one head would leave most of its
// lanes empty, and each head would read the keys again.
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewQueries = 8;
constexpr int64_t kMaxDecodeRows = 256;
constexpr int64_t kMinSplitKeys = 256;

inline int64_t decode_rows(const AttentionParams& p) {
  return p.heads / p.key_heads * p.num_queries;
}

inline bool is_decode(const AttentionParams& p) {
  if (p.key_heads == 0 || p.cu_seqlens_q != nullptr || p.threshold != 0) return false;
  if (p.mask_type != MaskType::kNone) return false;
  const int64_t rows = decode_rows(p);
  return rows <= kFewRows || (p.num_queries <= kFewQueries && rows <= kMaxDecodeRows);
}

inline int64_t num_splits(const AttentionParams& p) {
  const int64_t wanted = (kEnoughPieces + p.batch * p.key_heads - 1) / (p.batch * p.key_heads);
  const int64_t most = p.num_keys / kMinSplitKeys;
  return wanted < most ? wanted : (most > 1 ? most : 1);
}

// Floats: sum, maximum and sum of values of every row and split.
inline int64_t decode_scratch_size(const AttentionParams& p) {
  return p.batch * p.heads * p.num_queries * num_splits(p) * (padded_size(p.value_size) + 2);
}

PYFAST_CPU_TILE_KERNEL(attention_cpu, AttentionParams);
PYFAST_CPU_TILE_KERNEL(attention_decode_cpu, AttentionParams);
PYFAST_CPU_TILE_KERNEL(attention_backward_cpu, AttentionBackwardParams);

}  // namespace pyfast
