// The steps between the products of a decoder layer: norm, rotary embedding, gated activation. Plain loops on float32; the compiler makes a
// version for each width of vectors and picks one at load.
#pragma once
#include "common.h"

#if BITSMITH_X86 && defined(__linux__) && !defined(__clang__)
#define BITSMITH_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BITSMITH_CLONES
#endif

namespace bitsmith::layer {

// Rounding as in float_to_bfloat, written so that loops of it vectorize; NaN stays NaN but for its payload.
inline uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// exp(v), relative error 2e-7; exp(-87) below that, infinity above 88.
inline float exponential(float x) {
  const float v = std::min(std::max(x, -87.0f), 88.0f);
  const float scaled = v * 1.44269504f, whole = std::nearbyint(scaled);
  const float r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return x > 88.0f ? INFINITY : p * scale;
}

enum Form : int32_t { LLAMA = 0, GEMMA = 1, FLOAT = 2 };

// One row: y = norm(x). bfloat16.
BITSMITH_CLONES inline void norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t width, float eps, int32_t form) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) {
    const float v = bfloat_to_float(x[i]);
    sum += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
  if (form == LLAMA) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = narrow(bfloat_to_float(narrow(bfloat_to_float(x[i]) * scale)) * bfloat_to_float(weight[i]));
  } else {
    const float one = form == GEMMA ? 1.0f : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = narrow(bfloat_to_float(x[i]) * scale * (one + bfloat_to_float(weight[i])));
  }
}

// y = a + b.
BITSMITH_CLONES inline void add(const uint16_t* a, const uint16_t* b, uint16_t* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = narrow(bfloat_to_float(a[i]) + bfloat_to_float(b[i]));
}

// One row: y = act(gate) * up; act 0 is SiLU, 1 GELU by tanh.
BITSMITH_CLONES inline void gated(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t width, int32_t act) {
  if (act == 0) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = bfloat_to_float(gate[i]);
      y[i] = narrow(g / (1.0f + exponential(-g)) * bfloat_to_float(up[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float g = bfloat_to_float(gate[i]);
      y[i] = narrow(g / (1.0f + exponential(-1.5957691216057308f * (g + 0.044715f * g * g * g))) * bfloat_to_float(up[i]));
    }
  }
}

// One head: y = x turned by the angles of its token; R of D dimensions, the rest copied.
BITSMITH_CLONES inline void rope(const uint16_t* x, const uint16_t* cosine, const uint16_t* sine, uint16_t* y, int64_t d, int64_t r, bool interleaved) {
  const int64_t half = r / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const int64_t at = i * step;
    const float a = bfloat_to_float(x[at]), b = bfloat_to_float(x[at + apart]);
    const float c = bfloat_to_float(cosine[at]), s = bfloat_to_float(sine[at]);
    y[at] = narrow(a * c - b * s);
    y[at + apart] = narrow(b * c + a * s);
  }
  for (int64_t i = r; i < d; ++i) y[i] = x[i];
}

}  // namespace bitsmith::layer
