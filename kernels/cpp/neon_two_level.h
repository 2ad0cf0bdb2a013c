// two_level.h on ARM. The products of a group (16 or 32 inputs) are summed in 32 bits and meet its integer scale there.
#pragma once
#include "neon.h"
#include "two_level.h"

#if BITSMITH_NEON
namespace bitsmith::two_level::neon {

using namespace bitsmith::neon;

// Integer scales and mins of 16 rows in the groups of a super block, less their offset; float factors of both.
struct Levels {
  int32x4_t scale[16][4], min[16][4];
  float32x4_t d[4], dmin[4];
};

template <int SUB>
BITSMITH_NEON_INLINE uint8x16_t sub_code16(const uint8_t* p, int64_t g) {
  if constexpr (SUB == 8) return vld1q_u8(p + g * ROWS);
  if constexpr (SUB == 4) {
    const uint8x16_t both = vld1q_u8(p + g / 2 * ROWS);
    return g % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
  }
  const uint8_t* quad = p + g / 4 * 3 * ROWS;
  if (g % 4 < 3) return vandq_u8(vld1q_u8(quad + g % 4 * ROWS), vdupq_n_u8(63));
  const uint8x16_t high = vsriq_n_u8(vld1q_u8(quad + 2 * ROWS), vld1q_u8(quad + ROWS), 2);
  return vshrq_n_u8(vsriq_n_u8(high, vld1q_u8(quad), 4), 2);
}

template <int SUB, int GROUP>
BITSMITH_NEON_INLINE void levels(const Weight& w, int64_t at, Levels& out) {
  const auto widened = [](uint8x16_t bytes, int32_t offset, int32x4_t (&to)[4]) __attribute__((always_inline)) {
    const uint16x8_t half[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
    for (int t = 0; t < 4; ++t) {
      const uint32x4_t wide = t % 2 ? vmovl_high_u16(half[t / 2]) : vmovl_u16(vget_low_u16(half[t / 2]));
      to[t] = vsubq_s32(vreinterpretq_s32_u32(wide), vdupq_n_s32(offset));
    }
  };
  for (int64_t g = 0; g < SUPER / GROUP; ++g) {
    widened(sub_code16<SUB>(w.scales + at * w.sub_bytes(), g), w.offset, out.scale[g]);
    if (w.mins) widened(sub_code16<SUB>(w.mins + at * w.sub_bytes(), g), 0, out.min[g]);
  }
  for (int64_t t = 0; t < 4; ++t) {
    out.d[t] = load4(w.supers, at * ROWS + 4 * t, F16);
    if (w.mins) out.dmin[t] = load4(w.super_mins, at * ROWS + 4 * t, F16);
  }
}

// total[16 outputs] += 128 inputs of row m: dot without mins, which are added here.
template <int GROUP>
BITSMITH_NEON_INLINE void add(const Weight& w, const Input& x, int64_t m, int64_t chunk, const int32x4_t (&dot)[4], const Levels& by, float* total) {
  const float step = x.step[m * w.chunks() + chunk * CHUNK / SUPER];
  const int16_t* sums = x.sums.data() + m * (w.k / 16) + chunk * (CHUNK / 16);
  for (int t = 0; t < 4; ++t) {
    float32x4_t value = vmulq_f32(vcvtq_f32_s32(dot[t]), by.d[t]);
    if (w.mins) {
      int32x4_t low = vdupq_n_s32(0);
      for (int64_t i = 0; i < CHUNK / 16; ++i) low = vmlaq_n_s32(low, by.min[(chunk % 2 * (CHUNK / 16) + i) * 16 / GROUP][t], sums[i]);
      value = vfmaq_f32(value, vcvtq_f32_s32(low), by.dmin[t]);
    }
    float* to = total + m * ROWS + 4 * t;
    vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), value, step));
  }
}

// The byte vectors of a block, four of its rows: values of the codes, before the zero point.
template <int BITS, bool TABLE, bool PACKED>
BITSMITH_NEON_INLINE void values4(const Weight& w, const uint8_t* p, int8x16_t (&v)[8]) {
  codes4<BITS, PACKED>(p, v);
  if constexpr (TABLE && PACKED) {
    const int8x16_t table = vld1q_s8(w.table);
    for (auto& one : v) one = vqtbl1q_s8(table, vreinterpretq_u8_s8(one));
  }
}

