// Kernels of attend.h with AVX-512: bfloat16 dot products of queries with sixteen keys at a time, and of weights, rounded to bfloat16 as in torch's flash
// attention, with two values at a time. Key dimensions in multiples of 32, value dimensions of 16.
#pragma once
#include "attend.h"
#include "avx512.h"

#if BITSMITH_X86
namespace bitsmith::attend512 {

inline bool takes(const attend::Attention& a) { return a.key_dim % 32 == 0 && a.value_dim % 16 == 0 && avx512::supported(); }

BITSMITH_512 inline void decode(const int8_t* codes, float scale, uint16_t* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 16) {
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(v, _mm512_set1_ps(scale)))));
  }
}

// Lane i of the result is the sum of the lanes of a[i].
BITSMITH_512_INLINE __m512 sums16(const __m512 (&a)[16]) {
  __m512 t[8], u[4];
  for (int i = 0; i < 8; ++i) t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    u[i] = _mm512_add_ps(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44), _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  const __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  const __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd));
}

// As layer::exponential, for v <= 0.
BITSMITH_512_INLINE __m512 exponential(__m512 v) {
  // NaN is the second one's.
  v = _mm512_max_ps(_mm512_set1_ps(-87.0f), v);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, whole);
}

BITSMITH_512_INLINE __m512 capped(__m512 score, float cap) {
  const __m512 one = _mm512_set1_ps(1.0f), x = _mm512_mul_ps(score, _mm512_set1_ps(1.0f / cap));
  const __m512 t = exponential(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f)));
  const __m512 size = _mm512_mul_ps(_mm512_set1_ps(cap), _mm512_div_ps(_mm512_sub_ps(one, t), _mm512_add_ps(one, t)));
  return _mm512_mask_sub_ps(size, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), size);
}

// Scores of 16 keys, one head: for the few heads that pay for no transposition.
BITSMITH_512_INLINE void scores1(const uint16_t* query, const uint16_t* const* key, int64_t dim, float* out) {
  __m512 dot[16];
  for (auto& one : dot) one = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 32) {
    const auto q = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + d));
    for (int i = 0; i < 16; ++i) dot[i] = _mm512_dpbf16_ps(dot[i], q, reinterpret_cast<__m512bh>(_mm512_loadu_si512(key[i] + d)));
  }
  _mm512_storeu_ps(out, sums16(dot));
}

// The same of HEADS heads, whose queries follow each other.
template <int HEADS>
BITSMITH_512_INLINE void scores_of(const uint16_t* query, const uint16_t* const* key, int64_t dim, float* out) {
  __m512 dot[HEADS];
  for (auto& one : dot) one = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 32) {
    __m512i pair[16];
    for (int i = 0; i < 16; ++i) pair[i] = _mm512_loadu_si512(key[i] + d);
    avx512::transpose(pair);
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p)
      for (int g = 0; g < HEADS; ++g)
        dot[g] = _mm512_dpbf16_ps(dot[g], reinterpret_cast<__m512bh>(pair[p]), reinterpret_cast<__m512bh>(avx512::spread(query + g * dim + d + 2 * p)));
  }
  for (int g = 0; g < HEADS; ++g) _mm512_storeu_ps(out + g * attend::TOKENS, dot[g]);
}

BITSMITH_512 inline void scores(const uint16_t* q, int64_t count, int64_t dim, int64_t tokens, attend::Room& room, attend::Ahead& ahead) {
  for (int64_t j = 0; j < tokens; j += 16) {
    ahead.ask(dim / 2);
    int64_t g = 0;
    for (; g + 8 <= count; g += 8) scores_of<8>(q + g * dim, room.keys + j, dim, room.weights + g * attend::TOKENS + j);
    for (; g + 4 <= count; g += 4) scores_of<4>(q + g * dim, room.keys + j, dim, room.weights + g * attend::TOKENS + j);
    for (; g < count; ++g) scores1(q + g * dim, room.keys + j, dim, room.weights + g * attend::TOKENS + j);
  }
}

