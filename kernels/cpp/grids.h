// Weights whose codes are indices and signs of vectors of 8 small integers (GGUF's IQ1, IQ2 and IQ3; kernels/grids.py), with int8
// activations. Nothing is packed anew: codes and scales are read from the bit streams of the QTensor.
#pragma once
#include "two_level.h"

namespace bitsmith::grids {

using two_level::CHUNK;
using two_level::Input;
using two_level::SUPER;
// Inputs that share a scale at the least, and the eights of a chunk.
constexpr int64_t UNIT = 16, OCTETS = CHUNK / 8;
// What makes bytes without a sign of numbers.
constexpr int32_t BIAS = 128;

// Mirrored by kernels/native_grids.py; only pointers, int64, float and int32 in this order.
struct Weight {
  const uint32_t* codes;     // [n][words], `width` bits for 8 inputs: indices, then signs
  const uint32_t* scales;    // [n][scale_words], `scale_bits` bits a group: 2 * (code & scale_mask) + 1 is the scale, the bit above
                             // it (where there is one) the highest of the indices of the group's vectors
  const uint16_t* supers;    // float16 [n][k / 256]
  const int8_t* vectors;     // [2^index_bits][8 / indices], none of them 0
  const uint8_t* signs;      // [2^sign_bits][8], 0 or 255; or null
  const uint16_t* places;    // of grids512.h: [2^index_bits], for each number of a vector, lowest bits first, its place in `levels`
  const uint8_t* levels;     // of grids512.h: [64] numbers plus 128, without the shift
  int64_t n, k;              // k a multiple of 256
  int64_t words, scale_words;
  float unit;                // of the scale
  int32_t width, index_bits, indices, sign_bits, group, scale_bits, scale_mask;

  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
};

// The numbers of 16 rows in one chunk, and each row's scale four times for each 16 inputs.
struct Panel {
  alignas(32) int8_t value[OCTETS][ROWS][8];
  alignas(32) int16_t scale[CHUNK / UNIT][ROWS][4];
};

// Bits at .. at + bits - 1 of a row's stream of `words` >= 2 words, of which two are read that hold them.
inline uint32_t field(const uint32_t* row, uint32_t words, uint32_t at, uint32_t bits) {
  const uint32_t word = std::min(at / 32, words - 2);
  uint64_t two;
  std::memcpy(&two, row + word, 8);
  return static_cast<uint32_t>(two >> (at - 32 * word)) & ((1u << bits) - 1);
}

// The eight numbers of a code, as bytes. Magnitudes are not 0, so that no byte carries into the next when it is negated.
template <int INDICES, bool SIGNS>
inline uint64_t octet(const Weight& w, uint32_t code) {
  const uint32_t mask = (1u << w.index_bits) - 1;
  uint64_t numbers = 0;
  for (int i = 0; i < INDICES; ++i, code >>= w.index_bits) {
    uint64_t part = 0;
    std::memcpy(&part, w.vectors + (code & mask) * (8 / INDICES), 8 / INDICES);
    numbers |= part << (32 * i);
  }
  if constexpr (!SIGNS) return numbers;
  uint64_t negative;
  std::memcpy(&negative, w.signs + (code & ((1u << w.sign_bits) - 1)) * 8, 8);
  return (numbers ^ negative) + (negative & 0x0101010101010101u);
}

template <int INDICES, bool SIGNS>
void decode(const Weight& weight, int64_t nb, int64_t chunk, Panel& to) {
  // A copy: bytes written to the panel might be its own otherwise.
  const Weight w = weight;
  for (int64_t r = 0; r < ROWS; ++r) {
    const int64_t row = std::min(nb * ROWS + r, w.n - 1);
    const uint32_t *codes = w.codes + row * w.words, *scales = w.scales + row * w.scale_words;
    const uint32_t words = static_cast<uint32_t>(w.words), scale_words = static_cast<uint32_t>(w.scale_words), width = w.width, bits = w.scale_bits;
    const uint32_t units = w.group / UNIT, octets = w.group / 8, groups = CHUNK / w.group, mask = w.scale_mask;
    uint32_t at = static_cast<uint32_t>(chunk * OCTETS) * width;
    for (uint32_t g = 0; g < groups; ++g) {
      const uint32_t from = (static_cast<uint32_t>(chunk) * groups + g) * bits;
      // 256 inputs with 8 codes of up to 4 bits have one word of scales.
      const uint32_t code = scale_words > 1 ? field(scales, scale_words, from, bits) : scales[0] >> from & ((1u << bits) - 1);
      const uint64_t four = (2 * (code & mask) + 1) * 0x0001000100010001u;
      for (uint32_t u = 0; u < units; ++u) std::memcpy(to.scale[g * units + u][r], &four, 8);
      const uint32_t high = (code & ~mask) << (width + 1 - bits);
      for (uint32_t o = g * octets; o < (g + 1) * octets; ++o, at += width) {
        const uint64_t numbers = octet<INDICES, SIGNS>(w, field(codes, words, at, width) | high);
        std::memcpy(to.value[o][r], &numbers, 8);
      }
    }
  }
}

using Decode = void (*)(const Weight&, int64_t, int64_t, Panel&);
inline Decode decode_of(const Weight& w) { return w.indices == 2 ? decode<2, true> : w.signs ? decode<1, true> : decode<1, false>; }

// total[r] += chunk: the definition.
inline void chunk(const Panel& panel, const int8_t* q, const float* by, float* total) {
  for (int64_t r = 0; r < ROWS; ++r) {
    int32_t dot = 0;
    for (int64_t i = 0; i < CHUNK; ++i) dot += panel.value[i / 8][r][i % 8] * panel.scale[i / UNIT][r][0] * q[i];
    total[r] += by[r] * static_cast<float>(dot);
  }
}

#if BITSMITH_X86
BITSMITH_256 inline void chunk256(const Panel& panel, const int8_t* q, const float* by, float* total) {
  __m256i dot[4];
  for (auto& one : dot) one = _mm256_setzero_si256();
  for (int64_t u = 0; u < CHUNK / UNIT; ++u) {
    int64_t eight[2];
    std::memcpy(eight, q + u * UNIT, UNIT);
    const __m256i x[2] = {_mm256_set1_epi64x(eight[0]), _mm256_set1_epi64x(eight[1])};
    for (int i = 0; i < 4; ++i) {
      __m256i sum[2];
      for (int half = 0; half < 2; ++half) {
        const __m256i v = avx2::word(reinterpret_cast<const uint8_t*>(panel.value[2 * u + half][4 * i]));
        sum[half] = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x[half], v));
      }
      // At most 62 * 127 * 4.
      const __m256i both = _mm256_add_epi16(sum[0], sum[1]), scale = avx2::word(reinterpret_cast<const uint8_t*>(panel.scale[u][4 * i]));
      dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(both, scale));
    }
  }
  for (int h = 0; h < 2; ++h) {
    const __m256i rows = _mm256_permute4x64_epi64(_mm256_hadd_epi32(dot[2 * h], dot[2 * h + 1]), 0xd8);
    float* to = total + 8 * h;
    _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(rows), _mm256_loadu_ps(by + 8 * h), _mm256_loadu_ps(to)));
  }
}
#endif

using Chunk = void (*)(const Panel&, const int8_t*, const float*, float*);

// 16 outputs, all rows of activations.
inline void rows(const Weight& w, const Input& x, Chunk chunk, int64_t nb, void* y, int32_t dtype) {
  const Decode decode = decode_of(w);
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  Panel panel;
  for (int64_t c = 0; c < w.k / CHUNK; ++c) {
    decode(w, nb, c, panel);
    float super[ROWS], by[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) super[r] = w.unit * half_to_float(w.supers[std::min(nb * ROWS + r, w.n - 1) * (w.k / SUPER) + c * CHUNK / SUPER]);
    for (int64_t m = 0; m < x.m; ++m) {
      for (int64_t r = 0; r < ROWS; ++r) by[r] = super[r] * x.step[m * (w.k / CHUNK) + c];
      chunk(panel, x.q.data() + m * x.stride + c * CHUNK, by, totals.data() + m * ROWS);
    }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

}  // namespace bitsmith::grids
