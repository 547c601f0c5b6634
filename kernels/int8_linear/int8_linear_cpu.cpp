// Passes over up to 512 rows of x. First the rows become units, quantized on the way; then the weights
// are taken in blocks, by threads, and multiplied with all rows of the pass; sums turn into results
// while they are in L1. Few rows are left as they are (int8_dot.h), more are packed in panels
// (int8_tile.h).
#include "../common/parallel.h"
#include "../common/workspace.h"
#include "int8_dot.h"
#include "int8_finish.h"
#include "int8_tile.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kPassRows = 512;
constexpr int64_t kMinWorkPerThread = 1 << 18;  // multiplications; fewer are not worth a thread
constexpr int64_t kPadUnits = 16;               // rows of a multiple of 4 KB would share their sets

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Shares of one workspace.
class Memory {
 public:
  explicit Memory(char* begin) : next_(begin) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return taken;
  }
  template <typename T>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

 private:
  char* next_;
};

int64_t threads_for(int64_t work, int64_t num_threads) {
  const int64_t useful = work / kMinWorkPerThread;
  return num_threads < useful ? num_threads : useful;
}

// Row `row` of x as units; returns its scale.
template <typename Unit, bool kSigned>
float units_of_row(const Int8LinearParams& p, int64_t row, int8_t* values, uint32_t* units,
                   int64_t num_units) {
  float scale = 1.0f;
  if (p.x_is_int8) {
    if constexpr (Unit::kIsInteger) {
      const int8_t* from = static_cast<const int8_t*>(p.x) + row * p.k;
      spread_values<Unit, kSigned>(from, p.k, units, num_units);
      if (p.input_scale != nullptr) scale = p.input_scale[row];
    }
    return scale;
  }
  dispatch_dtype(p.x_dtype, [&](auto* type) {
    if constexpr (sizeof(*type) <= 4) {
      const auto* from = static_cast<decltype(type)>(const_cast<void*>(p.x)) + row * p.k;
      scale = convert_row<Unit, kSigned>(p, from, row, values, units, num_units);
    }
  });
  return scale;
}

template <typename Dot>
void multiply_few(const Int8LinearParams& p, int64_t num_threads) {
  using Unit = typename Dot::Unit;
  constexpr int64_t kBlock = 16;
  const int64_t num_units = round_up(p.k, Dot::kStep) / Unit::kElements;
  char* workspace = static_cast<char*>(thread_workspace(
      Memory::bytes<uint32_t>(p.m * num_units) + Memory::bytes<int8_t>(p.k) +
      Memory::bytes<float>(p.m)));
  Memory memory(workspace);
  uint32_t* units = memory.take<uint32_t>(p.m * num_units);
  int8_t* values = memory.take<int8_t>(p.k);
  float* scales = memory.take<float>(p.m);
  for (int64_t row = 0; row < p.m; ++row) {
    scales[row] = units_of_row<Unit, false>(p, row, values, units + row * num_units, num_units);
  }
  const int64_t num_blocks = (p.n + kBlock - 1) / kBlock;
  parallel_for(num_blocks, num_threads, [&](int64_t begin, int64_t end, int64_t) {
    alignas(64) float sums[kMaxFewRows * kBlock] = {};
    ColumnTerms terms = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      const int64_t count = p.n - first < kBlock ? p.n - first : kBlock;
      dot_block<Dot>(p.weight + first * p.k, count, p.k, units, num_units, p.m, sums, kBlock);
      terms.load(p, first, count);
      finish<Unit::kIsInteger>(p, terms, sums, kBlock, scales, 0, p.m, first, count);
    }
  });
}

// One pass: the rows of x from first_row on.
template <typename Unit>
struct Pass {
  const Int8LinearParams& p;
  int64_t first_row;
  int64_t rows;
  int64_t num_units;  // of a row, in whole vectors
  uint32_t* panels;   // [panel][unit][kPanel]
  float* scales;      // [row]
  char* scratch;      // of each thread
  int64_t scratch_bytes;

  static constexpr bool kUsesTiles = kHasTiles && Unit::kElements >= 2;
  static constexpr bool kSigned = kUsesTiles;
  static constexpr bool kIsDirect = Unit::kElements == 4;

