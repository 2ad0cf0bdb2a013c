// Between the dense bit stream of a row and the blocks of common.h. Loops run over the 16 rows of a block, which is what vectorizes.
#pragma once
#include "layer.h"

namespace bitsmith::pack {

// Words of 16 rows: stream[row * row_stride + word * word_stride].
struct Stream {
  const uint32_t* words;
  int64_t row_stride, word_stride;
};

// Words of eight 4-bit codes -> byte b holds code b and, above it, code b + 4.
BITSMITH_CLONES inline void nibbles(const uint32_t* word, uint32_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < 4 * ROWS; ++i) {
    uint32_t low = word[i] & 0xffffu, high = word[i] >> 16;
    low = (low | low << 8) & 0x00ff00ffu, high = (high | high << 8) & 0x00ff00ffu;
    to[i] = ((low | low << 4) & 0x0f0f0f0fu) | ((high | high << 4) & 0x0f0f0f0fu) << 4;
  }
}

// word[bits + 1][16] -> byte vectors lane[8][16] of four codes each.
BITSMITH_CLONES inline void lanes(const uint32_t (*word)[ROWS], int32_t bits, uint32_t (*lane)[ROWS]) {
  const uint32_t mask = (1u << bits) - 1;
  for (int v = 0; v < 8; ++v) {
    const int first = 4 * v * bits / 32, shift = 4 * v * bits % 32;
    // Shifted in two steps: by 32 at once is undefined.
    const int up = 31 - shift;
#pragma omp simd
    for (int64_t r = 0; r < ROWS; ++r) {
      const uint32_t field = word[first][r] >> shift | (shift ? word[first + 1][r] << 1 << up : 0);
      lane[v][r] = (field & mask) | (field >> bits & mask) << 8 | (field >> (2 * bits) & mask) << 16 | (field >> (3 * bits) & mask) << 24;
    }
  }
}

// The inverse of `lanes`.
BITSMITH_CLONES inline void words(const uint32_t (*lane)[ROWS], int32_t bits, uint32_t (*word)[ROWS]) {
  std::memset(word, 0, static_cast<size_t>(bits + 1) * ROWS * 4);
  for (int v = 0; v < 8; ++v) {
    const int first = 4 * v * bits / 32, shift = 4 * v * bits % 32, up = 31 - shift;
#pragma omp simd
    for (int64_t r = 0; r < ROWS; ++r) {
      const uint32_t x = lane[v][r];
      const uint32_t field = (x & 0xffu) | (x >> 8 & 0xffu) << bits | (x >> 16 & 0xffu) << (2 * bits) | x >> 24 << (3 * bits);
      word[first][r] |= field << shift;
      word[first + 1][r] |= field >> 1 >> up;
    }
  }
}

// Byte vectors -> bit planes.
BITSMITH_CLONES inline void planes(const uint32_t (*lane)[ROWS], int32_t bits, uint32_t* to) {
  int below = 0;
  for (int width = 8; width; width /= 2) {
    if (!(bits & width)) continue;
    const int per = 8 / width;
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    for (int j = 0; j < width; ++j, to += ROWS) {
      std::memset(to, 0, ROWS * 4);
      for (int s = 0; s < per; ++s) {
        const int up = width * s;
#pragma omp simd
        for (int64_t r = 0; r < ROWS; ++r) to[r] |= (lane[j * per + s][r] >> below & mask) << up;
      }
    }
    below += width;
  }
}

// Block kb of 16 rows, of which `count` there are; rows and inputs beyond n and k are zeros.
inline void block(const Stream& from, int64_t kb, int64_t count, int64_t k, int32_t bits, uint8_t* out) {
  const int64_t words = (k * bits + 31) / 32;
  uint32_t* to = reinterpret_cast<uint32_t*>(out);
  uint32_t word[9][ROWS] = {};
  const bool whole = (kb + 1) * BLOCK <= k && count == ROWS;
  const int64_t have = std::min<int64_t>(bits, words - kb * bits);
  const uint32_t* first = from.words + kb * bits * from.word_stride;
  if (from.row_stride == 1) {  // GPTQ's own order
    for (int64_t i = 0; i < have; ++i) std::memcpy(word[i], first + i * from.word_stride, static_cast<size_t>(count) * 4);
  } else {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < have; ++i) word[i][r] = first[r * from.row_stride + i * from.word_stride];
  }
  if (whole && bits == 8) {
    std::memcpy(to, word, 8 * ROWS * 4);
  } else if (whole && bits == 4) {
    nibbles(word[0], to);
  } else {
    uint32_t lane[8][ROWS];
    lanes(word, bits, lane);
    for (int64_t i = k - kb * BLOCK; !whole && i < BLOCK; ++i)
      for (int64_t r = 0; r < ROWS; ++r) lane[i / 4][r] &= ~(0xffu << (8 * (i % 4)));
    planes(lane, bits, to);
  }
}

// Codes first .. first + count - 1 of a row's stream, each of them followed by a word that may be read.
BITSMITH_CLONES inline void fields(const uint32_t* stream, int64_t first, int64_t count, int32_t bits, uint32_t* out) {
  const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * bits, shift = at & 31;
    // Shifted in two steps: by 32 at once is undefined.
    out[i] = (stream[at >> 5] >> shift | stream[(at >> 5) + 1] << 1 << (31 - shift)) & mask;
  }
}

// The codes of a row.
template <class T>
void codes(const uint32_t* stream, int64_t columns, int32_t bits, T* out) {
  constexpr int64_t PIECE = 256;
  // Codes that begin in the last word have none after it.
  const int64_t last = (columns * bits + 31) / 32 - 1, followed = std::min(columns, (last * 32 + bits - 1) / bits);
  uint32_t wide[PIECE];
  for (int64_t first = 0; first < followed; first += PIECE) {
    const int64_t count = std::min(PIECE, followed - first);
    fields(stream, first, count, bits, wide);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<T>(wide[i]);
  }
  const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
  for (int64_t i = followed; i < columns; ++i) out[i] = static_cast<T>(stream[last] >> (i * bits - last * 32) & mask);
}

// Numbers [n, count] -> [row blocks][count][16]; rows beyond n are zeros.
template <class T>
void groups(const T* from, int64_t row_stride, int64_t group_stride, int64_t n, int64_t count, T* out) {
  for (int64_t first = 0; first < n; first += ROWS)
    for (int64_t g = 0; g < count; ++g, out += ROWS) {
      const int64_t have = std::min(ROWS, n - first);
      for (int64_t r = 0; r < have; ++r) out[r] = from[(first + r) * row_stride + g * group_stride];
      std::fill(out + have, out + ROWS, T{0});
    }
}

}  // namespace bitsmith::pack
