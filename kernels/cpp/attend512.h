// Decode attention with AVX-512: scores by bfloat16 dot products, sixteen keys at a time; ten cycles a head and key where the
// plain loops of layer.h take a hundred. Key dimensions in multiples of 32, value dimensions of 16.
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

// HEADS query heads, 64 (or the last 16, 32, 48) value dimensions from `dim` on: weighted values summed over the keys.
template <int HEADS>
BITSMITH_512_INLINE void values(const layer::Attention& a, const int64_t* slots, int64_t kv, int64_t keys, int64_t padded, const float* scores,
                                int64_t dim, const float* inverse, uint16_t* out) {
  const int parts = static_cast<int>(std::min<int64_t>(4, (a.value_dim - dim) / 16));
  __m512 sum[HEADS][4];
  for (auto& head : sum)
    for (auto& part : head) part = _mm512_setzero_ps();
  for (int64_t j = 0; j < keys; ++j) {
    const uint16_t* row = a.v + (slots[j] * a.kv_heads + kv) * a.value_dim + dim;
    __m512 v[4];
    for (int i = 0; i < 4; ++i) v[i] = i < parts ? avx512::load16(row, 16 * i, BF16) : _mm512_setzero_ps();
    for (int g = 0; g < HEADS; ++g) {
      const __m512 weight = _mm512_set1_ps(scores[g * padded + j]);
      for (int i = 0; i < 4; ++i) sum[g][i] = _mm512_fmadd_ps(weight, v[i], sum[g][i]);
    }
  }
  for (int g = 0; g < HEADS; ++g)
    for (int i = 0; i < parts; ++i)
      avx512::store16(out, g * a.value_dim + dim + 16 * i, BF16, _mm512_mul_ps(sum[g][i], _mm512_set1_ps(inverse[g])), 16);
}

// As layer::attend; scratch holds GROUP * (keys rounded up to 16) floats and as many slots.
BITSMITH_512 inline void attend(const layer::Attention& a, int64_t row, int64_t kv, int64_t first, int64_t count, float* scratch, int64_t* slots) {
  const int64_t length = a.context[row], begin = a.window > 0 ? std::max<int64_t>(0, length - a.window) : 0, keys = length - begin;
  const int64_t padded = (keys + 15) / 16 * 16, head = kv * (a.heads / a.kv_heads) + first;
  // Beyond the last key its own slot again: read, and then masked.
  for (int64_t j = 0; j < padded; ++j) slots[j] = a.slot(row, begin + std::min(j, keys - 1));
  const uint16_t* query = a.q + row * a.q_stride + head * a.key_dim;
  for (int64_t j = 0; j < padded; j += 16) {
    const uint16_t* key[16];
    for (int i = 0; i < 16; ++i) key[i] = a.k + (slots[j + i] * a.kv_heads + kv) * a.key_dim;
    for (int64_t g = 0; g < count; ++g) {
      __m512 dot[16];
      for (auto& one : dot) one = _mm512_setzero_ps();
      for (int64_t d = 0; d < a.key_dim; d += 32) {
        const auto q = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query + g * a.key_dim + d));
        for (int i = 0; i < 16; ++i) dot[i] = _mm512_dpbf16_ps(dot[i], q, reinterpret_cast<__m512bh>(_mm512_loadu_si512(key[i] + d)));
      }
      __m512 score = _mm512_mul_ps(sums16(dot), _mm512_set1_ps(a.scale));
      if (a.softcap > 0) {
        alignas(64) float capped[16];
        _mm512_store_ps(capped, score);
        for (auto& one : capped) one = a.softcap * std::tanh(one / a.softcap);
        score = _mm512_load_ps(capped);
      }
      _mm512_storeu_ps(scratch + g * padded + j, score);
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
      _mm512_storeu_ps(s + j, weight);
    }
    inverse[g] = 1.0f / (_mm512_reduce_add_ps(sum) + (a.sinks ? layer::exponential(a.sinks[head + g] - peak) : 0.0f));
  }
  uint16_t* out = a.out + (row * a.heads + head) * a.value_dim;
  for (int64_t dim = 0; dim < a.value_dim; dim += 64) {
    int64_t g = 0;
    for (; g + 4 <= count; g += 4) values<4>(a, slots, kv, keys, padded, scratch + g * padded, dim, inverse + g, out + g * a.value_dim);
    for (; g < count; ++g) values<1>(a, slots, kv, keys, padded, scratch + g * padded, dim, inverse + g, out + g * a.value_dim);
  }
}

}  // namespace bitsmith::attend512
#endif
