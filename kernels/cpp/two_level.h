// Weights whose scales are small integers times one float for 256 inputs (GGUF's K-quants and IQ4_XS), with int8 activations. The integer
// sums of groups meet their scales, activations' steps once for 128 or 256 inputs. Beside them, with AVX2 and AVX-512: 4-bit codes of a table whose
// groups have a float each (NVFP4, MXFP4; with AVX2 IQ4_NL), which meets their integer sum.
#pragma once
#include "generic.h"

namespace bitsmith::two_level {

constexpr int64_t SUPER = 256, CHUNK = 128;

// Mirrored by kernels/native_two_level.py; only pointers, int64 and int32 in this order.
struct Weight {
  const uint8_t* codes;      // as common.h
  const uint8_t* scales;     // [row blocks][super blocks][bytes of 16 rows], see `sub_codes`
  const uint8_t* mins;       // like scales, unsigned; or null
  const uint16_t* supers;    // float16 [row blocks][super blocks][16]; or null: scales are [row blocks][k / group][16] of scale_dtype
  const uint16_t* super_mins;
  const int8_t* table;       // [16] values of the codes, or null: the code is the number
  int64_t n, k;              // k a multiple of 256, without supers of 32
  int32_t bits, group;       // group 16 or 32
  int32_t sub_bits;          // 4, 6 or 8
  int32_t offset;            // subtracted from a scale's code
  int32_t zero;              // subtracted from a weight's code
  int32_t scale_dtype;       // E4M3_BYTE (groups of 16), E8M0 or F16 (32)
  float factor;              // of all scales without supers

  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
  int64_t super_blocks() const { return (k + SUPER - 1) / SUPER; }
  // Inputs of a row that are rounded together: a super block, as llama.cpp has it, and with float scales half of one.
  int64_t chunk() const { return supers ? SUPER : CHUNK; }
  int64_t chunks() const { return supers ? super_blocks() : (k + CHUNK - 1) / CHUNK; }
  // Dividing by a group's size takes longer than what is done with a group.
  int64_t shift() const { return group == 32 ? 5 : 4; }
  int64_t groups() const { return SUPER >> shift(); }
  int64_t sub_bytes() const { return groups() * ROWS * sub_bits / 8; }
};

// Activations: int8 [m][stride], a step for a chunk, sums of 16 codes.
struct Input {
  int64_t m, stride;
  std::vector<int8_t> q;
  std::vector<uint8_t> records;  // of two_level256.h
  std::vector<float> step;     // [m][chunks]
  std::vector<int16_t> sums;   // [m][k / 16]
  std::vector<int16_t> group_sums;  // of two_level256.h: [m][k / group]
  std::vector<int32_t> start;       // of two_level512.h: [m][k / group], what a group's sum begins with
};

inline void shape(const Weight& w, int64_t m, Input& x) {
  x.m = m;
  x.stride = w.k + 64;
  const auto grow = [](auto& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(static_cast<size_t>(size));
  };
  grow(x.q, (m + TILE - 1) / TILE * TILE * x.stride);
  grow(x.step, m * w.chunks());
  grow(x.sums, m * (w.k / 16));
  grow(x.group_sums, m * (w.k / 16));
  grow(x.start, m * (w.k / 16));
}

// Codes of the scales of 16 rows in every group of a super block, out[group][row]. 8 bits: a byte each. 4 bits: groups 2 g and 2 g + 1 in
// the halves of a byte. 6 bits: four groups in three bytes, the fourth in the upper two bits of each.
inline void sub_codes(const uint8_t* p, int32_t bits, int64_t groups, uint8_t (*out)[ROWS]) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < ROWS; ++r) {
      if (bits == 8) out[g][r] = p[g * ROWS + r];
      else if (bits == 4) out[g][r] = p[g / 2 * ROWS + r] >> (4 * (g % 2)) & 15;
      else {
        const uint8_t* quad = p + g / 4 * 3 * ROWS + r;
        out[g][r] = g % 4 < 3 ? quad[g % 4 * ROWS] & 63 : static_cast<uint8_t>(quad[0] >> 6 | quad[ROWS] >> 6 << 2 | quad[2 * ROWS] >> 6 << 4);
      }
    }
}

