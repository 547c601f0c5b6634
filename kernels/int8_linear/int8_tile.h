// Products of a block of weight rows with panels of rows of x. Roles are swapped against the usual
// form: weights are the left operand, read where they lie (32 bits broadcast, or tiles of AMX), and
// x, which is written anew by its quantization anyway, is packed: [unit][row of x]. Sums come out
// transposed, [weight row][row of x]. So no copy of the weights in another layout is ever made.
// Panels of 64 rows by 4,096 bytes stay in L2, the weights of a strip of 6 rows in L1.
#pragma once

#include "int8_units.h"

namespace pyfast::PYFAST_ISA {

constexpr int kPanel = kTileVectors * kLanes;  // rows of x
#if defined(__AMX_INT8__)
constexpr bool kHasTiles = true;
constexpr int kBlockRows = 64;  // of the weights; a multiple of kLanes
#elif defined(__AVX512F__)
constexpr bool kHasTiles = false;
constexpr int kBlockRows = 48;
#else
constexpr bool kHasTiles = false;
constexpr int kBlockRows = 24;
#endif
constexpr int64_t kBlockUnits = 1024;  // 256 KB of a panel

// Few rows of x are few vectors, and too few sums in flight: the units are dealt out to several sums
// of each, which are added in the end.
template <typename Unit, int kRows, int kVectors, int kParts>
inline __attribute__((noinline)) void multiply_parts(LeftOperand a, RightOperand b, Product c,
                                                     int64_t num_units) {
  Lanes sum[kRows][kVectors][kParts];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) sum[r][v][part] = Lanes::broadcast(0.0f);
    }
  }
  const uint32_t* left = a.data;
  const float* right = reinterpret_cast<const float*>(b.data);
  const auto step = [&](int part) PYFAST_INLINE_LAMBDA {
    Lanes columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = Lanes::load(right + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v][part] = Unit::dot(left + r * a.stride, columns[v], sum[r][v][part]);
      }
    }
    ++left;
    right += b.stride;
  };
  int64_t u = 0;
  for (; u + kParts <= num_units; u += kParts) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) step(part);
  }
  for (; u < num_units; ++u) step(0);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Lanes total = sum[r][v][0];
#pragma GCC unroll 4
      for (int part = 1; part < kParts; ++part) total = added<Unit>(total, sum[r][v][part]);
      float* to = c.data + r * c.stride + v * kLanes;
      if (c.accumulate) total = added<Unit>(total, Lanes::load(to));
      total.store(to);
    }
  }
}

// sums[row][column] of `rows` rows of weights, for `vectors` vectors of columns.
template <typename Unit>
inline void multiply_block(LeftOperand weights, const uint32_t* panel, float* sums, int64_t rows,
                           int64_t vectors, int64_t num_units) {
  if (num_units == 0) {
    memset(sums, 0, static_cast<size_t>(rows * kPanel) * sizeof(float));
    return;
  }
  for (int64_t first = 0; first < num_units; first += kBlockUnits) {
    const int64_t end = first + kBlockUnits < num_units ? first + kBlockUnits : num_units;
    const RightOperand right = {panel, kPanel};
    const Product product = {sums, kPanel, first > 0};
#if defined(__AVX512F__)
    if (vectors <= 2) {
      int64_t row = 0;
      const RightOperand from = {panel + first * kPanel, kPanel};
      for (; row + kTileRows <= rows; row += kTileRows) {
        const LeftOperand left = {weights.data + row * weights.stride + first, weights.stride};
        const Product to = {sums + row * kPanel, kPanel, first > 0};
        if (vectors == 1) {
          multiply_parts<Unit, kTileRows, 1, 4>(left, from, to, end - first);
        } else {
          multiply_parts<Unit, kTileRows, 2, 2>(left, from, to, end - first);
        }
      }
      const LeftOperand left = {weights.data + row * weights.stride, weights.stride};
      const Product to = {sums + row * kPanel, kPanel, first > 0};
      multiply<Unit, false>(left, right, to, rows - row, vectors, [&](int64_t, int64_t) {
        return Extent{0, vectors, first, end};
      });
      continue;
    }
#endif
    multiply<Unit, false>(weights, right, product, rows, vectors, [&](int64_t, int64_t) {
      return Extent{0, vectors, first, end};
    });
  }
}

