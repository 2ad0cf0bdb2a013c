// Weights whose scales are small integers times one float for 256 inputs (GGUF's K-quants and IQ4_XS), with int8 activations. The integer
// scale is applied where sums are widened from 16 to 32 bits, which costs nothing; floats meet once for 128 or 256 inputs. Beside them, with AVX-512
// alone: 4-bit codes of a table whose groups have a float of 8 bits each (NVFP4, MXFP4), which meets their integer sum.
#pragma once
#include "avx2.h"
#include "generic.h"

namespace bitsmith::two_level {

constexpr int64_t SUPER = 256, CHUNK = 128;

// Mirrored by kernels/native_two_level.py; only pointers, int64 and int32 in this order.
struct Weight {
  const uint8_t* codes;      // as common.h
  const uint8_t* scales;     // [row blocks][super blocks][bytes of 16 rows], see `sub_codes`
  const uint8_t* mins;       // like scales, unsigned; or null
  const uint16_t* supers;    // float16 [row blocks][super blocks][16]; or null: scales are bytes [row blocks][k / group][16] of scale_dtype
  const uint16_t* super_mins;
  const int8_t* table;       // [16] values of the codes, or null: the code is the number
  int64_t n, k;              // k a multiple of 256, without supers of 32
  int32_t bits, group;       // group 16 or 32
  int32_t sub_bits;          // 4, 6 or 8
  int32_t offset;            // subtracted from a scale's code
  int32_t zero;              // subtracted from a weight's code
  int32_t scale_dtype;       // E4M3_BYTE (groups of 16) or E8M0 (32)
  float factor;              // of all scales without supers

  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
  int64_t super_blocks() const { return (k + SUPER - 1) / SUPER; }
  // Inputs of a row that are rounded together: a super block, as llama.cpp has it, and with float scales half of one.
  int64_t chunk() const { return supers ? SUPER : CHUNK; }
  int64_t chunks() const { return (k + chunk() - 1) / chunk(); }
  int64_t groups() const { return SUPER / group; }
  int64_t sub_bytes() const { return groups() * ROWS * sub_bits / 8; }
};

// Activations: int8 [m][stride], a step for a chunk, sums of 16 codes.
struct Input {
  int64_t m, stride;
  std::vector<int8_t> q;
  std::vector<uint8_t> records;  // of two_level512.h
  std::vector<float> step;     // [m][chunks]
  std::vector<int16_t> sums;   // [m][k / 16]
  std::vector<int16_t> group_sums;  // of two_level512.h: [m][k / group]
  std::vector<int32_t> start;       // of two_level512.h: [m][k / group], what a group's sum begins with
};

inline void shape(const Weight& w, int64_t m, Input& x) {
  x.m = m;
  x.stride = w.k + 64;
  const auto grow = [](auto& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  };
  grow(x.q, (m + TILE - 1) / TILE * TILE * x.stride);
  grow(x.step, m * w.chunks());
  grow(x.sums, m * (w.k / 16));
  grow(x.group_sums, m * (w.k / 16));
  grow(x.start, m * (w.k / 16));
}

// Codes of the scales of 16 rows in every group of a super block, out[group][row]. 8 bits: a byte each. 4 bits: groups 2 g and 2 g + 1 in
// the halves of a byte. 6 bits: four groups in three bytes, the fourth in the upper two bits of each.
inline void sub_codes(const uint8_t* p, int32_t bits, int64_t groups, uint8_t (*out)[ROWS]) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < ROWS; ++r) {
      if (bits == 8) out[g][r] = p[g * ROWS + r];
      else if (bits == 4) out[g][r] = p[g / 2 * ROWS + r] >> (4 * (g % 2)) & 15;
      else {
        const uint8_t* quad = p + g / 4 * 3 * ROWS + r;
        out[g][r] = g % 4 < 3 ? quad[g % 4 * ROWS] & 63 : static_cast<uint8_t>(quad[0] >> 6 | quad[ROWS] >> 6 << 2 | quad[2 * ROWS] >> 6 << 4);
      }
    }
}

// The inverse of `sub_codes`.
inline void pack_sub_codes(const uint8_t (*codes)[ROWS], int32_t bits, int64_t groups, uint8_t* p) {
  std::memset(p, 0, static_cast<size_t>(groups * ROWS * bits / 8));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < ROWS; ++r) {
      const uint8_t c = codes[g][r];
      if (bits == 8) p[g * ROWS + r] = c;
      else if (bits == 4) p[g / 2 * ROWS + r] |= static_cast<uint8_t>(c << (4 * (g % 2)));
      else {
        uint8_t* quad = p + g / 4 * 3 * ROWS + r;
        if (g % 4 < 3) quad[g % 4 * ROWS] |= c;
        else
          for (int i = 0; i < 3; ++i) quad[i * ROWS] |= static_cast<uint8_t>((c >> (2 * i) & 3) << 6);
      }
    }
}

inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  const int64_t chunk = w.chunk();
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t at = row * w.k + c * chunk, count = std::min(chunk, w.k - c * chunk);
    float peak = 0;
    for (int64_t i = 0; i < count; ++i) peak = std::max(peak, std::fabs(load(x, at + i, dtype)));
    const float inverse = peak > 0 ? 127 / peak : 0;
    in.step[row * w.chunks() + c] = peak / 127;
    for (int64_t i = 0; i < count; i += 16) {
      int32_t sum = 0;
      for (int64_t j = i; j < i + 16; ++j) {
        const int32_t q = static_cast<int32_t>(std::nearbyint(load(x, at + j, dtype) * inverse));
        in.q[row * in.stride + c * chunk + j] = static_cast<int8_t>(q);
        sum += q;
      }
      in.sums[row * (w.k / 16) + (c * chunk + i) / 16] = static_cast<int16_t>(sum);
    }
  }
}

// The definition where scales are floats: 16 outputs, all rows of activations.
inline void float_rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  std::vector<float> totals(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t k = 0; k < w.k; k += w.group) {
    uint8_t codes[BLOCK * ROWS];
    generic::unpack(w.codes + (nb * w.k + k) / BLOCK * 64 * w.bits, w.bits, codes);
    for (int64_t r = 0; r < ROWS; ++r) {
      const float scale = w.factor * load(w.scales, (nb * w.k + k) / w.group * ROWS + r, w.scale_dtype);
      for (int64_t m = 0; m < x.m; ++m) {
        int32_t dot = 0;
        for (int64_t i = k; i < k + w.group; ++i) dot += w.table[codes[64 * (i % BLOCK / 4) + 4 * r + i % 4]] * x.q[m * x.stride + i];
        totals[m * ROWS + r] += x.step[m * w.chunks() + k / CHUNK] * scale * static_cast<float>(dot);
      }
    }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

// The definition: 16 outputs, all rows of activations.
inline void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  if (!w.supers) return float_rows(w, x, nb, y, dtype);
  const int64_t supers = w.super_blocks(), groups = w.groups();
  std::vector<float> totals(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t s = 0; s < supers; ++s) {
    uint8_t codes[8][512], scale[16][ROWS], min[16][ROWS] = {};
    for (int64_t b = 0; b < 8; ++b) generic::unpack(w.codes + ((nb * supers + s) * 8 + b) * 64 * w.bits, w.bits, codes[b]);
    sub_codes(w.scales + (nb * supers + s) * w.sub_bytes(), w.sub_bits, groups, scale);
    if (w.mins) sub_codes(w.mins + (nb * supers + s) * w.sub_bytes(), w.sub_bits, groups, min);
    for (int64_t m = 0; m < x.m; ++m)
      for (int64_t r = 0; r < ROWS; ++r) {
        int32_t dot = 0, low = 0;
        for (int64_t i = 0; i < SUPER; ++i) {
          const uint8_t code = codes[i / 32][64 * (i % 32 / 4) + 4 * r + i % 4];
          const int32_t value = (w.table ? w.table[code] : code) - w.zero, by = scale[i / w.group][r] - w.offset;
          const int32_t q = x.q[m * x.stride + s * SUPER + i];
          dot += value * by * q;
          low += min[i / w.group][r] * q;
        }
        const int64_t at = (nb * supers + s) * ROWS + r;
        const float offset = w.mins ? half_to_float(w.super_mins[at]) * static_cast<float>(low) : 0.0f;
        totals[m * ROWS + r] += x.step[m * supers + s] * (half_to_float(w.supers[at]) * static_cast<float>(dot) + offset);
      }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

#if BITSMITH_X86
namespace vectors {

// Per super block: the integer scale of each group twice in the 32-bit lane of a row (16 bits each), as the factor that widens; and what
// multiplies the sums of 16 activations of each 32 inputs (two of them in a lane).
struct Scales {
  __m256i scale[16][2], low[8][2];
};

template <int SUB>
BITSMITH_256_INLINE __m256i sub_code8(const uint8_t* p, int64_t g, int64_t half) {
  const auto bytes = [&](const uint8_t* at) __attribute__((always_inline)) BITSMITH_256 {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * half)));
  };
  if constexpr (SUB == 8) return bytes(p + g * ROWS);
  if constexpr (SUB == 4) {
    const __m256i both = bytes(p + g / 2 * ROWS);
    return g % 2 ? _mm256_srli_epi32(both, 4) : _mm256_and_si256(both, _mm256_set1_epi32(15));
  }
  const uint8_t* quad = p + g / 4 * 3 * ROWS;
  if (g % 4 < 3) return _mm256_and_si256(bytes(quad + g % 4 * ROWS), _mm256_set1_epi32(63));
  const __m256i a = _mm256_srli_epi32(bytes(quad), 6), b = _mm256_srli_epi32(bytes(quad + ROWS), 6), c = _mm256_srli_epi32(bytes(quad + 2 * ROWS), 6);
  return _mm256_or_si256(a, _mm256_or_si256(_mm256_slli_epi32(b, 2), _mm256_slli_epi32(c, 4)));
}

