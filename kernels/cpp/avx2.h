// AVX2: int8 activations by maddubs. Its sums of two products saturate at 16 bits, so as many of them are added up in 16 bits as the width
// of the codes allows before they are widened; 8-bit codes are multiplied as two halves of 4 bits.
#pragma once
#include "common.h"

#if BITSMITH_X86
#define BITSMITH_256 __attribute__((target("avx2,fma,f16c")))
#define BITSMITH_256_INLINE BITSMITH_256 inline __attribute__((always_inline))

namespace bitsmith::avx2 {

inline bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

// Blocks of 32 inputs whose products fit 16 bits: 16 * blocks * (2^bits - 1) * 127 <= 32767. 0: byte vectors (4 inputs), see `run`.
constexpr int whole_blocks(int bits) { return bits <= 2 ? 4 : bits == 3 ? 2 : bits == 4 || bits == 8 ? 1 : 0; }
// Byte vectors whose products fit, where a block's do not.
constexpr int run(int bits) { return bits == 5 ? 4 : bits == 6 ? 2 : bits == 7 ? 1 : 8; }

BITSMITH_256_INLINE __m256i word(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// 8 rows of 8 words -> 8 columns.
BITSMITH_256_INLINE void transpose(__m256i (&v)[8]) {
  __m256i t[8];
  for (int j = 0; j < 8; j += 2) t[j] = _mm256_unpacklo_epi32(v[j], v[j + 1]), t[j + 1] = _mm256_unpackhi_epi32(v[j], v[j + 1]);
  for (int j = 0; j < 8; j += 4)
    for (int h = 0; h < 2; ++h) {
      v[j + 2 * h] = _mm256_unpacklo_epi64(t[j + h], t[j + h + 2]);
      v[j + 2 * h + 1] = _mm256_unpackhi_epi64(t[j + h], t[j + h + 2]);
    }
  for (int j = 0; j < 4; ++j) t[j] = _mm256_permute2x128_si256(v[j], v[j + 4], 0x20), t[j + 4] = _mm256_permute2x128_si256(v[j], v[j + 4], 0x31);
  for (int j = 0; j < 8; ++j) v[j] = t[j];
}

// `place` of int8 codes of TILE rows, the first at `from`: fours of each, whole 8s of them. The rows must be there, whatever they hold.
BITSMITH_256 inline void place_codes(const int8_t* from, int64_t stride, int64_t fours, uint8_t* to) {
  for (int64_t i = 0; i < fours; i += 8) {
    __m256i v[8];
    for (int r = 0; r < 8; ++r) v[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * stride + 4 * i));
    transpose(v);
    for (int j = 0; j < 8; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (i + j) * TILE * 4), v[j]);
  }
}

// The byte vectors of a block: rows 0-7 of vector j in v[2 j], rows 8-15 in v[2 j + 1].
template <int BITS>
BITSMITH_256_INLINE void unpack(const uint8_t* p, __m256i (&v)[16]) {
  if constexpr (BITS == 8) {
    for (int j = 0; j < 16; ++j) v[j] = word(p + 32 * j);
  }
  if constexpr (BITS & 4) {
    const __m256i mask = _mm256_set1_epi8(0x0f);
    for (int j = 0; j < 8; ++j) {
      const __m256i a = word(p + 32 * j);
      v[j / 2 * 4 + j % 2] = _mm256_and_si256(a, mask);
      v[j / 2 * 4 + 2 + j % 2] = _mm256_and_si256(_mm256_srli_epi32(a, 4), mask);
    }
    p += 256;
  }
  if constexpr (BITS & 2) {
    constexpr int below = BITS & 4;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(3 << below));
    for (int j = 0; j < 4; ++j) {
      const __m256i a = word(p + 32 * j);
      for (int s = 0; s < 4; ++s) {
        const int shift = 2 * s - below;
        const __m256i moved = shift >= 0 ? _mm256_srli_epi32(a, shift) : _mm256_slli_epi32(a, -shift);
        const __m256i bits = _mm256_and_si256(moved, mask);
        __m256i& to = v[(j / 2 * 4 + s) * 2 + j % 2];
        to = below ? _mm256_or_si256(to, bits) : bits;
      }
    }
    p += 128;
  }
  if constexpr (BITS & 1) {
    constexpr int below = BITS & 6;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>(1 << below));
    for (int j = 0; j < 2; ++j) {
      const __m256i a = word(p + 32 * j);
      for (int s = 0; s < 8; ++s) {
        const int shift = s - below;
        const __m256i moved = shift >= 0 ? _mm256_srli_epi32(a, shift) : _mm256_slli_epi32(a, -shift);
        const __m256i bits = _mm256_and_si256(moved, mask);
        __m256i& to = v[s * 2 + j];
        to = below ? _mm256_or_si256(to, bits) : bits;
      }
    }
  }
}

