// Weights of floats.h as bfloat16 for bfloat16 activations, with AVX-512: the product of pairs512.h. Every decoder serves, through a panel in float32; the
// trellis (trellis512.h) and vectors of eight write pairs themselves.
#pragma once
#include "floats.h"
#include "pairs512.h"
#include "trellis512.h"

#if BITSMITH_X86
namespace bitsmith::floats512 {

using trellis512::Pairs;
static_assert(pairs512::STEP == PANEL);

// Inputs 2 i and 2 i + 1 of panel [count][16] side by side; beyond `count`, zeros up to whole 16s.
BITSMITH_512 inline void paired(float* panel, int64_t count, uint32_t* pairs) {
  const int64_t inputs = pairs512::whole(count);
  std::memset(panel + count * ROWS, 0, static_cast<size_t>((inputs - count) * ROWS * 4));
  for (int64_t i = 0; i < inputs; i += 2, pairs += ROWS)
    _mm512_store_si512(pairs, pairs512::paired(_mm512_loadu_ps(panel + i * ROWS), _mm512_loadu_ps(panel + (i + 1) * ROWS)));
}

template <int DTYPE>
BITSMITH_512_INLINE __m256 entry8(const char* table, int64_t entry) {
  if constexpr (DTYPE == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(table + entry * 32));
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + entry * 16));
  if constexpr (DTYPE == F16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// The eight inputs of one output that `code` stands for. BOOKS tables for BITS each, any number of either where 0.
template <int DTYPE, int BOOKS, int BITS>
BITSMITH_512_INLINE __m256 octet(const Source& s, uint32_t code) {
  const int books = BOOKS ? BOOKS : s.books, bits = BITS ? BITS : s.w.bits;
  const uint32_t mask = (uint64_t{1} << bits) - 1;
  const char* table = static_cast<const char*>(s.table);
  __m256 sum = entry8<DTYPE>(table, code & mask);
  for (int book = 1; book < books; ++book)
    sum = _mm256_add_ps(sum, entry8<DTYPE>(table += int64_t{8 * (DTYPE == F32 ? 4 : 2)} << bits, code >> book * bits & mask));
  return sum;
}

template <int DTYPE, int BOOKS, int BITS>
BITSMITH_512 void vectors(const Source& s, int64_t nb, int64_t k0, int64_t count, uint32_t* pairs) {
  const int64_t octets = (count + 7) / 8;
  uint32_t codes[ROWS][PANEL / 8];
  for (int64_t r = 0; r < ROWS; ++r) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(s.w.codes) + std::min(nb * ROWS + r, s.w.n - 1) * s.words;
    floats256::read_codes(row, s.words, s.w.bits * s.books, k0 / 8, octets, codes[r]);
  }
  floats256::Scales scales(s, nb, k0);
  __m512 scale[8];
  for (int64_t o = 0; o < octets; ++o, pairs += 4 * ROWS) {
    if (k0 + o * 8 >= scales.next) {
      scales.at(k0 + o * 8);
      // Of the outputs of half[i % 2] of vector i / 2.
      for (int i = 0; i < 8; ++i) {
        const floats256::V of = scales.scale[i % 2];
        scale[i] = _mm512_insertf32x8(_mm512_set1_ps(of[i / 2]), _mm256_set1_ps(of[i / 2 + 4]), 1);
      }
    }
    // Vector i: outputs i, i + 4, i + 8 and i + 12.
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      __m512 half[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m512 low = _mm512_castps256_ps512(octet<DTYPE, BOOKS, BITS>(s, codes[i + 8 * h][o]));
        half[h] = _mm512_mul_ps(_mm512_insertf32x8(low, octet<DTYPE, BOOKS, BITS>(s, codes[i + 8 * h + 4][o]), 1), scale[2 * i + h]);
      }
      v[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(half[1], half[0]));
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    _mm512_store_si512(pairs, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(pairs + ROWS, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(pairs + 2 * ROWS, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(pairs + 3 * ROWS, _mm512_unpackhi_epi64(b, d));
  }
  if (octets % 2) std::memset(pairs, 0, 4 * ROWS * 4);
}

// Whether pairs are faster: one row does not pay for them, but where they come out of the decoder in their order (4096 x 4096, two threads, ms: 2-bit affine
// weights 1.10 in float32 and 1.31, codebook16.v8 1.1 and 1.3, trellis2 1.20 and 1.03).
inline bool taken(const Source& s, int64_t m) { return m > 1 || s.form == TRELLIS; }

// AQLM's common forms by themselves (2 x 8 bits: 6.4 -> 5.5 cycles for 16 weights).
template <int DTYPE>
Pairs vectors_of(const Source& s) {
  if (s.books == 1 && s.w.bits == 16) return vectors<DTYPE, 1, 16>;
  return s.books == 2 && s.w.bits == 8 ? vectors<DTYPE, 2, 8> : vectors<DTYPE, 0, 0>;
}

// The decoder of pairs, or null: through float32.
inline Pairs pairs_of(const Source& s) {
  if (s.form == TRELLIS) return trellis512::pairs_of(s);
  if (s.form != VECTORS || s.vec != 8) return nullptr;
  return s.table_kind == F32 ? vectors_of<F32>(s) : s.table_kind == F16 ? vectors_of<F16>(s) : vectors_of<BF16>(s);
}

// `count` row blocks from nb on, all m rows of `records`.
BITSMITH_512 inline void rows(const Source& s, int64_t m, const uint8_t* records, int64_t nb, int64_t count, void* y, int32_t dtype) {
  const Pairs pairs = pairs_of(s);
  const Decode decode = pairs ? nullptr : floats256::decode_of(s);
  const auto fill = [&](int64_t block, int64_t k0, int64_t inputs, pairs512::Panel& panel) BITSMITH_512 {
    panel.scale[0] = _mm512_set1_ps(1);
    if (pairs) return pairs(s, block, k0, inputs, panel.pairs);
    alignas(64) float wide[PANEL * ROWS];
    decode(s, block, k0, inputs, wide);
    paired(wide, inputs, panel.pairs);
  };
  pairs512::rows(fill, s.w.n, s.w.k, m, records, pairs512::STEP / 2, nb, count, y, dtype);
}

}  // namespace bitsmith::floats512
#endif