  int64_t num_panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t vectors_of(int64_t panel) const {
    const int64_t left = rows - panel * kPanel;
    return left < kPanel ? (left + kLanes - 1) / kLanes : kTileVectors;
  }

  // Rows [group * kLanes, ...) into their vector of a panel.
  void pack(int64_t group, int64_t thread) const {
    Memory memory(scratch + thread * scratch_bytes);
    uint32_t* units = memory.take<uint32_t>(kLanes * num_units);
    int8_t* values = memory.take<int8_t>(p.k);
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = group * kLanes + i;
      uint32_t* to = units + i * num_units;
      if (row < rows) {
        scales[row] = units_of_row<Unit, kSigned>(p, first_row + row, values, to, num_units);
      } else {
        memset(to, 0, static_cast<size_t>(num_units) * 4);
      }
    }
    uint32_t* panel = panels + group / kTileVectors * num_units * kPanel +
                      group % kTileVectors * kLanes;
    for (int64_t u = 0; u < num_units; u += kLanes) {
      transpose_lanes(reinterpret_cast<const float*>(units) + u, num_units,
                      reinterpret_cast<float*>(panel) + u * kPanel, kPanel);
    }
  }

  // What of the sums of unsigned bytes is too much: 128 times the sum of a row of weights.
  void find_excess(const int8_t* weights, int64_t count, ColumnTerms* terms) const {
#if defined(__AVX512VNNI__)
    if constexpr (Unit::kElements == 4 && !kSigned) {
      for (int64_t row = 0; row < count; ++row) {
        ByteDot excess;
        int64_t j = 0;
        for (; j + 64 <= p.k; j += 64) {
          excess.add_excess(ByteDot::weights(weights + row * p.k + j, 64));
        }
        if (j < p.k) {
          excess.add_excess(
              ByteDot::weights(weights + row * p.k + j, static_cast<int>(p.k - j)));
        }
        terms->excess[row] = excess.sum();
      }
    }
#endif
    (void)weights;
    (void)count;
    (void)terms;
  }

  void multiply_weights(int64_t block, int64_t first_panel, int64_t end_panel,
                        int64_t thread) const {
    const int64_t first = block * kBlockRows;
    const int64_t count = p.n - first < kBlockRows ? p.n - first : kBlockRows;
    const int8_t* weights = p.weight + first * p.k;
    const int64_t alignment = kUsesTiles ? 64 : 4;
    LeftOperand left = {reinterpret_cast<const uint32_t*>(weights), p.k / 4};
    int64_t used_units = num_units;
    const bool is_direct =
        kIsDirect && p.k % alignment == 0 && (!kUsesTiles || count == kBlockRows);
    if (is_direct) {
      used_units = p.k / 4;
    } else {
      const int64_t stride = num_units + kPadUnits;
      auto* converted = reinterpret_cast<uint32_t*>(scratch + thread * scratch_bytes);
      for (int64_t row = 0; row < count; ++row) {
        convert_weights<Unit>(weights + row * p.k, p.k, converted + row * stride, num_units);
      }
      if (kUsesTiles && count < kBlockRows) {
        memset(converted + count * stride, 0,
               static_cast<size_t>((round_up(count, 32) - count) * stride) * 4);
      }
      left = {converted, stride};
    }
    ColumnTerms terms = {};
    terms.load(p, first, count);
    find_excess(weights, count, &terms);
    alignas(64) float sums[kBlockRows * kPanel];
    alignas(64) float turned[kPanel * kBlockRows];
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const uint32_t* x = panels + panel * num_units * kPanel;
      const int64_t vectors = vectors_of(panel);
#if defined(__AMX_INT8__)
      if constexpr (kUsesTiles) {
        multiply_block_of_tiles<Unit>(reinterpret_cast<const char*>(left.data), left.stride * 4, x,
                                      sums, count, vectors, used_units, nullptr);
      } else {
        multiply_block<Unit>(left, x, sums, count, vectors, used_units);
      }
#else
      multiply_block<Unit>(left, x, sums, count, vectors, used_units);
#endif
      for (int64_t row = 0; row < count; row += kLanes) {
        for (int64_t vector = 0; vector < vectors; ++vector) {
          transpose_lanes(sums + row * kPanel + vector * kLanes, kPanel,
                          turned + vector * kLanes * kBlockRows + row, kBlockRows);
        }
      }
      const int64_t begin = panel * kPanel;
      finish<Unit::kIsInteger>(p, terms, turned, kBlockRows, scales + begin, first_row + begin,
                               rows - begin < kPanel ? rows - begin : kPanel, first, count);
    }
  }
};

