// Two readings of a block, of which the second is from cache: its range, then its values. Blocks
// that exceed a piece of 64K elements are cut: pieces find ranges first, then write. Bound by bytes
// (2 or 4 read, 1 written), see common/quantize_row.h.
#include "../common/parallel.h"
#include "../common/quantize_row.h"
#include "../common/workspace.h"
#include "quantize_int8.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kPieceSize = 1 << 16;
constexpr int64_t kMinPerThread = 1 << 14;  // elements; fewer are not worth a thread

struct Block {
  int64_t first;  // element of x
  int64_t column;
  int64_t size;
};

Block block_at(const QuantizeInt8Params& p, int64_t index, int64_t per_row) {
  const int64_t column = index % per_row * p.block_size;
  const int64_t left = p.row_size - column;
  return {index / per_row * p.row_size + column, column, left < p.block_size ? left : p.block_size};
}

template <bool kSymmetric, typename T>
void write_block(const QuantizeInt8Params& p, int64_t index, const Block& block,
                 const ValueRange& range, int64_t begin, int64_t end, bool stream) {
  const float given = p.scale_in == nullptr ? 0.0f : p.scale_in[p.has_one_scale_in ? 0 : index];
  const float scale = scale_of<kSymmetric>(range, given);
  const int32_t zero_point = kSymmetric ? 0 : zero_point_of(range, scale);
  if (begin == 0) {
    p.scale[index] = scale;
    if (!kSymmetric) p.zero_point[index] = zero_point;
  }
  const float* smooth = p.smooth == nullptr ? nullptr : p.smooth + block.column + begin;
  quantize_values(static_cast<const T*>(p.x) + block.first + begin, smooth, scale,
                  p.scale_in != nullptr, kSymmetric ? kMaxInt8 : kNoLimit, zero_point,
                  p.values + block.first + begin, end - begin, stream);
}

template <bool kSymmetric, typename T>
ValueRange range_of(const QuantizeInt8Params& p, const Block& block, int64_t begin, int64_t end) {
  const float* smooth = p.smooth == nullptr ? nullptr : p.smooth + block.column + begin;
  return value_range<kSymmetric>(static_cast<const T*>(p.x) + block.first + begin, smooth,
                                 end - begin);
}

template <bool kSymmetric, typename T>
void quantize(const T* /*type*/, const QuantizeInt8Params& params, int64_t num_threads) {
  const int64_t per_row = (params.row_size + params.block_size - 1) / params.block_size;
  const int64_t num_blocks = params.num_rows * per_row;
  const int64_t longest = params.block_size < params.row_size ? params.block_size : params.row_size;
  const bool stream = params.block_size % 64 == 0 &&
                      streams(params.values, params.num_rows, params.row_size, 1 + sizeof(T));
  if (longest <= kPieceSize) {
    parallel_for(num_blocks, num_threads, [&](int64_t begin, int64_t end, int64_t) {
      const QuantizeInt8Params p = params;  // of its own: no store can change it
      for (int64_t index = begin; index < end; ++index) {
        const Block block = block_at(p, index, per_row);
        const ValueRange range = range_of<kSymmetric, T>(p, block, 0, block.size);
        write_block<kSymmetric, T>(p, index, block, range, 0, block.size, stream);
      }
      if (stream) stream_fence();
    });
    return;
  }
  const int64_t per_block = (longest + kPieceSize - 1) / kPieceSize;
  const int64_t num_pieces = num_blocks * per_block;
  auto* ranges = static_cast<ValueRange*>(
      thread_workspace(num_pieces * static_cast<int64_t>(sizeof(ValueRange))));
  const auto piece_end = [](const Block& block, int64_t begin) {
    return begin + kPieceSize < block.size ? begin + kPieceSize : block.size;
  };
  parallel_for(num_pieces, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t piece = from; piece < to; ++piece) {
      const Block block = block_at(params, piece / per_block, per_row);
      const int64_t begin = piece % per_block * kPieceSize;
      ranges[piece] = begin < block.size
                          ? range_of<kSymmetric, T>(params, block, begin, piece_end(block, begin))
                          : ValueRange{};
    }
  });
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    ranges[piece / per_block * per_block].add(ranges[piece]);
  }
  parallel_for(num_pieces, num_threads, [&](int64_t from, int64_t to, int64_t) {
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t index = piece / per_block, begin = piece % per_block * kPieceSize;
      const Block block = block_at(params, index, per_row);
      if (begin >= block.size) continue;
      write_block<kSymmetric, T>(params, index, block, ranges[index * per_block], begin,
                                 piece_end(block, begin), stream);
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void quantize_int8_cpu(const QuantizeInt8Params& params, int num_threads) {
  const int64_t useful = params.num_rows * params.row_size / kMinPerThread;
  const int64_t threads = num_threads < useful ? num_threads : useful;
  dispatch_dtype(params.dtype, [&](auto* type) {
    if (params.zero_point == nullptr) {
      quantize<true>(type, params, threads);
    } else {
      quantize<false>(type, params, threads);
    }
  });
}

}  // namespace pyfast::PYFAST_ISA