// HEADS heads from `first` on, 32 PARTS dimensions (or the last, whole 16s) from `at` on.
template <int HEADS, int PARTS>
BITSMITH_512_INLINE void add_to(float* sums, int64_t first, int64_t at, int64_t dim, int64_t tokens, const attend::Room& room, attend::Ahead& ahead) {
  // The two halves of a pair's products: of each eight dimensions the first and the last four.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), four = _mm512_set1_epi32(4);
  const __m512i back = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), eight = _mm512_set1_epi32(8);
  const auto* weights = reinterpret_cast<const uint16_t*>(room.weights);
  __mmask32 there[PARTS];
  for (int i = 0; i < PARTS; ++i) {
    const int64_t left = dim - at - 32 * i;
    there[i] = left >= 32 ? 0xffffffffu : left > 0 ? 0xffffu : 0;
  }
  __m512 sum[HEADS][PARTS][2];
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < PARTS; ++i) {
      const float* from = sums + (first + g) * dim + at + 32 * i;
      const __m512 by = _mm512_set1_ps(room.factors[first + g]);
      const __m512 one = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(static_cast<__mmask16>(there[i]), from));
      const __m512 other = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(static_cast<__mmask16>(there[i] >> 16), from + 16));
      sum[g][i][0] = _mm512_permutex2var_ps(one, low, other);
      sum[g][i][1] = _mm512_permutex2var_ps(one, _mm512_add_epi32(low, four), other);
    }
  for (int64_t j = 0; j < tokens; j += 2) {
    ahead.ask(2 * PARTS);
    const uint16_t *even = room.values[j] + at, *odd = room.values[j + 1] + at;
    for (int i = 0; i < PARTS; ++i) {
      const __m512i one = _mm512_maskz_loadu_epi16(there[i], even + 32 * i), other = _mm512_maskz_loadu_epi16(there[i], odd + 32 * i);
      const auto first_four = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(one, other)), last_four = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(one, other));
      for (int g = 0; g < HEADS; ++g) {
        const auto weight = reinterpret_cast<__m512bh>(avx512::spread(weights + 2 * (first + g) * attend::TOKENS + j));
        sum[g][i][0] = _mm512_dpbf16_ps(sum[g][i][0], first_four, weight);
        sum[g][i][1] = _mm512_dpbf16_ps(sum[g][i][1], last_four, weight);
      }
    }
  }
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < PARTS; ++i) {
      float* to = sums + (first + g) * dim + at + 32 * i;
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>(there[i]), _mm512_permutex2var_ps(sum[g][i][0], back, sum[g][i][1]));
      _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(there[i] >> 16), _mm512_permutex2var_ps(sum[g][i][0], _mm512_add_epi32(back, eight), sum[g][i][1]));
    }
}

// Weights are bfloat16, in place.
BITSMITH_512 inline float weigh(const attend::Attention& a, float* s, int64_t tokens, int64_t there, float& most, float& total) {
  constexpr int VECTORS = attend::TOKENS / 16;
  const int used = static_cast<int>(tokens / 16);
  __m512 score[VECTORS], peaks = _mm512_set1_ps(most), sum = _mm512_setzero_ps();
  for (int i = 0; i < VECTORS; ++i) {
    if (i >= used) break;
    score[i] = _mm512_mul_ps(_mm512_load_ps(s + 16 * i), _mm512_set1_ps(a.scale));
    if (a.softcap > 0) score[i] = capped(score[i], a.softcap);
    peaks = _mm512_max_ps(peaks, score[i]);
  }
  const float peak = _mm512_reduce_max_ps(peaks), factor = layer::exponential(most - peak);
  for (int i = 0; i < VECTORS; ++i) {
    if (i >= used) break;
    const __mmask16 present = there - 16 * i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (there - 16 * i)) - 1);
    const __m512 weight = _mm512_maskz_mov_ps(present, exponential(_mm512_sub_ps(score[i], _mm512_set1_ps(peak))));
    sum = _mm512_add_ps(sum, weight);
    _mm256_store_si256(reinterpret_cast<__m256i*>(s) + i, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weight)));
  }
  most = peak, total = total * factor + _mm512_reduce_add_ps(sum);
  return factor;
}

BITSMITH_512 inline void add(float* sums, int64_t count, int64_t dim, int64_t tokens, attend::Room& room, attend::Ahead& ahead) {
  int64_t g = 0;
  for (; g + 4 <= count; g += 4)
    for (int64_t at = 0; at < dim; at += 64) add_to<4, 2>(sums, g, at, dim, tokens, room, ahead);
  for (; g < count; ++g)
    for (int64_t at = 0; at < dim; at += 128) add_to<1, 4>(sums, g, at, dim, tokens, room, ahead);
}

constexpr attend::Kernels KERNELS = {decode, scores, weigh, add};

}  // namespace bitsmith::attend512
#endif
