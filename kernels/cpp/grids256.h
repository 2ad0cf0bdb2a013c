// The products of grids.h with AVX2: numbers are looked up by the code, eight or four at a time. One row of activations meets them as they come
// (4096 x 4096, one core: IQ2_XS 3.4 -> 1.4 ms); for more, a super block of 16 outputs becomes bytes in the order of common.h, whose products are those
// of two_level256.h.
#pragma once
#include <array>

#include "grids.h"
#include "two_level256.h"

#if BITSMITH_X86
namespace bitsmith::grids::vectors {

// The largest number of a grid.
constexpr int MOST = 62;

template <class T, class F>
constexpr std::array<T, 32 / sizeof(T)> each(F f) {
  std::array<T, 32 / sizeof(T)> out{};
  for (int i = 0; i < static_cast<int>(out.size()); ++i) out[static_cast<size_t>(i)] = static_cast<T>(f(i));
  return out;
}

template <class T>
BITSMITH_256_INLINE __m256i load(const T& numbers) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers.data()));
}

// Bytes beyond eight codes that `codes8` reads.
constexpr int64_t BEYOND = 16;

// Where code i of eight begins, in bits, in its half of a vector.
template <class F>
constexpr int begin(int i) {
  return i < 4 ? i * F::WIDTH : F::WIDTH % 2 * 4 + (i - 4) * F::WIDTH;
}

// Eight codes, which are whole bytes together, in a lane each.
template <class F>
BITSMITH_256_INLINE __m256i codes8(const uint8_t* p) {
  static constexpr auto FROM = each<uint8_t>([](int i) { return begin<F>(i / 4) / 8 + i % 4; });
  static constexpr auto DOWN = each<uint32_t>([](int i) { return begin<F>(i) % 8; });
  const auto half = [&](const uint8_t* at) __attribute__((always_inline)) BITSMITH_256 { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  const __m256i both = _mm256_set_m128i(half(p + F::WIDTH / 2), half(p));
  return _mm256_srlv_epi32(_mm256_shuffle_epi8(both, load(FROM)), load(DOWN));
}

// Of eight codes, in the lowest byte of their lanes: the signs of the numbers, of 7 the last making their number even; or twice the shift.
template <class F>
BITSMITH_256_INLINE __m256i signs8(__m256i code) {
  const __m256i place = _mm256_srli_epi32(code, F::PLACE);
  if constexpr (F::SHIFT) return _mm256_and_si256(_mm256_slli_epi32(place, 1), _mm256_set1_epi32(2));
  if constexpr (F::SIGNS == 8) return place;
  // Bit 7 set where an odd number of an index's bits is.
  static constexpr auto ODD = each<uint8_t>([](int i) { return (i ^ i >> 1 ^ i >> 2 ^ i >> 3) % 2 * 128; });
  const __m256i seven = _mm256_and_si256(place, _mm256_set1_epi32(127)), four = _mm256_xor_si256(seven, _mm256_srli_epi32(seven, 4));
  return _mm256_or_si256(seven, _mm256_shuffle_epi8(load(ODD), _mm256_and_si256(four, _mm256_set1_epi32(15))));
}

// The numbers, without signs or shift, of two codes whose indices are in `index`: of 32 bits, or two of 16.
template <class F>
BITSMITH_256_INLINE __m128i two(const Weight& w, uint64_t index) {
  if constexpr (F::INDICES == 1) {
    const auto* vectors = reinterpret_cast<const int64_t*>(w.vectors);
    return _mm_set_epi64x(vectors[index >> 32], vectors[index & 0xffffffffu]);
  } else {
    const auto* vectors = reinterpret_cast<const int32_t*>(w.vectors);
    return _mm_setr_epi32(vectors[index & 0xffff], vectors[index >> 16 & 0xffff], vectors[index >> 32 & 0xffff], vectors[index >> 48]);
  }
}

// take(i, numbers, negative) of eight codes, for i = 0 and 2: the numbers of codes i, i + 1 and, 16 bytes on, i + 4, i + 5, which leaves bytes within
// halves of vectors; all bits of those are set that are to be negated. shift: of GROUP_SHIFT, as of `signs8`.
template <class F, class Take>
BITSMITH_256_INLINE void numbers8(const Weight& w, const uint8_t* p, __m256i shift, const Take& take) {
  static constexpr auto BIT = each<uint8_t>([](int i) { return 1 << i % 8; });
  constexpr uint32_t MASK = (1u << F::INDEX_BITS) - 1;
  const __m256i code = codes8<F>(p), bit = load(BIT), extra = F::GROUP_SHIFT ? shift : signs8<F>(code);
  __m256i index = _mm256_and_si256(code, _mm256_set1_epi32(MASK));
  if constexpr (F::INDICES == 2)
    index = _mm256_or_si256(index, _mm256_and_si256(_mm256_slli_epi32(code, 16 - F::INDEX_BITS), _mm256_set1_epi32(static_cast<int32_t>(MASK << 16))));
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const auto half = [&](__m128i four) __attribute__((always_inline)) BITSMITH_256 {
      return two<F>(w, static_cast<uint64_t>(i ? _mm_extract_epi64(four, 1) : _mm_cvtsi128_si64(four)));
    };
    const __m256i numbers = _mm256_set_m128i(half(_mm256_extracti128_si256(index, 1)), half(_mm256_castsi256_si128(index)));
    const int64_t first = i * 0x0404040404040404, second = (i + 1) * 0x0404040404040404;
    const __m256i own = _mm256_shuffle_epi8(extra, _mm256_set_epi64x(second, first, second, first));
    if constexpr (F::SHIFT) take(i, _mm256_sub_epi8(numbers, own), _mm256_setzero_si256());
    else take(i, numbers, _mm256_cmpeq_epi8(_mm256_and_si256(own, bit), bit));
  }
}

