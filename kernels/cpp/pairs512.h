// Products of bfloat16 activations with AVX-512 where weights are decoded a panel at a time: 16 outputs by STEP inputs, pairs of them side by side as
// vdpbf16ps takes them. The panel stays in the first-level cache while all rows pass it. Eight sums in registers keep that instruction busy (one core, all in
// caches: 118 billion multiply-adds a second of 118; here, with decoding, 105 at 64 rows and 110 at 512, and not more with 16 sums or panels of 512 inputs).
#pragma once
#include <numeric>

#include "avx512.h"

#if BITSMITH_X86
namespace bitsmith::pairs512 {

constexpr int64_t STEP = 256;
// Scales of a panel: at least 32 inputs have one.
constexpr int64_t PARTS = STEP / BLOCK;
// Inputs come in whole 16s, zeros at the end: eight pairs, for up to eight sums of a row.
constexpr int64_t whole(int64_t inputs) { return (inputs + 15) / 16 * 16; }

struct Panel {
  alignas(64) uint32_t pairs[STEP / 2 * ROWS];
  __m512 scale[PARTS];
};

// A record: STEP inputs of TILE rows, words [STEP / 2][TILE], each a pair. Records of the tiles follow each other, then those of the next STEP inputs.
constexpr int64_t RECORD_BYTES = STEP * TILE * 2;

// Of rows of k inputs, `stride` apart.
inline void record(const uint16_t* x, int64_t stride, int64_t m, int64_t k, int64_t tile, int64_t step, uint8_t* to) {
  const int64_t first = step * STEP, count = std::min(STEP, k - first);
  uint8_t* const rest = to + count / 2 * TILE * 4;
  std::memset(rest, 0, static_cast<size_t>((whole(count) / 2 - count / 2) * TILE * 4));
  for (int64_t r = 0; r < std::min(TILE, m - tile * TILE); ++r) {
    const uint16_t* from = x + (tile * TILE + r) * stride + first;
    place(from, count / 2, to + 4 * r);
    if (count % 2) std::memcpy(rest + 4 * r, from + count - 1, 2);
  }
}

// Pairs of lanes of two vectors, rounded.
BITSMITH_512_INLINE __m512i paired(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// Pairs less a number of their lane.
BITSMITH_512_INLINE __m512i less(__m512i pairs, __m512 by) {
  const __m512i first = _mm512_slli_epi32(pairs, 16), second = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
  return paired(_mm512_sub_ps(_mm512_castsi512_ps(first), by), _mm512_sub_ps(_mm512_castsi512_ps(second), by));
}

// sum + products of pairs w with the one at p. Written out for the reason at add_dot of avx512.h.
BITSMITH_512_INLINE __m512 add_pairs(__m512 sum, __m512i w, const void* p) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*static_cast<const char(*)[4]>(p)));
  return sum;
}

// total [MR][16] += MR rows of a record by `pairs` pairs of a panel, each `per` of them by their scale.
template <int MR>
BITSMITH_512 void tile(const uint8_t* record, const Panel& panel, int64_t pairs, int64_t per, bool starts, float* total) {
  // Eight sums: a product takes six cycles and one begins in each.
  constexpr int APART = 8 / MR;
  __m512 all[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) all[m] = starts ? _mm512_setzero_ps() : _mm512_loadu_ps(total + m * ROWS);
  const uint32_t* w = panel.pairs;
  for (const __m512* scale = panel.scale; pairs > 0; pairs -= per, ++scale) {
    __m512 sum[MR][APART];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int a = 0; a < APART; ++a) sum[m][a] = _mm512_setzero_ps();
    for (const uint32_t* stop = w + std::min(per, pairs) * ROWS; w < stop; w += APART * ROWS, record += APART * TILE * 4)
#pragma GCC unroll 8
      for (int a = 0; a < APART; ++a) {
        const __m512i weights = _mm512_load_si512(w + a * ROWS);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) sum[m][a] = add_pairs(sum[m][a], weights, record + a * TILE * 4 + m * 4);
      }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int a = 1; a < APART; ++a) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][a]);
      all[m] = _mm512_fmadd_ps(sum[m][0], *scale, all[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(total + m * ROWS, all[m]);
}

// Outputs of `count` row blocks from nb on, m rows of k inputs. fill(nb, first input, inputs, panel) decodes a panel, with a scale for each `per` pairs.
template <class Fill>
BITSMITH_512 void rows(const Fill& fill, int64_t n, int64_t k, int64_t m, const uint8_t* records, int64_t per, int64_t nb, int64_t count, void* y, int32_t dtype) {
  const int64_t tiles = (m + TILE - 1) / TILE, room = tiles * TILE * ROWS;
  float* const totals = scratch(count * room);
  Panel panel;
  for (int64_t k0 = 0; k0 < k; k0 += STEP, records += tiles * RECORD_BYTES) {
    const int64_t inputs = std::min(STEP, k - k0), pairs = whole(inputs) / 2;
    for (int64_t i = 0; i < count; ++i) {
      fill(nb + i, k0, inputs, panel);
      for (int64_t t = 0; t < tiles; ++t) {
        const uint8_t* record = records + t * RECORD_BYTES;
        float* total = totals + i * room + t * TILE * ROWS;
        const int64_t left = m - t * TILE;
        if (left > 4) tile<8>(record, panel, pairs, per, k0 == 0, total);
        else if (left > 2) tile<4>(record, panel, pairs, per, k0 == 0, total);
        else if (left > 1) tile<2>(record, panel, pairs, per, k0 == 0, total);
        else tile<1>(record, panel, pairs, per, k0 == 0, total);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t row = 0; row < m; ++row)
      avx512::store16(y, row * n + (nb + i) * ROWS, dtype, _mm512_loadu_ps(totals + i * room + row * ROWS), n - (nb + i) * ROWS);
}

// Whether BFLOAT weights go through panels; `few` of avx512.h multiplies the rows that registers hold as it decodes.
inline bool taken(const Weight& w, int64_t m) { return w.kind == BFLOAT && m > TILE; }

// Outputs of `count` row blocks from nb on of BFLOAT weights, all rows. Scales meet the sums; only zero points meet the values, which are rounded again then.
template <int BITS, int KIND>
BITSMITH_512 void table_rows(const Weight& w, const Input& x, int64_t nb, int64_t count, void* y, int32_t dtype) {
  const avx512::Table<BITS> table(w.values);
  const int64_t per = std::gcd(w.chunk(), STEP);
  const auto fill = [&](int64_t block, int64_t k0, int64_t inputs, Panel& panel) BITSMITH_512 {
    __m512 zero;
    for (int64_t k = 0; k < inputs; k += BLOCK) {
      if (k % per == 0) avx512::scales16(w, block, (k0 + k) / w.group, w.groups(), panel.scale[k / per], zero);
      const uint8_t* codes = w.block(block, (k0 + k) / BLOCK);
      __m512i v[8];
      ahead<BITS, 2>(codes);
      avx512::unpack<BITS>(codes, v);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __m512i pair[2];
        table.look_up(v[j], pair[0], pair[1]);
        for (int h = 0; h < 2; ++h) {
          if (w.zeros) pair[h] = less(pair[h], zero);
          _mm512_store_si512(panel.pairs + (k / 2 + 2 * j + h) * ROWS, pair[h]);
        }
      }
    }
  };
  rows(fill, w.n, w.k_blocks() * BLOCK, x.m, x.records.data(), per / 2, nb, count, y, dtype);
}

}  // namespace bitsmith::pairs512
#endif
