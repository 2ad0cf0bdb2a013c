// The products of grids.h on ARM: numbers as `grids::decode` leaves them, 16 inputs of an output at once. The integers are those of `grids::rows`.
#pragma once
#include "grids.h"
#include "neon_two_level.h"

#if BITSMITH_NEON
namespace bitsmith::grids::neon {

using namespace bitsmith::neon;

// Both: a super block of four outputs, whose numbers and scales begin there, with a row of activations. Products of a group meet its scale in 32 bits.
struct Dot {
  template <int GROUP>
  BITSMITH_SDOT static int32x4_t super_block(const int8_t* number, const uint8_t* scale, const int8_t* q) {
    int32x4_t dot[4] = {};
    for (int64_t i = 0; i < SUPER; i += GROUP)
      for (int r = 0; r < 4; ++r) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int j = 0; j < GROUP; j += 16) sum = vdotq_s32(sum, vld1q_s8(number + r * SUPER + i + j), vld1q_s8(q + i + j));
        dot[r] = vmlaq_n_s32(dot[r], sum, scale[i / GROUP * ROWS + r]);
      }
    return vpaddq_s32(vpaddq_s32(dot[0], dot[1]), vpaddq_s32(dot[2], dot[3]));
  }
};

struct Widen {
  template <int GROUP>
  static int32x4_t super_block(const int8_t* number, const uint8_t* scale, const int8_t* q) {
    int32x4_t dot[4] = {};
    for (int64_t i = 0; i < SUPER; i += GROUP)
      for (int r = 0; r < 4; ++r) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int j = 0; j < GROUP; j += 16) {
          const int8x16_t v = vld1q_s8(number + r * SUPER + i + j), in = vld1q_s8(q + i + j);
          // Numbers reach 62: two products fit 16 bits.
          sum = vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(v), vget_low_s8(in)), v, in));
        }
        dot[r] = vmlaq_n_s32(dot[r], sum, scale[i / GROUP * ROWS + r]);
      }
    return vpaddq_s32(vpaddq_s32(dot[0], dot[1]), vpaddq_s32(dot[2], dot[3]));
  }
};

template <class By, class F>
void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  int8_t number[ROWS][SUPER];
  uint8_t scale[F::GROUPS][ROWS];
  float super[ROWS];
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    decode<F>(w, nb, s, number, scale);
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    for (int64_t m = 0; m < x.m; ++m)
      for (int64_t r = 0; r < ROWS; r += 4) {
        const int32x4_t dot = By::template super_block<F::GROUP>(number[r], scale[0] + r, x.q.data() + m * x.stride + s * SUPER);
        float* to = totals.data() + m * ROWS + r;
        vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(dot), vmulq_n_f32(vld1q_f32(super + r), x.step[m * (w.k / SUPER) + s])));
      }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[static_cast<size_t>(m * ROWS + r)]);
}

template <class By>
Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows { return rows<By, decltype(form)>; });
}

}  // namespace bitsmith::grids::neon
#endif
