// Blocks of 32 rows of weights, by threads. bfloat16 in tiles of AMX where there are any, with x
// packed once into panels of 32 columns: a step of 2 KB of weights takes two products and 25 ns,
// less than memory needs for them. Further panels find the weights in L2; up to 128 rows of x stay
// there too. Else sums in float32 along the rows of the weights (../common/row_dots.h), four rows
// of x at a time.
#include "../common/parallel.h"
#include "../common/product.h"
#include "../common/row_blocks.h"
#include "../common/row_dots.h"
#include "../common/tiles.h"
#include "../common/transpose.h"
#include "../common/workspace.h"
#include "linear.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kBlockRows = 32;              // of the weights
constexpr int64_t kMinWorkPerThread = 1 << 16;  // weights; fewer are not worth a thread

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// `count` results of one row of y.
template <typename T>
void finish_row(const float* sums, const T* bias, T* y, int64_t count) {
  for_each_vec<Lanes>(0, count, [&](int64_t j, int n) PYFAST_INLINE_LAMBDA {
    Lanes value = Lanes::load(sums + j);
    if (bias != nullptr) value = value + load_lanes<Lanes>(bias + j, n);
    store_lanes(value, y + j, n, false);
  });
}

template <typename F>
void for_each_weight_block(const LinearParams& p, int64_t num_threads, const F& f) {
  const int64_t useful = p.n * p.k / kMinWorkPerThread;
  const int64_t num_blocks = (p.n + kBlockRows - 1) / kBlockRows;
  parallel_for(num_blocks, num_threads < useful ? num_threads : useful,
               [&](int64_t begin, int64_t end, int64_t) { f(begin, end); });
}

template <typename T>
struct WeightDot {
  using Weight = T;
  static constexpr bool kHasExcess = false;
  static constexpr int kStep = kLanes;
  Lanes v = Lanes::broadcast(0.0f);
  static PYFAST_ALWAYS_INLINE Lanes weights(const T* from, int n) {
    return load_lanes<Lanes>(from, n);
  }
  static PYFAST_ALWAYS_INLINE Lanes values(const uint32_t* row, int64_t j) {
    return Lanes::load(reinterpret_cast<const float*>(row) + j);
  }
  PYFAST_ALWAYS_INLINE void add(Lanes w, Lanes x) { v = fused(w, x, v); }
  float sum() const { return v.sum(); }
};

template <typename T>
void multiply_along_rows(const LinearParams& p, int64_t num_threads) {
  const T* x = static_cast<const T*>(p.x);
  const int64_t stride = round_up(p.k, kLanes);
  auto* floats = static_cast<float*>(thread_workspace(p.m * stride * 4));
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t j = 0; j < stride; j += kLanes) {
      const int n = static_cast<int>(p.k - j < kLanes ? p.k - j : kLanes);
      load_lanes<Lanes>(x + row * p.k + j, n).store(floats + row * stride + j);
    }
  }
  for_each_weight_block(p, num_threads, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kMostLinearRows * kBlockRows] = {};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows;
      const int64_t count = p.n - first < kBlockRows ? p.n - first : kBlockRows;
      dot_block<WeightDot<T>>(static_cast<const T*>(p.weight) + first * p.k, count, p.k,
                              reinterpret_cast<const uint32_t*>(floats), stride, p.m, sums,
                              kBlockRows);
      const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + first;
      for (int64_t row = 0; row < p.m; ++row) {
        finish_row(sums + row * kBlockRows, bias, static_cast<T*>(p.y) + row * p.n + first, count);
      }
    }
  });
}

#if defined(__AMX_BF16__)

constexpr int64_t kStep = 32;     // elements of a row
constexpr int64_t kColumns = 32;  // of a panel: rows of x

// Rows [first, first + 16) of x into their panel: [panel][pair of elements][row], zeros beyond.
void pack(const LinearParams& p, int64_t first, uint32_t* rows, uint32_t* panels,
          int64_t num_units) {
  const auto* x = static_cast<const char*>(p.x);
  const int64_t row_bytes = p.k * 2;
  for (int64_t i = 0; i < kLanes; ++i) {
    char* row = reinterpret_cast<char*>(rows + i * num_units);
    const int64_t used = first + i < p.m ? row_bytes : 0;
    memcpy(row, x + (first + i) * row_bytes, static_cast<size_t>(used));
    memset(row + used, 0, static_cast<size_t>(num_units * 4 - used));
  }
  uint32_t* to = panels + first / kColumns * kColumns * num_units + first % kColumns;
  for (int64_t u = 0; u < num_units; u += kLanes) {
    transpose_block(rows + u, num_units, to + u * kColumns, kColumns);
  }
}