BITSMITH_256_INLINE __m256 load8(const void* p, int64_t i, int32_t dtype) {
  const auto half = [&]() __attribute__((always_inline)) BITSMITH_256 { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i)); };
  switch (dtype) {
    case F32: return _mm256_loadu_ps(static_cast<const float*>(p) + i);
    case BF16: return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half()), 16));
    case F16: return _mm256_cvtph_ps(half());
    case E4M3_BYTE: {
      // Through float16, as e4m3_to_float.
      const __m128i byte = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p) + i)));
      const __m128i sizes = _mm_and_si128(byte, _mm_set1_epi16(0x7f)), nan = _mm_cmpeq_epi16(sizes, _mm_set1_epi16(0x7f));
      const __m128i half = _mm_and_si128(_mm_slli_epi16(byte, 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
      return _mm256_mul_ps(_mm256_cvtph_ps(_mm_blendv_epi8(half, _mm_set1_epi16(0x7e00), nan)), _mm256_set1_ps(256));
    }
    default: {
      const __m256i u = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p) + i)));
      if (dtype == U8) return _mm256_cvtepi32_ps(u);
      // 2^(u - 127); u = 0 is the subnormal 2^-127.
      const __m256i zero = _mm256_cmpeq_epi32(u, _mm256_setzero_si256());
      return _mm256_castsi256_ps(_mm256_blendv_epi8(_mm256_slli_epi32(u, 23), _mm256_set1_epi32(1 << 22), zero));
    }
  }
}

// Sums of 16 outputs to y[at ..], the first `count` of them.
BITSMITH_256_INLINE void store16(void* y, int64_t at, int32_t dtype, const float* sums, int64_t count) {
  if (count < ROWS) {
    for (int64_t r = 0; r < count; ++r) store(y, at + r, dtype, sums[r]);
    return;
  }
  const __m256 v[2] = {_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8)};
  if (dtype == F32) {
    for (int h = 0; h < 2; ++h) _mm256_storeu_ps(static_cast<float*>(y) + at + 8 * h, v[h]);
    return;
  }
  __m128i half[2];
  for (int h = 0; h < 2; ++h) {
    half[h] = _mm256_cvtps_ph(v[h], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (dtype == F16) continue;
    // As float_to_bfloat.
    const __m256i raw = _mm256_castps_si256(v[h]), upper = _mm256_srli_epi32(raw, 16), odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v[h], v[h], _CMP_UNORD_Q)), quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
    half[h] = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(y) + at), _mm256_set_m128i(half[1], half[0]));
}

// Scales and zero points of rows 0-7 and 8-15 in one group.
struct Scales {
  __m256 scale[2], zero[2];
};

BITSMITH_256_INLINE Scales scales16(const Weight& w, int64_t nb, int64_t g, int64_t groups) {
  Scales found;
  if (w.supers || w.scale_rows > 1) {
    alignas(32) float s[ROWS], z[ROWS];
    scales_of(w, nb, g, s, z);
    for (int h = 0; h < 2; ++h) found.scale[h] = _mm256_load_ps(s + 8 * h), found.zero[h] = _mm256_load_ps(z + 8 * h);
    return found;
  }
  const int64_t at = (nb * groups + g) * ROWS;
  for (int h = 0; h < 2; ++h) {
    found.scale[h] = load8(w.scales, at + 8 * h, w.scale_dtype);
    found.zero[h] = w.zeros ? load8(w.zeros, at + 8 * h, w.zero_dtype) : _mm256_set1_ps(w.zero);
    if (w.mins) {
      const __m256 none = _mm256_cmp_ps(found.scale[h], _mm256_setzero_ps(), _CMP_EQ_OQ), sign = _mm256_set1_ps(-0.0f);
      found.scale[h] = _mm256_blendv_ps(found.scale[h], _mm256_set1_ps(NO_SCALE), none);
      found.zero[h] = _mm256_xor_ps(_mm256_div_ps(found.zero[h], found.scale[h]), sign);
    }
  }
  return found;
}

