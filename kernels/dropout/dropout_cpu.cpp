// y = keep ? x * scale + shift : fill. Work is cut along the innermost dimension into pieces of at
// most 4096 elements; a piece draws the keep bits of 256 elements at a time and applies them while
// the next ones are in flight. Bound by bytes beyond L2 (read x, write y) and by Philox below
// (0.43 cycles an element on Zen 4); outputs larger than the last-level cache are written with
// non-temporal stores, which saves reading y first.
#include "../common/keep_bits.h"
#include "../common/parallel.h"
#include "../common/row_blocks.h"
#include "dropout.h"

namespace pyfast::PYFAST_ISA {
namespace {

constexpr int64_t kPieceSize = 4096;

// Passed by value, as the rule is: a store through a pointer could change what a reference names.
template <typename C>
struct Affine {
  C scale, shift, fill;
};

template <bool kStream, bool kShift, typename T, typename C>
inline void apply64(const T* x, T* y, uint64_t bits, Affine<C> f) {
  using V = Vec<C>;
  const V scale = V::broadcast(f.scale), shift = V::broadcast(f.shift), fill = V::broadcast(f.fill);
  for (int j = 0; j < 64; j += V::kLanes) {
    V out = V::load(x + j) * scale;
    if (kShift) out = out + shift;
    out = select(bits >> j, out, fill);
    if (kStream) {
      out.stream(y + j);
    } else {
      out.store(y + j);
    }
  }
}

#if defined(__AVX512F__)
// bfloat16 as pairs: the even elements shifted up and the odd ones masked are two float vectors,
// and rounding (half to even, by integer addition) leaves them where they are to be stored. NaN
// needs no care here: one that comes from bfloat16 has 16 zero bits below and does not carry.
template <bool kStream, bool kShift>
inline void apply64(const BFloat16* x, BFloat16* y, uint64_t bits, Affine<float> f) {
  const __m512 scale = _mm512_set1_ps(f.scale), shift = _mm512_set1_ps(f.shift);
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512i one = _mm512_set1_epi32(1), below_half = _mm512_set1_epi32(0x7FFF);
  BFloat16 fill_word;
  from_float(f.fill, &fill_word);
  const __m512i fill = _mm512_set1_epi16(static_cast<int16_t>(fill_word.bits));
  auto round = [&](__m512i pair_half) {
    __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(pair_half), scale);
    if (kShift) scaled = _mm512_add_ps(scaled, shift);
    const __m512i value = _mm512_castps_si512(scaled);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(value, 16), one);
    return _mm512_add_epi32(_mm512_add_epi32(value, below_half), is_odd);
  };
  for (int j = 0; j < 64; j += 32) {
    const __m512i pairs = _mm512_loadu_si512(x + j);
    const __m512i even = round(_mm512_slli_epi32(pairs, 16));
    const __m512i odd = round(_mm512_and_si512(pairs, high_half));
    const __m512i both = _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), 0xAAAAAAAAu, odd);
    const __m512i out = _mm512_mask_mov_epi16(fill, static_cast<__mmask32>(bits >> j), both);
    if (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y + j), out);
    } else {
      _mm512_storeu_si512(y + j, out);
    }
  }
}
#endif

template <typename T, typename C>
inline void apply_tail(const T* x, T* y, uint64_t bits, int n, Affine<C> f) {
  using V = Vec<C>;
  const V scale = V::broadcast(f.scale), shift = V::broadcast(f.shift), fill = V::broadcast(f.fill);
  for (int j = 0; j < n; j += V::kLanes) {
    const int lanes = n - j < V::kLanes ? n - j : V::kLanes;
    select(bits >> j, V::load(x + j, lanes) * scale + shift, fill).store(y + j, lanes);
  }
}

