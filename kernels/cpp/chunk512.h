// Attention of a prefill chunk over a paged cache with AVX-512: the queries of one sequence, of which the last is the sequence's last
// token. Keys and values are copied once into the order that bfloat16 dot products want; the softmax is online (arXiv 1805.02867), weights are
// rounded to bfloat16 and sums are float32, as in torch's flash attention, which computes hidden keys too.
#pragma once
#include "attend512.h"

#if BITSMITH_X86
namespace bitsmith::chunk512 {

// Keys a step, queries a task, and those that share the registers.
constexpr int64_t KEYS = 64, QUERIES = 32, SHARED = 4;
constexpr int64_t LANES = 16;

// The keys that any query sees, rounded up to whole steps: zeros beyond the last.
struct Span {
  int64_t first, keys;

  explicit Span(const attend::Attention& a) {
    const int64_t oldest = a.context[0] - a.rows;
    first = a.window > 0 ? std::max<int64_t>(0, oldest - a.window + 1) : 0;
    keys = (a.context[0] - first + KEYS - 1) / KEYS * KEYS;
  }
};

// 16 keys from `from` on -> pairs of dimensions, [D / 2][16].
BITSMITH_512 inline void pack_keys(const attend::Attention& a, int64_t kv, int64_t from, uint32_t* out) {
  const int64_t pairs = a.key_dim / 2;
  uint16_t room[attend::DIM];
  for (int64_t i = 0; i < LANES; ++i) {
    const bool there = from + i < a.context[0];
    const uint16_t* key = there ? attend::read(a.keys(), attend::plain::decode, a.slot(0, from + i), kv, room) : nullptr;
    for (int64_t p = 0; p < pairs; ++p) out[p * LANES + i] = there ? key[2 * p] | static_cast<uint32_t>(key[2 * p + 1]) << 16 : 0;
  }
}

// 16 values from `from` on -> pairs of keys, [8][Dv].
BITSMITH_512 inline void pack_values(const attend::Attention& a, int64_t kv, int64_t from, uint32_t* out) {
  uint16_t room[attend::DIM];
  for (int64_t i = 0; i < LANES; ++i) {
    const bool there = from + i < a.context[0];
    const uint16_t* value = there ? attend::read(a.values(), attend::plain::decode, a.slot(0, from + i), kv, room) : nullptr;
    uint32_t* pair = out + i / 2 * a.value_dim;
    for (int64_t d = 0; d < a.value_dim; ++d) pair[d] = (i % 2 ? pair[d] : 0) | (there ? static_cast<uint32_t>(value[d]) << (16 * (i % 2)) : 0);
  }
}

// The lanes of keys at ... at + 15 that a query at `position` sees.
inline __mmask16 visible(int64_t position, int64_t window, int64_t at) {
  const int64_t last = position - at, first = window > 0 ? position - window + 1 - at : 0;
  if (last < 0 || first >= LANES) return 0;
  const uint32_t below = last >= LANES - 1 ? 0xffffu : (2u << last) - 1;
  return static_cast<__mmask16>(below & (first > 0 ? 0xffffu << first : 0xffffu));
}

// What a task keeps of its queries: the largest score and the sum of weights so far, and weighted values, [QUERIES][Dv].
struct State {
  float most[QUERIES], sum[QUERIES], factor[QUERIES];
  alignas(64) uint32_t weights[SHARED][KEYS / 2];
  std::vector<float> values;
};

// Scores of SHARED queries and 16 N keys, [query][16 keys].
template <int N>
BITSMITH_512_INLINE void scores(const uint32_t* const (&query)[SHARED], const uint32_t* keys, int64_t pairs, __m512 (&out)[SHARED][N]) {
  for (auto& row : out)
    for (auto& one : row) one = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh key[N];
    for (int i = 0; i < N; ++i) key[i] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(keys + (i * pairs + p) * LANES));
    for (int r = 0; r < SHARED; ++r) {
      const auto q = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(query[r][p])));
      for (int i = 0; i < N; ++i) out[r][i] = _mm512_dpbf16_ps(out[r][i], q, key[i]);
    }
  }
}

// Scores of one query -> weights in bfloat16, and what earlier sums are to be multiplied by.
template <int N>
BITSMITH_512_INLINE void weigh(const attend::Attention& a, int64_t position, int64_t at, __m512 (&score)[N], int64_t query, uint32_t* weights, State& state) {
  __mmask16 seen[N];
  __m512 most = _mm512_set1_ps(state.most[query]);
  for (int i = 0; i < N; ++i) {
    seen[i] = visible(position, a.window, at + i * LANES);
    score[i] = _mm512_mul_ps(score[i], _mm512_set1_ps(a.scale));
    if (a.softcap > 0) score[i] = attend512::capped(score[i], a.softcap);
    most = _mm512_mask_max_ps(most, seen[i], most, score[i]);
  }
  const float before = state.most[query], peak = _mm512_reduce_max_ps(most);
  // Nothing seen yet: any number will do.
  const __m512 shift = _mm512_set1_ps(peak == -INFINITY ? 0.0f : peak);
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < N; ++i) {
    score[i] = _mm512_maskz_mov_ps(seen[i], attend512::exponential(_mm512_sub_ps(score[i], shift)));
    sum = _mm512_add_ps(sum, score[i]);
  }
  for (int i = 0; i < N; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights + i * LANES / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(score[i])));
  state.factor[query] = before == -INFINITY ? 0.0f : layer::exponential(before - peak);
  state.most[query] = peak;
  state.sum[query] = state.sum[query] * state.factor[query] + _mm512_reduce_add_ps(sum);
}