// What the zero point takes from the products of a group, as where their sum begins.
template <int GROUP>
BITSMITH_NEON_INLINE int32x4_t begin(const Weight& w, const int16_t* sums) {
  return vdupq_n_s32(-w.zero * (GROUP == 16 ? sums[0] : sums[0] + sums[1]));
}

// Both: total[m][16 outputs] += 128 inputs of rows m0 .. m0 + MR - 1. codes: of those inputs, as stored where PACKED, else their values as a
// byte each.
struct Dot {
  template <int BITS, int GROUP, bool TABLE, int MR, bool PACKED>
  BITSMITH_SDOT static void chunk(const Weight& w, const Input& x, const uint8_t* codes, const Levels& by, int64_t chunk, int64_t m0, float* total) {
    constexpr int PARTS = 32 / GROUP;
    int32x4_t dot[MR][4];
    for (int m = 0; m < MR; ++m)
      for (int t = 0; t < 4; ++t) dot[m][t] = vdupq_n_s32(0);
    for (int64_t b = 0; b < CHUNK / BLOCK; ++b, codes += 64 * (PACKED ? BITS : 8)) {
      const int64_t at = chunk * CHUNK + b * BLOCK, group = (chunk % 2 * CHUNK + b * BLOCK) / GROUP;
      int8x16_t in[MR][2];
      int32x4_t from[MR][PARTS];
      for (int m = 0; m < MR; ++m) {
        for (int h = 0; h < 2; ++h) in[m][h] = vld1q_s8(x.q.data() + (m0 + m) * x.stride + at + 16 * h);
        for (int i = 0; i < PARTS; ++i) from[m][i] = begin<GROUP>(w, x.sums.data() + (m0 + m) * (w.k / 16) + at / 16 + i);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        int8x16_t v[8];
        values4<BITS, TABLE, PACKED>(w, codes + 16 * t, v);
        for (int m = 0; m < MR; ++m) {
          int32x4_t sum = from[m][0];
          for (int h = 0; h < 2; ++h) {
            sum = vdotq_laneq_s32(sum, v[4 * h], in[m][h], 0);
            sum = vdotq_laneq_s32(sum, v[4 * h + 1], in[m][h], 1);
            sum = vdotq_laneq_s32(sum, v[4 * h + 2], in[m][h], 2);
            sum = vdotq_laneq_s32(sum, v[4 * h + 3], in[m][h], 3);
            if (GROUP == 32 && h == 0) continue;
            dot[m][t] = vmlaq_s32(dot[m][t], sum, by.scale[group + h * (PARTS - 1)][t]);
            sum = from[m][PARTS - 1];
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) add<GROUP>(w, x, m0 + m, chunk, dot[m], by, total);
  }
};

struct Widen {
  template <int BITS, int GROUP, bool TABLE, int MR, bool PACKED>
  static void chunk(const Weight& w, const Input& x, const uint8_t* codes, const Levels& by, int64_t chunk, int64_t m0, float* total) {
    constexpr int PER = GROUP / 4, RUN = std::min(bitsmith::neon::Widen::run(TABLE ? 8 : BITS), PER);
    int32x4_t dot[MR][4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      for (int m = 0; m < MR; ++m) dot[m][t] = vdupq_n_s32(0);
      for (int64_t b = 0; b < CHUNK / BLOCK; ++b) {
        const int64_t at = chunk * CHUNK + b * BLOCK, group = (chunk % 2 * CHUNK + b * BLOCK) / GROUP;
        int8x16_t v[8];
        values4<BITS, TABLE, PACKED>(w, codes + b * 64 * (PACKED ? BITS : 8) + 16 * t, v);
        for (int m = 0; m < MR; ++m) {
          const int8_t* q = x.q.data() + (m0 + m) * x.stride + at;
          int32x4_t wide[2];
          int16x8_t sum[2];
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j) {
            if (j % PER == 0) wide[0] = wide[1] = vdupq_n_s32(0);
            if (j % RUN == 0) sum[0] = sum[1] = vdupq_n_s16(0);
            int32_t four;
            std::memcpy(&four, q + 4 * j, 4);
            const int8x16_t in = vreinterpretq_s8_s32(vdupq_n_s32(four));
            sum[0] = vmlal_s8(sum[0], vget_low_s8(v[j]), vget_low_s8(in));
            sum[1] = vmlal_high_s8(sum[1], v[j], in);
            if ((j + 1) % RUN == 0)
              for (int h = 0; h < 2; ++h) wide[h] = vpadalq_s16(wide[h], sum[h]);
            if ((j + 1) % PER == 0) {
              const int32x4_t from = begin<GROUP>(w, x.sums.data() + (m0 + m) * (w.k / 16) + at / 16 + j / PER);
              dot[m][t] = vmlaq_s32(dot[m][t], vaddq_s32(from, vpaddq_s32(wide[0], wide[1])), by.scale[group + j / PER][t]);
            }
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) add<GROUP>(w, x, m0 + m, chunk, dot[m], by, total);
  }
};

template <class By, int BITS, int GROUP, int SUB, bool TABLE>
void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  float* total = totals.data();
  uint8_t codes[SUPER * ROWS];
  Levels by;
  for (int64_t s = 0; s < w.super_blocks(); ++s) {
    const int64_t at = nb * w.super_blocks() + s;
    const uint8_t* packed = w.codes + at * 8 * 64 * BITS;
    for (int64_t b = 0; b < (x.m > 1 ? 8 : 0); ++b)
      for (int t = 0; t < 4; ++t) {
        int8x16_t v[8];
        values4<BITS, TABLE, true>(w, packed + b * 64 * BITS + 16 * t, v);
        for (int j = 0; j < 8; ++j) vst1q_u8(codes + 512 * b + 64 * j + 16 * t, vreinterpretq_u8_s8(v[j]));
      }
    levels<SUB, GROUP>(w, at, by);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t chunk = 2 * s + half;
      if (x.m == 1) {
        By::template chunk<BITS, GROUP, TABLE, 1, true>(w, x, packed + half * 4 * 64 * BITS, by, chunk, 0, total);
        continue;
      }
      const uint8_t* c = codes + half * CHUNK * ROWS;
      int64_t m = 0;
      for (; m + 4 <= x.m; m += 4) By::template chunk<BITS, GROUP, TABLE, 4, false>(w, x, c, by, chunk, m, total);
      for (; m + 2 <= x.m; m += 2) By::template chunk<BITS, GROUP, TABLE, 2, false>(w, x, c, by, chunk, m, total);
      if (m < x.m) By::template chunk<BITS, GROUP, TABLE, 1, false>(w, x, c, by, chunk, m, total);
    }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, total[m * ROWS + r]);
}

// One row of activations: what `two_level::prepare` does.
inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t at = row * w.k + c * SUPER;
    const float peak = largest(x, at, SUPER, dtype, SUPER), inverse = peak > 0 ? 127 / peak : 0;
    in.step[row * w.chunks() + c] = peak / 127;
    for (int64_t i = 0; i < SUPER; i += 16) {
      const int8x16_t bytes = rounded16(x, at + i, dtype, SUPER, inverse);
      vst1q_s8(in.q.data() + row * in.stride + c * SUPER + i, bytes);
      in.sums[row * (w.k / 16) + (c * SUPER + i) / 16] = vaddlvq_s8(bytes);
    }
  }
}

template <class By>
Rows rows_of(const Weight& w) {
  const int32_t kind = w.bits * 1000 + w.group * 10 + w.sub_bits;
  if (w.table) return kind == 4326 ? rows<By, 4, 32, 6, true> : nullptr;
  switch (kind) {
    case 2164: return rows<By, 2, 16, 4, false>;
    case 3166: return rows<By, 3, 16, 6, false>;
    case 4326: return rows<By, 4, 32, 6, false>;
    case 5326: return rows<By, 5, 32, 6, false>;
    case 6168: return rows<By, 6, 16, 8, false>;
    default: return nullptr;
  }
}

}  // namespace bitsmith::two_level::neon
#endif