BITSMITH_256_INLINE __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

BITSMITH_256_INLINE __m256i added(__m256i sums, __m256i products) {
  __m256i total = _mm256_add_epi16(sums, products);
  // Keeps the sum in its register: reassociating sums, the compiler spills them.
  asm("" : "+x"(total));
  return total;
}

// Dot products of 16 outputs with MR rows of `blocks` times 32 activations, q[m] at the first of them.
// codes: as stored where PACKED (one row of activations: they meet nothing twice), as `unpack` leaves them otherwise.
template <int BITS, int MR, bool PACKED>
BITSMITH_256_INLINE void dots(const uint8_t* codes, int64_t blocks, const int8_t* const (&q)[MR], __m256i (&dot)[MR][2]) {
  // 8 bits: sums of the low halves of the codes, and of the high ones.
  constexpr int SUMS = BITS == 8 ? 2 : 1, RUN = run(BITS), WHOLE = whole_blocks(BITS);
  const __m256i low = _mm256_set1_epi8(0x0f);
  for (int m = 0; m < MR; ++m) dot[m][0] = dot[m][1] = _mm256_setzero_si256();
  __m256i sum[MR][2][SUMS];
  const auto clear = [&]() __attribute__((always_inline)) BITSMITH_256 {
    for (int m = 0; m < MR; ++m)
      for (int h = 0; h < 2; ++h)
        for (int s = 0; s < SUMS; ++s) sum[m][h][s] = _mm256_setzero_si256();
  };
  const auto flush = [&]() __attribute__((always_inline)) BITSMITH_256 {
    for (int m = 0; m < MR; ++m)
      for (int h = 0; h < 2; ++h) {
        dot[m][h] = _mm256_add_epi32(dot[m][h], widened(sum[m][h][0]));
        if constexpr (SUMS == 2) dot[m][h] = _mm256_add_epi32(dot[m][h], _mm256_slli_epi32(widened(sum[m][h][1]), 4));
      }
  };
  clear();
  for (int64_t b = 0; b < blocks; ++b, codes += 64 * (PACKED ? BITS : 8)) {
    __m256i v[16];
    if constexpr (PACKED) ahead<BITS, 1>(codes);
    unpack<PACKED ? BITS : 8>(codes, v);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i c[2] = {v[2 * j], v[2 * j + 1]};
      for (int m = 0; m < MR; ++m) {
        int32_t four;
        std::memcpy(&four, q[m] + b * BLOCK + 4 * j, 4);
        const __m256i x = _mm256_set1_epi32(four);
        for (int h = 0; h < 2; ++h) {
          if constexpr (SUMS == 2) {
            sum[m][h][0] = added(sum[m][h][0], _mm256_maddubs_epi16(_mm256_and_si256(c[h], low), x));
            sum[m][h][1] = added(sum[m][h][1], _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c[h], 4), low), x));
          } else {
            sum[m][h][0] = added(sum[m][h][0], _mm256_maddubs_epi16(c[h], x));
          }
        }
      }
      if constexpr (WHOLE == 0) {
        if ((j + 1) % RUN == 0) flush(), clear();
      }
    }
    if constexpr (WHOLE > 0) {
      if ((b + 1) % WHOLE == 0 || b + 1 == blocks) flush(), clear();
    }
  }
}