// Adds the weighted values of `keys` keys to the sums of SHARED queries.
BITSMITH_512_INLINE void gather(const attend::Attention& a, const uint32_t* values, int64_t keys, int64_t first, State& state) {
  for (int64_t dim = 0; dim < a.value_dim; dim += 4 * LANES) {
    const int parts = static_cast<int>(std::min<int64_t>(4, (a.value_dim - dim) / LANES));
    __m512 sum[SHARED][4];
    for (int r = 0; r < SHARED; ++r)
      for (int i = 0; i < 4; ++i) {
        const float* at = state.values.data() + (first + r) * a.value_dim + dim + i * LANES;
        sum[r][i] = i < parts ? _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(state.factor[first + r])) : _mm512_setzero_ps();
      }
    for (int64_t j = 0; j < keys / 2; ++j) {
      __m512bh value[4];
      for (int i = 0; i < 4; ++i)
        value[i] = reinterpret_cast<__m512bh>(i < parts ? _mm512_loadu_si512(values + j * a.value_dim + dim + i * LANES) : _mm512_setzero_si512());
      for (int r = 0; r < SHARED; ++r) {
        const auto weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(state.weights[r][j])));
        for (int i = 0; i < 4; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], weight, value[i]);
      }
    }
    for (int r = 0; r < SHARED; ++r)
      for (int i = 0; i < parts; ++i) _mm512_storeu_ps(state.values.data() + (first + r) * a.value_dim + dim + i * LANES, sum[r][i]);
  }
}

// Queries first ... first + SHARED - 1 of those from `begin` on (or the last again) meet 16 N keys, the first of them key `at` of the span.
template <int N>
BITSMITH_512 void step(const attend::Attention& a, const Span& span, int64_t head, int64_t begin, int64_t first, int64_t at, const uint32_t* keys,
                       const uint32_t* values, State& state) {
  const int64_t last = std::min(QUERIES, a.rows - begin) - 1, oldest = a.context[0] - a.rows + begin, pairs = a.key_dim / 2;
  const uint32_t* query[SHARED];
  for (int64_t r = 0; r < SHARED; ++r)
    query[r] = reinterpret_cast<const uint32_t*>(a.q + (begin + std::min(first + r, last)) * a.q_stride + head * a.key_dim);
  __m512 score[SHARED][N];
  scores<N>(query, keys + at * pairs, pairs, score);
  for (int64_t r = 0; r < SHARED; ++r) weigh<N>(a, oldest + std::min(first + r, last), span.first + at, score[r], first + r, state.weights[r], state);
  gather(a, values + at / 2 * a.value_dim, N * LANES, first, state);
}

// Queries `begin` ... begin + QUERIES - 1 (or the last) of one head; keys and values of its key head as packed.
BITSMITH_512 inline void attend(const attend::Attention& a, const Span& span, int64_t head, int64_t begin, const uint32_t* keys, const uint32_t* values,
                                State& state) {
  const int64_t count = std::min(QUERIES, a.rows - begin), oldest = a.context[0] - a.rows + begin;
  state.values.assign(static_cast<size_t>(QUERIES * a.value_dim), 0.0f);
  for (int64_t i = 0; i < QUERIES; ++i) state.most[i] = a.sinks ? a.sinks[head] : -INFINITY, state.sum[i] = a.sinks ? 1.0f : 0.0f;
  const int64_t low = a.window > 0 ? std::max<int64_t>(0, oldest - a.window + 1) : 0;
  for (int64_t at = (low - span.first) / KEYS * KEYS; span.first + at < oldest + count; at += KEYS) {
    for (int64_t first = 0; first < count; first += SHARED) {
      // Keys from `at` on that the last of these queries sees.
      const int64_t seen = oldest + std::min(first + SHARED, count) - span.first - at;
      if (seen > 3 * LANES) step<4>(a, span, head, begin, first, at, keys, values, state);
      else if (seen > 2 * LANES) step<3>(a, span, head, begin, first, at, keys, values, state);
      else if (seen > LANES) step<2>(a, span, head, begin, first, at, keys, values, state);
      else if (seen > 0) step<1>(a, span, head, begin, first, at, keys, values, state);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < a.value_dim; d += LANES)
      avx512::store16(a.out + (begin + i) * a.heads * a.value_dim, head * a.value_dim + d, BF16,
                      _mm512_mul_ps(_mm512_loadu_ps(state.values.data() + i * a.value_dim + d), _mm512_set1_ps(1.0f / state.sum[i])), 16);
}

}  // namespace bitsmith::chunk512
#endif
