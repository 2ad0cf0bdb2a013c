// The products of two_level.h with AVX2: the integer scale of a group is applied where sums are widened from 16 to 32 bits, which costs nothing
// (4096 x 4096, 512 rows, one core: Q4_K 140 billion multiply-adds a second of the 183 that the dot products alone reach).
// The integers are those of `two_level::rows`; float32 sums may differ in their order.
#pragma once
#include "avx2.h"
#include "two_level.h"

#if BITSMITH_X86
namespace bitsmith::two_level {

// Inputs taken together: `Weight::chunk`.
template <int SUB>
constexpr int64_t SPAN = SUB ? SUPER : CHUNK;

// A span of inputs of TILE rows, `place`d: codes of four inputs, then starts of groups or pairs of their sums, the step. Records of the tiles follow
// each other, then those of the next inputs: the order they are read in.
constexpr int64_t record_bytes(int64_t span, int64_t group, bool pairs) { return (span + span / group / (pairs ? 2 : 1) * 4 + 4) * TILE; }

// Whether the activations of m rows are recorded (5632 x 2048 of Q4_K, AVX-512, one core, 2 rows: 0.43 ms so, 0.32 from row to row). A tile's missing
// rows are multiplied too, whatever they hold.
constexpr bool recorded(int64_t m) { return m > 4; }

inline void record(const Weight& w, const Input& x, bool pairs, int64_t tile, int64_t s, uint8_t* to) {
  const int64_t span = w.chunk(), groups = w.k >> w.shift(), from = s * span, inputs = std::min(span, w.k - from), first = from >> w.shift();
  avx2::place_codes(x.q.data() + tile * TILE * x.stride + from, x.stride, inputs / 4, to);
  for (int64_t row = tile * TILE; row < std::min(x.m, (tile + 1) * TILE); ++row, to += 4) {
    if (pairs) place(x.group_sums.data() + row * groups + first, inputs >> w.shift() >> 1, to + span * TILE);
    else place(x.start.data() + row * groups + first, inputs >> w.shift(), to + span * TILE);
    place(x.step.data() + row * w.chunks() + s, 1, to + record_bytes(span, w.group, pairs) - TILE * 4);
  }
}

// Where a span of some rows' activations lies: from row to row, or in a record.
struct Place {
  const char *q, *start, *step;
  int64_t q_row, start_row, step_row;
};

template <int64_t WIDE, int GROUP, bool PAIRS>
inline __attribute__((always_inline)) Place apart(const Weight& w, const Input& x, int64_t m, int64_t s) {
  const int64_t groups = w.k / GROUP, group = m * groups + s * WIDE / GROUP, width = PAIRS ? 2 : 4;
  const void* start = PAIRS ? static_cast<const void*>(x.group_sums.data() + group) : x.start.data() + group;
  return {reinterpret_cast<const char*>(x.q.data() + m * x.stride + s * WIDE), static_cast<const char*>(start),
          reinterpret_cast<const char*>(x.step.data() + m * w.chunks() + s), x.stride, groups * width, w.chunks() * 4};
}

template <int64_t WIDE, int GROUP, bool PAIRS>
inline __attribute__((always_inline)) Place in_record(const Input& x, int64_t m, int64_t s) {
  const int64_t tiles = (x.m + TILE - 1) / TILE, size = record_bytes(WIDE, GROUP, PAIRS);
  const char* p = reinterpret_cast<const char*>(x.records.data()) + (s * tiles + m / TILE) * size + m % TILE * 4;
  return {p, p + WIDE * TILE, p + size - TILE * 4, 4, 4, 4};
}

namespace vectors {

// Of a span, rows 0-7 and 8-15 in the lanes of two vectors: the scale of each group, 16 bits twice (`floats`: where SUB below is 0); what multiplies the
// sums of activations of two groups each, 16 bits each; the floats of a super block.
struct Scales {
  __m256i scale[SUPER / 16][2], low[SUPER / 32][2];
  __m256 floats[CHUNK / 16][2], d[2], dmin[2];
};

// The code of a group's scale for 16 rows, bytes.
template <int SUB>
BITSMITH_256_INLINE __m128i sub_code16(const uint8_t* p, int64_t g) {
  const auto masked = [](const uint8_t* at, int shift, int mask) __attribute__((always_inline)) BITSMITH_256 {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm_and_si128(_mm_srli_epi16(bytes, shift), _mm_set1_epi8(static_cast<char>(mask)));
  };
  if constexpr (SUB == 8) return masked(p + g * ROWS, 0, 255);
  if constexpr (SUB == 4) return masked(p + g / 2 * ROWS, g % 2 * 4, 15);
  const uint8_t* quad = p + g / 4 * 3 * ROWS;
  if (g % 4 < 3) return masked(quad + g % 4 * ROWS, 0, 63);
  const __m128i b = _mm_slli_epi16(masked(quad + ROWS, 6, 3), 2), c = _mm_slli_epi16(masked(quad + 2 * ROWS, 6, 3), 4);
  return _mm_or_si128(masked(quad, 6, 3), _mm_or_si128(b, c));
}

// 16 bits of a and 16 bits of b in the lane of each row, `offset` subtracted.
BITSMITH_256_INLINE void pairs(__m128i a, __m128i b, __m256i offset, __m256i (&out)[2]) {
  out[0] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), offset);
  out[1] = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), offset);
}