// total[m][16 outputs] += one chunk of rows m0 .. m0 + MR - 1.
template <int BITS, int MR, bool PACKED = false>
BITSMITH_256_INLINE void chunk(const Input& x, const uint8_t* codes, int64_t c, int64_t blocks, int64_t m0, const Scales& by, float* total) {
  const int8_t* q[MR];
  for (int m = 0; m < MR; ++m) q[m] = x.q.data() + (m0 + m) * x.stride + c * x.chunk;
  __m256i dot[MR][2];
  dots<BITS, MR, PACKED>(codes, blocks, q, dot);
  for (int m = 0; m < MR; ++m) {
    const int64_t at = (m0 + m) * x.chunks + c;
    const __m256 step = _mm256_set1_ps(x.scale[at]), sum = _mm256_set1_ps(x.sum[at]);
    for (int h = 0; h < 2; ++h) {
      float* to = total + (m0 + m) * ROWS + 8 * h;
      const __m256 plain = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[m][h]), step);
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_fnmadd_ps(by.zero[h], sum, plain), by.scale[h], _mm256_loadu_ps(to)));
    }
  }
}

// 16 outputs, all rows of activations: a chunk of the weight is unpacked once and meets every row.
template <int BITS, int KIND>
BITSMITH_256 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  const int64_t k_blocks = w.k_blocks(), groups = w.groups(), per = x.chunk / BLOCK;
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  float* total = totals.data();
  const uint8_t* p = w.block(nb, 0);
  Groups group{w.group};
  alignas(32) uint8_t codes[LONGEST * 512];
  for (int64_t c = 0; c < x.chunks; ++c) {
    const int64_t blocks = std::min((c + 1) * per, k_blocks) - c * per;
    const Scales by = scales16(w, nb, group.next(x.chunk), groups);
    if (x.m == 1) {
      chunk<BITS, 1, true>(x, p, c, blocks, 0, by, total);
      p += blocks * 64 * BITS;
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b, p += 64 * BITS) {
      __m256i v[16];
      ahead<BITS, 2>(p);
      unpack<BITS>(p, v);
      for (int j = 0; j < 16; ++j) _mm256_store_si256(reinterpret_cast<__m256i*>(codes + 512 * b) + j, v[j]);
    }
    int64_t m = 0;
    // As many rows as have registers for their sums.
    if constexpr (BITS < 8)
      for (; m + 4 <= x.m; m += 4) chunk<BITS, 4>(x, codes, c, blocks, m, by, total);
    for (; m + 2 <= x.m; m += 2) chunk<BITS, 2>(x, codes, c, blocks, m, by, total);
    if (m < x.m) chunk<BITS, 1>(x, codes, c, blocks, m, by, total);
  }
  for (int64_t m = 0; m < x.m; ++m) store16(y, m * w.n + nb * ROWS, dtype, total + m * ROWS, w.n - nb * ROWS);
}

BITSMITH_256_INLINE __m256 activations8(const void* x, int64_t at, int32_t dtype, int64_t count) {
  if (count >= 8) return load8(x, at, dtype);
  alignas(32) float some[8] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = load(x, at + i, dtype);
  return _mm256_load_ps(some);
}

// One row of activations, its columns in packed order, rounded to int8 a chunk.
BITSMITH_256 inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t c = 0; c < in.chunks; ++c) {
    const int64_t first = c * in.chunk, stop = c + 1 == in.chunks ? in.inputs : first + in.chunk;
    __m256 largest = _mm256_setzero_ps();
    for (int64_t k = first; k < stop; k += 8)
      largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, activations8(x, row * w.k + k, dtype, w.k - k)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float peak = std::max(_mm_cvtss_f32(four), _mm_cvtss_f32(_mm_movehdup_ps(four)));
    const __m256 inverse = _mm256_set1_ps(peak > 0 ? 127 / peak : 0);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = first; k < stop; k += 32) {
      __m256i q[4];
      for (int j = 0; j < 4; ++j) {
        q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(activations8(x, row * w.k + k + 8 * j, dtype, w.k - k - 8 * j), inverse));
        sum = _mm256_add_epi32(sum, q[j]);
      }
      const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(in.q.data() + row * in.stride + k), _mm256_permutevar8x32_epi32(bytes, order));
    }
    alignas(32) int32_t codes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), sum);
    int32_t total = 0;
    for (int32_t one : codes) total += one;
    in.scale[row * in.chunks + c] = peak / 127;
    in.sum[row * in.chunks + c] = peak / 127 * static_cast<float>(total);
  }
}

}  // namespace bitsmith::avx2
#endif
