// The products of grids.h with AVX-512. A super block of 16 outputs becomes bytes in the order of two_level512.h, whose products they then
// are; codes of 16 rows, not their numbers, are brought side by side. Sums are those of `grids::rows`, exactly.
#pragma once
#include "grids.h"
#include "two_level512.h"

#if BITSMITH_X86
namespace bitsmith::grids::wide {

using two_level::wide::Scales;
using Bytes = std::array<uint8_t, 64>;

BITSMITH_512_INLINE __m512i load(const Bytes& bytes) { return _mm512_loadu_si512(bytes.data()); }

// 16 codes, which are whole bytes together, in a lane each.
template <class F>
BITSMITH_512_INLINE __m512i codes16(const uint8_t* p) {
  static constexpr Bytes FROM = bytes_of<64>([](int i) { return i / 4 * F::WIDTH / 8 + i % 4; });
  static constexpr Bytes DOWN = bytes_of<64>([](int i) { return i % 4 ? 0 : i / 4 * F::WIDTH % 8; });
  constexpr __mmask64 HAVE = (1ull << (2 * F::WIDTH)) - 1;
  return _mm512_srlv_epi32(_mm512_permutexvar_epi8(load(FROM), _mm512_maskz_loadu_epi8(HAVE, p)), load(DOWN));
}

// Bytes of a table of 128 << LEVEL. high: bit 7 of each index, bit 8, ...
template <int LEVEL>
BITSMITH_512_INLINE __m512i find(const uint8_t* bytes, __m512i index, const __mmask64* high) {
  if constexpr (LEVEL == 0) {
    return _mm512_permutex2var_epi8(_mm512_loadu_si512(bytes), index, _mm512_loadu_si512(bytes + 64));
  } else {
    const __m512i low = find<LEVEL - 1>(bytes, index, high), upper = find<LEVEL - 1>(bytes + (64 << LEVEL), index, high);
    return _mm512_mask_blend_epi8(high[LEVEL - 1], low, upper);
  }
}

// Codes whose indices fill the four bytes of a lane.
template <class F>
constexpr int TOGETHER = 4 / F::INDICES;

// The low bytes of two of the four indices, then their upper bits.
template <class F>
BITSMITH_512_INLINE __m512i two_indices(const __m512i* code) {
  if constexpr (F::INDICES == 1) {
    static constexpr Bytes FROM = bytes_of<64>([](int i) { return i % 2 * 64 + i / 4 * 4 + i % 4 / 2; });
    return _mm512_permutex2var_epi8(code[0], load(FROM), code[1]);
  } else {
    static constexpr Bytes FROM = bytes_of<64>([](int i) { return i % 8 / 4 * 32 + i % 2 * F::INDEX_BITS + i % 4 / 2 * 8; });
    return _mm512_multishift_epi64_epi8(load(FROM), code[0]);
  }
}

// The first and the second half of the numbers of each index, a byte of places in `levels` each.
template <class F>
BITSMITH_512_INLINE void halves(const Weight& w, const __m512i* code, __m512i (&found)[2]) {
  constexpr int LEVEL = F::INDEX_BITS - 7;
  const __m512i a = two_indices<F>(code), b = two_indices<F>(code + TOGETHER<F> / 2);
  const __m512i low = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)), upper = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
  __mmask64 high[LEVEL];
  for (int i = 0; i < LEVEL; ++i) high[i] = i ? _mm512_test_epi8_mask(upper, _mm512_set1_epi8(static_cast<char>(1 << (i - 1)))) : _mm512_movepi8_mask(low);
  for (int i = 0; i < 2; ++i) found[i] = find<LEVEL>(w.places + (i << F::INDEX_BITS), low, high);
}

// Numbers plus 128 of inputs 4 QUAD .. of the code that is number AT of those together.
template <class F, int AT, int QUAD>
BITSMITH_512_INLINE __m512i numbers(const __m512i (&halves)[2], __m512i table) {
  if constexpr (F::INDICES == 1) {
    static constexpr Bytes FROM = bytes_of<64>([](int i) { return i % 8 / 4 * 32 + 8 * AT + i % 4 * 2; });
    return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(load(FROM), halves[QUAD]), table);
  } else {
    static constexpr Bytes FROM = bytes_of<64>([](int i) { return i % 8 / 4 * 32 + 8 * (2 * AT + QUAD) + i % 2 * 3; });
    const __m512i first = _mm512_multishift_epi64_epi8(load(FROM), halves[0]);
    return _mm512_permutexvar_epi8(_mm512_mask_multishift_epi64_epi8(first, 0xcccccccccccccccc, load(FROM), halves[1]), table);
  }
}

// The byte of 8 signs of 7, of which the last makes their number even.
constexpr uint8_t even(int bits) { return static_cast<uint8_t>(bits | (bits ^ bits >> 1 ^ bits >> 2 ^ bits >> 3 ^ bits >> 4 ^ bits >> 5 ^ bits >> 6) << 7); }

// The lower seven bits of each byte with the eighth sign.
BITSMITH_512_INLINE __m512i with_eighth(__m512i signs) {
  static constexpr Bytes LOW = bytes_of<64>([](int i) { return even(i); }), HIGH = bytes_of<64>([](int i) { return even(i + 64); });
  return _mm512_permutex2var_epi8(load(LOW), signs, load(HIGH));
}

// `numbers` with the signs of inputs 4 QUAD .. of a code.
template <class F, int QUAD>
BITSMITH_512_INLINE __m512i with_signs(__m512i numbers, __m512i signs) {
  // Each byte's own bit at its top. 128 + v and 128 - v are opposite bytes.
  static constexpr Bytes FROM = bytes_of<64>([](int i) { return (i % 8 / 4 * 32 + F::PLACE / 8 * 8 + (F::SIGNS == 8 ? F::PLACE % 8 : 0) + 4 * QUAD + i % 4 + 57) % 64; });
  const __mmask64 negative = _mm512_movepi8_mask(_mm512_multishift_epi64_epi8(load(FROM), signs));
  return _mm512_mask_sub_epi8(numbers, negative, _mm512_setzero_si512(), numbers);
}

