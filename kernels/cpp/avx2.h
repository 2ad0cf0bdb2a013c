// AVX2: int8 activations by maddubs, which saturates at 16 bits. Codes of up to 7 bits times 127, twice, stay below; 8-bit
// codes are multiplied as two halves of 4 bits.
#pragma once
#include "generic.h"

#if BITSMITH_X86
#define BITSMITH_256 __attribute__((target("avx2,fma")))

namespace bitsmith::avx2 {

inline bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

BITSMITH_256 inline __m256i dot4(__m256i sum, __m256i codes, __m256i q) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1)));
}

// Byte vectors of a block, [8][64].
BITSMITH_256 inline void unpack(const uint8_t* p, int32_t bits, uint8_t* out) {
  if (bits == 4) {  // The usual width without shifts by register: a third faster.
    const __m256i mask = _mm256_set1_epi8(0x0f);
    for (int j = 0; j < 8; ++j) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * j));
      uint8_t* to = out + (j / 2) * 128 + (j % 2) * 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(a, mask));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64), _mm256_and_si256(_mm256_srli_epi32(a, 4), mask));
    }
    return;
  }
  int below = 0;
  for (int width = 8; width; width /= 2) {
    if (!(bits & width)) continue;
    const int per = 8 / width;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << width) - 1));
    const __m128i up = _mm_cvtsi32_si128(below);
    for (int v = 0; v < 8; ++v) {
      const __m128i down = _mm_cvtsi32_si128(width * (v % per));
      for (int half = 0; half < 64; half += 32) {
        const __m256i plane = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + v / per * 64 + half));
        __m256i codes = _mm256_sll_epi32(_mm256_and_si256(_mm256_srl_epi32(plane, down), mask), up);
        __m256i* to = reinterpret_cast<__m256i*>(out + 64 * v + half);
        if (below) codes = _mm256_or_si256(codes, _mm256_loadu_si256(to));
        _mm256_storeu_si256(to, codes);
      }
    }
    p += 64 * width;
    below += width;
  }
}

BITSMITH_256 inline void dots(const uint8_t* codes, const int8_t* q, int64_t fours, int32_t bits, int32_t* out) {
  const __m256i low = _mm256_set1_epi8(0x0f);
  for (int64_t half = 0; half < 2; ++half) {
    __m256i dot = _mm256_setzero_si256(), high = _mm256_setzero_si256();
    for (int64_t four = 0; four < fours; ++four) {
      const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + four * 64 + half * 32));
      int32_t inputs;
      std::memcpy(&inputs, q + four * 4, 4);
      const __m256i b = _mm256_set1_epi32(inputs);
      if (bits < 8) {
        dot = dot4(dot, v, b);
      } else {
        dot = dot4(dot, _mm256_and_si256(v, low), b);
        high = dot4(high, _mm256_and_si256(_mm256_srli_epi32(v, 4), low), b);
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half * 8), _mm256_add_epi32(dot, _mm256_slli_epi32(high, 4)));
  }
}

inline void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) { generic::rows_by(unpack, dots, w, x, nb, y, dtype); }

}  // namespace bitsmith::avx2
#endif
