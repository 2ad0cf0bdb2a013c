// The products of two_level.h with AVX-512's dot products: four inputs at once into 32 bits, then the integer scale. The integers are those of
// `two_level::rows`; float32 sums may differ in their order.
#pragma once
#include "avx512.h"
#include "two_level256.h"

#if BITSMITH_X86
namespace bitsmith::two_level::wide {

using avx512::spread;

// What is added to the values of a table, so that they have no sign; their zero point moves with them.
constexpr int32_t BIAS = 128;

// Per super block: the integer scale of each group for 16 rows, and the mins of two groups each, 16 bits in a lane; or, where SUB below is 0,
// the bytes of float scales.
struct Scales {
  __m512i scale[16], mins[8];
  const uint8_t* floats;
};

BITSMITH_512_INLINE __m512i bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

template <int SUB>
BITSMITH_512_INLINE __m512i sub_code16(const uint8_t* p, int64_t g) {
  if constexpr (SUB == 8) return bytes(p + g * ROWS);
  if constexpr (SUB == 4) {
    const __m512i both = bytes(p + g / 2 * ROWS);
    return g % 2 ? _mm512_srli_epi32(both, 4) : _mm512_and_si512(both, _mm512_set1_epi32(15));
  }
  const uint8_t* quad = p + g / 4 * 3 * ROWS;
  if (g % 4 < 3) return _mm512_and_si512(bytes(quad + g % 4 * ROWS), _mm512_set1_epi32(63));
  const __m512i a = _mm512_srli_epi32(bytes(quad), 6), b = _mm512_srli_epi32(bytes(quad + ROWS), 6), c = _mm512_srli_epi32(bytes(quad + 2 * ROWS), 6);
  return _mm512_or_si512(a, _mm512_or_si512(_mm512_slli_epi32(b, 2), _mm512_slli_epi32(c, 4)));
}

template <int SUB, int GROUP>
BITSMITH_512_INLINE void scales(const Weight& w, int64_t at, Scales& out) {
  constexpr int64_t GROUPS = SUPER / GROUP;
  const uint8_t *p = w.scales + at * w.sub_bytes(), *mins = w.mins + at * w.sub_bytes();
  const __m512i offset = _mm512_set1_epi32(w.offset);
  for (int64_t g = 0; g < GROUPS; ++g) out.scale[g] = _mm512_sub_epi32(sub_code16<SUB>(p, g), offset);
  for (int64_t g = 0; w.mins && g < GROUPS; g += 2)
    out.mins[g / 2] = _mm512_or_si512(sub_code16<SUB>(mins, g), _mm512_slli_epi32(sub_code16<SUB>(mins, g + 1), 16));
}

// Whether weights of this kind have mins: native_two_level.py brings no others.
template <int BITS, int SUB, bool TABLE>
constexpr bool MINS = SUB != 0 && !TABLE && (BITS == 2 || BITS == 4 || BITS == 5);

// One row of activations, and what its groups add to sums of unsigned codes: nothing with mins, else minus the zero point times their sum.
BITSMITH_512 inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  vectors::prepare(w, x, dtype, row, in);
  const int64_t groups = w.k / w.group;
  const int32_t zero = w.mins ? 0 : w.zero + (w.table ? BIAS : 0);
  for (int64_t at = row * groups; at < (row + 1) * groups; ++at) in.start[at] = -zero * in.group_sums[at];
}

BITSMITH_512_INLINE void values(__m512i table, __m512i (&v)[8]) {
  for (auto& one : v) one = _mm512_shuffle_epi8(table, one);
}

// total[m][16 outputs] += 128 inputs of rows m0 .. m0 + MR - 1, RECORDED: of one tile. codes: of those inputs, as stored.
template <int BITS, int GROUP, int SUB, bool TABLE, int MR, bool RECORDED>
BITSMITH_512_INLINE void chunk(const Weight& w, const Input& in, const uint8_t* codes, const Scales& by, __m512i table, __m512 d, __m512 dmin, int64_t at,
                               int64_t half, int64_t m0, float* total) {
  constexpr bool LOW = MINS<BITS, SUB, TABLE>;
  constexpr int PER = GROUP / 4, PARTS = 8 / PER, GROUPS = CHUNK / GROUP;
  // From four inputs to the next, from a group or a pair of groups to the next.
  constexpr int64_t NEXT = RECORDED ? TILE * 4 : 4;
  const Rows128 x = RECORDED ? in_record<GROUP, LOW>(w, in, m0, at) : apart<GROUP, LOW>(w, in, m0, at);
  const int64_t blocks = SUB ? CHUNK / BLOCK : std::min(CHUNK, w.k - at) / BLOCK;
  const int64_t q_row = RECORDED ? 4 : x.q_row, start_row = RECORDED ? 4 : x.start_row, step_row = RECORDED ? 4 : x.step_row;
  const char* q = x.q;
  __m512i dot[MR];
  __m512 scaled[MR];
  for (int m = 0; m < MR; ++m) dot[m] = _mm512_setzero_si512(), scaled[m] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, codes += 64 * BITS, q += 8 * NEXT) {
    __m512i v[8];
    // Bytes are those of grids512.h, which are near.
    if constexpr (BITS < 8) ahead<BITS, MR>(codes);
    avx512::unpack<BITS>(codes, v);
    if constexpr (TABLE) values(table, v);
    for (int part = 0; part < PARTS; ++part) {
      const int64_t g = b * PARTS + part;
      __m512i sum[MR];
      for (int m = 0; m < MR; ++m) sum[m] = LOW ? _mm512_setzero_si512() : spread(x.start + m * start_row + g * NEXT);
#pragma GCC unroll 8
      for (int j = part * PER; j < (part + 1) * PER; ++j)
        for (int m = 0; m < MR; ++m) sum[m] = _mm512_dpbusd_epi32(sum[m], v[j], spread(q + m * q_row + j * NEXT));
      if constexpr (SUB) {
        for (int m = 0; m < MR; ++m) dot[m] = _mm512_add_epi32(dot[m], _mm512_mullo_epi32(sum[m], by.scale[half * GROUPS + g]));
      } else {
        const __m512 scale = avx512::load16(by.floats, (half * GROUPS + g) * ROWS, GROUP == 16 ? E4M3_BYTE : E8M0);
        for (int m = 0; m < MR; ++m) scaled[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), scale, scaled[m]);
      }
    }
  }
  // In registers: left to itself GCC keeps `dot` in memory and this a loop.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* to = total + (m0 + m) * ROWS;
    const __m512 step = _mm512_castsi512_ps(spread(x.step + m * step_row)), all = _mm512_loadu_ps(to);
    const __m512 whole = SUB ? _mm512_cvtepi32_ps(dot[m]) : scaled[m];
    if constexpr (!LOW) {
      _mm512_storeu_ps(to, _mm512_fmadd_ps(whole, _mm512_mul_ps(d, step), all));
    } else {
      __m512i low = _mm512_setzero_si512();
      for (int g = 0; g < GROUPS; g += 2) low = _mm512_dpwssd_epi32(low, by.mins[(half * GROUPS + g) / 2], spread(x.start + m * start_row + g / 2 * NEXT));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(low), dmin, _mm512_mul_ps(whole, d)), step, all));
    }
  }
}