// take(8 * e + i, numbers, negative), see `numbers8`, of every eight codes of row r of block nb, super block s; its codes of scales to lane[..][r].
template <class F, class Take>
BITSMITH_256_INLINE void numbers(const Weight& w, int64_t nb, int64_t r, int64_t s, uint32_t (&lane)[F::GROUPS / 8][ROWS], const Take& take) {
  const Row row = row_at<F>(w, nb, r, s);
  ahead<F>(w, row);
  for (int64_t i = 0; i < F::GROUPS / 8; ++i) lane[i][r] = eight_scales<F>(row.scales + i * F::SCALE_BITS);
  // The end of the weight is copied: nothing may be read beyond it.
  uint8_t last[4 * F::WIDTH + BEYOND];
  const uint8_t* codes = row.codes;
  if (nb * ROWS + r >= w.n - 1 && (s + 1) * SUPER == w.k) codes = static_cast<const uint8_t*>(std::memcpy(last, codes, 4 * F::WIDTH));
  __m256i shifts{};
  if constexpr (F::GROUP_SHIFT) {
    const __m256i place = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(lane[0][r])), _mm256_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30));
    shifts = _mm256_and_si256(place, _mm256_set1_epi32(2));
  }
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m256i groups = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32(2 * e));
    numbers8<F>(w, codes + e * F::WIDTH, F::GROUP_SHIFT ? _mm256_permutevar8x32_epi32(shifts, groups) : shifts,
                [&](int i, __m256i v, __m256i negative) __attribute__((always_inline)) BITSMITH_256 { take(8 * e + i, v, negative); });
  }
}

// Eight codes of scales -> the scales, 16 bits twice.
template <class F>
BITSMITH_256_INLINE __m256i scales8(__m256i codes) {
  const __m256i code = _mm256_and_si256(codes, _mm256_set1_epi32(F::MASK));
  return _mm256_add_epi16(_mm256_or_si256(_mm256_slli_epi32(code, 17), _mm256_slli_epi32(code, 1)), _mm256_set1_epi16(1));
}

// Super block s of 16 outputs: the numbers of each row, the scales of its groups.
template <class F>
BITSMITH_256 void decode(const Weight& w, int64_t nb, int64_t s, int8_t (*to)[SUPER], two_level::vectors::Scales& by) {
  alignas(32) uint32_t lane[F::GROUPS / 8][ROWS];
  for (int64_t r = 0; r < ROWS; ++r)
    numbers<F>(w, nb, r, s, lane, [&](int o, __m256i v, __m256i negative) __attribute__((always_inline)) BITSMITH_256 {
      v = _mm256_sub_epi8(_mm256_xor_si256(v, negative), negative);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to[r] + 8 * o), _mm256_castsi256_si128(v));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to[r] + 8 * o + 32), _mm256_extracti128_si256(v, 1));
    });
  for (int64_t g = 0; g < F::GROUPS; ++g)
    for (int h = 0; h < 2; ++h) {
      const __m256i eight = _mm256_load_si256(reinterpret_cast<const __m256i*>(lane[g / 8] + 8 * h));
      by.scale[g][h] = scales8<F>(_mm256_srl_epi32(eight, _mm_cvtsi32_si128(static_cast<int>(g % 8 * F::SCALE_BITS))));
    }
}

