// Weights whose codes are indices and signs of vectors of 8 small integers (GGUF's IQ1, IQ2 and IQ3; kernels/grids.py), with int8
// activations. Nothing is packed anew: codes and scales are read from the bit streams of the QTensor. A super block of 16 outputs becomes
// bytes in the order of common.h, whose products are those of two_level.h.
#pragma once
#include <array>

#include "two_level.h"

namespace bitsmith::grids {

using two_level::Input;
using two_level::SUPER;
// What makes bytes without a sign of numbers.
constexpr int32_t BIAS = 128;

// Mirrored by kernels/native_grids.py; only pointers, int64, float and int32 in this order.
struct Weight {
  const uint32_t* codes;     // [n][words], `width` bits for 8 inputs: indices, then signs
  const uint32_t* scales;    // [n][scale_words], 3 or 4 bits a group: 2 * code + 1 is the scale; of iq1s three bits are, and the one above
                             // them is the highest of the indices of the group's vectors
  const uint16_t* supers;    // float16 [n][k / 256]
  const int8_t* vectors;     // [2^index_bits][8 / indices], none of them 0
  const uint8_t* signs;      // [2^sign_bits][8], 0 or 255; or null
  const uint8_t* places;     // of grids512.h: [2][2^index_bits], for the numbers of a half of a vector, lowest bits first, their places in `levels`
  const uint8_t* levels;     // of grids512.h: [64] numbers plus 128, without the shift
  int64_t n, k;              // k a multiple of 256
  int64_t words, scale_words;
  float unit;                // of the scale
  int32_t width, group;
};

// Tables made when compiling: f(i) for each byte.
template <int SIZE, class F>
constexpr std::array<uint8_t, SIZE> bytes_of(F f) {
  std::array<uint8_t, SIZE> out{};
  for (int i = 0; i < SIZE; ++i) out[static_cast<size_t>(i)] = static_cast<uint8_t>(f(i));
  return out;
}

// What is known of a grid's codes when compiling: GridCode of kernels/spec.py.
template <int INDEX_BITS_, int INDICES_, int SIGNS_, int GROUP_, int SCALE_BITS_, bool GROUP_SHIFT_ = false>
struct Form {
  static constexpr int INDEX_BITS = INDEX_BITS_, INDICES = INDICES_, SIGNS = SIGNS_, GROUP = GROUP_, SCALE_BITS = SCALE_BITS_;
  static constexpr bool GROUP_SHIFT = GROUP_SHIFT_, SHIFT = SIGNS == 0;
  // Where signs, or the shift, begin; bits of a code.
  static constexpr int PLACE = INDEX_BITS * INDICES, WIDTH = PLACE + (SHIFT && !GROUP_SHIFT ? 1 : SIGNS);
  // Of the code of a scale.
  static constexpr uint32_t MASK = (1u << (SCALE_BITS - GROUP_SHIFT)) - 1;
  static constexpr int64_t GROUPS = SUPER / GROUP;
};

// f(Form) of the weight's form.
template <class F>
auto with_form(const Weight& w, const F& f) {
  switch (w.width) {
    case 11: return f(Form<11, 1, 0, 32, 4, true>{});
    case 12: return f(Form<11, 1, 0, 16, 3>{});
    case 15: return f(Form<8, 1, 7, 32, 4>{});
    case 16: return f(Form<9, 1, 7, 16, 4>{});
    case 18: return f(Form<10, 1, 8, 16, 4>{});
    case 23: return f(Form<8, 2, 7, 32, 4>{});
    default: return f(Form<9, 2, 8, 32, 4>{});
  }
}

// Where row r of block nb has its codes and its scales of super block s, which are whole bytes; beyond n the last row.
struct Row {
  const uint8_t *codes, *scales;
};

template <class F>
inline Row row_at(const Weight& w, int64_t nb, int64_t r, int64_t s) {
  const int64_t at = std::min(nb * ROWS + r, w.n - 1);
  return {reinterpret_cast<const uint8_t*>(w.codes + at * w.words) + s * 4 * F::WIDTH,
          reinterpret_cast<const uint8_t*>(w.scales + at * w.scale_words) + s * F::GROUPS / 8 * F::SCALE_BITS};
}

// Asks for the same of the next block of 16 rows: more streams than the hardware follows (AVX-512, one row, weights of 8 matrices in turn, 4096 x 4096:
// IQ3_S 0.97 -> 0.70 ms, IQ2_XS 0.72 -> 0.57).
template <class F>
inline __attribute__((always_inline)) void ahead(const Weight& w, const Row& row) {
  for (int64_t i = 0; i < 4 * F::WIDTH; i += 64) __builtin_prefetch(row.codes + ROWS * 4 * w.words + i, 0, 2);
  __builtin_prefetch(row.scales + ROWS * 4 * w.scale_words, 0, 2);
}

// Eight codes of scales.
template <class F>
inline uint32_t eight_scales(const uint8_t* p) {
  uint32_t found = 0;
  for (int i = 0; i < F::SCALE_BITS; ++i) found |= static_cast<uint32_t>(p[i]) << (8 * i);
  return found;
}

inline float super_of(const Weight& w, int64_t nb, int64_t r, int64_t s) {
  return w.unit * half_to_float(w.supers[std::min(nb * ROWS + r, w.n - 1) * (w.k / SUPER) + s]);
}

// The eight numbers of a code, as bytes. Magnitudes are not 0, so that no byte carries into the next when it is negated.
template <class F>
inline uint64_t octet(const int8_t* vectors, const uint8_t* signs, uint32_t code) {
  constexpr uint32_t MASK = (1u << (F::INDEX_BITS + F::SHIFT)) - 1;
  constexpr int EACH = 8 / F::INDICES;
  uint64_t numbers = 0;
  for (int i = 0; i < F::INDICES; ++i) {
    uint64_t part = 0;
    std::memcpy(&part, vectors + (code >> (i * F::INDEX_BITS) & MASK) * EACH, EACH);
    numbers |= part << (32 * i);
  }
  if constexpr (F::SHIFT) return numbers;
  uint64_t negative;
  std::memcpy(&negative, signs + (code >> F::PLACE & ((1u << F::SIGNS) - 1)) * 8, 8);
  return (numbers ^ negative) + (negative & 0x0101010101010101u);
}

// Super block s of 16 outputs: the numbers of each row, the scales of its groups.
template <class F>
void decode(const Weight& w, int64_t nb, int64_t s, int8_t (*to)[SUPER], uint8_t (*scale)[ROWS]) {
  constexpr int32_t WIDTH = F::WIDTH, EIGHTH = F::GROUP / 8;
  // Copies: bytes written might be theirs otherwise.
  const int8_t* vectors = w.vectors;
  const uint8_t* signs = w.signs;
  for (int64_t r = 0; r < ROWS; ++r) {
    Row row = row_at<F>(w, nb, r, s);
    uint32_t high[F::GROUPS];
    for (int64_t g = 0; g < F::GROUPS; ++g) {
      const uint32_t code = eight_scales<F>(row.scales + g / 8 * F::SCALE_BITS) >> (g % 8 * F::SCALE_BITS) & ((1u << F::SCALE_BITS) - 1);
      scale[g][r] = static_cast<uint8_t>(2 * (code & F::MASK) + 1);
      high[g] = F::GROUP_SHIFT ? (code & ~F::MASK) << (F::INDEX_BITS + 1 - F::SCALE_BITS) : 0;
    }
    for (int64_t half = 0; half < 2; ++half, row.codes += 2 * WIDTH)
#pragma GCC unroll 16
      for (int32_t o = 0; o < 16; ++o) {
        // Four bytes that hold the code, the last four at the end.
        const int32_t at = std::min(o * WIDTH / 8, 2 * WIDTH - 4);
        uint32_t code;
        std::memcpy(&code, row.codes + at, 4);
        code >>= o * WIDTH - 8 * at;
        if constexpr (F::GROUP_SHIFT) code = (code & ((1u << WIDTH) - 1)) | high[(half * 16 + o) / EIGHTH];
        const uint64_t numbers = octet<F>(vectors, signs, code);
        std::memcpy(to[r] + (half * 16 + o) * 8, &numbers, 8);
      }
  }
}

// The definition: 16 outputs, all rows of activations.
inline void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  std::vector<float> totals(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    int8_t number[ROWS][SUPER];
    uint8_t scale[16][ROWS];
    with_form(w, [&](auto form) { decode<decltype(form)>(w, nb, s, number, scale); });
    for (int64_t m = 0; m < x.m; ++m)
      for (int64_t r = 0; r < ROWS; ++r) {
        int32_t dot = 0;
        for (int64_t i = 0; i < SUPER; ++i) dot += number[r][i] * scale[i / w.group][r] * x.q[m * x.stride + s * SUPER + i];
        totals[m * ROWS + r] += super_of(w, nb, r, s) * x.step[m * (w.k / SUPER) + s] * static_cast<float>(dot);
      }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

// as: the weight as two_level.h sees it, its codes numbers.
using Rows = void (*)(const Weight&, const two_level::Weight& as, const Input&, int64_t nb, void* y, int32_t dtype);

}  // namespace bitsmith::grids
