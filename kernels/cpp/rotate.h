// The Hadamard transform around a product (kernels/transform.py), rows of bfloat16 with float32 inside.
#pragma once
#include "layer.h"

namespace bitsmith::rotate {

// v [count] times float32, float16 or bfloat16 numbers, from number `at` on. By type: a choice for each number is no vector loop (512 rows of 14336 with
// a float16 vector 24.6 -> 4.7 ms).
inline __attribute__((always_inline)) void scale(const void* p, int32_t dtype, int64_t at, int64_t count, float* v) {
  if (dtype == F32) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] *= load(p, at + i, F32);
  } else if (dtype == F16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] *= load(p, at + i, F16);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] *= load(p, at + i, BF16);
  }
}

// v [size] in natural order, a power of two, without its norm; `spare` is as large. Returns where the result lies. Each stage adds and
// subtracts neighbours and moves their bit of the index to the top, so all stages are the same loop, and after the last the order is restored.
inline __attribute__((always_inline)) float* transform(float* v, float* spare, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t stage = 1; stage < size; stage *= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = v[2 * i], b = v[2 * i + 1];
      spare[i] = a + b, spare[half + i] = a - b;
    }
    std::swap(v, spare);
  }
  return v;
}

// One row: x [k] -> y [k rounded up to blocks], inputs beyond k being zeros; `vector` of y's length or null, times x (first) or y.
BITSMITH_CLONES inline void row(const uint16_t* x, int64_t k, int64_t block, const void* vector, int32_t dtype, bool first, uint16_t* y) {
  static thread_local std::vector<float> buffers;
  if (static_cast<int64_t>(buffers.size()) < 2 * block) buffers.resize(static_cast<size_t>(2 * block));
  const float norm = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t at = 0; at < k; at += block) {
    float* v = buffers.data();
    const int64_t count = std::min(block, k - at);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] = bfloat_to_float(x[at + i]) * norm;
    for (int64_t i = count; i < block; ++i) v[i] = 0.0f;
    if (vector && first) scale(vector, dtype, at, block, v);
    v = transform(v, v + block, block);
    if (vector && !first) scale(vector, dtype, at, block, v);
#pragma omp simd
    for (int64_t i = 0; i < block; ++i) y[at + i] = layer::narrow(v[i]);
  }
}

}  // namespace bitsmith::rotate