// The inverse of `sub_codes`.
inline void pack_sub_codes(const uint8_t (*codes)[ROWS], int32_t bits, int64_t groups, uint8_t* p) {
  std::memset(p, 0, static_cast<size_t>(groups * ROWS * bits / 8));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < ROWS; ++r) {
      const uint8_t c = codes[g][r];
      if (bits == 8) p[g * ROWS + r] = c;
      else if (bits == 4) p[g / 2 * ROWS + r] |= static_cast<uint8_t>(c << (4 * (g % 2)));
      else {
        uint8_t* quad = p + g / 4 * 3 * ROWS + r;
        if (g % 4 < 3) quad[g % 4 * ROWS] |= c;
        else
          for (int i = 0; i < 3; ++i) quad[i * ROWS] |= static_cast<uint8_t>((c >> (2 * i) & 3) << 6);
      }
    }
}

inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  const int64_t chunk = w.chunk();
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t at = row * w.k + c * chunk, count = std::min(chunk, w.k - c * chunk);
    float peak = 0;
    for (int64_t i = 0; i < count; ++i) peak = std::max(peak, std::fabs(load(x, at + i, dtype)));
    const float inverse = peak > 0 ? 127 / peak : 0;
    in.step[row * w.chunks() + c] = peak / 127;
    for (int64_t i = 0; i < count; i += 16) {
      int32_t sum = 0;
      for (int64_t j = i; j < i + 16; ++j) {
        const int32_t q = static_cast<int32_t>(std::nearbyint(load(x, at + j, dtype) * inverse));
        in.q[row * in.stride + c * chunk + j] = static_cast<int8_t>(q);
        sum += q;
      }
      in.sums[row * (w.k / 16) + (c * chunk + i) / 16] = static_cast<int16_t>(sum);
    }
  }
}

// The definition where scales are floats: 16 outputs, all rows of activations.
inline void float_rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  std::vector<float> totals(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t k = 0; k < w.k; k += w.group) {
    uint8_t codes[BLOCK * ROWS];
    generic::unpack(w.codes + (nb * w.k + k) / BLOCK * 64 * w.bits, w.bits, codes);
    for (int64_t r = 0; r < ROWS; ++r) {
      const float scale = w.factor * load(w.scales, (nb * w.k + k) / w.group * ROWS + r, w.scale_dtype);
      for (int64_t m = 0; m < x.m; ++m) {
        int32_t dot = 0;
        for (int64_t i = k; i < k + w.group; ++i) dot += w.table[codes[64 * (i % BLOCK / 4) + 4 * r + i % 4]] * x.q[m * x.stride + i];
        totals[m * ROWS + r] += x.step[m * w.chunks() + k / CHUNK] * scale * static_cast<float>(dot);
      }
    }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

// The definition: 16 outputs, all rows of activations.
inline void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  if (!w.supers) return float_rows(w, x, nb, y, dtype);
  const int64_t supers = w.super_blocks(), groups = w.groups();
  std::vector<float> totals(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t s = 0; s < supers; ++s) {
    uint8_t codes[8][512], scale[16][ROWS], min[16][ROWS] = {};
    for (int64_t b = 0; b < 8; ++b) generic::unpack(w.codes + ((nb * supers + s) * 8 + b) * 64 * w.bits, w.bits, codes[b]);
    sub_codes(w.scales + (nb * supers + s) * w.sub_bytes(), w.sub_bits, groups, scale);
    if (w.mins) sub_codes(w.mins + (nb * supers + s) * w.sub_bytes(), w.sub_bits, groups, min);
    for (int64_t m = 0; m < x.m; ++m)
      for (int64_t r = 0; r < ROWS; ++r) {
        int32_t dot = 0, low = 0;
        for (int64_t i = 0; i < SUPER; ++i) {
          const uint8_t code = codes[i / 32][64 * (i % 32 / 4) + 4 * r + i % 4];
          const int32_t value = (w.table ? w.table[code] : code) - w.zero, by = scale[i / w.group][r] - w.offset;
          const int32_t q = x.q[m * x.stride + s * SUPER + i];
          dot += value * by * q;
          low += min[i / w.group][r] * q;
        }
        const int64_t at = (nb * supers + s) * ROWS + r;
        const float offset = w.mins ? half_to_float(w.super_mins[at]) * static_cast<float>(low) : 0.0f;
        totals[m * ROWS + r] += x.step[m * supers + s] * (half_to_float(w.supers[at]) * static_cast<float>(dot) + offset);
      }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

// Null for a combination that no format has.
using Rows = void (*)(const Weight&, const Input&, int64_t nb, void* y, int32_t dtype);

}  // namespace bitsmith::two_level