// All rows of activations meet super block s, of which a weight with float scales may end in its first half. Codes are unpacked for every eight
// rows anew: that is done beside the dot products, where loads of bytes unpacked before are not (5632 x 2048 of Q4_K, one core, 32 rows: 2.53 ms
// by way of memory, 2.24 so; 9 rows 0.94 and 0.73; 512 rows the same).
template <int BITS, int GROUP, int SUB, bool TABLE>
BITSMITH_512_INLINE void super_block(const Weight& w, const Input& x, const uint8_t* codes, const Scales& by, __m512i table, __m512 d, __m512 dmin, int64_t s,
                                     float* total) {
  for (int64_t half = 0; half < 2 && s * SUPER + half * CHUNK < w.k; ++half, codes += CHUNK * ROWS / 8 * BITS) {
    const int64_t at = s * SUPER + half * CHUNK;
    int64_t m = 0;
    if (!recorded(x.m)) {
      if (m + 4 <= x.m) chunk<BITS, GROUP, SUB, TABLE, 4, false>(w, x, codes, by, table, d, dmin, at, half, m, total), m += 4;
      if (m + 2 <= x.m) chunk<BITS, GROUP, SUB, TABLE, 2, false>(w, x, codes, by, table, d, dmin, at, half, m, total), m += 2;
      if (m < x.m) chunk<BITS, GROUP, SUB, TABLE, 1, false>(w, x, codes, by, table, d, dmin, at, half, m, total);
      continue;
    }
    for (; m + 4 < x.m; m += TILE) chunk<BITS, GROUP, SUB, TABLE, TILE, true>(w, x, codes, by, table, d, dmin, at, half, m, total);
    if (m + 2 < x.m) chunk<BITS, GROUP, SUB, TABLE, 4, true>(w, x, codes, by, table, d, dmin, at, half, m, total);
    else if (m < x.m) chunk<BITS, GROUP, SUB, TABLE, 2, true>(w, x, codes, by, table, d, dmin, at, half, m, total);
  }
}

template <int BITS, int GROUP, int SUB, bool TABLE>
BITSMITH_512 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>((x.m + TILE) * ROWS), 0.0f);
  float* total = totals.data();
  const __m512i table = TABLE ? _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table))),
                                                _mm512_set1_epi8(static_cast<char>(BIAS)))
                              : _mm512_setzero_si512();
  Scales by;
  for (int64_t s = 0; s < w.super_blocks(); ++s) {
    const int64_t at = nb * w.super_blocks() + s;
    const uint8_t* codes = w.codes + (nb * w.k + s * SUPER) / BLOCK * 64 * BITS;
    if constexpr (SUB) scales<SUB, GROUP>(w, at, by);
    else by.floats = w.scales + (nb * w.k + s * SUPER) / GROUP * ROWS;
    const __m512 d = SUB ? avx512::load16(w.supers, at * ROWS, F16) : _mm512_set1_ps(w.factor);
    const __m512 dmin = w.mins ? avx512::load16(w.super_mins, at * ROWS, F16) : _mm512_setzero_ps();
    super_block<BITS, GROUP, SUB, TABLE>(w, x, codes, by, table, d, dmin, s, total);
  }
  for (int64_t m = 0; m < x.m; ++m) avx512::store16(y, m * w.n + nb * ROWS, dtype, _mm512_loadu_ps(total + m * ROWS), w.n - nb * ROWS);
}

// Null for a combination that no format has.
inline Rows rows_of(const Weight& w) {
  if (!w.supers) return w.group == 16 ? rows<4, 16, 0, true> : rows<4, 32, 0, true>;
  const int32_t kind = w.bits * 1000 + w.group * 10 + w.sub_bits;
  if (w.table) return kind == 4326 ? rows<4, 32, 6, true> : nullptr;
  switch (kind) {
    case 2164: return rows<2, 16, 4, false>;
    case 3166: return rows<3, 16, 6, false>;
    case 4326: return rows<4, 32, 6, false>;
    case 5326: return rows<5, 32, 6, false>;
    case 6168: return rows<6, 16, 8, false>;
    default: return nullptr;
  }
}

}  // namespace bitsmith::two_level::wide
#endif