template <class F>
BITSMITH_512_INLINE __m512i signs_of(__m512i code) {
  if constexpr (F::SIGNS != 7) return code;
  return with_eighth(_mm512_srli_epi32(code, F::PLACE % 8));
}

// Eight numbers of 16 rows, plus 128: two vectors of bytes. shift: what is added to them.
template <class F, int AT>
BITSMITH_512_INLINE void store_octet(const __m512i (&halves)[2], __m512i table, __m512i code, __m512i shift, uint8_t* to) {
  __m512i v[2] = {numbers<F, AT, 0>(halves, table), numbers<F, AT, 1>(halves, table)};
  if constexpr (F::SHIFT) {
    for (auto& one : v) one = _mm512_add_epi8(one, shift);
  } else {
    const __m512i signs = signs_of<F>(code);
    v[0] = with_signs<F, 0>(v[0], signs), v[1] = with_signs<F, 1>(v[1], signs);
  }
  for (int i = 0; i < 2; ++i) _mm512_store_si512(to + 128 * AT + 64 * i, v[i]);
}

// Plus or minus one where a bit is clear or set.
BITSMITH_512_INLINE __m512i shift_of(__m512i from, int32_t bit) {
  return _mm512_mask_blend_epi32(_mm512_test_epi32_mask(from, _mm512_set1_epi32(bit)), _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
}

// Where a super block's codes of 16 outputs lie; codes of scales, eight groups a lane.
template <class F>
struct Streams {
  const uint8_t* codes[ROWS];
  alignas(64) uint32_t lane[F::GROUPS / 8][ROWS];

  BITSMITH_512_INLINE __m512i code(int64_t g) const {
    return _mm512_srli_epi32(_mm512_load_si512(lane[g / 8]), static_cast<uint32_t>(g % 8 * F::SCALE_BITS));
  }
};

template <class F>
BITSMITH_512_INLINE void open(const Weight& w, int64_t nb, int64_t s, Streams<F>& to) {
  for (int64_t r = 0; r < ROWS; ++r) {
    const Row row = row_at<F>(w, nb, r, s);
    to.codes[r] = row.codes;
    ahead<F>(w, row);
    for (int64_t i = 0; i < F::GROUPS / 8; ++i) to.lane[i][r] = eight_scales<F>(row.scales + i * F::SCALE_BITS);
  }
}

// The scales of groups, (2 code + 1) * super.
template <class F>
BITSMITH_512_INLINE void scales(const Streams<F>& from, const float* super, Scales& by) {
  const __m512 one = _mm512_load_ps(super), two = _mm512_add_ps(one, one);
  for (int64_t g = 0; g < F::GROUPS; ++g)
    by.scale[g] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(from.code(g), _mm512_set1_epi32(F::MASK))), two, one);
}

// Super block s of 16 outputs: their numbers plus 128, the scales of their groups, of which `super` is a factor.
template <class F>
BITSMITH_512 void decode(const Weight& w, int64_t nb, int64_t s, const float* super, uint8_t* to, Scales& by) {
  Streams<F> from;
  open<F>(w, nb, s, from);
  scales<F>(from, super, by);
  const __m512i table = _mm512_loadu_si512(w.levels);
  __m512i shift[F::GROUPS];
  if constexpr (F::GROUP_SHIFT)
    for (int64_t g = 0; g < F::GROUPS; ++g) shift[g] = shift_of(from.code(g), F::MASK + 1);
  for (int64_t half = 0; half < 2; ++half) {
    __m512i code[16];
    for (int64_t r = 0; r < ROWS; ++r) code[r] = codes16<F>(from.codes[r] + half * 2 * F::WIDTH);
    avx512::transpose(code);
    for (int64_t o = 0; o < 16; o += TOGETHER<F>, to += 128 * TOGETHER<F>) {
      __m512i found[2];
      halves<F>(w, code + o, found);
      const auto store = [&]<int AT>(std::integral_constant<int, AT>) __attribute__((always_inline)) BITSMITH_512 {
        __m512i add{};
        if constexpr (F::SHIFT) add = F::GROUP_SHIFT ? shift[(half * 16 + o) * 8 / F::GROUP] : shift_of(code[o + AT], 1 << F::PLACE);
        store_octet<F, AT>(found, table, code[o + AT], add, to);
      };
      store(std::integral_constant<int, 0>{}), store(std::integral_constant<int, 1>{});
      if constexpr (TOGETHER<F> == 4) store(std::integral_constant<int, 2>{}), store(std::integral_constant<int, 3>{});
    }
  }
}

template <class F>
BITSMITH_512 void rows(const Weight& w, const two_level::Weight& as, const Input& x, int64_t nb, void* y, int32_t dtype) {
  float* const totals = scratch((x.m + TILE) * ROWS);
  alignas(64) uint8_t number[SUPER * ROWS];
  alignas(64) float super[ROWS];
  Scales by;
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    decode<F>(w, nb, s, super, number, by);
    two_level::wide::span<8, F::GROUP, 8, false>(as, x, number, by, __m512i{}, __m512{}, s, totals);
  }
  for (int64_t m = 0; m < x.m; ++m) avx512::store16(y, m * w.n + nb * ROWS, dtype, _mm512_loadu_ps(totals + m * ROWS), w.n - nb * ROWS);
}

inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows { return rows<decltype(form)>; });
}

}  // namespace bitsmith::grids::wide
#endif