// A step of weights that memory does not hold as a whole, with zeros where there are none.
void copy_step(const BFloat16* weights, int64_t k, int64_t rows, int64_t elements, BFloat16* to) {
  memset(to, 0, kBlockRows * kStep * sizeof(BFloat16));
  for (int64_t row = 0; row < rows; ++row) {
    memcpy(to + row * kStep, weights + row * k, static_cast<size_t>(elements) * sizeof(BFloat16));
  }
}

// sums[row][column] of up to kRows * 16 rows of weights.
template <int kRows, int kTiles>
void multiply_block(const BFloat16* weights, int64_t k, int64_t rows, const uint32_t* panel,
                    float* sums) {
  alignas(64) BFloat16 copy[kBlockRows * kStep];
  zero_tiles<kRows, kTiles>();
  int64_t j = 0;
  if (rows >= kRows * kLanes) {
    for (; j + kStep <= k; j += kStep) {
      tile_step<PairUnit, kRows, kTiles>(reinterpret_cast<const char*>(weights + j), k * 2,
                                         panel + j / 2 * kColumns, kColumns * 4, kLanes);
    }
  }
  for (; j < k; j += kStep) {
    const int64_t used = rows < kRows * kLanes ? rows : kRows * kLanes;
    copy_step(weights + j, k, used, k - j < kStep ? k - j : kStep, copy);
    tile_step<PairUnit, kRows, kTiles>(reinterpret_cast<const char*>(copy), kStep * 2,
                                       panel + j / 2 * kColumns, kColumns * 4, kLanes);
  }
  store_tiles<kRows, kTiles>(sums, kColumns);
}

// sums[panel][row][column] of a block. 16 rows of weights come from memory for the first panel.
void multiply_panels(const LinearParams& p, const BFloat16* weights, int64_t count,
                     const uint32_t* panels, int64_t num_units, float* sums) {
  if (p.m <= kLanes) return multiply_block<2, 1>(weights, p.k, count, panels, sums);
  for (int64_t row = 0; row < count; row += kLanes) {
    const BFloat16* from = weights + row * p.k;
    for (int64_t first = 0; first < p.m; first += kColumns) {
      const uint32_t* panel = panels + first * num_units;
      float* to = sums + first * kBlockRows + row * kColumns;
      if (p.m - first > kLanes) {
        multiply_block<1, 2>(from, p.k, count - row, panel, to);
      } else {
        multiply_block<1, 1>(from, p.k, count - row, panel, to);
      }
    }
  }
}

void multiply_in_tiles(const LinearParams& p, int64_t num_threads) {
  const int64_t num_units = round_up(p.k, kStep) / 2;
  const int64_t threads = num_threads < 1 ? 1 : num_threads;
  const int64_t panel_units = round_up(p.m, kColumns) * num_units;
  const int64_t scratch_units = kLanes * num_units;  // of a thread
  auto* panels =
      static_cast<uint32_t*>(thread_workspace((panel_units + threads * scratch_units) * 4));
  parallel_for((p.m + kLanes - 1) / kLanes, threads,
               [&](int64_t begin, int64_t end, int64_t thread) {
                 uint32_t* rows = panels + panel_units + thread * scratch_units;
                 for (int64_t i = begin; i < end; ++i) {
                   pack(p, i * kLanes, rows, panels, num_units);
                 }
               });
  for_each_weight_block(p, num_threads, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    alignas(64) float sums[kBlockRows * kMostLinearRows];
    alignas(64) float turned[kMostLinearRows * kBlockRows];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockRows;
      const int64_t count = p.n - first < kBlockRows ? p.n - first : kBlockRows;
      const auto* weights = static_cast<const BFloat16*>(p.weight) + first * p.k;
      multiply_panels(p, weights, count, panels, num_units, sums);
      for (int64_t row = 0; row < kBlockRows; row += kLanes) {
        for (int64_t column = 0; column < p.m; column += kLanes) {
          const float* from =
              sums + column / kColumns * kColumns * kBlockRows + row * kColumns + column % kColumns;
          transpose_block(reinterpret_cast<const uint32_t*>(from), kColumns,
                          reinterpret_cast<uint32_t*>(turned + column * kBlockRows + row),
                          kBlockRows);
        }
      }
      const auto* bias = static_cast<const BFloat16*>(p.bias);
      if (bias != nullptr) bias += first;
      for (int64_t row = 0; row < p.m; ++row) {
        finish_row(turned + row * kBlockRows, bias, static_cast<BFloat16*>(p.y) + row * p.n + first,
                   count);
      }
    }
  });
}

#endif

}  // namespace

void linear_cpu(const LinearParams& params, int num_threads) {
  if (params.m == 0 || params.n == 0) return;
#if defined(__AMX_BF16__)
  if (params.dtype == DType::kBFloat16) return multiply_in_tiles(params, num_threads);
#endif
  dispatch_dtype(params.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) <= 4) multiply_along_rows<T>(params, num_threads);
  });
}

}  // namespace pyfast::PYFAST_ISA
