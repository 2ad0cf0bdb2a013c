// The products of grids.h with AVX-512 and one row of activations, where codes have no signs (IQ1): vectors of the grid are loaded one by one, eight
// for 64 inputs of an output, which takes 500 of 790 us, as many as their 64 loads a super block (4096 x 4096 of IQ1_S, one core, in cache; by the byte
// tables of grids512.h, which serve many rows, 1150 us in all; IQ1_M 1300 -> 920). Sums, of integers and then of floats, are those of grids512.h.
#pragma once
#include "grids512.h"

#if BITSMITH_X86
namespace bitsmith::grids::row {

using wide::load;

// What makes numbers, which have the shift of a clear bit in the grid, bytes without a sign; what a set bit takes from them.
constexpr int32_t UP = 9, SHIFTED = 2;

// Codes of a super block of 16 outputs; of eight each those whose shift bit is set.
struct Codes {
  alignas(64) uint16_t index[ROWS][SUPER / 8];
  alignas(64) uint8_t set[ROWS][4];
};

template <class F>
BITSMITH_512_INLINE void read(const wide::Streams<F>& from, Codes& to) {
  for (int64_t r = 0; r < ROWS; ++r)
    for (int half = 0; half < 2; ++half) {
      const __m512i code = wide::codes16<F>(from.codes[r] + half * 2 * F::WIDTH), index = _mm512_and_si512(code, _mm512_set1_epi32((1 << F::INDEX_BITS) - 1));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to.index[r] + 16 * half), _mm512_cvtepi32_epi16(index));
      if constexpr (F::GROUP_SHIFT) continue;
      const __mmask16 set = _mm512_test_epi32_mask(code, _mm512_set1_epi32(1 << F::PLACE));
      std::memcpy(to.set[r] + 2 * half, &set, 2);
    }
  if constexpr (F::GROUP_SHIFT) {
    // Four codes a group, of whose four bits it is the highest.
    const __m512i each = _mm512_and_si512(_mm512_srli_epi32(_mm512_load_si512(from.lane[0]), 3), _mm512_set1_epi32(0x11111111));
    _mm512_store_si512(to.set, _mm512_sub_epi32(_mm512_slli_epi32(each, 4), each));
  }
}

// Sums of products of 16 inputs each; that of number g is in lane `place_of(g)`.
constexpr int place_of(int g) { return g % 4 * 4 + g / 4; }

BITSMITH_512_INLINE __m512i dots(const int64_t* vectors, const uint16_t* index, const uint8_t* set, const int8_t* q) {
  __m512i sum[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const uint16_t* at = index + 8 * v;
    const __m512i signless = _mm512_add_epi8(_mm512_set_epi64(vectors[at[7]], vectors[at[6]], vectors[at[5]], vectors[at[4]], vectors[at[3]], vectors[at[2]],
                                                              vectors[at[1]], vectors[at[0]]),
                                             _mm512_set1_epi8(UP));
    // No byte is below SHIFTED, so none borrows from the next.
    const __m512i number = _mm512_mask_sub_epi64(signless, set[v], signless, _mm512_set1_epi8(SHIFTED));
    sum[v] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), number, _mm512_loadu_si512(q + 64 * v));
  }
  // Eight products with numbers of up to 18 fit 16 bits.
  const __m512i ones = _mm512_set1_epi16(1);
  const auto neighbours = [&](__m512i a, __m512i b) __attribute__((always_inline)) BITSMITH_512 { return _mm512_madd_epi16(_mm512_packs_epi32(a, b), ones); };
  return neighbours(neighbours(sum[0], sum[1]), neighbours(sum[2], sum[3]));
}

template <class F>
BITSMITH_512 void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  const int64_t* vectors = reinterpret_cast<const int64_t*>(w.vectors);
  alignas(64) float super[ROWS];
  wide::Streams<F> from;
  wide::Scales by;
  Codes codes;
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    wide::open<F>(w, nb, s, from);
    // All of them before the first is looked up: an index that was stored just before is loaded slowly.
    read<F>(from, codes);
    __m512i sum[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) sum[r] = dots(vectors, codes.index[r], codes.set[r], x.q.data() + s * SUPER);
    avx512::transpose(sum);
    wide::scales<F>(from, super, by);
    __m512 whole = _mm512_setzero_ps();
    for (int g = 0; g < F::GROUPS; ++g) {
      __m512i one = _mm512_set1_epi32(x.start[s * F::GROUPS + g]);
      for (int i = 0; i < F::GROUP / 16; ++i) one = _mm512_add_epi32(one, sum[place_of(g * F::GROUP / 16 + i)]);
      whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), by.scale[g], whole);
    }
    total = _mm512_fmadd_ps(whole, _mm512_set1_ps(x.step[s]), total);
  }
  avx512::store16(y, nb * ROWS, dtype, total, w.n - nb * ROWS);
}

// Null for codes with signs.
inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows {
    using F = decltype(form);
    if constexpr (F::SHIFT) return rows<F>;
    return nullptr;
  });
}

}  // namespace bitsmith::grids::row
#endif