BITSMITH_256_INLINE __m256i pair(__m256i low, __m256i high) {
  return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(high, 16));
}

template <int SUB, int GROUP>
BITSMITH_256_INLINE void scales(const Weight& w, int64_t at, Scales& out) {
  const uint8_t *p = w.scales + at * w.sub_bytes(), *mins = w.mins ? w.mins + at * w.sub_bytes() : nullptr;
  const __m256i offset = _mm256_set1_epi32(w.offset), zero = _mm256_set1_epi32(-w.zero);
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t b = 0; b < 8; ++b) {
      __m256i low[2];
      for (int64_t i = 0; i < 32 / GROUP; ++i) {
        const int64_t g = b * 32 / GROUP + i;
        const __m256i scale = _mm256_sub_epi32(sub_code8<SUB>(p, g, half), offset);
        out.scale[g][half] = pair(scale, scale);
        low[i] = mins ? sub_code8<SUB>(mins, g, half) : _mm256_mullo_epi16(scale, zero);
      }
      out.low[b][half] = pair(low[0], GROUP == 32 ? low[0] : low[1]);
    }
}

BITSMITH_256_INLINE void values(const int8_t* table, __m256i (&v)[16]) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  for (auto& one : v) one = _mm256_shuffle_epi8(entries, one);
}

// total[m][16 outputs] += 128 inputs of rows m0 .. m0 + MR - 1. codes: of those inputs, as stored where PACKED, else as a byte each; with
// a table, its values.
template <int BITS, int GROUP, bool TABLE, int MR, bool PACKED = false>
BITSMITH_256_INLINE void chunk(const Weight& w, const Input& x, const uint8_t* codes, const Scales& by, const __m256 (&d)[2], const __m256 (&dmin)[2],
                               int64_t at, int64_t half, int64_t m0, float* total) {
  // Byte vectors whose products fit 16 bits; values of tables reach 127.
  constexpr int FIT = TABLE ? 1 : avx2::run(BITS), PER = GROUP / 4, RUN = FIT < PER ? FIT : PER;
  const int8_t* q[MR];
  const int16_t* sums[MR];
  for (int m = 0; m < MR; ++m) {
    q[m] = x.q.data() + (m0 + m) * x.stride + at;
    sums[m] = x.sums.data() + (m0 + m) * (w.k / 16) + at / 16;
  }
  __m256i dot[MR][2], low[MR][2];
  for (int m = 0; m < MR; ++m)
    for (int h = 0; h < 2; ++h) dot[m][h] = low[m][h] = _mm256_setzero_si256();
  for (int64_t b = 0; b < CHUNK / 32; ++b, codes += 64 * (PACKED ? BITS : 8)) {
    __m256i v[16];
    if constexpr (PACKED) avx2::ahead<BITS>(codes);
    avx2::unpack<PACKED ? BITS : 8>(codes, v);
    if constexpr (PACKED && TABLE) values(w.table, v);
#pragma GCC unroll 8
    for (int part = 0; part < 8 / RUN; ++part) {
      __m256i sum[MR][2];
      for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
      for (int j = part * RUN; j < (part + 1) * RUN; ++j) {
        const __m256i c[2] = {v[2 * j], v[2 * j + 1]};
        for (int m = 0; m < MR; ++m) {
          int32_t four;
          std::memcpy(&four, q[m] + b * BLOCK + 4 * j, 4);
          const __m256i inputs = _mm256_set1_epi32(four);
          for (int h = 0; h < 2; ++h) {
            if constexpr (TABLE) sum[m][h] = _mm256_maddubs_epi16(_mm256_abs_epi8(c[h]), _mm256_sign_epi8(inputs, c[h]));
            else sum[m][h] = avx2::added(sum[m][h], c[h], inputs);
          }
        }
      }
      const __m256i* scale = by.scale[(half * 4 + b) * (32 / GROUP) + part * RUN / PER];
      for (int m = 0; m < MR; ++m)
        for (int h = 0; h < 2; ++h) dot[m][h] = _mm256_add_epi32(dot[m][h], _mm256_madd_epi16(sum[m][h], scale[h]));
    }
    for (int m = 0; m < MR; ++m) {
      int32_t two;
      std::memcpy(&two, sums[m] + 2 * b, 4);
      for (int h = 0; h < 2; ++h) low[m][h] = _mm256_add_epi32(low[m][h], _mm256_madd_epi16(by.low[half * 4 + b][h], _mm256_set1_epi32(two)));
    }
  }
  for (int m = 0; m < MR; ++m) {
    const __m256 step = _mm256_set1_ps(x.step[(m0 + m) * w.chunks() + at / SUPER]);
    for (int h = 0; h < 2; ++h) {
      float* to = total + (m0 + m) * ROWS + 8 * h;
      const __m256 all = _mm256_loadu_ps(to);
      if (!w.mins) {
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(dot[m][h], low[m][h])), _mm256_mul_ps(d[h], step), all));
        continue;
      }
      const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low[m][h]), dmin[h], _mm256_mul_ps(_mm256_cvtepi32_ps(dot[m][h]), d[h]));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(value, step, all));
    }
  }
}

