// Decode attention over a paged cache: one query a sequence. A sequence's tokens are cut into parts that threads share out, and a part is gone
// through in steps with all heads at a time, since the heads of a token lie side by side. The softmax is online (arXiv 1805.02867); parts are
// merged as in Flash-Decoding. Plain loops here; attend512.h has kernels for AVX-512.
#pragma once
#include "layer.h"
#include "pool.h"

namespace bitsmith::attend {

// Keys or values of a layer, [slots][heads][dim]: bfloat16, or int8 codes with a bfloat16 scale for each vector.
struct Vectors {
  const void* numbers;
  const uint16_t* scales;
  int64_t heads, dim;

  const uint8_t* at(int64_t slot, int64_t head) const { return static_cast<const uint8_t*>(numbers) + (slot * heads + head) * dim * (scales ? 1 : 2); }
  int64_t token_bytes() const { return heads * dim * (scales ? 1 : 2); }
};

struct Attention {
  const uint16_t* q;
  const void *k, *v;
  const uint16_t *k_scales, *v_scales;  // null where numbers are bfloat16
  uint16_t* out;
  const int32_t *table, *context;  // [rows, pages], [rows]
  const float* sinks;              // [heads] or null
  int64_t rows, heads, kv_heads, key_dim, value_dim, pages, block_size, window, q_stride;
  float scale, softcap;

  // Where position `at` of a row's sequence lies in the cache.
  int64_t slot(int64_t row, int64_t at) const { return table[row * pages + at / block_size] * block_size + at % block_size; }
  Vectors keys() const { return {k, k_scales, kv_heads, key_dim}; }
  Vectors values() const { return {v, v_scales, kv_heads, value_dim}; }
};

// Query heads and tokens that kernels take at once; tokens come in multiples of LANES, vectors of up to DIM numbers.
constexpr int64_t GROUP = 8, TOKENS = 64, LANES = 16, DIM = 512;

// Positions first ... stop - 1 of a row's sequence; `sole`: they are all that its query sees.
struct Part {
  int64_t row, first, stop;
  bool sole;
};

// Of every head: weighted sums of values, the largest score, the sum of weights.
struct State {
  float *sums, *most, *total;

  State(const Attention& a, float* room) : sums(room), most(room + a.heads * a.value_dim), total(most + a.heads) {}
  static int64_t size(const Attention& a) { return a.heads * (a.value_dim + 2); }
};

// The vectors that are read next, in the order they lie in: memory is asked for them while these are worked on.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  const int64_t *slot = nullptr, *last = nullptr;
  Vectors vectors;

  Ahead(const Vectors& all, const int64_t* slots, int64_t count) : slot(slots), last(slots + count), vectors(all) {}
  inline __attribute__((always_inline)) void ask(int64_t lines) {
    for (; lines > 0; --lines, at += 64) {
      if (at >= end) {
        if (slot == last) return;
        at = vectors.at(*slot++, 0), end = at + vectors.token_bytes();
      }
      __builtin_prefetch(at, 0, 2);
    }
  }
};

// What kernels work on, a thread's own. Tokens beyond the last repeat it, and have no weight.
struct Room {
  int64_t slots[TOKENS], next[TOKENS];
  const uint16_t *keys[TOKENS], *values[TOKENS];
  alignas(64) uint16_t decoded_keys[TOKENS * DIM], decoded_values[TOKENS * DIM];
  alignas(64) float weights[GROUP * TOKENS];
  float factors[GROUP];
};

using Decode = void (*)(const int8_t* codes, float scale, uint16_t* out, int64_t dim);

// As in `plain` below. scores: of `count` heads and `tokens` keys into weights. weigh: one head's scores, of which `there` exist, to weights; what
// earlier sums are to be multiplied by. add: sums * factors + weighted values.
struct Kernels {
  Decode decode;
  void (*scores)(const uint16_t* q, int64_t count, int64_t dim, int64_t tokens, Room& room, Ahead& ahead);
  float (*weigh)(const Attention& a, float* s, int64_t tokens, int64_t there, float& most, float& total);
  void (*add)(float* sums, int64_t count, int64_t dim, int64_t tokens, Room& room, Ahead& ahead);
};

namespace plain {

BITSMITH_CLONES inline void decode(const int8_t* codes, float scale, uint16_t* out, int64_t dim) {
#pragma omp simd
  for (int64_t i = 0; i < dim; ++i) out[i] = layer::narrow(static_cast<float>(codes[i]) * scale);
}

// A number of each head. The compiler's own vectors: loops over eight floats it leaves in memory.
using Heads = float __attribute__((vector_size(GROUP * sizeof(float))));
// Tokens that are read together: as many chains of sums in flight.
constexpr int64_t CHAINS = 4;

inline __attribute__((always_inline)) void widen(const uint16_t* const* vectors, int64_t dim, float* wide) {
  for (int64_t t = 0; t < CHAINS; ++t) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) wide[t * dim + i] = bfloat_to_float(vectors[t][i]);
  }
}

