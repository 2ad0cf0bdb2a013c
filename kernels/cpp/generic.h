// Plain C++, int8 activations only: the definition of what the vector paths compute. Too slow to be chosen anywhere (3 ms where AVX2
// takes 0.4).
#pragma once
#include "common.h"

namespace bitsmith::generic {

// Codes of a block as bytes [8 byte vectors][16 rows][4].
inline void unpack(const uint8_t* p, int32_t bits, uint8_t* out) {
  std::memset(out, 0, 512);
  int below = 0;
  for (int width = 8; width; width /= 2) {
    if (!(bits & width)) continue;
    const int per = 8 / width;
    const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
    for (int v = 0; v < 8; ++v)
      for (int i = 0; i < 64; ++i) out[64 * v + i] |= static_cast<uint8_t>((p[v / per * 64 + i] >> (width * (v % per)) & mask) << below);
    p += 64 * width;
    below += width;
  }
}

// Dot products of 16 rows with `fours` times four activations.
inline void dots(const uint8_t* codes, const int8_t* q, int64_t fours, int32_t, int32_t* dot) {
  std::memset(dot, 0, ROWS * 4);
  for (int64_t four = 0; four < fours; ++four)
    for (int64_t r = 0; r < ROWS; ++r)
      for (int64_t b = 0; b < 4; ++b) dot[r] += codes[four * 64 + r * 4 + b] * q[four * 4 + b];
}

// 16 outputs, all rows of activations; what instructions there are is in `unpack` and `dots`.
template <class Unpack, class Dots>
void rows_by(Unpack unpack, Dots dots, const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  const int64_t k_blocks = w.k_blocks(), per = x.chunk / BLOCK;
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  for (int64_t c = 0; c < x.chunks; ++c) {
    const int64_t first = c * per, stop = std::min(first + per, k_blocks);
    alignas(64) uint8_t codes[LONGEST * 512];
    for (int64_t kb = first; kb < stop; ++kb) unpack(w.block(nb, kb), w.bits, codes + (kb - first) * 512);
    float scale[ROWS], zero[ROWS];
    scales_of(w, nb, c * x.chunk / w.group, scale, zero);
    for (int64_t m = 0; m < x.m; ++m) {
      const int8_t* q = x.q.data() + m * x.stride + first * BLOCK;
      int32_t dot[ROWS];
      dots(codes, q, (stop - first) * 8, w.bits, dot);
      const float step = x.scale[m * x.chunks + c], sum = x.sum[m * x.chunks + c];
      for (int64_t r = 0; r < ROWS; ++r)
        totals[m * ROWS + r] += (static_cast<float>(dot[r]) * step - zero[r] * sum) * scale[r];
    }
  }
  for (int64_t m = 0; m < x.m; ++m)
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r) store(y, m * w.n + nb * ROWS + r, dtype, totals[m * ROWS + r]);
}

inline void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) { rows_by(unpack, dots, w, x, nb, y, dtype); }

inline void prepare(const Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  for (int64_t c = 0; c < in.chunks; ++c) {
    const int64_t first = c * in.chunk, stop = c + 1 == in.chunks ? in.inputs : first + in.chunk;
    float peak = 0;
    for (int64_t k = first; k < std::min(stop, w.k); ++k) peak = std::max(peak, std::fabs(load(x, row * w.k + k, dtype)));
    const float inverse = peak > 0 ? 127 / peak : 0;
    int32_t codes = 0;
    for (int64_t k = first; k < stop; ++k) {
      const float v = k < w.k ? load(x, row * w.k + k, dtype) * inverse : 0;
      const int32_t q = static_cast<int32_t>(std::nearbyint(v));
      in.q[row * in.stride + k] = static_cast<int8_t>(q);
      codes += q;
    }
    in.scale[row * in.chunks + c] = peak / 127;
    in.sum[row * in.chunks + c] = peak / 127 * static_cast<float>(codes);
  }
}

}  // namespace bitsmith::generic
