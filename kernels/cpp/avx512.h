// AVX-512: VNNI for int8 activations, BF16 for bfloat16 ones. Few rows; many are in tiles512.h (int8) and pairs512.h (bfloat16).
#pragma once
#include "avx2.h"

#if BITSMITH_X86
#define BITSMITH_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,avx2")))
#define BITSMITH_512_INLINE BITSMITH_512 inline __attribute__((always_inline))

namespace bitsmith::avx512 {

inline bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

// v[i] lane j <-> v[j] lane i.
BITSMITH_512_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      v[i + 2 * h] = _mm512_unpacklo_epi64(t[i + h], t[i + h + 2]);
      v[i + 2 * h + 1] = _mm512_unpackhi_epi64(t[i + h], t[i + h + 2]);
    }
  // v[4 q + c], 128 bits p: rows 4 q .. of column 4 p + c.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x44), b = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xee), e = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xee);
    t[c] = _mm512_shuffle_i32x4(a, b, 0x88), t[c + 4] = _mm512_shuffle_i32x4(a, b, 0xdd);
    t[c + 8] = _mm512_shuffle_i32x4(d, e, 0x88), t[c + 12] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// The eight byte vectors of a block.
template <int BITS>
BITSMITH_512_INLINE void unpack(const uint8_t* p, __m512i (&v)[8]) {
  if constexpr (BITS == 8) {
    for (int j = 0; j < 8; ++j) v[j] = _mm512_loadu_si512(p + 64 * j);
  }
  if constexpr (BITS & 4) {
    const __m512i mask = _mm512_set1_epi8(0x0f);
    for (int j = 0; j < 4; ++j) {
      const __m512i a = _mm512_loadu_si512(p + 64 * j);
      v[2 * j] = _mm512_and_si512(a, mask);
      v[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi32(a, 4), mask);
    }
    p += 256;
  }
  if constexpr (BITS & 2) {
    constexpr int below = BITS & 4;
    const __m512i mask = _mm512_set1_epi8(3 << below);
    for (int j = 0; j < 2; ++j) {
      const __m512i a = _mm512_loadu_si512(p + 64 * j);
      for (int s = 0; s < 4; ++s) {
        const int shift = 2 * s - below;
        const __m512i moved = shift >= 0 ? _mm512_srli_epi32(a, shift) : _mm512_slli_epi32(a, -shift);
        const __m512i bits = _mm512_and_si512(moved, mask);
        v[4 * j + s] = below ? _mm512_or_si512(v[4 * j + s], bits) : bits;
      }
    }
    p += 128;
  }
  if constexpr (BITS & 1) {
    constexpr int below = BITS & 6;
    const __m512i mask = _mm512_set1_epi8(1 << below);
    const __m512i a = _mm512_loadu_si512(p);
    for (int s = 0; s < 8; ++s) {
      const int shift = s - below;
      const __m512i moved = shift >= 0 ? _mm512_srli_epi32(a, shift) : _mm512_slli_epi32(a, -shift);
      const __m512i bits = _mm512_and_si512(moved, mask);
      v[s] = below ? _mm512_or_si512(v[s], bits) : bits;
    }
  }
}

// Table of BFLOAT values in registers. Codes of up to 5 bits index words; wider ones index low and high bytes apart, and bit 7
// of an 8-bit code is the sign (FP8): 128 entries are all that a byte permutation reaches.
template <int BITS>
struct Table {
  __m512i t[4];
  // values: null where the codes are the numbers, and nothing is looked up.
  BITSMITH_512_INLINE explicit Table(const uint16_t* values) {
    if (!values) return;
    if constexpr (BITS <= 5) {
      uint16_t words[32];
      for (int i = 0; i < 32; ++i) words[i] = values[i & ((1 << BITS) - 1)];
      t[0] = _mm512_loadu_si512(words);
    } else {
      uint8_t bytes[2][128];
      for (int i = 0; i < 128; ++i)
        for (int h = 0; h < 2; ++h) bytes[h][i] = static_cast<uint8_t>(values[i & ((1 << BITS) - 1)] >> (8 * h));
      for (int i = 0; i < 4; ++i) t[i] = _mm512_loadu_si512(bytes[i / 2] + 64 * (i % 2));
    }
  }
  // Byte vector -> bfloat16 pairs of inputs (0, 2) and (1, 3) of each lane.
  BITSMITH_512_INLINE void look_up(__m512i v, __m512i& even, __m512i& odd) const {
    if constexpr (BITS <= 5) {
      even = _mm512_permutexvar_epi16(v, t[0]);
      odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), t[0]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(t[0], v, t[1]);
      __m512i high = _mm512_permutex2var_epi8(t[2], v, t[3]);
      if constexpr (BITS == 8) high = _mm512_or_si512(high, _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(0x80))));
      const __m512i mask = _mm512_set1_epi16(0xff);
      // (a & mask) | (b & ~mask)
      even = _mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xca);
      odd = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca);
    }
  }
};