BITSMITH_CLONES inline void scores(const uint16_t* q, int64_t count, int64_t dim, int64_t tokens, Room& room, Ahead& ahead) {
  // Heads side by side: a score of each is a lane, and nothing is summed across lanes.
  Heads query[DIM] = {};
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < dim; ++i) query[i][g] = bfloat_to_float(q[g * dim + i]);
  float wide[CHAINS * DIM];
  for (int64_t j = 0; j < tokens; j += CHAINS) {
    ahead.ask(CHAINS * dim / 32);
    widen(room.keys + j, dim, wide);
    Heads dot[CHAINS] = {};
    for (int64_t i = 0; i < dim; ++i)
      for (int64_t t = 0; t < CHAINS; ++t) dot[t] += query[i] * wide[t * dim + i];
    for (int64_t t = 0; t < CHAINS; ++t)
      for (int64_t g = 0; g < count; ++g) room.weights[g * TOKENS + j + t] = dot[t][g];
  }
}

BITSMITH_CLONES inline void add(float* sums, int64_t count, int64_t dim, int64_t tokens, Room& room, Ahead& ahead) {
  for (int64_t g = 0; g < count; ++g) {
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) sums[g * dim + i] *= room.factors[g];
  }
  float wide[CHAINS * DIM];
  for (int64_t j = 0; j < tokens; j += CHAINS) {
    ahead.ask(CHAINS * dim / 32);
    widen(room.values + j, dim, wide);
    for (int64_t g = 0; g < count; ++g) {
      const float* p = room.weights + g * TOKENS + j;
      float* sum = sums + g * dim;
#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) sum[i] += p[0] * wide[i] + p[1] * wide[dim + i] + p[2] * wide[2 * dim + i] + p[3] * wide[3 * dim + i];
    }
  }
}

BITSMITH_CLONES inline float weigh(const Attention& a, float* s, int64_t tokens, int64_t there, float& most, float& total) {
#pragma omp simd
  for (int64_t j = 0; j < tokens; ++j) s[j] *= a.scale;
  if (a.softcap > 0) {
    const float cap = a.softcap;
#pragma omp simd
    for (int64_t j = 0; j < tokens; ++j) {
      const float t = layer::exponential(-2.0f / cap * std::fabs(s[j]));
      s[j] = std::copysign(cap * (1.0f - t) / (1.0f + t), s[j]);
    }
  }
  float peak = most, sum = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t j = 0; j < tokens; ++j) peak = std::max(peak, s[j]);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < tokens; ++j) {
    s[j] = j < there ? layer::exponential(s[j] - peak) : 0.0f;
    sum += s[j];
  }
  const float factor = layer::exponential(most - peak);
  most = peak, total = total * factor + sum;
  return factor;
}

constexpr Kernels KERNELS = {decode, scores, weigh, add};

}  // namespace plain

// Slots of the tokens of a part from `at` on: how many there are, and up to whole LANES the last one again.
inline int64_t find(const Attention& a, const Part& part, int64_t at, int64_t step, int64_t (&slots)[TOKENS]) {
  const int64_t count = std::min(step, part.stop - at);
  for (int64_t j = 0; j < count;) {
    const int64_t slot = a.slot(part.row, at + j), stop = std::min(count, j + a.block_size - slot % a.block_size);
    for (int64_t i = j; i < stop; ++i) slots[i] = slot + i - j;
    j = stop;
  }
  for (int64_t j = count; j % LANES; ++j) slots[j] = slots[count - 1];
  return count;
}

// One vector: where it lies, or decoded into `room`.
inline const uint16_t* read(const Vectors& vectors, Decode decode, int64_t slot, int64_t head, uint16_t* room) {
  const uint8_t* from = vectors.at(slot, head);
  if (!vectors.scales) return reinterpret_cast<const uint16_t*>(from);
  decode(reinterpret_cast<const int8_t*>(from), bfloat_to_float(vectors.scales[slot * vectors.heads + head]), room, vectors.dim);
  return room;
}