template <int SUB, int GROUP>
BITSMITH_256_INLINE void scales(const Weight& w, int64_t at, Scales& out) {
  const uint8_t *p = w.scales + at * w.sub_bytes(), *mins = w.mins + at * w.sub_bytes();
  const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(w.offset)), zero = _mm256_set1_epi16(static_cast<int16_t>(-w.zero));
  for (int64_t g = 0; g < SUPER / GROUP; g += 2) {
    const __m128i a = sub_code16<SUB>(p, g), b = sub_code16<SUB>(p, g + 1);
    pairs(a, a, offset, out.scale[g]), pairs(b, b, offset, out.scale[g + 1]);
    __m256i(&low)[2] = out.low[g / 2];
    if (w.mins) {
      pairs(sub_code16<SUB>(mins, g), sub_code16<SUB>(mins, g + 1), _mm256_setzero_si256(), low);
    } else if (w.zero) {
      pairs(a, b, offset, low);
      for (auto& one : low) one = _mm256_mullo_epi16(one, zero);
    }
  }
  for (int h = 0; h < 2; ++h) {
    out.d[h] = avx2::load8(w.supers, at * ROWS + 8 * h, F16);
    if (w.mins) out.dmin[h] = avx2::load8(w.super_mins, at * ROWS + 8 * h, F16);
  }
}

// Scales of `count` groups, the first of them number `at`.
template <int GROUP, int DTYPE>
BITSMITH_256_INLINE void floats(const Weight& w, int64_t at, int64_t count, Scales& out) {
  for (int h = 0; h < 2; ++h) {
    out.d[h] = _mm256_set1_ps(w.factor);
    for (int64_t g = 0; g < count; ++g) out.floats[g][h] = avx2::load8(w.scales, (at + g) * ROWS + 8 * h, DTYPE);
  }
}

BITSMITH_256_INLINE void values(const int8_t* table, __m256i (&v)[16]) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  for (auto& one : v) one = _mm256_shuffle_epi8(entries, one);
}

BITSMITH_256_INLINE __m256i spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// The largest values of tables: of IQ4_NL, and of FP4's doubles.
constexpr int IQ4NL = 127, FP4 = 12;

// A weight of four inputs for each of 8 outputs. MOST: the largest size of those that have a sign, 0 where there is none.
template <int MOST>
struct Fours {
  __m256i v, size;
  BITSMITH_256_INLINE explicit Fours(__m256i codes) : v(codes), size(MOST ? _mm256_abs_epi8(codes) : codes) {}
  BITSMITH_256_INLINE __m256i times(__m256i x) const { return _mm256_maddubs_epi16(size, MOST ? _mm256_sign_epi8(x, v) : x); }
};

