// Decode attention with AVX-512: bfloat16 dot products of queries with sixteen keys at a time, and of weights, rounded to bfloat16 as in torch's flash
// attention, with two values at a time. Key dimensions in multiples of 32, value dimensions of 16.
#pragma once
#include "avx512.h"
#include "layer.h"

#if BITSMITH_X86
namespace bitsmith::attend512 {

inline bool takes(const layer::Attention& a) { return a.key_dim % 32 == 0 && a.value_dim % 16 == 0 && avx512::supported(); }

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
  v = _mm512_max_ps(v, _mm512_set1_ps(-87.0f));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), v);
  r = _mm512_fmadd_ps(whole, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, whole);
}

// Scores of 16 keys, one head: for the few heads that pay for no transposition.
BITSMITH_512_INLINE __m512 score(const uint16_t* query, const uint16_t* const (&key)[16], int64_t dim) {
  __m512 dot[16];
  for (auto& one : dot) one = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += 32) {
    const auto q = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + d));
    for (int i = 0; i < 16; ++i) dot[i] = _mm512_dpbf16_ps(dot[i], q, reinterpret_cast<__m512bh>(_mm512_loadu_si512(key[i] + d)));
  }
  return sums16(dot);
}

// The same of HEADS heads, whose queries follow each other.
template <int HEADS>
BITSMITH_512_INLINE void scores(const uint16_t* query, const uint16_t* const (&key)[16], int64_t dim, __m512* out) {
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
  for (int g = 0; g < HEADS; ++g) out[g] = dot[g];
}

// Asks for `bytes` of a key or a value that will be read: tokens of a head lie too far apart for the hardware to follow.
BITSMITH_512_INLINE void ahead(const uint16_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p) + i, _MM_HINT_T0);
}

// Tokens from one that is read to one that is asked for.
constexpr int64_t AHEAD = 16;

// HEADS heads, 32 PARTS value dimensions (or the last, whole 16s) from `dim` on: weighted values summed over the keys, an even number. weights: bfloat16,
// `apart` from head to head.
template <int HEADS, int PARTS>
BITSMITH_512_INLINE void values(const layer::Attention& a, const int64_t* slots, int64_t kv, int64_t keys, const uint16_t* weights, int64_t apart, int64_t dim,
                                const float* inverse, uint16_t* out) {
  __mmask32 there[PARTS];
  for (int i = 0; i < PARTS; ++i) {
    const int64_t left = a.value_dim - dim - 32 * i;
    there[i] = left >= 32 ? 0xffffffffu : left > 0 ? 0xffffu : 0;
  }
  __m512 sum[HEADS][PARTS][2];
  for (auto& head : sum)
    for (auto& part : head) part[0] = part[1] = _mm512_setzero_ps();
  const uint16_t* first = a.v + kv * a.value_dim + dim;
  const int64_t row = a.kv_heads * a.value_dim;
  for (int64_t j = 0; j < keys; j += 2) {
    const uint16_t *even = first + slots[j] * row, *odd = first + slots[j + 1] * row;
    for (int64_t t = j + AHEAD; t < std::min(keys, j + AHEAD + 2); ++t) ahead(first + slots[t] * row, 64 * PARTS);
    for (int i = 0; i < PARTS; ++i) {
      const __m512i one = _mm512_maskz_loadu_epi16(there[i], even + 32 * i), other = _mm512_maskz_loadu_epi16(there[i], odd + 32 * i);
      // Of each eight dimensions the first and the last four.
      const auto low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(one, other)), high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(one, other));
      for (int g = 0; g < HEADS; ++g) {
        const auto weight = reinterpret_cast<__m512bh>(avx512::spread(weights + g * apart + j));
        sum[g][i][0] = _mm512_dpbf16_ps(sum[g][i][0], low, weight);
        sum[g][i][1] = _mm512_dpbf16_ps(sum[g][i][1], high, weight);
      }
    }
  }
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), eight = _mm512_set1_epi32(8);
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < PARTS; ++i) {
      const __m512 by = _mm512_set1_ps(inverse[g]);
      uint16_t* to = out + g * a.value_dim + dim + 32 * i;
      if (there[i]) avx512::store16(to, 0, BF16, _mm512_mul_ps(_mm512_permutex2var_ps(sum[g][i][0], order, sum[g][i][1]), by), 16);
      if (there[i] >> 16) avx512::store16(to, 16, BF16, _mm512_mul_ps(_mm512_permutex2var_ps(sum[g][i][0], _mm512_add_epi32(order, eight), sum[g][i][1]), by), 16);
    }
}