#if defined(__AMX_INT8__)

// All tiles are 16 rows of 64 bytes. The configuration is a thread's, and ends with release().
// (The compiler's intrinsics do not say that they read memory.)
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

#define PYFAST_TILE_LOAD(tile, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(stride) : "memory")
#define PYFAST_TILE_STORE(tile, to, stride) \
  asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define PYFAST_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::: "memory")
#define PYFAST_TILE_DOT(sum, a, b)                                           \
  do {                                                                       \
    if constexpr (Unit::kIsInteger) {                                        \
      asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::);       \
    } else {                                                                 \
      asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::);     \
    }                                                                        \
  } while (false)

// 32 rows of weights by 32 columns, or by 16. Units are a multiple of 16. Weights that come next are
// asked for on the way: the hardware does not follow 32 rows at once.
template <typename Unit, bool kTwoColumns>
inline __attribute__((noinline)) void multiply_tiles(const char* weights, int64_t stride,
                                                     const uint32_t* panel, float* sums,
                                                     int64_t num_units, const char* next) {
  constexpr int64_t kPanelBytes = kPanel * 4;
  PYFAST_TILE_ZERO(0);
  PYFAST_TILE_ZERO(1);
  PYFAST_TILE_ZERO(2);
  PYFAST_TILE_ZERO(3);
  for (int64_t u = 0; u < num_units; u += 16) {
    const char* a = weights + u * 4;
    const uint32_t* b = panel + u * kPanel;
    PYFAST_TILE_LOAD(4, a, stride);
    PYFAST_TILE_LOAD(6, b, kPanelBytes);
    PYFAST_TILE_DOT(0, 4, 6);
    PYFAST_TILE_LOAD(5, a + 16 * stride, stride);
    PYFAST_TILE_DOT(2, 5, 6);
    if constexpr (kTwoColumns) {
      PYFAST_TILE_LOAD(7, b + 16, kPanelBytes);
      PYFAST_TILE_DOT(1, 4, 7);
      PYFAST_TILE_DOT(3, 5, 7);
    }
    if (next != nullptr) {
      for (int line = 0; line < 32; ++line) __builtin_prefetch(next + line * 64, 0, 2);
      next += 32 * 64;
    }
  }
  PYFAST_TILE_STORE(0, sums, kPanelBytes);
  PYFAST_TILE_STORE(2, sums + 16 * kPanel, kPanelBytes);
  if constexpr (kTwoColumns) {
    PYFAST_TILE_STORE(1, sums + 16, kPanelBytes);
    PYFAST_TILE_STORE(3, sums + 16 * kPanel + 16, kPanelBytes);
  }
}

// A whole block: rows beyond the last are zero weights.
template <typename Unit>
inline void multiply_block_of_tiles(const char* weights, int64_t stride, const uint32_t* panel,
                                    float* sums, int64_t rows, int64_t vectors, int64_t num_units,
                                    const char* next) {
  for (int64_t row = 0; row < rows; row += 32) {
    int64_t vector = 0;
    for (; vector + 2 <= vectors; vector += 2) {
      multiply_tiles<Unit, true>(weights + row * stride, stride, panel + vector * kLanes,
                                 sums + row * kPanel + vector * kLanes, num_units, next);
      next = nullptr;
    }
    if (vector < vectors) {
      multiply_tiles<Unit, false>(weights + row * stride, stride, panel + vector * kLanes,
                                  sums + row * kPanel + vector * kLanes, num_units, next);
      next = nullptr;
    }
  }
}

#endif

// to[column][row] = from[row][column], kLanes by kLanes.
PYFAST_ALWAYS_INLINE void transpose_lanes(const float* from, int64_t from_stride, float* to,
                                          int64_t to_stride) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
  }
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

}  // namespace pyfast::PYFAST_ISA
