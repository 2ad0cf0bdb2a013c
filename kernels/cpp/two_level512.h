// The products of two_level.h with AVX-512's dot products: four inputs at once into 32 bits, then the group's scale as a float, which costs nothing
// more than the integer (Q4_K, one core, 512 rows: 171 -> 176 billion multiply-adds a second). Sums of groups are the integers of `two_level::rows`.
#pragma once
#include "avx512.h"
#include "two_level256.h"

#if BITSMITH_X86
namespace bitsmith::two_level::wide {

using avx512::spread;

// What is added to the values of a table, so that they have no sign; their zero point moves with them.
constexpr int32_t BIAS = 128;

// Of SPAN inputs and 16 rows: the scale of each group, and the integer mins of two groups each, 16 bits in a lane.
struct Scales {
  __m512 scale[SUPER / 16];
  __m512i mins[SUPER / 32];
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
BITSMITH_512_INLINE void scales(const Weight& w, int64_t nb, int64_t s, Scales& out) {
  constexpr int64_t GROUPS = SPAN<SUB> / GROUP;
  if constexpr (SUB == 0) {
    const int64_t groups = std::min(GROUPS, w.k / GROUP - s * GROUPS);
    const uint8_t* bytes = w.scales + (nb * w.k / GROUP + s * GROUPS) * ROWS;
    for (int64_t g = 0; g < groups; ++g)
      out.scale[g] = _mm512_mul_ps(avx512::load16(bytes, g * ROWS, GROUP == 16 ? E4M3_BYTE : E8M0), _mm512_set1_ps(w.factor));
  } else {
    const int64_t at = nb * w.super_blocks() + s;
    const uint8_t *p = w.scales + at * w.sub_bytes(), *mins = w.mins + at * w.sub_bytes();
    const __m512i offset = _mm512_set1_epi32(w.offset);
    const __m512 d = avx512::load16(w.supers, at * ROWS, F16);
    for (int64_t g = 0; g < GROUPS; ++g) out.scale[g] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sub_code16<SUB>(p, g), offset)), d);
    for (int64_t g = 0; w.mins && g < GROUPS; g += 2)
      out.mins[g / 2] = _mm512_or_si512(sub_code16<SUB>(mins, g), _mm512_slli_epi32(sub_code16<SUB>(mins, g + 1), 16));
  }
}

// Whether weights of this kind have mins: native_two_level.py brings no others.
template <int BITS, int SUB, bool TABLE>
constexpr bool MINS = SUB != 0 && !TABLE && (BITS == 2 || BITS == 4 || BITS == 5);

// One row of activations, and what its groups add to sums of unsigned codes: nothing with mins, else minus the zero point times their sum.
BITSMITH_512 inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  const int64_t span = w.chunk(), spans = w.chunks(), shift = w.shift();
  const int32_t zero = w.mins ? 0 : w.zero + (w.table ? BIAS : 0);
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t at = s * span, count = std::min(span, w.k - at), first = (row * w.k + at) >> shift;
    int16_t* sums = in.group_sums.data() + first;
    in.step[row * spans + s] = avx512::rounded(x, row * w.k + at, dtype, count, count, in.q.data() + row * in.stride + at,
                                               [&](int64_t i, __m256i fours) __attribute__((always_inline)) BITSMITH_512 {
                                                 fours = _mm256_hadd_epi32(fours, fours);
                                                 fours = _mm256_hadd_epi32(fours, fours);
                                                 const int32_t low = _mm256_extract_epi32(fours, 0), high = _mm256_extract_epi32(fours, 4);
                                                 if (shift == 5) sums[i / 32] = static_cast<int16_t>(low + high);
                                                 else sums[i / 16] = static_cast<int16_t>(low), sums[i / 16 + 1] = static_cast<int16_t>(high);
                                               });
    for (int64_t g = 0; g < count >> shift; ++g) in.start[first + g] = -zero * sums[g];
  }
}

BITSMITH_512_INLINE void values(__m512i table, __m512i (&v)[8]) {
  for (auto& one : v) one = _mm512_shuffle_epi8(table, one);
}

