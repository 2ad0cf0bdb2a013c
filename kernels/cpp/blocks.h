// From the blocks of a file, where codes and scales lie side by side, to the layouts of common.h and two_level.h. Python says what fields a
// block has (kernels/blocks.py); no format is known here. Loops run over the 16 rows of a row block, as in pack.h.
#pragma once
#include "pack.h"
#include "two_level.h"

namespace bitsmith::blocks {

enum Kind : int32_t { HALF = 0, PLANE = 1, NIBBLES = 2, SIXES = 3 };
enum Part : int32_t { CODES = 0, SCALES = 1, MINS = 2, SUPERS = 3, SUPER_MINS = 4 };

// Mirrored by kernels/blocks.py, as is Source.
//   HALF     16 bits of a part, exclusive-or `flip`
//   PLANE    `bits` bits of each of 8 / bits * size codes: field f of byte i of a run of `run` bytes is code f * run + i; exclusive-or
//            `flip`, then shifted left by `place`
//   NIBBLES  scale codes in the low halves of the bytes, those of mins in the high ones
//   SIXES    12 bytes: eight scale codes and eight of mins, of 6 bits; the last four of each have their upper two bits above the first four
struct Field {
  int32_t kind, part, at, size, bits, run, place, flip;
};

struct Source {
  const uint8_t* const* rows;   // [n], each `blocks` blocks of `size` bytes
  const Field* fields;
  uint8_t* parts[5];            // by Part: codes of common.h; halves and bytes [row blocks][groups][16], scale codes of two_level.h
  int64_t n, blocks;
  int32_t count;                // of fields
  int32_t width, size;          // weights and bytes of a block
  int32_t bits, scale_bits;     // of a code, of the code of a scale
  int32_t groups;               // of a block, whose scales are codes

  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
};

// Four codes of each row a lane. A block has at most 256 codes and 16 scales.
struct Lanes {
  uint32_t codes[64][ROWS], scales[4][ROWS], mins[4][ROWS];
};

constexpr uint32_t EACH = 0x01010101u;

// Words of the field of 16 rows; bytes beyond it are zeros.
inline void gather(const uint8_t* const* row, int32_t size, uint32_t (*word)[ROWS]) {
  const int32_t whole = size / 4, rest = size % 4;
  for (int64_t r = 0; r < ROWS; ++r) {
    for (int32_t i = 0; i < whole; ++i) std::memcpy(&word[i][r], row[r] + 4 * i, 4);
    if (rest) {
      word[whole][r] = 0;
      std::memcpy(&word[whole][r], row[r] + 4 * whole, static_cast<size_t>(rest));
    }
  }
}

// Codes of neighbours lie in neighbouring bits.
inline void stream(const uint32_t (*word)[ROWS], const Field& f, uint32_t (*to)[ROWS]) {
  const int32_t b = f.bits, lanes = (f.size * 2 + b - 1) / b, per = 8 / b;
  const uint32_t mask = (1u << b) - 1, flip = static_cast<uint32_t>(f.flip) * EACH;
  for (int32_t v = 0; v < lanes; ++v) {
    const int32_t down = v % per * 4 * b;
#pragma omp simd
    for (int64_t r = 0; r < ROWS; ++r) {
      const uint32_t x = word[v / per][r] >> down;
      const uint32_t found = (x & mask) | (x >> b & mask) << 8 | (x >> (2 * b) & mask) << 16 | (x >> (3 * b) & mask) << 24;
      to[v][r] |= (found ^ flip) << f.place;
    }
  }
}

// Codes of neighbours lie in neighbouring bytes.
inline void runs(const uint32_t (*word)[ROWS], const Field& f, uint32_t (*to)[ROWS]) {
  const int32_t run = f.run / 4;
  const uint32_t mask = ((1u << f.bits) - 1) * EACH, flip = static_cast<uint32_t>(f.flip) * EACH;
  for (int32_t first = 0; first < f.size / 4; first += run)
    for (int32_t down = 0; down < 8; down += f.bits, to += run)
      for (int32_t i = 0; i < run; ++i) {
#pragma omp simd
        for (int64_t r = 0; r < ROWS; ++r) to[i][r] |= ((word[first + i][r] >> down & mask) ^ flip) << f.place;
      }
}

inline void nibbles(const uint32_t (*word)[ROWS], int32_t words, Lanes& to) {
  for (int32_t i = 0; i < words; ++i) {
#pragma omp simd
    for (int64_t r = 0; r < ROWS; ++r) to.scales[i][r] = word[i][r] & 15 * EACH, to.mins[i][r] = word[i][r] >> 4 & 15 * EACH;
  }
}

inline void sixes(const uint32_t (*word)[ROWS], Lanes& to) {
#pragma omp simd
  for (int64_t r = 0; r < ROWS; ++r) {
    const uint32_t scale = word[0][r], min = word[1][r], last = word[2][r];
    to.scales[0][r] = scale & 63 * EACH, to.scales[1][r] = (last & 15 * EACH) | (scale >> 6 & 3 * EACH) << 4;
    to.mins[0][r] = min & 63 * EACH, to.mins[1][r] = (last >> 4 & 15 * EACH) | (min >> 6 & 3 * EACH) << 4;
  }
}

// Lanes of scale codes -> their bytes in two_level.h.
inline void put_levels(const uint32_t (*lane)[ROWS], int32_t bits, int32_t groups, uint8_t* out) {
  uint8_t codes[16][ROWS];
  for (int32_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < ROWS; ++r) codes[g][r] = static_cast<uint8_t>(lane[g / 4][r] >> (8 * (g % 4)));
  two_level::pack_sub_codes(codes, bits, groups, out);
}

inline void halves(const uint8_t* const* row, int32_t flip, int64_t count, uint8_t* out) {
  uint16_t half[ROWS] = {};
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(half + r, row[r], 2);
    half[r] ^= static_cast<uint16_t>(flip);
  }
  std::memcpy(out, half, sizeof half);
}