// total[m][16 outputs] += a span of inputs, the s-th, of rows m0 .. m0 + MR - 1, RECORDED: of half a tile. codes: as stored where PACKED, else as a byte
// each; where they are looked up (MOST), their values.
template <int BITS, int GROUP, int SUB, int MOST, int MR, bool RECORDED, bool PACKED = false>
BITSMITH_256_INLINE void tile(const Weight& w, const Input& in, const uint8_t* codes, const Scales& by, int64_t s, int64_t m0, float* total) {
  // Byte vectors whose products fit 16 bits: 2 * 127 * size * FIT <= 32767.
  constexpr int FIT = MOST ? 32767 / (254 * MOST) : avx2::run(BITS), PER = GROUP / 4, RUN = FIT < PER ? FIT : PER;
  constexpr bool MINS = !MOST && (BITS == 2 || BITS == 4 || BITS == 5);
  constexpr int64_t WIDE = SPAN<SUB>, NEXT = RECORDED ? TILE * 4 : 4;
  const Place x = RECORDED ? in_record<WIDE, GROUP, true>(in, m0, s) : apart<WIDE, GROUP, true>(w, in, m0, s);
  const int64_t blocks = SUB ? WIDE / BLOCK : std::min(WIDE, w.k - s * WIDE) / BLOCK;
  const int64_t q_row = RECORDED ? 4 : x.q_row, start_row = RECORDED ? 4 : x.start_row, step_row = RECORDED ? 4 : x.step_row;
  const char* q = x.q;
  __m256i dot[MR][2];
  __m256 scaled[MR][2];
  for (int m = 0; m < MR; ++m)
    for (int h = 0; h < 2; ++h) dot[m][h] = _mm256_setzero_si256(), scaled[m][h] = _mm256_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b, codes += 64 * (PACKED ? BITS : 8), q += 8 * NEXT) {
    __m256i v[16];
    if constexpr (PACKED) ahead<BITS, 1>(codes);
    avx2::unpack<PACKED ? BITS : 8>(codes, v);
    if constexpr (PACKED && MOST) values(w.table, v);
#pragma GCC unroll 8
    for (int part = 0; part < 8 / RUN; ++part) {
      const int64_t g = b * (BLOCK / GROUP) + part * RUN / PER;
      const auto widen = [&](int m, int h, __m256i sum) __attribute__((always_inline)) BITSMITH_256 {
        dot[m][h] = _mm256_add_epi32(dot[m][h], SUB ? _mm256_madd_epi16(sum, by.scale[g][h]) : avx2::widened(sum));
        if (SUB || (part + 1) * RUN % PER) return;
        scaled[m][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][h]), by.floats[g][h], scaled[m][h]);
        dot[m][h] = _mm256_setzero_si256();
      };
      if constexpr (RUN <= 2) {
        // Few products a sum: those of a row one after the other, and the sums of all stay in registers.
        constexpr int WIDE = MOST && RUN == 2 ? 1 : 2;
        for (int h0 = 0; h0 < 2; h0 += WIDE)
          for (int m = 0; m < MR; ++m)
            for (int h = h0; h < h0 + WIDE; ++h) {
              __m256i sum = Fours<MOST>(v[2 * part * RUN + h]).times(spread(q + m * q_row + part * RUN * NEXT));
              if constexpr (RUN == 2) sum = _mm256_add_epi16(sum, Fours<MOST>(v[2 * part * RUN + 2 + h]).times(spread(q + m * q_row + (part * RUN + 1) * NEXT)));
              widen(m, h, sum);
              asm("" : "+x"(dot[m][h]));
            }
        continue;
      }
      __m256i sum[MR][2];
#pragma GCC unroll 8
      for (int j = part * RUN; j < (part + 1) * RUN; ++j) {
        const Fours<MOST> c[2] = {Fours<MOST>(v[2 * j]), Fours<MOST>(v[2 * j + 1])};
        for (int m = 0; m < MR; ++m) {
          const __m256i inputs = spread(q + m * q_row + j * NEXT);
          for (int h = 0; h < 2; ++h) {
            const __m256i product = c[h].times(inputs);
            sum[m][h] = j == part * RUN ? product : avx2::added(sum[m][h], product);
          }
        }
      }
      for (int m = 0; m < MR; ++m)
        for (int h = 0; h < 2; ++h) widen(m, h, sum[m][h]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    const __m256 step = _mm256_castsi256_ps(spread(x.step + m * step_row));
    for (int h = 0; h < 2; ++h) {
      float* to = total + (m0 + m) * ROWS + 8 * h;
      const __m256 all = _mm256_loadu_ps(to);
      __m256i low = _mm256_setzero_si256();
      for (int pair = 0; !MOST && pair < WIDE / GROUP / 2; ++pair)
        low = _mm256_add_epi32(low, _mm256_madd_epi16(by.low[pair][h], spread(x.start + m * start_row + pair * NEXT)));
      if constexpr (MINS) {
        const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), by.dmin[h], _mm256_mul_ps(_mm256_cvtepi32_ps(dot[m][h]), by.d[h]));
        _mm256_storeu_ps(to, _mm256_fmadd_ps(value, step, all));
      } else {
        const __m256 whole = SUB ? _mm256_cvtepi32_ps(_mm256_add_epi32(dot[m][h], low)) : scaled[m][h];
        _mm256_storeu_ps(to, _mm256_fmadd_ps(whole, _mm256_mul_ps(by.d[h], step), all));
      }
    }
  }
}