template <typename Unit>
void multiply_many(const Int8LinearParams& p, int64_t num_threads) {
  const int64_t num_units = round_up((p.k + Unit::kElements - 1) / Unit::kElements, kLanes);
  const int64_t most_rows = round_up(p.m < kPassRows ? p.m : kPassRows, kPanel);
  const int64_t threads = num_threads < 1 ? 1 : num_threads;
  const int64_t pack_bytes =
      Memory::bytes<uint32_t>(kLanes * num_units) + Memory::bytes<int8_t>(p.k);
  const int64_t weight_bytes = Memory::bytes<uint32_t>(kBlockRows * (num_units + kPadUnits));
  const int64_t scratch_bytes = pack_bytes > weight_bytes ? pack_bytes : weight_bytes;
  Memory memory(static_cast<char*>(thread_workspace(
      Memory::bytes<uint32_t>(most_rows * num_units) + Memory::bytes<float>(most_rows) +
      threads * scratch_bytes)));
  uint32_t* panels = memory.take<uint32_t>(most_rows * num_units);
  float* scales = memory.take<float>(most_rows);
  char* scratch = memory.take<char>(threads * scratch_bytes);
  const int64_t num_blocks = (p.n + kBlockRows - 1) / kBlockRows;
  for (int64_t first_row = 0; first_row < p.m; first_row += kPassRows) {
    const int64_t rows = p.m - first_row < kPassRows ? p.m - first_row : kPassRows;
    const Pass<Unit> pass = {p,      first_row, rows,    num_units,
                             panels, scales,    scratch, scratch_bytes};
    const int64_t num_groups = round_up(rows, kLanes) / kLanes;
    parallel_for(num_groups, threads, [&](int64_t begin, int64_t end, int64_t thread) {
      for (int64_t group = begin; group < end; ++group) pass.pack(group, thread);
    });
    // Where there are few blocks, each is done for parts of the panels apart.
    const int64_t panels_of_pass = pass.num_panels();
    const int64_t wanted = (4 * threads + num_blocks - 1) / num_blocks;
    const int64_t parts = wanted < panels_of_pass ? wanted : panels_of_pass;
    parallel_for(num_blocks * parts, threads, [&](int64_t begin, int64_t end, int64_t thread) {
#if defined(__AMX_INT8__)
      const Tiles tiles;
#endif
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t part = piece % parts;
        pass.multiply_weights(piece / parts, panels_of_pass * part / parts,
                              panels_of_pass * (part + 1) / parts, thread);
      }
    });
  }
}

#if defined(__AVX512VNNI__)
using IntegerUnit = ByteUnit;
using IntegerDot = ByteDot;
#else
using IntegerUnit = WordUnit;
using IntegerDot = WordDot;
#endif

}  // namespace

void int8_linear_cpu(const Int8LinearParams& params, int num_threads) {
  if (params.m == 0 || params.n == 0) return;
  const int64_t threads = threads_for(params.m * params.n * params.k, num_threads);
  const bool is_few = params.m <= kMaxFewRows;
  if (!params.weight_only) {
    return is_few ? multiply_few<IntegerDot>(params, threads)
                  : multiply_many<IntegerUnit>(params, threads);
  }
  if (is_few) return multiply_few<FloatDot>(params, threads);
#if defined(__AVX512BF16__)
  // (With `smooth`, x is float32 from there on.)
  if (params.x_dtype == DType::kBFloat16 && params.smooth == nullptr) return multiply_many<PairWeightUnit>(params, threads);
#endif
  multiply_many<FloatWeightUnit>(params, threads);
}

}  // namespace pyfast::PYFAST_ISA
