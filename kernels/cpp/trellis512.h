// The trellis family (trellis.h) as pairs of bfloat16 with AVX-512: 16 states of two neighbouring inputs are cut out of their bits by one instruction.
#pragma once
#include "avx512.h"
#include "floats.h"

#if BITSMITH_X86
namespace bitsmith::trellis512 {

// Weights of 16 outputs, two neighbouring inputs of each a word: [count / 2][16], zeros up to whole 16 inputs.
using Pairs = void (*)(const Source& s, int64_t nb, int64_t k0, int64_t count, uint32_t* pairs);

BITSMITH_512_INLINE __m512 to_half(__m512 v) {
  const __m512 far = _mm512_set1_ps(0x1p13f);
  return _mm512_fnmadd_ps(v, far, _mm512_fmadd_ps(v, far, v));
}

// As `value_of` of trellis.h.
template <int STATES>
BITSMITH_512_INLINE __m512 value_of(__m512i state) {
  if constexpr (STATES == MUL1) {
    const __m512i x = _mm512_mullo_epi32(state, _mm512_set1_epi32(static_cast<int32_t>(0x83DCD12Du)));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(1024), x, _mm512_set1_epi32(0x01010101)));
    return to_half(_mm512_fmadd_ps(sum, _mm512_set1_ps(0x1.bb8p-8f), _mm512_set1_ps(-0x1.4c4p+3f)));
  }
  __m512i x = _mm512_mullo_epi32(state, _mm512_set1_epi32(static_cast<int32_t>(STATES == INST3 ? 89226354u : 0xCBAC1FEDu)));
  if constexpr (STATES == INST3) x = _mm512_add_epi32(x, _mm512_set1_epi32(64248484));
  const __m512i keep = _mm512_set1_epi32(static_cast<int32_t>(0x81ffe000u)), flip = _mm512_set1_epi32(0x38000000 + (0x3b60 << 13));
  const auto half = [&](__m512i top) BITSMITH_512 __attribute__((always_inline)) {
    // (a & keep) ^ flip
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_srai_epi32(top, 3), keep, flip, 0x6a));
  };
  return to_half(_mm512_add_ps(half(_mm512_slli_epi32(x, 16)), half(x)));
}

// Weights T and T + 1 of the 32 of each pair of outputs, a pair beside the other in a lane of 64 bits. words[W]: word W, above it W - 1.
template <int BITS, int STATES, int T>
BITSMITH_512_INLINE __m512 two(const __m512i* words) {
  constexpr int W = ((T + 2) * BITS - 1) / 32, DOWN = (W + 1) * 32 - (T + 1) * BITS, NEXT = DOWN - BITS;
  constexpr uint64_t PLACES = DOWN | (DOWN + 8) << 8 | static_cast<uint64_t>(NEXT | (NEXT + 8) << 8) << 32;
  return value_of<STATES>(_mm512_maskz_multishift_epi64_epi8(0x3333333333333333u, _mm512_set1_epi64(PLACES), words[W]));
}

// Inputs 2 * LANE + 4 * J and the next of 16 outputs.
template <int BITS, int STATES, int LANE, int J>
BITSMITH_512_INLINE void inputs(const __m512i* words, uint32_t* pairs) {
  const __m512 first = two<BITS, STATES, 8 * LANE + J>(words), last = two<BITS, STATES, 8 * LANE + J + 4>(words);
  _mm512_store_si512(pairs + (LANE + 2 * J) * ROWS, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(last, first)));
}

template <int BITS, int STATES>
BITSMITH_512 void trellis(const Source& s, int64_t nb, int64_t k0, int64_t count, uint32_t* pairs) {
  const int64_t tiles = (s.w.k + 15) / 16;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(s.w.codes) + (nb * tiles + k0 / 16) * 8 * BITS;
  const __m512i above = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  // The bits before the first are the last word of the output before.
  const __m512i around = _mm512_setr_epi32(0, 23, 1, 16, 2, 17, 3, 18, 4, 19, 5, 20, 6, 21, 7, 22);
  for (int64_t k = 0; k < count; k += 16, from += 8 * BITS, pairs += 8 * ROWS) {
    __m512i own[BITS], words[BITS];
    for (int w = 0; w < BITS; ++w) own[w] = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8 * w)));
    for (int w = 0; w < BITS; ++w) words[w] = _mm512_permutex2var_epi32(own[w], w ? above : around, own[w ? w - 1 : BITS - 1]);
    inputs<BITS, STATES, 0, 0>(words, pairs);
    inputs<BITS, STATES, 0, 2>(words, pairs);
    inputs<BITS, STATES, 1, 0>(words, pairs);
    inputs<BITS, STATES, 1, 2>(words, pairs);
    inputs<BITS, STATES, 2, 0>(words, pairs);
    inputs<BITS, STATES, 2, 2>(words, pairs);
    inputs<BITS, STATES, 3, 0>(words, pairs);
    inputs<BITS, STATES, 3, 2>(words, pairs);
  }
}

template <int STATES>
Pairs pairs_of(int32_t bits) {
  BITSMITH_BY_BITS(bits, trellis, STATES)
}

inline Pairs pairs_of(const Source& s) {
  return s.table_kind == INST3 ? pairs_of<INST3>(s.w.bits) : s.table_kind == MCG ? pairs_of<MCG>(s.w.bits) : pairs_of<MUL1>(s.w.bits);
}

}  // namespace bitsmith::trellis512
#endif