// A part's tokens, `step` at a time, into its state; `after`: the part that this thread is likely to take next, or null.
inline void run(const Attention& a, const Part& part, const Part* after, int64_t step, const Kernels& by, State state, Room& room) {
  const Vectors keys = a.keys(), values = a.values();
  const int64_t shared = a.heads / a.kv_heads;
  std::fill(state.sums, state.sums + a.heads * a.value_dim, 0.0f);
  for (int64_t h = 0; h < a.heads; ++h) {
    const bool sink = a.sinks && part.first == (a.window > 0 ? std::max<int64_t>(0, a.context[part.row] - a.window) : 0);
    state.most[h] = sink ? a.sinks[h] : -INFINITY, state.total[h] = sink;
  }
  int64_t count = find(a, part, part.first, step, room.slots);
  for (int64_t at = part.first; at < part.stop; at += step) {
    const bool last = at + step >= part.stop;
    const int64_t following = !last ? find(a, part, at + step, step, room.next) : after ? find(a, *after, after->first, step, room.next) : 0;
    const int64_t tokens = (count + LANES - 1) / LANES * LANES;
    Ahead keys_ahead(keys, room.next, following), values_ahead(values, room.next, following);
    for (int64_t kv = 0; kv < a.kv_heads; ++kv) {
      for (int64_t j = 0; j < tokens; ++j) {
        room.keys[j] = read(keys, by.decode, room.slots[j], kv, room.decoded_keys + j * DIM);
        room.values[j] = read(values, by.decode, room.slots[j], kv, room.decoded_values + j * DIM);
      }
      for (int64_t head = kv * shared; head < (kv + 1) * shared; head += GROUP) {
        const int64_t heads = std::min(GROUP, (kv + 1) * shared - head);
        by.scores(a.q + part.row * a.q_stride + head * a.key_dim, heads, a.key_dim, tokens, room, keys_ahead);
        for (int64_t g = 0; g < heads; ++g)
          room.factors[g] = by.weigh(a, room.weights + g * TOKENS, tokens, count, state.most[head + g], state.total[head + g]);
        by.add(state.sums + head * a.value_dim, heads, a.value_dim, tokens, room, values_ahead);
      }
    }
    count = following;
    std::swap(room.slots, room.next);
  }
}

// `count` states of a row's parts, one behind the other -> its result; they are used up.
BITSMITH_CLONES inline void finish(const Attention& a, int64_t row, float* states, int64_t count) {
  const State first(a, states);
  for (int64_t h = 0; h < a.heads; ++h) {
    float* sums = first.sums + h * a.value_dim;
    for (int64_t i = 1; i < count; ++i) {
      const State next(a, states + i * State::size(a));
      const float most = std::max(first.most[h], next.most[h]);
      const float own = layer::exponential(first.most[h] - most), others = layer::exponential(next.most[h] - most);
      const float* more = next.sums + h * a.value_dim;
#pragma omp simd
      for (int64_t d = 0; d < a.value_dim; ++d) sums[d] = sums[d] * own + more[d] * others;
      first.most[h] = most, first.total[h] = first.total[h] * own + next.total[h] * others;
    }
    const float inverse = 1.0f / first.total[h];
    uint16_t* out = a.out + (row * a.heads + h) * a.value_dim;
#pragma omp simd
    for (int64_t d = 0; d < a.value_dim; ++d) out[d] = layer::narrow(sums[d] * inverse);
  }
}

// Parts of a sequence at most, and tokens of one at least. They depend on its length alone, so that it gets the same numbers in any batch.
constexpr int64_t PARTS = 16, LEAST = 128;
// Bytes of the keys and values of a step: with those of the next one, half of a second-level cache.
constexpr int64_t STEP_BYTES = 1 << 18;

// Parts whose states are held at once, but all of a sequence.
constexpr int64_t HELD = 256;

// Adds a row's parts.
inline void cut(const Attention& a, int64_t row, std::vector<Part>& parts) {
  const int64_t stop = a.context[row], begin = a.window > 0 ? std::max<int64_t>(0, stop - a.window) : 0, keys = stop - begin;
  const int64_t size = std::max(LEAST, (keys + PARTS * TOKENS - 1) / (PARTS * TOKENS) * TOKENS);
  for (int64_t at = begin; at < stop; at += size) parts.push_back({row, at, std::min(at + size, stop), keys <= size});
}

// All parts; states: room for theirs.
inline void run(const Attention& a, const std::vector<Part>& parts, float* states, int32_t threads, const Kernels& by) {
  const int64_t bytes = a.keys().token_bytes() + a.values().token_bytes(), step = std::clamp(STEP_BYTES / bytes / LANES * LANES, LANES, TOKENS);
  const int64_t count = static_cast<int64_t>(parts.size()), size = State::size(a);
  const Part* const each = parts.data();
  int64_t tokens = 0;
  for (const Part& part : parts) tokens += part.stop - part.first;
  pool().run(count, tokens * a.heads * a.key_dim < (1 << 17) ? 1 : threads, [&](int64_t i) {
    static thread_local Room room;
    run(a, each[i], i + 1 < count ? each + i + 1 : nullptr, step, by, State(a, states + i * size), room);
    if (each[i].sole) finish(a, each[i].row, states + i * size, 1);
  });
  for (int64_t i = 0, own = 1; i < count; i += own, own = 1) {
    while (i + own < count && each[i + own].row == each[i].row) ++own;
    if (!each[i].sole) finish(a, each[i].row, states + i * size, own);
  }
}

inline void attend(const Attention& a, int32_t threads, const Kernels& by) {
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<float> states;
  for (int64_t row = 0; row < a.rows;) {
    parts.clear();
    while (row < a.rows && static_cast<int64_t>(parts.size()) < HELD) cut(a, row++, parts);
    const size_t size = parts.size() * static_cast<size_t>(State::size(a));
    if (states.size() < size) states.resize(size);
    run(a, parts, states.data(), threads, by);
  }
}

}  // namespace bitsmith::attend
