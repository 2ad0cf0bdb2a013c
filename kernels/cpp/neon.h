// ARM: int8 activations by `sdot` where the processor has it (FEAT_DotProd), else by multiplications that widen to 16 bits. Codes of 8 bits
// are taken less 128, so that all are signed; the zero point gives it back.
#pragma once
#include "common.h"

#if defined(__aarch64__) && defined(__GNUC__)
#define BITSMITH_NEON 1
#include <arm_neon.h>

#include <utility>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define BITSMITH_SDOT
#else
#define BITSMITH_SDOT __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define BITSMITH_NEON_INLINE inline __attribute__((always_inline))

namespace bitsmith::neon {

inline bool has_sdot() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}

// Byte vector V of four rows, p at the first of them in a plane of WIDTH bits; those bits lie at BELOW in the result.
template <int WIDTH, int BELOW, int V>
BITSMITH_NEON_INLINE uint8x16_t plane(const uint8_t* p) {
  constexpr int PER = 8 / WIDTH, AT = V % PER * WIDTH, SHIFT = AT - BELOW;
  uint8x16_t found = vld1q_u8(p + V / PER * 64);
  if constexpr (SHIFT > 0) found = vshrq_n_u8(found, SHIFT);
  if constexpr (SHIFT < 0) found = vshlq_n_u8(found, -SHIFT);
  if constexpr (BELOW > 0 || AT + WIDTH < 8) found = vandq_u8(found, vdupq_n_u8(((1 << WIDTH) - 1) << BELOW));
  return found;
}

template <int BITS, int V>
BITSMITH_NEON_INLINE int8x16_t code(const uint8_t* p) {
  if constexpr (BITS == 8) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + V * 64), vdupq_n_u8(0x80)));
  } else {
    uint8x16_t found = vdupq_n_u8(0);
    if constexpr (BITS & 4) found = plane<4, 0, V>(p);
    if constexpr (BITS & 2) found = vorrq_u8(found, plane<2, BITS & 4, V>(p + (BITS & 4) * 64));
    if constexpr (BITS & 1) found = vorrq_u8(found, plane<1, BITS & 6, V>(p + (BITS & 6) * 64));
    return vreinterpretq_s8_u8(found);
  }
}

// The byte vectors of a block, four of its rows, p at the first of them. PACKED: as stored; otherwise as `unpack` leaves them.
template <int BITS, bool PACKED>
BITSMITH_NEON_INLINE void codes4(const uint8_t* p, int8x16_t (&v)[8]) {
  if constexpr (PACKED) {
    [&]<int... V>(std::integer_sequence<int, V...>) __attribute__((always_inline)) { ((v[V] = code<BITS, V>(p)), ...); }
    (std::make_integer_sequence<int, 8>{});
  } else {
    for (int j = 0; j < 8; ++j) v[j] = vreinterpretq_s8_u8(vld1q_u8(p + j * 64));
  }
}

template <int BITS>
BITSMITH_NEON_INLINE void unpack(const uint8_t* p, uint8_t* out) {
  for (int t = 0; t < 4; ++t) {
    int8x16_t v[8];
    codes4<BITS, true>(p + 16 * t, v);
    for (int j = 0; j < 8; ++j) vst1q_u8(out + 64 * j + 16 * t, vreinterpretq_u8_s8(v[j]));
  }
}

BITSMITH_NEON_INLINE float32x4_t load4(const void* p, int64_t i, int32_t dtype) {
  switch (dtype) {
    case F32: return vld1q_f32(static_cast<const float*>(p) + i);
    case BF16: return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(static_cast<const uint16_t*>(p) + i), 16));
    case F16: return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(p) + i)));
    default: {
      const float some[4] = {load(p, i, dtype), load(p, i + 1, dtype), load(p, i + 2, dtype), load(p, i + 3, dtype)};
      return vld1q_f32(some);
    }
  }
}

// Scales and zero points of rows 4 t .. 4 t + 3 in one group; what is less than a code by `below` is what meets them.
struct Scales {
  float32x4_t scale[4], zero[4];
};

