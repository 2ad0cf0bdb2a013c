// The products of grids.h with AVX-512 and one row of activations, where codes have one index (IQ1, IQ2): vectors of the grid are loaded one by one, eight
// for 64 inputs of an output. Sums, of integers and then of floats, are those of grids512.h, whose tables serve many rows (4096 x 4096, one core, in
// cache, us by tables and so: IQ1_S 1150, 790; IQ1_M 1300, 920; IQ2_XXS 845, 825; IQ2_XS 945, 860; IQ2_S 1080, 875). Of IQ1_S's 790 us 500 go into
// `dots`, two loads a vector; broadcasts that blend instead of inserts take as long.
#pragma once
#include <type_traits>

#include "grids512.h"

#if BITSMITH_X86
namespace bitsmith::grids::row {

// What makes numbers that have the shift of a clear bit bytes without a sign; what a set bit takes from them.
constexpr int32_t UP = 9, SHIFTED = 2;

// Of eight codes: their signs, or which shift bits are set.
template <class F>
using Rest = std::conditional_t<F::SHIFT, uint8_t, uint64_t>;

// The codes of a super block of 16 outputs.
template <class F>
struct Codes {
  alignas(64) uint16_t index[ROWS][SUPER / 8];
  alignas(64) Rest<F> rest[ROWS][4];
};

template <class F>
BITSMITH_512_INLINE void read(const wide::Streams<F>& from, Codes<F>& to) {
  for (int64_t r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) {
      const __m512i code = wide::codes16<F>(from.codes[r] + half * 2 * F::WIDTH), index = _mm512_and_si512(code, _mm512_set1_epi32((1 << F::INDEX_BITS) - 1));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to.index[r] + 16 * half), _mm512_cvtepi32_epi16(index));
      if constexpr (!F::SHIFT) {
        __m512i signs = _mm512_srli_epi32(code, F::PLACE);
        if constexpr (F::SIGNS == 7) signs = wide::with_eighth(signs);
        _mm_store_si128(reinterpret_cast<__m128i*>(to.rest[r] + 2 * half), _mm512_cvtepi32_epi8(signs));
      } else if constexpr (!F::GROUP_SHIFT) {
        const __mmask16 set = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << F::PLACE));
        std::memcpy(to.rest[r] + 2 * half, &set, 2);
      }
    }
  if constexpr (F::GROUP_SHIFT) {
    // Four codes a group, of whose four bits it is the highest.
    const __m512i each = _mm512_and_si512(_mm512_srli_epi32(_mm512_load_si512(from.lane[0]), 3), _mm512_set1_epi32(0x11111111));
    _mm512_store_si512(to.rest, _mm512_sub_epi32(_mm512_slli_epi32(each, 4), each));
  }
}

// Sums of products of 16 inputs each; that of number g is in lane `place_of(g)`.
constexpr int place_of(int g) { return g % 4 * 4 + g / 4; }

template <class F>
BITSMITH_512_INLINE __m512i dots(const int64_t* vectors, const uint16_t* index, const Rest<F>* rest, const int8_t* q) {
  __m512i sum[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const uint16_t* at = index + 8 * v;
    __m512i x = _mm512_loadu_si512(q + 64 * v);
    __m512i number = _mm512_set_epi64(vectors[at[7]], vectors[at[6]], vectors[at[5]], vectors[at[4]], vectors[at[3]], vectors[at[2]], vectors[at[1]],
                                      vectors[at[0]]);
    if constexpr (F::SHIFT) {
      // No byte is below SHIFTED, so none borrows from the next.
      number = _mm512_add_epi8(number, _mm512_set1_epi8(UP));
      number = _mm512_mask_sub_epi64(number, rest[v], number, _mm512_set1_epi8(SHIFTED));
    } else {
      x = _mm512_mask_sub_epi8(x, rest[v], _mm512_setzero_si512(), x);
    }
    sum[v] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), number, x);
  }
  // Four products fit 16 bits.
  const __m512i ones = _mm512_set1_epi16(1);
  const auto pairs = [&](__m512i a, __m512i b) __attribute__((always_inline)) BITSMITH_512 {
    return _mm512_castsi512_ps(_mm512_madd_epi16(_mm512_packs_epi32(a, b), ones));
  };
  const __m512 a = pairs(sum[0], sum[1]), b = pairs(sum[2], sum[3]);
  return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));
}

template <class F>
BITSMITH_512 void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  const auto* vectors = reinterpret_cast<const int64_t*>(w.vectors);
  alignas(64) float super[ROWS];
  wide::Streams<F> from;
  wide::Scales by;
  Codes<F> codes;
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    wide::open<F>(w, nb, s, from);
    // All of them before the first is looked up: an index that was stored just before is loaded slowly.
    read<F>(from, codes);
    __m512i sum[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) sum[r] = dots<F>(vectors, codes.index[r], codes.rest[r], x.q.data() + s * SUPER);
    avx512::transpose(sum);
    wide::scales<F>(from, super, by);
    __m512 whole = _mm512_setzero_ps();
    for (int g = 0; g < F::GROUPS; ++g) {
      __m512i one = F::SHIFT ? _mm512_set1_epi32(x.start[s * F::GROUPS + g]) : _mm512_setzero_si512();
      for (int i = 0; i < F::GROUP / 16; ++i) one = _mm512_add_epi32(one, sum[place_of(g * F::GROUP / 16 + i)]);
      whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), by.scale[g], whole);
    }
    total = _mm512_fmadd_ps(whole, _mm512_set1_ps(x.step[s]), total);
  }
  avx512::store16(y, nb * ROWS, dtype, total, w.n - nb * ROWS);
}

// Null for codes of two indices.
inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows {
    using F = decltype(form);
    if constexpr (F::INDICES == 1) return rows<F>;
    return nullptr;
  });
}

}  // namespace bitsmith::grids::row
#endif
