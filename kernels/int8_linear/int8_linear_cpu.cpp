// Passes over up to 512 rows of x (or digits of them). First the rows become units, quantized on
// the way; then the weights are taken in blocks, by threads, and multiplied with all rows of the
// pass; sums turn into results while they are in L1. Few rows are left as they are (int8_dot.h),
// more are packed in panels (int8_tile.h).
#include "../common/parallel.h"
#include "../common/workspace.h"
#include "int8_amx.h"
#include "int8_dot.h"
#include "int8_finish.h"

namespace pyfast::PYFAST_ISA {
namespace {

template <typename Unit>
constexpr int64_t kPassRows = 512 / Unit::kDigits;
constexpr int64_t kMinWorkPerThread = 1 << 18;  // multiplications; fewer are not worth a thread
constexpr int64_t kPartUnits = 256;             // of a panel's rows: 32 KB
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
      scale = convert_row<Unit, kSigned>(p, from, values, units, num_units);
    }
  });
  return scale;
}

Int8LinearParams row_of(const Int8LinearParams& p, int64_t row) {
  Int8LinearParams one = p;
  one.m = 1;
  const auto offset = [row](DType dtype, int64_t size) {
    int64_t bytes = 0;
    dispatch_dtype(dtype, [&](auto* type) { bytes = row * size * int64_t{sizeof(*type)}; });
    return bytes;
  };
  one.x = static_cast<const char*>(p.x) + offset(p.x_dtype, p.k);
  one.y = static_cast<char*>(p.y) + offset(p.y_dtype, p.n);
  return one;
}