// Rows 16 nb .. of all parts; those beyond n are zeros.
BITSMITH_CLONES inline void row_block(const Source& from, int64_t nb) {
  const int64_t count = std::min(ROWS, from.n - nb * ROWS);
  static thread_local std::vector<uint8_t> near;
  const int64_t length = from.blocks * from.size;
  if (static_cast<int64_t>(near.size()) < ROWS * length) near.resize(static_cast<size_t>(ROWS * length));
  for (int64_t r = 0; r < count; ++r) std::memcpy(near.data() + r * length, from.rows[nb * ROWS + r], static_cast<size_t>(length));
  for (int64_t b = 0; b < from.blocks; ++b) {
    const int64_t at = nb * from.blocks + b;
    Lanes lanes{};
    for (int32_t i = 0; i < from.count; ++i) {
      const Field& f = from.fields[i];
      const uint8_t* row[ROWS];
      // A row that is missing is read as the last one, and cleared below.
      for (int64_t r = 0; r < ROWS; ++r) row[r] = near.data() + std::min(r, count - 1) * length + b * from.size + f.at;
      if (f.kind == HALF) {
        halves(row, f.flip, count, from.parts[f.part] + at * 2 * ROWS);
        continue;
      }
      uint32_t word[32][ROWS];
      gather(row, f.size, word);
      uint32_t(*to)[ROWS] = f.part == CODES ? lanes.codes : lanes.scales;
      if (f.kind == NIBBLES) nibbles(word, f.size / 4, lanes);
      else if (f.kind == SIXES) sixes(word, lanes);
      else if (f.run == 1) stream(word, f, to);
      else runs(word, f, to);
    }
    for (int64_t r = count; r < ROWS; ++r) {
      for (auto& lane : lanes.codes) lane[r] = 0;
      for (auto& lane : lanes.scales) lane[r] = 0;
      for (auto& lane : lanes.mins) lane[r] = 0;
    }
    for (int32_t k = 0; k < from.width / BLOCK; ++k)
      pack::planes(lanes.codes + 8 * k, from.bits, reinterpret_cast<uint32_t*>(from.parts[CODES] + (at * from.width / BLOCK + k) * 64 * from.bits));
    const int64_t level = at * from.groups * ROWS * from.scale_bits / 8;
    if (from.scale_bits) put_levels(lanes.scales, from.scale_bits, from.groups, from.parts[SCALES] + level);
    if (from.scale_bits && from.parts[MINS]) put_levels(lanes.mins, from.scale_bits, from.groups, from.parts[MINS] + level);
  }
}

}  // namespace bitsmith::blocks
