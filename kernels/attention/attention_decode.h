// One split of attention over a cache: all rows that share a key head read its keys, then its
// values, in chunks of 128 keys. Products run along a key, four keys at a time, and are then summed
// across the lanes. Bound by instructions as much as by memory: four rows take 15 to 20 ns for the
// 256 bytes of a key and a value of 64 bfloat16 (Sapphire Rapids, one core of 11 GB/s). Products in
// tiles take 40 % more there with four rows, as much with eight, and 60 % of it with 16.
#pragma once

#include "attention_block.h"
#include "attention_decode_units.h"

namespace pyfast::PYFAST_ISA {

constexpr int64_t kChunkKeys = 128;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#elif defined(__AVX2__)
constexpr int kRowsAtOnce = 2;
#else
constexpr int kRowsAtOnce = 1;
#endif
// How far ahead rows are fetched, and how near. A core of Zen 4 keeps its share of the memory busy
// into L2; into L1 it does not, the misses of which also wait for the hits in L2. Sapphire Rapids
// gains 8 to 15 % by L1.
#if defined(__AMX_TILE__)
constexpr int64_t kAheadBytes = 4096;
constexpr int kLocality = 3;
#else
constexpr int64_t kAheadBytes = 12288;
constexpr int kLocality = 2;
#endif

// Scratch of a thread; rows are the queries that share a key head.
struct DecodeWorkspace {
  uint32_t* queries;  // [rows][units]
  float* scores;      // [rows][kChunkKeys], then weights
  float* out;         // [rows][padded value size]
  float* top;         // [rows] running maximum
  float* sum;         // [rows]