template <typename Dot>
void multiply_few(const Int8LinearParams& p, int64_t num_threads) {
  using Unit = typename Dot::Unit;
  constexpr int64_t kBlock = 16;
  const int64_t num_units = round_up(p.k, Dot::kStep) / Unit::kElements;
  char* workspace =
      static_cast<char*>(thread_workspace(Memory::bytes<uint32_t>(p.m * num_units) +
                                          Memory::bytes<int8_t>(p.k) + Memory::bytes<float>(p.m)));
  Memory memory(workspace);
  uint32_t* units = memory.take<uint32_t>(p.m * num_units);
  int8_t* values = memory.take<int8_t>(p.k);
  float* scales = memory.take<float>(p.m);
  for (int64_t row = 0; row < p.m; ++row) {
    scales[row] = units_of_row<Unit, false>(p, row, values, units + row * num_units, num_units);
  }
  const int64_t num_blocks = (p.n + kBlock - 1) / kBlock;
  parallel_for(num_blocks, num_threads, [&](int64_t begin, int64_t end, int64_t) {
    alignas(64) float sums[8 * kBlock] = {};
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
  uint32_t* panels;   // [panel][unit][kPanel], or in tiles [panel][unit / 16][vector][16][kLanes]
  float* scales;      // [row]
  char* scratch;      // of each thread
  int64_t scratch_bytes;

  static constexpr int64_t kPanel = PYFAST_ISA::kPanel<Unit>;
  static constexpr bool kUsesTiles = PYFAST_ISA::kUsesTiles<Unit>;
  static constexpr bool kSigned = kUsesTiles;
  static constexpr bool kConverts = kUsesTiles && !Unit::kIsInteger;
  static constexpr int64_t kDigits = Unit::kDigits;
  static constexpr int64_t kPanelRows = kPanel / kDigits;  // of x
  // What is packed at a time: a vector, or, where a row's digits may lie in two, a panel.
  static constexpr int64_t kGroupVectors = kDigits == 1 ? 1 : kPanel / kLanes;
  static constexpr int64_t kGroupRows = kGroupVectors * kLanes / kDigits;
  // In units: from one vector of a panel to the next, from one unit of a vector to the next.
  static constexpr int64_t kVectorOffset = kUsesTiles ? kTileUnits : kLanes;
  static constexpr int64_t kRowStride = kUsesTiles ? kLanes : kPanel;

  int64_t num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  int64_t num_groups() const { return (rows + kGroupRows - 1) / kGroupRows; }
  int64_t rows_of(int64_t panel) const {
    const int64_t left = rows - panel * kPanelRows;
    return left < kPanelRows ? left : kPanelRows;
  }
  int64_t vectors_of(int64_t panel) const {
    return (rows_of(panel) * kDigits + kLanes - 1) / kLanes;
  }

  // Weights of one panel are converted just before they are used, and once.
  bool converts_late() const { return kConverts && num_panels() == 1; }

  // Rows [group * kGroupRows, ...) into their vectors of a panel.
  void pack(int64_t group, int64_t thread) const {
    Memory memory(scratch + thread * scratch_bytes);
    uint32_t* units = memory.take<uint32_t>(kGroupVectors * kLanes * num_units);
    int8_t* values = memory.take<int8_t>(p.k);
    const int64_t first = group * kGroupRows;
    const int64_t count = rows - first < kGroupRows ? rows - first : kGroupRows;
    for (int64_t i = 0; i < count; ++i) {
      scales[first + i] = units_of_row<Unit, kSigned>(p, first_row + first + i, values,
                                                      units + i * kDigits * num_units, num_units);
    }
    const int64_t vectors = (count * kDigits + kLanes - 1) / kLanes;
    const int64_t used = count * kDigits * num_units;
    memset(units + used, 0, static_cast<size_t>(vectors * kLanes * num_units - used) * 4);
    constexpr int64_t kGroups = kPanel / kLanes / kGroupVectors;  // of a panel
    uint32_t* panel = panels + group / kGroups * num_units * kPanel;
    for (int64_t i = 0; i < vectors; ++i) {
      const uint32_t* from = units + i * kLanes * num_units;
      uint32_t* to = panel + (group % kGroups + i) * kVectorOffset;
      for (int64_t u = 0; u < num_units; u += kLanes) {
        transpose_block(from + u, num_units, to + u * kPanel, kRowStride);
      }
    }
  }

  // What of the sums of unsigned bytes is too much: 128 times the sum of a row of weights.
  void find_excess([[maybe_unused]] const int8_t* weights, [[maybe_unused]] int64_t count,
                   [[maybe_unused]] ColumnTerms* terms) const {
#if defined(__AVX512VNNI__)
    if constexpr (Unit::kElements == 4 && !kSigned) {
      for (int64_t row = 0; row < count; ++row) {
        ByteDot excess;
        int64_t j = 0;
        for (; j + 64 <= p.k; j += 64) {
          excess.add_excess(ByteDot::weights(weights + row * p.k + j, 64));
        }
        if (j < p.k) {
          excess.add_excess(ByteDot::weights(weights + row * p.k + j, static_cast<int>(p.k - j)));
        }
        terms->excess[row] = excess.sum();
      }
    }
#endif
  }

  // Whether the weights of a block can be multiplied where they lie.
  bool is_direct(int64_t count) const {
    if constexpr (Unit::kElements < 4) return false;
    return kUsesTiles ? p.k == num_units * 4 && count == kBlockRows : p.k % 4 == 0;
  }

  LeftOperand converted(const int8_t* weights, int64_t count, int64_t thread) const {
    const int64_t stride = num_units + kPadUnits;
    auto* units = reinterpret_cast<uint32_t*>(scratch + thread * scratch_bytes);
    for (int64_t row = 0; row < count; ++row) {
      convert_weights<Unit>(weights + row * p.k, p.k, units + row * stride, num_units);
    }
    if (kUsesTiles) {
      memset(units + count * stride, 0,
             static_cast<size_t>((round_up(count, 32) - count) * stride) * 4);
    }
    return {units, stride};
  }

#if defined(__AMX_INT8__)
  // Sums of a block with a panel of so many vectors.
  template <int kVectors>
  void multiply_panel_of_tiles(LeftOperand left, const int8_t* weights, int64_t count,
                               const uint32_t* x, float* sums, bool from_memory,
                               Ahead* ahead) const {
    constexpr int kRows = kVectors == 1 ? 2 : 1;
    if (!converts_late()) {
      // What memory streams is read in whole rows, other panels in parts that stay in L1. Once at
      // least: without units, sums are zero.
      const int64_t part = from_memory ? num_units : kPartUnits;
      int64_t begin = 0;
      do {
        const int64_t end = begin + part < num_units ? begin + part : num_units;
        for (int64_t row = 0; row < count; row += kRows * 16) {
          const char* from = reinterpret_cast<const char*>(left.data + row * left.stride);
          multiply_tiles<Unit, kRows, kVectors>(from, left.stride * 4, x, sums + row * kPanel,
                                                begin, end, from_memory, ahead);
        }
        begin += part;
      } while (begin < num_units);
    } else if constexpr (kConverts) {
      for (int64_t row = 0; row < count; row += 16) {
        multiply_converted<Unit, kVectors>(weights + row * p.k, p.k, count - row, x,
                                           sums + row * kPanel, num_units);
      }
    }
  }
#endif

  void multiply_weights(int64_t block, int64_t first_panel, int64_t end_panel,
                        int64_t thread) const {
    const int64_t first = block * kBlockRows;
    const int64_t count = p.n - first < kBlockRows ? p.n - first : kBlockRows;
    const int8_t* weights = p.weight + first * p.k;
    LeftOperand left = {nullptr, 0};
    if (is_direct(count)) {
      left = {reinterpret_cast<const uint32_t*>(weights), p.k / 4};
    } else if (!converts_late()) {
      left = converted(weights, count, thread);
    }
    ColumnTerms terms = {};
    terms.load(p, first, count);
    find_excess(weights, count, &terms);
    alignas(64) float sums[kBlockRows * kPanel];
    alignas(64) float turned[kPanel * kBlockRows];
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t panel_units = num_units * kPanel;
      const uint32_t* x = panels + panel * panel_units;
      const int64_t vectors = vectors_of(panel);
#if defined(__AMX_INT8__)
      if constexpr (kUsesTiles) {
        const int64_t steps = round_up(count, 16) / 16 * (num_units / 16) + 1;
        Ahead ahead(x + panel_units, panel + 1 < end_panel ? panel_units * 4 : 0, steps);
        const bool from_memory = panel == first_panel && is_direct(count);
        if (vectors == 1) {
          multiply_panel_of_tiles<1>(left, weights, count, x, sums, from_memory, &ahead);
        } else if (vectors == 2) {
          multiply_panel_of_tiles<2>(left, weights, count, x, sums, from_memory, &ahead);
        } else if constexpr (kPanelVectors<Unit> == 3) {
          multiply_panel_of_tiles<3>(left, weights, count, x, sums, from_memory, &ahead);
        }
      } else {
        multiply_block<Unit>(left, x, sums, count, vectors, num_units);
      }
#else
      const int64_t units = is_direct(count) ? p.k / 4 : num_units;
      multiply_block<Unit>(left, x, sums, count, vectors, units);
#endif
      for (int64_t row = 0; row < count; row += kLanes) {
        for (int64_t vector = 0; vector < vectors; ++vector) {
          const float* from = sums + row * kPanel + vector * kLanes;
          float* to = turned + vector * kLanes * kBlockRows + row;
          transpose_block(reinterpret_cast<const uint32_t*>(from), kPanel,
                          reinterpret_cast<uint32_t*>(to), kBlockRows);
        }
      }
      const int64_t begin = panel * kPanelRows;
#if defined(__AMX_INT8__)
      if constexpr (kDigits > 1) {
        join_digits<kDigits>(turned, kBlockRows, scales + begin, rows_of(panel), count);
      }
#endif
      finish<Unit::kIsInteger && kDigits == 1>(p, terms, turned, kBlockRows, scales + begin,
                                               first_row + begin, rows_of(panel), first, count);
    }
  }
};

template <typename Unit>
void multiply_many(const Int8LinearParams& p, int64_t num_threads) {
  using Pass = PYFAST_ISA::Pass<Unit>;
  const int64_t num_units =
      round_up((p.k + Unit::kElements - 1) / Unit::kElements, kUnitStep<Unit>);
  const int64_t most_rows = p.m < kPassRows<Unit> ? p.m : kPassRows<Unit>;
  const int64_t most_panels = (most_rows + Pass::kPanelRows - 1) / Pass::kPanelRows;
  const int64_t panel_units = most_panels * num_units * Pass::kPanel;
  const int64_t threads = num_threads < 1 ? 1 : num_threads;
  const int64_t pack_bytes = Memory::bytes<uint32_t>(Pass::kGroupVectors * kLanes * num_units) +
                             Memory::bytes<int8_t>(p.k);
  const int64_t weight_bytes = Memory::bytes<uint32_t>(kBlockRows * (num_units + kPadUnits));
  const int64_t scratch_bytes = pack_bytes > weight_bytes ? pack_bytes : weight_bytes;
  Memory memory(static_cast<char*>(thread_workspace(Memory::bytes<uint32_t>(panel_units) +
                                                    Memory::bytes<float>(most_rows) +
                                                    threads * scratch_bytes)));
  uint32_t* panels = memory.take<uint32_t>(panel_units);
  float* scales = memory.take<float>(most_rows);
  char* scratch = memory.take<char>(threads * scratch_bytes);
  const int64_t num_blocks = (p.n + kBlockRows - 1) / kBlockRows;
  for (int64_t first_row = 0; first_row < p.m; first_row += most_rows) {
    const int64_t rows = p.m - first_row < most_rows ? p.m - first_row : most_rows;
    const Pass pass = {p, first_row, rows, num_units, panels, scales, scratch, scratch_bytes};
    parallel_for(pass.num_groups(), threads, [&](int64_t begin, int64_t end, int64_t thread) {
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
    if constexpr (Unit::kDigits > 1) {
      bool has_digits[kPassRows<Unit>];  // the workspace is needed for the other rows
      for (int64_t row = 0; row < rows; ++row) has_digits[row] = scales[row] == scales[row];
      for (int64_t row = 0; row < rows; ++row) {
        if (!has_digits[row]) multiply_few<FloatDot>(row_of(p, first_row + row), num_threads);
      }
    }
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
  const int64_t m = params.m;
  if (m == 0 || params.n == 0) return;
  const int64_t threads = threads_for(m * params.n * params.k, num_threads);
  if (!params.weight_only) {
    return m <= kFewRows ? multiply_few<IntegerDot>(params, threads)
                         : multiply_many<IntegerUnit>(params, threads);
  }
  [[maybe_unused]] const DType dtype = params.smooth == nullptr ? params.x_dtype : DType::kFloat32;
  if (m <= kFewRowsOfFloats) {
#if defined(__AVX512VBMI__) && !defined(__AMX_INT8__)
    if (dtype == DType::kBFloat16) return multiply_few<PairDot>(params, threads);
#endif
    return multiply_few<FloatDot>(params, threads);
  }
#if defined(__AMX_INT8__)
  if (dtype == DType::kFloat32) return multiply_many<DigitUnit<4>>(params, threads);
  if (dtype == DType::kFloat16 || m <= kFewRowsOfDigits) {
    return multiply_many<DigitUnit<3>>(params, threads);
  }
  multiply_many<PairWeightUnit>(params, threads);
#else
#if defined(__AVX512VBMI__)
  if (dtype == DType::kBFloat16) return multiply_many<PairWeightUnit>(params, threads);
#endif
  multiply_many<FloatWeightUnit>(params, threads);
#endif
}

}  // namespace pyfast::PYFAST_ISA