BITSMITH_512_INLINE __m512 load16(const void* p, int64_t i, int32_t dtype) {
  switch (dtype) {
    case F32: return _mm512_loadu_ps(static_cast<const float*>(p) + i);
    case BF16:
      return _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i))), 16));
    case F16: return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i)));
    case E4M3_BYTE: {
      // Through float16, as e4m3_to_float.
      const __m256i byte = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p) + i)));
      const __m256i half = _mm256_and_si256(_mm256_slli_epi16(byte, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
      const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_or_si256(half, _mm256_set1_epi16(INT16_MIN)), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
      return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00))), _mm512_set1_ps(256));
    }
    default: {
      const __m512i u = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(p) + i)));
      if (dtype == U8) return _mm512_cvtepi32_ps(u);
      // 2^(u - 127); u = 0 is the subnormal 2^-127.
      const __m512i power = _mm512_slli_epi32(u, 23);
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(power, _mm512_testn_epi32_mask(u, u), _mm512_set1_epi32(1 << 22)));
    }
  }
}

BITSMITH_512_INLINE void scales16(const Weight& w, int64_t nb, int64_t g, int64_t groups, __m512& scale, __m512& zero) {
  if (w.supers) {
    alignas(64) float s[ROWS], z[ROWS];
    scales_of(w, nb, g, s, z);
    scale = _mm512_load_ps(s), zero = _mm512_load_ps(z);
    return;
  }
  const int64_t at = w.scale_rows == 1 ? (nb * groups + g) * ROWS : nb * ROWS / w.scale_rows * groups + g;
  scale = w.scale_rows == 1 ? load16(w.scales, at, w.scale_dtype) : _mm512_set1_ps(load(w.scales, at, w.scale_dtype));
  if (!w.zeros) zero = _mm512_set1_ps(w.zero);
  else zero = w.scale_rows == 1 ? load16(w.zeros, at, w.zero_dtype) : _mm512_set1_ps(load(w.zeros, at, w.zero_dtype));
  if (w.mins) {
    const __mmask16 none = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
    scale = _mm512_mask_mov_ps(scale, none, _mm512_set1_ps(NO_SCALE));
    zero = _mm512_div_ps(_mm512_sub_ps(_mm512_setzero_ps(), zero), scale);
  }
}

BITSMITH_512_INLINE void store16(void* y, int64_t at, int32_t dtype, __m512 v, int64_t count) {
  const __mmask16 mask = count >= ROWS ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  if (dtype == F32) _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, v);
  else if (dtype == BF16) _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

BITSMITH_512_INLINE __m512i spread(const void* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// sum + products of v's bytes, unsigned, with the same four signed ones at p. Written out because GCC 12 loads them into a register first; without it
// more dot products are under way at once (one core, 512 rows, billion multiply-adds a second: Q6_K 142 -> 158, IQ4_XS 180 -> 189).
BITSMITH_512_INLINE __m512i add_dot(__m512i sum, __m512i v, const void* p) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(v), "m"(*static_cast<const char(*)[4]>(p)));
  return sum;
}