  int64_t lay_out(const AttentionParams& p, char* base) {
    const int64_t rows = decode_rows(p);
    int64_t bytes = 0;
    auto take = [&](auto*& array, int64_t count) {
      array = static_cast<decltype(&*array)>(static_cast<void*>(base + bytes));
      bytes += (count * static_cast<int64_t>(sizeof(*array)) + 63) / 64 * 64;
    };
    take(queries, rows * (whole_lanes(p.head_size) + kLanes));
    take(scores, rows * kChunkKeys);
    take(out, rows * whole_lanes(p.value_size));
    take(top, rows);
    take(sum, rows);
    return bytes;
  }
};

// Four sums of lanes.
PYFAST_ALWAYS_INLINE void store_sums(const Lanes* a, float* to) {
#if defined(__AVX512F__)
  auto add = [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); };
  auto as_pd = [](__m512 x) { return _mm512_castps_pd(x); };
  auto as_ps = [](__m512d x) { return _mm512_castpd_ps(x); };
  const __m512 s01 = add(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 s23 = add(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 s = add(as_ps(_mm512_unpacklo_pd(as_pd(s01), as_pd(s23))),
                       as_ps(_mm512_unpackhi_pd(as_pd(s01), as_pd(s23))));
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = a[i].sum();
#endif
}

// Fetches the row that is read `ahead` rows after this one: rows come one after the other,
// then those of `next` from `first` on.
template <typename T>
PYFAST_ALWAYS_INLINE void fetch_after(const Rows<T>& rows, int64_t row, int64_t ahead,
                                      const Rows<T>& next, int64_t first) {
  const int64_t at = row + ahead;
  prefetch_row<kLocality>(at < rows.count ? rows.row(at) : next.row(first + at - rows.count),
                          rows.size);
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

template <typename T, typename TK>
class Decode {
  using Unit = typename DecodeUnit<T, TK>::type;
  static constexpr int64_t kStep = kLanes * Unit::kElements * Unit::kParts;  // elements

 public:
  Decode(const AttentionParams& p, const Head& first, const DecodeWorkspace& w)
      : p_(p),
        first_(first),
        w_(w),
        rows_(decode_rows(p)),
        units_((p.head_size + kStep - 1) / kStep * (kLanes * Unit::kParts)),
        columns_(whole_lanes(p.value_size)),
        ahead_(minimum_of(kChunkKeys, kAheadBytes / (static_cast<int64_t>(sizeof(TK)) *
                                                     maximum_of(p.head_size, p.value_size)))) {}

  // Keys that any row sees.
  Range visible() const {
    return {first_.first_visible_key(0), first_.end_visible_key(p_.num_queries - 1)};
  }

  void split(int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t head = first_.head + r / p_.num_queries;
      const T* q = row_pointer<T>(p_.q, first_.batch, head, r % p_.num_queries);
      pack_row<Unit>(q, p_.head_size, w_.queries + r * units_, units_);
#if defined(__AVX512BF16__)
      if constexpr (Unit::kParts == 2) part_row(w_.queries + r * units_, units_);
#endif
      w_.top[r] = -kInfinity;
      w_.sum[r] = 0.0f;
    }
    for (int64_t i = 0; i < rows_ * columns_; ++i) w_.out[i] = 0.0f;
    for (int64_t n0 = begin; n0 < end; n0 += kChunkKeys) {
      chunk(n0, minimum_of(kChunkKeys, end - n0));
    }
  }

 private:
  // The keys of a chunk that a row sees.
  Range seen(int64_t row, int64_t n0, int64_t num_keys) const {
    const int64_t m = row % p_.num_queries;
    const int64_t first = maximum_of<int64_t>(0, first_.first_visible_key(m) - n0);
    const int64_t end = minimum_of(num_keys, first_.end_visible_key(m) - n0);
    return first < end ? Range{first, end} : Range{0, 0};
  }

  void chunk(int64_t n0, int64_t num_keys) {
    const Rows<TK> keys = key_rows<TK>(p_.k, first_, n0, num_keys, p_.head_size);
    const Rows<TK> values = key_rows<TK>(p_.v, first_, n0, num_keys, p_.value_size);
    for_rows<kRowsAtOnce>(
        0, [&](auto count, int64_t r) { multiply_keys<decltype(count)::value>(r, keys, values); });
    bool whole = true;  // every row sees every key
    for (int64_t r = 0; r < rows_; ++r) {
      const Range range = seen(r, n0, num_keys);
      whole = whole && range.first == 0 && range.end == num_keys;
      if (range.first < range.end) softmax(r, n0, range);
    }
    if (!whole) {  // row by row: what one does not see may be NaN
      for (int64_t r = 0; r < rows_; ++r)
        add_values<1, false>(r, values, keys, seen(r, n0, num_keys));
      return;
    }
    const Range all = {0, num_keys};
    for_rows<kRowsAtOnce>(0, [&](auto count, int64_t r) {
      add_values<decltype(count)::value, true>(r, values, keys, all);
    });
  }

  // Calls f(number, first row) for rows from `row` on, up to kRows at once.
  template <int kRows, typename F>
  void for_rows(int64_t row, const F& f) const {
    for (; row + kRows <= rows_; row += kRows) f(Number<kRows>(), row);
    if constexpr (kRows > 1) for_rows<kRows - 1>(row, f);
  }

  // scores[row][n] = the raw product, four keys at a time; values are fetched on the way.
  template <int kRows>
  void multiply_keys(int64_t row, const Rows<TK>& keys, const Rows<TK>& values) {
    const float* const queries = reinterpret_cast<const float*>(w_.queries + row * units_);
    for (int64_t n = 0; n < keys.count; n += 4) {
      const int64_t last = keys.count - 1;
      const TK* from[4];
      Lanes sums[kRows][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = minimum_of(n + i, last);
        from[i] = keys.row(at);
        if (row == 0) fetch_after(keys, n + i, ahead_, values, 0);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r][i] = Lanes::broadcast(0.0f);
      }
      int64_t j = 0;
      auto step = [&](int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          Lanes parts[Unit::kParts];
          load_parts<Unit>(from[i] + j, left, parts);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int h = 0; h < Unit::kParts; ++h) {
              const float* const query = queries + r * units_ + j / Unit::kElements + h * kLanes;
              sums[r][i] = dot_units<Unit>(parts[h], Lanes::load(query), sums[r][i]);
            }
          }
        }
      };
      for (; j + kStep <= keys.size; j += kStep) step(kStep);
      if (j < keys.size) step(keys.size - j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) store_sums(sums[r], w_.scores + (row + r) * kChunkKeys + n);
    }
  }

  // Turns the scores of a row into weights; what it has summed before shrinks where the maximum
  // rises.
  void softmax(int64_t row, int64_t n0, Range range) {
    const int64_t m = row % p_.num_queries;
    const Head h = head_of(p_, first_.sequence, first_.head + row / p_.num_queries);
    const ScoreRule rule = score_rule(p_, h);
    float* const scores = w_.scores + row * kChunkKeys;
    const Lanes hidden = Lanes::broadcast(-kInfinity), log2e = Lanes::broadcast(kLog2E);
    Lanes tops = hidden;
    alignas(64) static const float kSteps[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t n = range.first; n < range.end; n += kLanes) {
      const int64_t left = range.end - n;
      Lanes s = load_lanes_of(scores + n, left);
      if (p_.k_scale.data != nullptr) s = s * scales(p_.k_scale, n0 + n, left);
      const float distance = static_cast<float>(m + h.offset - n0 - n);
      Lanes derivative;
      s = score(rule, s, Lanes::broadcast(distance) - Lanes::load(kSteps), s, &derivative);
      if (left < kLanes) s = select((1u << left) - 1u, s, hidden);
      store(s, scores + n, left);
      tops = maximum(s, tops);
    }
    float lanes[kLanes];
    tops.store(lanes);
    float top = w_.top[row];
    for (int i = 0; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
    const float reached = top == -kInfinity ? 0.0f : top;
    Lanes sum = Lanes::broadcast(0.0f);
    for (int64_t n = range.first; n < range.end; n += kLanes) {
      const int64_t left = range.end - n;
      Lanes s = load_lanes_of(scores + n, left);
      if (left < kLanes) s = select((1u << left) - 1u, s, hidden);
      Lanes weight = power_of_two((s - Lanes::broadcast(reached)) * log2e);
      sum = sum + weight;
      if (p_.v_scale.data != nullptr) weight = weight * scales(p_.v_scale, n0 + n, left);
      store(weight, scores + n, left);
    }
    float shrinks[kLanes];
    power_of_two(Lanes::broadcast((w_.top[row] - reached) * kLog2E)).store(shrinks);
    w_.top[row] = top;
    w_.sum[row] = w_.sum[row] * shrinks[0] + sum.sum();
    if (shrinks[0] == 1.0f) return;
    const Lanes shrink = Lanes::broadcast(shrinks[0]);
    float* const out = w_.out + row * columns_;
    for (int64_t j = 0; j < columns_; j += kLanes) (Lanes::load(out + j) * shrink).store(out + j);
  }

  static void store(Lanes value, float* to, int64_t left) {
    if (left >= kLanes) {
      value.store(to);
    } else {
      value.store(to, static_cast<int>(left));
    }
  }

  // The scales of tokens from n on.
  Lanes scales(const HeadsView& view, int64_t n, int64_t left) const {
    const float* from = row_pointer<float>(view, first_.batch, first_.key_head, n);
    if (view.row_stride == 1) return load_lanes_of(from, left);
    float values[kLanes] = {};
    for (int64_t i = 0; i < left && i < kLanes; ++i) values[i] = from[i * view.row_stride];
    return Lanes::load(values);
  }

  // out[row] += sum over the keys of the range of weight * value.
  template <int kRows, bool kPairs>
  void add_values(int64_t row, const Rows<TK>& values, const Rows<TK>& keys, Range range) {
    for (int64_t j = 0; j < columns_; j += 4 * kLanes) {
      if (j + 4 * kLanes <= values.size) {
        add_columns<kRows, 4, kPairs>(row, values, keys, range, j);
      } else {
        for (int64_t c = j; c < columns_; c += kLanes) {
          add_columns<kRows, 1, false>(row, values, keys, range, c);
        }
      }
    }
  }

  template <int kRows, int kVectors, bool kPairs>
  void add_columns(int64_t row, const Rows<TK>& values, const Rows<TK>& keys, Range range,
                   int64_t column) {
    const bool fetches = row == 0 && column == 0;  // the keys of the next chunk
    float* const out = w_.out + row * columns_ + column;
    const float* const weights = w_.scores + row * kChunkKeys;
    Lanes sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Lanes::load(out + r * columns_ + v * kLanes);
    }
    int64_t n = range.first;
#if defined(__AVX512BF16__)
    if constexpr (Unit::kParts == 2 && kVectors == 4) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) part(sums[r]), part(sums[r] + 2);
      for (; n < range.end; ++n) {
        if (fetches) fetch_after(values, n, ahead_, keys, keys.count);
        const TK* const row = values.row(n) + column;
        Lanes value[4];
        split_pairs(_mm512_loadu_si512(row), value);
        split_pairs(_mm512_loadu_si512(row + 32), value + 2);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Lanes weight = Lanes::broadcast(weights[r * kChunkKeys + n]);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) sums[r][v] = fused(weight, value[v], sums[r][v]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) join(sums[r]), join(sums[r] + 2);
    }
    if constexpr (kPairs && Unit::kElements == 2 && kVectors == 4) {
      const __m512i low =
          _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                           6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
      for (; n + 2 <= range.end; n += 2) {
        if (fetches) {
          fetch_after(values, n, ahead_, keys, keys.count);
          fetch_after(values, n + 1, ahead_, keys, keys.count);
        }
        __m512i pairs[4];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m512i a = _mm512_loadu_si512(values.row(n) + column + 32 * i);
          const __m512i b = _mm512_loadu_si512(values.row(n + 1) + column + 32 * i);
          pairs[2 * i] = _mm512_permutex2var_epi16(a, low, b);
          pairs[2 * i + 1] = _mm512_permutex2var_epi16(a, high, b);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const float* const w = weights + r * kChunkKeys + n;
          const __m128 both =
              _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w)));
          const __m512i weight = _mm512_broadcastd_epi32((__m128i)_mm_cvtneps_pbh(both));
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            sums[r][v].v = _mm512_dpbf16_ps(sums[r][v].v, (__m512bh)weight, (__m512bh)pairs[v]);
          }
        }
      }
    }
#endif
    for (; n < range.end; ++n) {
      if (fetches) fetch_after(values, n, ahead_, keys, keys.count);
      Lanes value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = column + v * kLanes;
        value[v] = load_lanes_of(values.row(n) + at, values.size - at);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Lanes weight = Lanes::broadcast(weights[r * kChunkKeys + n]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fused(weight, value[v], sums[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v].store(out + r * columns_ + v * kLanes);
    }
  }

  const AttentionParams& p_;
  const Head first_;
  const DecodeWorkspace& w_;
  const int64_t rows_, units_, columns_, ahead_;
};

}  // namespace pyfast::PYFAST_ISA