// A run of contiguous elements whose mask indices count up from `first`.
template <bool kStream, typename T, typename C>
void apply_run(const T* x, T* y, int64_t n, KeepRule rule, uint64_t first, Affine<C> f) {
  const int64_t chunk = first % 64 == 0 ? 64 * kKeepBlocks : 1024;
  uint64_t bits[24];  // keep_words(1024)
  for (int64_t done = 0; done < n; done += chunk) {
    const int64_t count = n - done < chunk ? n - done : chunk;
    fill_keep_bits(rule, first + static_cast<uint64_t>(done), count, bits);
    int64_t j = 0;
    if (f.shift != 0) {
      for (; j + 64 <= count; j += 64) {
        apply64<kStream, true>(x + done + j, y + done + j, bits[j / 64], f);
      }
    }
    for (; j + 64 <= count; j += 64) {
      apply64<kStream, false>(x + done + j, y + done + j, bits[j / 64], f);
    }
    if (j < count) {
      apply_tail(x + done + j, y + done + j, bits[j / 64], static_cast<int>(count - j), f);
    }
  }
}

// A faster apply_run where there is one: false means that y is not to be used.
template <bool kStream, typename T, typename C>
bool try_fast_run(const T*, T*, int64_t, KeepRule, uint64_t, Affine<C>) {
  return false;
}

#if defined(__AVX512BF16__)
// One instruction rounds 32 elements, but takes subnormal values for zero. The product with a scale
// of at least one is subnormal only where x is, and the processor notes subnormal operands in a
// sticky flag: one look at it after the run costs nothing, where looking at the products would cost
// a seventh of the time.
template <bool kStream>
__attribute__((noinline)) void multiply_run(const BFloat16* x, BFloat16* y, int64_t n,
                                            KeepRule rule, uint64_t first, float factor) {
  const __m512 scale = _mm512_set1_ps(factor);
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  // Word 2 k is even element k, word 2 k + 1 odd element k, which comes 16 words later.
  const __m512i low_index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_or_si512(
      low_index, _mm512_slli_epi32(_mm512_add_epi32(low_index, _mm512_set1_epi32(16)), 16));
  for (int64_t done = 0; done < n; done += 64 * kKeepBlocks) {
    uint64_t bits[2 * kKeepBlocks];
    const int64_t count = n - done < 64 * kKeepBlocks ? n - done : 64 * kKeepBlocks;
    fill_keep_bits(rule, first + static_cast<uint64_t>(done), count, bits);
    for (int64_t word = 0; word < count / 64; ++word) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t j = done + 64 * word + 32 * half;
        const __m512i pairs = _mm512_loadu_si512(x + j);
        const __m512i high = _mm512_slli_epi32(pairs, 16);
        const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(high), scale);
        const __m512 odd =
            _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, high_half)), scale);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        const __mmask32 keep = static_cast<__mmask32>(bits[word] >> (32 * half));
        const __m512i out = _mm512_maskz_permutexvar_epi16(keep, index, rounded);
        if (kStream) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(y + j), out);
        } else {
          _mm512_storeu_si512(y + j, out);
        }
      }
    }
  }
}

template <bool kStream>
bool try_fast_run(const BFloat16* x, BFloat16* y, int64_t n, KeepRule rule, uint64_t first,
                  Affine<float> f) {
  if (n % 64 != 0 || first % 64 != 0 || x == y || f.scale < 1 || f.shift != 0 || f.fill != 0) {
    return false;
  }
  const uint32_t state = _mm_getcsr();
  _mm_setcsr(state & ~static_cast<uint32_t>(_MM_EXCEPT_DENORM));
  multiply_run<kStream>(x, y, n, rule, first, f.scale);
  const bool is_right = (_mm_getcsr() & _MM_EXCEPT_DENORM) == 0;
  _mm_setcsr(state);
  return is_right;
}
#endif

// A run of contiguous elements that share one mask bit.
template <typename T, typename C>
void apply_constant(const T* x, T* y, int64_t n, bool keep, Affine<C> f) {
  const uint64_t bits = keep ? ~uint64_t{0} : 0;
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) apply64<false, true>(x + j, y + j, bits, f);
  if (j < n) apply_tail(x + j, y + j, bits, static_cast<int>(n - j), f);
}