// total[m][16 outputs] += (s = 0: =) SPAN inputs, the s-th, of rows m0 .. m0 + MR - 1, RECORDED: of one tile. codes: as stored.
template <int BITS, int GROUP, int SUB, bool TABLE, int MR, bool RECORDED>
BITSMITH_512_INLINE void tile(const Weight& w, const Input& in, const uint8_t* codes, const Scales& by, __m512i table, __m512 dmin, int64_t s, int64_t m0,
                              float* total) {
  constexpr bool LOW = MINS<BITS, SUB, TABLE>;
  constexpr int64_t WIDE = SPAN<SUB>;
  constexpr int PER = GROUP / 4, PARTS = 8 / PER;
  // From four inputs to the next, from a group or a pair of groups to the next.
  constexpr int64_t NEXT = RECORDED ? TILE * 4 : 4;
  const Place x = RECORDED ? in_record<WIDE, GROUP, LOW>(in, m0, s) : apart<WIDE, GROUP, LOW>(w, in, m0, s);
  const int64_t blocks = SUB ? WIDE / BLOCK : std::min(WIDE, w.k - s * WIDE) / BLOCK;
  const int64_t q_row = RECORDED ? 4 : x.q_row, start_row = RECORDED ? 4 : x.start_row, step_row = RECORDED ? 4 : x.step_row;
  const char* q = x.q;
  __m512 whole[MR];
  for (int m = 0; m < MR; ++m) whole[m] = _mm512_setzero_ps();
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
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) sum[m] = avx512::add_dot(sum[m], v[j], q + m * q_row + j * NEXT);
      for (int m = 0; m < MR; ++m) whole[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), by.scale[g], whole[m]);
    }
  }
  // In registers: left to itself GCC keeps `whole` in memory and this a loop.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* to = total + (m0 + m) * ROWS;
    if constexpr (LOW) {
      __m512i low = _mm512_setzero_si512();
      for (int pair = 0; pair < WIDE / GROUP / 2; ++pair) low = _mm512_dpwssd_epi32(low, by.mins[pair], spread(x.start + m * start_row + pair * NEXT));
      whole[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), dmin, whole[m]);
    }
    const __m512 all = s ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
    _mm512_storeu_ps(to, _mm512_fmadd_ps(whole[m], _mm512_castsi512_ps(spread(x.step + m * step_row)), all));
  }
}

// All rows of activations meet SPAN inputs, the s-th. Codes are unpacked for every eight rows anew: that is done beside the dot products, where loads of
// bytes unpacked before are not (5632 x 2048 of Q4_K, one core, 32 rows: 2.53 ms by way of memory, 2.24 so; 9 rows 0.94 and 0.73; 512 rows the same).
template <int BITS, int GROUP, int SUB, bool TABLE>
BITSMITH_512_INLINE void span(const Weight& w, const Input& x, const uint8_t* codes, const Scales& by, __m512i table, __m512 dmin, int64_t s,
                                     float* total) {
  int64_t m = 0;
  if (!recorded(x.m)) {
    if (m + 4 <= x.m) tile<BITS, GROUP, SUB, TABLE, 4, false>(w, x, codes, by, table, dmin, s, m, total), m += 4;
    if (m + 2 <= x.m) tile<BITS, GROUP, SUB, TABLE, 2, false>(w, x, codes, by, table, dmin, s, m, total), m += 2;
    if (m < x.m) tile<BITS, GROUP, SUB, TABLE, 1, false>(w, x, codes, by, table, dmin, s, m, total);
    return;
  }
  for (; m + 4 < x.m; m += TILE) tile<BITS, GROUP, SUB, TABLE, TILE, true>(w, x, codes, by, table, dmin, s, m, total);
  if (m + 2 < x.m) tile<BITS, GROUP, SUB, TABLE, 4, true>(w, x, codes, by, table, dmin, s, m, total);
  else if (m < x.m) tile<BITS, GROUP, SUB, TABLE, 2, true>(w, x, codes, by, table, dmin, s, m, total);
}

template <int BITS, int GROUP, int SUB, bool TABLE>
BITSMITH_512 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  float* const total = scratch((x.m + TILE) * ROWS);
  const __m512i table = TABLE ? _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table))),
                                                _mm512_set1_epi8(static_cast<char>(BIAS)))
                              : _mm512_setzero_si512();
  Scales by;
  for (int64_t s = 0; s < w.chunks(); ++s) {
    scales<SUB, GROUP>(w, nb, s, by);
    const __m512 dmin = w.mins ? avx512::load16(w.super_mins, (nb * w.super_blocks() + s) * ROWS, F16) : _mm512_setzero_ps();
    span<BITS, GROUP, SUB, TABLE>(w, x, w.codes + (nb * w.k + s * SPAN<SUB>) / BLOCK * 64 * BITS, by, table, dmin, s, total);
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