// One row of activations: what `two_level::prepare` does, and the sums of groups.
BITSMITH_256 inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const int64_t chunk = w.chunk();
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t at = row * w.k + c * chunk, count = std::min(chunk, w.k - c * chunk);
    __m256 largest = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, avx2::load8(x, at + i, dtype)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float peak = std::max(_mm_cvtss_f32(four), _mm_cvtss_f32(_mm_movehdup_ps(four)));
    const __m256 inverse = _mm256_set1_ps(peak > 0 ? 127 / peak : 0);
    in.step[row * w.chunks() + c] = peak / 127;
    for (int64_t i = 0; i < count; i += 32) {
      __m256i q[4];
      for (int j = 0; j < 4; ++j) q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(avx2::load8(x, at + i + 8 * j, dtype), inverse));
      const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
      const __m256i bytes = _mm256_permutevar8x32_epi32(packed, order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(in.q.data() + row * in.stride + c * chunk + i), bytes);
      __m256i sums = avx2::widened(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes));
      sums = _mm256_hadd_epi32(sums, sums);
      sums = _mm256_hadd_epi32(sums, sums);
      const int32_t first = _mm256_extract_epi32(sums, 0), second = _mm256_extract_epi32(sums, 4);
      int16_t* to = in.group_sums.data() + ((row * w.k + c * chunk + i) >> w.shift());
      to[0] = static_cast<int16_t>(w.group == 32 ? first + second : first);
      if (w.group == 16) to[1] = static_cast<int16_t>(second);
    }
  }
}

// All rows of activations meet a span of inputs, the s-th. codes: a byte each, where they are looked up their values.
template <int BITS, int GROUP, int SUB, int MOST>
BITSMITH_256_INLINE void span(const Weight& w, const Input& x, const uint8_t* codes, const Scales& by, int64_t s, float* total) {
  int64_t m = 0;
  if (recorded(x.m)) {
    for (; m + 2 < x.m; m += 4) tile<BITS, GROUP, SUB, MOST, 4, true>(w, x, codes, by, s, m, total);
    if (m < x.m) tile<BITS, GROUP, SUB, MOST, 2, true>(w, x, codes, by, s, m, total);
    return;
  }
  if (m + 4 <= x.m) tile<BITS, GROUP, SUB, MOST, 4, false>(w, x, codes, by, s, m, total), m += 4;
  if (m + 2 <= x.m) tile<BITS, GROUP, SUB, MOST, 2, false>(w, x, codes, by, s, m, total), m += 2;
  if (m < x.m) tile<BITS, GROUP, SUB, MOST, 1, false>(w, x, codes, by, s, m, total);
}

template <int BITS, int GROUP, int SUB, int MOST>
BITSMITH_256 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  constexpr int64_t WIDE = SPAN<SUB>;
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>((x.m + TILE) * ROWS), 0.0f);
  float* total = totals.data();
  alignas(32) uint8_t codes[WIDE * ROWS];
  Scales by;
  for (int64_t s = 0; s < w.chunks(); ++s) {
    const int64_t first = nb * w.k + s * WIDE, inputs = std::min(WIDE, w.k - s * WIDE);
    const uint8_t* packed = w.codes + first / BLOCK * 64 * BITS;
    for (int64_t b = 0; b < (x.m > 1 ? inputs / BLOCK : 0); ++b) {
      __m256i v[16];
      ahead<BITS, 2>(packed + b * 64 * BITS);
      avx2::unpack<BITS>(packed + b * 64 * BITS, v);
      if constexpr (MOST) values(w.table, v);
      for (int j = 0; j < 16; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 512 * b) + j, v[j]);
    }
    if constexpr (SUB != 0) scales<SUB, GROUP>(w, nb * w.super_blocks() + s, by);
    else floats<GROUP, GROUP == 16 ? E4M3_BYTE : MOST == FP4 ? E8M0 : F16>(w, first / GROUP, inputs / GROUP, by);
    if (x.m > 1) span<BITS, GROUP, SUB, MOST>(w, x, codes, by, s, total);
    else tile<BITS, GROUP, SUB, MOST, 1, false, true>(w, x, packed, by, s, 0, total);
  }
  for (int64_t m = 0; m < x.m; ++m) avx2::store16(y, m * w.n + nb * ROWS, dtype, total + m * ROWS, w.n - nb * ROWS);
}

// Null for a combination that no format has.
inline Rows rows_of(const Weight& w) {
  if (!w.supers) return w.group == 16 ? rows<4, 16, 0, FP4> : w.scale_dtype == E8M0 ? rows<4, 32, 0, FP4> : rows<4, 32, 0, IQ4NL>;
  const int32_t kind = w.bits * 1000 + w.group * 10 + w.sub_bits;
  if (w.table) return kind == 4326 ? rows<4, 32, 6, IQ4NL> : nullptr;
  switch (kind) {
    case 2164: return rows<2, 16, 4, 0>;
    case 3166: return rows<3, 16, 6, 0>;
    case 4326: return rows<4, 32, 6, 0>;
    case 5326: return rows<5, 32, 6, 0>;
    case 6168: return rows<6, 16, 8, 0>;
    default: return nullptr;
  }
}

}  // namespace vectors
}  // namespace bitsmith::two_level
#endif