// Any strides: one element at a time, one Philox block for as long as the mask index stays in it.
template <typename T, typename C>
void apply_strided(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, KeepRule rule,
                   uint64_t mask, uint64_t mask_stride, Affine<C> f) {
  uint64_t group = ~uint64_t{0};
  uint32_t bits = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t index = mask + static_cast<uint64_t>(j) * mask_stride;
    if (index / 8 != group) {
      group = index / 8;
      bits = keep_bits8(rule.seed, group, rule.stream, rule.threshold);
    }
    const C value = to_float(x[j * x_stride]);
    const C out = (bits >> (index % 8)) & 1 ? value * f.scale + f.shift : f.fill;
    from_float(out, &y[j * y_stride]);
  }
}

template <typename T>
void run(const T* /*type*/, const DropoutParams& p, int num_threads) {
  using C = typename ComputeType<T>::type;
  const KeepRule rule = {seed_value(p.seed), p.stream, p.threshold};
  const Affine<C> f = {static_cast<C>(p.scale), static_cast<C>(p.shift), static_cast<C>(p.fill)};
  const int inner = p.ndim - 1;
  const int64_t inner_size = p.sizes[inner];
  const int64_t pieces_per_row = (inner_size + kPieceSize - 1) / kPieceSize;
  const int64_t num_rows = p.num_elements / inner_size;
  const bool contiguous = p.x_strides[inner] == 1 && p.y_strides[inner] == 1;
  const bool stream = p.ndim == 1 && contiguous && p.x != p.y &&
                      streams(static_cast<T*>(p.y), 1, p.num_elements, 2);

  auto work = [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t row = piece / pieces_per_row;
      const int64_t start = (piece % pieces_per_row) * kPieceSize;
      const int64_t n = inner_size - start < kPieceSize ? inner_size - start : kPieceSize;
      int64_t x_offset = start * p.x_strides[inner];
      int64_t y_offset = start * p.y_strides[inner];
      int64_t mask = p.seed.first + start * p.mask_strides[inner];
      for (int d = inner - 1; d >= 0; --d) {
        const int64_t coordinate = row % p.sizes[d];
        row /= p.sizes[d];
        x_offset += coordinate * p.x_strides[d];
        y_offset += coordinate * p.y_strides[d];
        mask += coordinate * p.mask_strides[d];
      }
      const T* x = static_cast<const T*>(p.x) + x_offset;
      T* y = static_cast<T*>(p.y) + y_offset;
      const uint64_t first = static_cast<uint64_t>(mask);
      if (contiguous && p.mask_strides[inner] == 1) {
        if (stream) {
          if (!try_fast_run<true>(x, y, n, rule, first, f))
            apply_run<true>(x, y, n, rule, first, f);
        } else {
          if (!try_fast_run<false>(x, y, n, rule, first, f)) {
            apply_run<false>(x, y, n, rule, first, f);
          }
        }
      } else if (contiguous && p.mask_strides[inner] == 0) {
        const uint32_t bits = keep_bits8(rule.seed, first / 8, rule.stream, rule.threshold);
        apply_constant(x, y, n, (bits >> (first % 8)) & 1, f);
      } else {
        apply_strided(x, p.x_strides[inner], y, p.y_strides[inner], n, rule, first,
                      static_cast<uint64_t>(p.mask_strides[inner]), f);
      }
    }
    if (stream) stream_fence();
  };
  parallel_for(num_rows * pieces_per_row, useful_threads(p.num_elements, num_threads), work);
}

}  // namespace

void dropout_cpu(const DropoutParams& params, int num_threads) {
  dispatch_dtype(params.dtype, [&](auto* type) { run(type, params, num_threads); });
}

}  // namespace pyfast::PYFAST_ISA