BITSMITH_NEON_INLINE void scales16(const Weight& w, int64_t nb, int64_t g, int64_t groups, float below, Scales& out) {
  if (w.supers || w.scale_rows > 1) {
    float s[ROWS], z[ROWS];
    scales_of(w, nb, g, s, z);
    for (int t = 0; t < 4; ++t) out.scale[t] = vld1q_f32(s + 4 * t), out.zero[t] = vsubq_f32(vld1q_f32(z + 4 * t), vdupq_n_f32(below));
    return;
  }
  const int64_t at = (nb * groups + g) * ROWS;
  uint8x16_t bytes = vdupq_n_u8(0);
  if (w.zeros && w.zero_dtype == U8) bytes = vld1q_u8(static_cast<const uint8_t*>(w.zeros) + at);
  const uint16x8_t wide[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
  for (int t = 0; t < 4; ++t) {
    float32x4_t scale = load4(w.scales, at + 4 * t, w.scale_dtype), zero;
    if (!w.zeros) zero = vdupq_n_f32(w.zero);
    else if (w.zero_dtype == U8) zero = vcvtq_f32_u32(t % 2 ? vmovl_high_u16(wide[t / 2]) : vmovl_u16(vget_low_u16(wide[t / 2])));
    else zero = load4(w.zeros, at + 4 * t, w.zero_dtype);
    if (w.mins) {
      scale = vbslq_f32(vceqzq_f32(scale), vdupq_n_f32(NO_SCALE), scale);
      zero = vnegq_f32(vdivq_f32(zero, scale));
    }
    out.scale[t] = scale;
    out.zero[t] = vsubq_f32(zero, vdupq_n_f32(below));
  }
}

// total[m][16 outputs] += the products of chunk c.
BITSMITH_NEON_INLINE void add(const Input& x, int64_t m, int64_t c, const int32x4_t (&dot)[4], const Scales& by, float* total) {
  const float step = x.scale[m * x.chunks + c], sum = x.sum[m * x.chunks + c];
  for (int t = 0; t < 4; ++t) {
    float* to = total + m * ROWS + 4 * t;
    const float32x4_t value = vfmsq_n_f32(vmulq_n_f32(vcvtq_f32_s32(dot[t]), step), by.zero[t], sum);
    vst1q_f32(to, vfmaq_f32(vld1q_f32(to), value, by.scale[t]));
  }
}

// Both: total[m][16 outputs] += chunk c, `blocks` times 32 inputs, of rows m0 .. m0 + MR - 1.
struct Dot {
  template <int BITS, int MR, bool PACKED>
  BITSMITH_SDOT static void chunk(const Input& x, const uint8_t* codes, int64_t c, int64_t blocks, int64_t m0, const Scales& by, float* total) {
    const int8_t* q = x.q.data() + m0 * x.stride + c * x.chunk;
    int32x4_t dot[MR][4];
    for (int m = 0; m < MR; ++m)
      for (int t = 0; t < 4; ++t) dot[m][t] = vdupq_n_s32(0);
    for (int64_t b = 0; b < blocks; ++b, codes += 64 * (PACKED ? BITS : 8), q += BLOCK) {
      int8x16_t in[MR][2];
      for (int m = 0; m < MR; ++m)
        for (int h = 0; h < 2; ++h) in[m][h] = vld1q_s8(q + m * x.stride + 16 * h);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        int8x16_t v[8];
        codes4<BITS, PACKED>(codes + 16 * t, v);
        for (int h = 0; h < 2; ++h)
          for (int m = 0; m < MR; ++m) {
            dot[m][t] = vdotq_laneq_s32(dot[m][t], v[4 * h], in[m][h], 0);
            dot[m][t] = vdotq_laneq_s32(dot[m][t], v[4 * h + 1], in[m][h], 1);
            dot[m][t] = vdotq_laneq_s32(dot[m][t], v[4 * h + 2], in[m][h], 2);
            dot[m][t] = vdotq_laneq_s32(dot[m][t], v[4 * h + 3], in[m][h], 3);
          }
      }
    }
    for (int m = 0; m < MR; ++m) add(x, m0 + m, c, dot[m], by, total);
  }
};

struct Widen {
  // Byte vectors whose products fit 16 bits, as a power of two.
  static constexpr int run(int bits) {
    const int most = bits == 8 ? 128 : (1 << bits) - 1;
    int found = 32;
    while (found * most * 127 > 32767) found /= 2;
    return found;
  }