// Rows m0 .. m0 + MR - 1 of the product with 16 outputs.
template <int BITS, int KIND, int MR>
BITSMITH_512 void few(const Weight& w, const Input& x, int64_t m0, int64_t nb, void* y, int32_t dtype) {
  __m512 total[MR];
  for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  const int64_t k_blocks = w.k_blocks(), groups = w.groups(), per = x.chunk / BLOCK;
  const uint8_t* p = w.block(nb, 0);
  const bool whole = KIND == INT8 && w.whole_zero();
  [[maybe_unused]] const Table<BITS> table(KIND == BFLOAT ? w.values : nullptr);
  for (int64_t c = 0; c < x.chunks; ++c) {
    const int64_t stop = std::min((c + 1) * per, k_blocks);
    __m512 dot[MR];
    if constexpr (KIND == INT8) {
      // Two sums a row where there are registers for them: a dot product takes five cycles and two start in each.
      constexpr int LANES = MR == 1 ? 4 : MR <= 4 ? 2 : 1;
      __m512i acc[MR][LANES];
      for (int m = 0; m < MR; ++m) {
        for (int l = 1; l < LANES; ++l) acc[m][l] = _mm512_setzero_si512();
        acc[m][0] = _mm512_set1_epi32(whole ? x.low[(m0 + m) * x.chunks + c] : 0);
      }
      for (int64_t kb = c * per; kb < stop; ++kb, p += 64 * BITS) {
        __m512i v[8];
        ahead<BITS, MR>(p);
        unpack<BITS>(p, v);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const int8_t* row = x.q.data() + (m0 + m) * x.stride + kb * BLOCK;
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) acc[m][j % LANES] = add_dot(acc[m][j % LANES], v[j], row + 4 * j);
        }
      }
      for (int m = 0; m < MR; ++m) {
        for (int l = 1; l < LANES; ++l) acc[m][0] = _mm512_add_epi32(acc[m][0], acc[m][l]);
        dot[m] = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[m][0]), _mm512_set1_ps(x.scale[(m0 + m) * x.chunks + c]));
      }
    } else {
      constexpr int LANES = MR <= 4 ? 2 : 1;
      __m512 acc[MR][LANES];
      for (int m = 0; m < MR; ++m)
        for (int l = 0; l < LANES; ++l) acc[m][l] = _mm512_setzero_ps();
      for (int64_t kb = c * per; kb < stop; ++kb, p += 64 * BITS) {
        __m512i v[8];
        ahead<BITS, 2>(p);
        unpack<BITS>(p, v);
        for (int j = 0; j < 8; ++j) {
          __m512i pair[2];
          table.look_up(v[j], pair[0], pair[1]);
          for (int m = 0; m < MR; ++m) {
            const uint16_t* row = x.b.data() + (m0 + m) * x.stride + kb * BLOCK + 4 * j;
            for (int h = 0; h < 2; ++h) {
              int32_t two;
              std::memcpy(&two, row + 2 * h, 4);
              acc[m][h % LANES] = _mm512_dpbf16_ps(acc[m][h % LANES], reinterpret_cast<__m512bh>(pair[h]), reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
            }
          }
        }
      }
      for (int m = 0; m < MR; ++m) dot[m] = LANES == 2 ? _mm512_add_ps(acc[m][0], acc[m][LANES - 1]) : acc[m][0];
    }
    __m512 scale, zero;
    scales16(w, nb, c * x.chunk / w.group, groups, scale, zero);
    for (int m = 0; m < MR; ++m) {
      if (!whole) dot[m] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x.sum[(m0 + m) * x.chunks + c]), dot[m]);
      total[m] = _mm512_fmadd_ps(dot[m], scale, total[m]);
    }
  }
  for (int m = 0; m < MR; ++m) store16(y, (m0 + m) * w.n + nb * ROWS, dtype, total[m], w.n - nb * ROWS);
}

BITSMITH_512_INLINE __m512 activations16(const void* x, int64_t at, int32_t dtype, int64_t count) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
  if (dtype == F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
  const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + at);
  return dtype == F16 ? _mm512_cvtph_ps(raw) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// `count` inputs, whole 32s, of which `there` exist, rounded to int8: their step. each(i, sums of four neighbours of codes i .. i + 31).
template <class Each>
BITSMITH_512_INLINE float rounded(const void* x, int64_t at, int32_t dtype, int64_t count, int64_t there, int8_t* q, const Each& each) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(activations16(x, at + i, dtype, there - i)));
  const float peak = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(peak > 0 ? 127 / peak : 0);
  for (int64_t i = 0; i < count; i += 32) {
    __m128i codes[2];
    for (int h = 0; h < 2; ++h)
      codes[h] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(activations16(x, at + i + 16 * h, dtype, there - i - 16 * h), inverse)));
    const __m256i both = _mm256_set_m128i(codes[1], codes[0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), both);
    each(i, _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), both));
  }
  return peak / 127;
}

// One row of activations, its columns in packed order, into the form the kernels read.
template <int KIND>
BITSMITH_512 void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  for (int64_t c = 0; c < in.chunks; ++c) {
    const int64_t first = c * in.chunk, stop = c + 1 == in.chunks ? in.inputs : first + in.chunk, at = row * in.chunks + c;
    if constexpr (KIND == INT8) {
      __m256i codes = _mm256_setzero_si256();
      in.scale[at] = rounded(x, row * w.k + first, dtype, stop - first, w.k - first, in.q.data() + row * in.stride + first,
                             [&](int64_t, __m256i fours) __attribute__((always_inline)) BITSMITH_512 { codes = _mm256_add_epi32(codes, fours); });
      const int32_t sum = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(codes));
      in.low[at] = w.whole_zero() ? -static_cast<int32_t>(w.zero) * sum : 0;
      in.sum[at] = in.scale[at] * static_cast<float>(sum);
    } else {
      // Inputs 0 1 2 3 of every four -> 0 2 1 3.
      const __m256i order = _mm256_setr_epi16(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
      __m512 total = _mm512_setzero_ps();
      for (int64_t k = first; k < stop; k += 16) {
        const __m256i b = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(activations16(x, row * w.k + k, dtype, w.k - k)));
        total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(in.b.data() + row * in.stride + k), _mm256_permutexvar_epi16(order, b));
      }
      in.scale[at] = 1;
      in.sum[at] = _mm512_reduce_add_ps(total);
    }
  }
}

}  // namespace bitsmith::avx512
#endif