// One row of activations: what `two_level::prepare` does.
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
      int16_t* to = in.sums.data() + row * (w.k / 16) + (c * chunk + i) / 16;
      to[0] = static_cast<int16_t>(_mm256_extract_epi32(sums, 0));
      to[1] = static_cast<int16_t>(_mm256_extract_epi32(sums, 4));
    }
  }
}

// All rows of activations meet super block s. codes: a byte each, with a table its values.
template <int BITS, int GROUP, bool TABLE>
BITSMITH_256_INLINE void super_block(const Weight& w, const Input& x, const uint8_t* codes, const Scales& by, const __m256 (&d)[2], const __m256 (&dmin)[2],
                                     int64_t s, float* total) {
  for (int64_t half = 0; half < 2; ++half, codes += CHUNK * ROWS) {
    const int64_t first = s * SUPER + half * CHUNK;
    int64_t m = 0;
    for (; m + 4 <= x.m; m += 4) chunk<BITS, GROUP, TABLE, 4>(w, x, codes, by, d, dmin, first, half, m, total);
    for (; m + 2 <= x.m; m += 2) chunk<BITS, GROUP, TABLE, 2>(w, x, codes, by, d, dmin, first, half, m, total);
    if (m < x.m) chunk<BITS, GROUP, TABLE, 1>(w, x, codes, by, d, dmin, first, half, m, total);
  }
}

template <int BITS, int GROUP, int SUB, bool TABLE>
BITSMITH_256 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  float* total = totals.data();
  alignas(32) uint8_t codes[SUPER * ROWS];
  Scales by;
  for (int64_t s = 0; s < w.super_blocks(); ++s) {
    const int64_t at = nb * w.super_blocks() + s;
    const uint8_t* packed = w.codes + at * 8 * 64 * BITS;
    for (int64_t b = 0; b < (x.m > 1 ? 8 : 0); ++b) {
      __m256i v[16];
      avx2::ahead<BITS>(packed + b * 64 * BITS);
      avx2::unpack<BITS>(packed + b * 64 * BITS, v);
      if constexpr (TABLE) values(w.table, v);
      for (int j = 0; j < 16; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 512 * b) + j, v[j]);
    }
    scales<SUB, GROUP>(w, at, by);
    __m256 d[2], dmin[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int h = 0; h < 2; ++h) {
      d[h] = avx2::load8(w.supers, at * ROWS + 8 * h, F16);
      if (w.mins) dmin[h] = avx2::load8(w.super_mins, at * ROWS + 8 * h, F16);
    }
    if (x.m > 1) super_block<BITS, GROUP, TABLE>(w, x, codes, by, d, dmin, s, total);
    for (int64_t half = 0; half < (x.m > 1 ? 0 : 2); ++half)
      chunk<BITS, GROUP, TABLE, 1, true>(w, x, packed + half * 4 * 64 * BITS, by, d, dmin, s * SUPER + half * CHUNK, half, 0, total);
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, total[m * ROWS + r]);
}

// Null for a combination that no format has.
using Rows = void (*)(const Weight&, const Input&, int64_t nb, void* y, int32_t dtype);
inline Rows rows_of(const Weight& w) {
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

}  // namespace vectors
#endif
}  // namespace bitsmith::two_level