  template <int BITS, int MR, bool PACKED>
  static void chunk(const Input& x, const uint8_t* codes, int64_t c, int64_t blocks, int64_t m0, const Scales& by, float* total) {
    constexpr int RUN = run(BITS);
    const int8_t* q = x.q.data() + m0 * x.stride + c * x.chunk;
    int32x4_t dot[MR][4];
    // Four outputs at a time: more have no registers for their sums.
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      // Two lanes an output.
      int32x4_t wide[MR][2];
      int16x8_t sum[MR][2];
      for (int m = 0; m < MR; ++m)
        for (int h = 0; h < 2; ++h) wide[m][h] = vdupq_n_s32(0), sum[m][h] = vdupq_n_s16(0);
      const auto flush = [&]() __attribute__((always_inline)) {
        for (int m = 0; m < MR; ++m)
          for (int h = 0; h < 2; ++h) wide[m][h] = vpadalq_s16(wide[m][h], sum[m][h]), sum[m][h] = vdupq_n_s16(0);
      };
      for (int64_t b = 0; b < blocks; ++b) {
        int8x16_t v[8];
        codes4<BITS, PACKED>(codes + b * 64 * (PACKED ? BITS : 8) + 16 * t, v);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
          for (int m = 0; m < MR; ++m) {
            int32_t four;
            std::memcpy(&four, q + m * x.stride + b * BLOCK + 4 * j, 4);
            const int8x16_t in = vreinterpretq_s8_s32(vdupq_n_s32(four));
            sum[m][0] = vmlal_s8(sum[m][0], vget_low_s8(v[j]), vget_low_s8(in));
            sum[m][1] = vmlal_high_s8(sum[m][1], v[j], in);
          }
          if constexpr (RUN < 8) {
            if ((j + 1) % RUN == 0) flush();
          }
        }
        if constexpr (RUN >= 8) {
          if ((b + 1) % (RUN / 8) == 0 || b + 1 == blocks) flush();
        }
      }
      for (int m = 0; m < MR; ++m) dot[m][t] = vpaddq_s32(wide[m][0], wide[m][1]);
    }
    for (int m = 0; m < MR; ++m) add(x, m0 + m, c, dot[m], by, total);
  }
};

// 16 outputs, all rows of activations: a chunk of the weight is unpacked once and meets every row.
template <int BITS, class By>
void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  const int64_t k_blocks = w.k_blocks(), groups = w.groups(), per = x.chunk / BLOCK;
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  float* total = totals.data();
  const uint8_t* p = w.block(nb, 0);
  Groups group{w.group};
  uint8_t codes[LONGEST * 512];
  for (int64_t c = 0; c < x.chunks; ++c) {
    const int64_t blocks = std::min((c + 1) * per, k_blocks) - c * per;
    Scales by;
    scales16(w, nb, group.next(x.chunk), groups, BITS == 8 ? 128 : 0, by);
    if (x.m == 1) {
      By::template chunk<BITS, 1, true>(x, p, c, blocks, 0, by, total);
      p += blocks * 64 * BITS;
      continue;
    }
    for (int64_t b = 0; b < blocks; ++b, p += 64 * BITS) unpack<BITS>(p, codes + 512 * b);
    int64_t m = 0;
    for (; m + 4 <= x.m; m += 4) By::template chunk<BITS, 4, false>(x, codes, c, blocks, m, by, total);
    for (; m + 2 <= x.m; m += 2) By::template chunk<BITS, 2, false>(x, codes, c, blocks, m, by, total);
    if (m < x.m) By::template chunk<BITS, 1, false>(x, codes, c, blocks, m, by, total);
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, total[m * ROWS + r]);
}

BITSMITH_NEON_INLINE float32x4_t activations4(const void* x, int64_t at, int32_t dtype, int64_t count) {
  if (count >= 4) return load4(x, at, dtype);
  float some[4] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = load(x, at + i, dtype);
  return vld1q_f32(some);
}

// The largest magnitude of `count` activations (a multiple of 4) of which `present` are there; NaN where one is.
BITSMITH_NEON_INLINE float largest(const void* x, int64_t at, int64_t count, int32_t dtype, int64_t present) {
  float32x4_t found = vdupq_n_f32(0);
  for (int64_t i = 0; i < count; i += 4) found = vmaxq_f32(found, vabsq_f32(activations4(x, at + i, dtype, present - i)));
  return vmaxvq_f32(found);
}

BITSMITH_NEON_INLINE int8x16_t rounded16(const void* x, int64_t at, int32_t dtype, int64_t present, float inverse) {
  int16x4_t q[4];
  for (int j = 0; j < 4; ++j)
    q[j] = vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(activations4(x, at + 4 * j, dtype, present - 4 * j), inverse)));
  return vcombine_s8(vmovn_s16(vcombine_s16(q[0], q[1])), vmovn_s16(vcombine_s16(q[2], q[3])));
}

// One row of activations, its columns in packed order, rounded to int8 a chunk.
inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  for (int64_t c = 0; c < in.chunks; ++c) {
    const int64_t first = c * in.chunk, stop = c + 1 == in.chunks ? in.inputs : first + in.chunk;
    const float peak = largest(x, row * w.k + first, stop - first, dtype, w.k - first), inverse = peak > 0 ? 127 / peak : 0;
    int32_t codes = 0;
    for (int64_t k = first; k < stop; k += 16) {
      const int8x16_t q = rounded16(x, row * w.k + k, dtype, w.k - k, inverse);
      vst1q_s8(in.q.data() + row * in.stride + k, q);
      codes += vaddlvq_s8(q);
    }
    in.scale[row * in.chunks + c] = peak / 127;
    in.sum[row * in.chunks + c] = peak / 127 * static_cast<float>(codes);
  }
}

}  // namespace bitsmith::neon
#else
#define BITSMITH_NEON 0
#endif