// dot[rows 0-7, 8-15]: one row of activations q meets super block s of 16 outputs, numbers as they come.
template <class F>
BITSMITH_256 void dots(const Weight& w, const int8_t* q, int64_t nb, int64_t s, __m256i (&dot)[2]) {
  static constexpr auto DOWN = each<uint32_t>([](int i) { return i * F::SCALE_BITS; });
  alignas(32) uint32_t lane[F::GROUPS / 8][ROWS];
  __m256i sums[ROWS], x[8];
  // As `numbers8` has them.
  for (int i = 0; i < 8; ++i) {
    const auto* at = reinterpret_cast<const __m128i*>(q + i / 2 * 64 + i % 2 * 16);
    x[i] = _mm256_set_m128i(_mm_loadu_si128(at + 2), _mm_loadu_si128(at));
  }
  for (int64_t r = 0; r < ROWS; ++r) {
    __m256i sum = _mm256_setzero_si256(), scale[F::GROUPS / 8], before;
    numbers<F>(w, nb, r, s, lane, [&](int o, __m256i v, __m256i negative) __attribute__((always_inline)) BITSMITH_256 {
      if (o == 0)
        for (int64_t i = 0; i < F::GROUPS / 8; ++i) scale[i] = scales8<F>(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int32_t>(lane[i][r])), load(DOWN)));
      const __m256i signs = F::SHIFT ? v : _mm256_or_si256(negative, _mm256_set1_epi8(1));
      __m256i products = _mm256_maddubs_epi16(F::SHIFT ? _mm256_abs_epi8(v) : v, _mm256_sign_epi8(x[o / 8 * 2 + o % 8 / 2], signs));
      // Two of them fit 16 bits: 2 * 2 * 62 * 127.
      if constexpr (F::GROUP == 32) {
        if (o % 4 == 0) return void(before = products);
        products = _mm256_add_epi16(products, before);
      }
      const int g = 8 * o / F::GROUP % 8, next = g + 32 / F::GROUP;
      const __m256i own = _mm256_permutevar8x32_epi32(scale[8 * o / F::GROUP / 8], _mm256_setr_epi32(g, g, g, g, next, next, next, next));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, own));
    });
    sums[r] = sum;
  }
  for (int h = 0; h < 2; ++h) {
    const __m256i* of = sums + 8 * h;
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(of[0], of[1]), _mm256_hadd_epi32(of[2], of[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(of[4], of[5]), _mm256_hadd_epi32(of[6], of[7]));
    dot[h] = _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
  }
}

// [16][256] -> [64 fours][16][4]
BITSMITH_256_INLINE void side_by_side(const int8_t (*from)[SUPER], uint8_t* to) {
  for (int64_t r = 0; r < ROWS; r += 8)
    for (int64_t i = 0; i < SUPER; i += 32) {
      __m256i v[8];
      for (int j = 0; j < 8; ++j) v[j] = avx2::word(reinterpret_cast<const uint8_t*>(from[r + j] + i));
      avx2::transpose(v);
      for (int j = 0; j < 8; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(to + (i / 4 + j) * 64 + 4 * r), v[j]);
    }
}

template <class F>
BITSMITH_256 void rows(const Weight& w, const two_level::Weight& as, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>((x.m + TILE) * ROWS), 0.0f);
  float* total = totals.data();
  alignas(32) int8_t number[ROWS][SUPER];
  alignas(32) uint8_t codes[SUPER * ROWS];
  two_level::vectors::Scales by;
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    alignas(32) float super[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    for (int h = 0; h < 2; ++h) by.d[h] = _mm256_load_ps(super + 8 * h);
    if (x.m > 1) {
      decode<F>(w, nb, s, number, by);
      side_by_side(number, codes);
      two_level::vectors::span<8, F::GROUP, 8, MOST>(as, x, codes, by, s, total);
      continue;
    }
    __m256i dot[2];
    dots<F>(w, x.q.data() + s * SUPER, nb, s, dot);
    for (int h = 0; h < 2; ++h) {
      const __m256 step = _mm256_mul_ps(by.d[h], _mm256_set1_ps(x.step[s]));
      _mm256_storeu_ps(total + 8 * h, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[h]), step, _mm256_loadu_ps(total + 8 * h)));
    }
  }
  for (int64_t m = 0; m < x.m; ++m) avx2::store16(y, m * w.n + nb * ROWS, dtype, total + m * ROWS, w.n - nb * ROWS);
}

inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows { return rows<decltype(form)>; });
}

}  // namespace bitsmith::grids::vectors
#endif