// As layer::attend; scratch holds GROUP * (keys rounded up to 16) floats and as many slots.
BITSMITH_512 inline void attend(const layer::Attention& a, int64_t row, int64_t kv, int64_t first, int64_t count, float* scratch, int64_t* slots) {
  const int64_t length = a.context[row], begin = a.window > 0 ? std::max<int64_t>(0, length - a.window) : 0, keys = length - begin;
  const int64_t padded = (keys + 15) / 16 * 16, head = kv * (a.heads / a.kv_heads) + first;
  for (int64_t j = 0; j < keys;) {
    const int64_t slot = a.slot(row, begin + j), stop = std::min(keys, j + a.block_size - slot % a.block_size);
    for (int64_t i = j; i < stop; ++i) slots[i] = slot + i - j;
    j = stop;
  }
  // Beyond the last key its own slot again: read, and then masked.
  for (int64_t j = keys; j < padded; ++j) slots[j] = slots[keys - 1];
  const uint16_t* query = a.q + row * a.q_stride + head * a.key_dim;
  for (int64_t j = 0; j < padded; j += 16) {
    const uint16_t* key[16];
    for (int i = 0; i < 16; ++i) key[i] = a.k + (slots[j + i] * a.kv_heads + kv) * a.key_dim;
    for (int64_t t = j + AHEAD; t < std::min(padded, j + AHEAD + 16); ++t) ahead(a.k + (slots[t] * a.kv_heads + kv) * a.key_dim, 2 * a.key_dim);
    __m512 found[layer::GROUP];
    int64_t g = 0;
    for (; g + 4 <= count; g += 4) scores<4>(query + g * a.key_dim, key, a.key_dim, found + g);
    for (; g < count; ++g) found[g] = score(query + g * a.key_dim, key, a.key_dim);
    for (g = 0; g < count; ++g) {
      __m512 one = _mm512_mul_ps(found[g], _mm512_set1_ps(a.scale));
      if (a.softcap > 0) {
        alignas(64) float capped[16];
        _mm512_store_ps(capped, one);
        for (auto& s : capped) s = a.softcap * std::tanh(s / a.softcap);
        one = _mm512_load_ps(capped);
      }
      _mm512_storeu_ps(scratch + g * padded + j, one);
    }
  }
  float inverse[layer::GROUP];
  for (int64_t g = 0; g < count; ++g) {
    float* s = scratch + g * padded;
    for (int64_t j = keys; j < padded; ++j) s[j] = -INFINITY;
    __m512 most = _mm512_set1_ps(a.sinks ? a.sinks[head + g] : -INFINITY), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < padded; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + j));
    const float peak = _mm512_reduce_max_ps(most);
    for (int64_t j = 0; j < padded; j += 16) {
      const __mmask16 present = keys - j >= 16 ? 0xffff : static_cast<__mmask16>((1u << (keys - j)) - 1);
      const __m512 weight = _mm512_maskz_mov_ps(present, exponential(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(peak))));
      sum = _mm512_add_ps(sum, weight);
      // In place, behind what is still to be read.
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(s) + j / 16, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weight)));
    }
    inverse[g] = 1.0f / (_mm512_reduce_add_ps(sum) + (a.sinks ? layer::exponential(a.sinks[head + g] - peak) : 0.0f));
  }
  uint16_t* out = a.out + (row * a.heads + head) * a.value_dim;
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(scratch);
  int64_t g = 0;
  for (; g + 4 <= count; g += 4)
    for (int64_t dim = 0; dim < a.value_dim; dim += 64)
      values<4, 2>(a, slots, kv, padded, weights + 2 * g * padded, 2 * padded, dim, inverse + g, out + g * a.value_dim);
  for (; g < count; ++g)
    for (int64_t dim = 0; dim < a.value_dim; dim += 128)
      values<1, 4>(a, slots, kv, padded, weights + 2 * g * padded, 2 * padded, dim, inverse + g, out + g * a.value_dim);
}

}  // namespace bitsmith::attend512
#endif
