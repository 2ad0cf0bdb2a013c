// The products of grids.h with AVX2. A super block of 16 outputs becomes bytes without a sign, a row after the other, and scales for vectors of
// 32 of them; sums of eight products of a row and a row of activations are then added up together. Sums are those of `grids::rows`, exactly.
#pragma once
#include "grids.h"

#if BITSMITH_X86
namespace bitsmith::grids::vectors {

// What is added to numbers here: with it two products fit 16 bits, the largest number being 62.
constexpr int32_t HALF_BIAS = 64;

using Bytes = std::array<uint8_t, 32>;

template <class F>
constexpr Bytes bytes_of(F f) {
  Bytes out{};
  for (int i = 0; i < 32; ++i) out[static_cast<size_t>(i)] = static_cast<uint8_t>(f(i));
  return out;
}

BITSMITH_256_INLINE __m256i load(const Bytes& bytes) { return avx2::word(bytes.data()); }
BITSMITH_256_INLINE __m256i all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }

// A super block of an output. Of 64 inputs a vector has 0-15 and 32-47, the next the others.
struct Numbers {
  alignas(32) uint8_t number[SUPER];   // plus HALF_BIAS
  alignas(32) int16_t scale[8][16];    // of a vector, or of two where groups are of 32
  alignas(32) int16_t start[SUPER / 16];  // -HALF_BIAS times the scale of 16 inputs
};

// Codes of the scales of each 16 inputs.
template <class F>
BITSMITH_256_INLINE __m128i scale_codes(const uint8_t* p) {
  if constexpr (F::SCALE_BITS == 3) {
    const __m256i down = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21), mask = _mm256_set1_epi32(7);
    __m256i code[2];
    for (int i = 0; i < 2; ++i) code[i] = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(eight_scales<F>(p + 3 * i))), down), mask);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(code[0], code[1]), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  } else {
    int64_t pairs = 0;
    std::memcpy(&pairs, p, F::GROUPS / 2);
    const __m128i both = _mm_cvtsi64_si128(pairs), mask = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
    return F::GROUP == 32 ? _mm_unpacklo_epi8(codes, codes) : codes;
  }
}

// Eight codes, which are `piece` of the four of a super block, in a lane each.
template <class F>
BITSMITH_256_INLINE __m256i codes8(const uint8_t* p, int piece) {
  // Sixteen bytes that hold four codes, never beyond those of the super block.
  constexpr int W = F::WIDTH;
  static constexpr auto FIRST = [](int piece, int half) { return std::min((8 * piece + 4 * half) * W / 8, 4 * W - 16); };
  static constexpr auto bit = [](int piece, int lane) { return (8 * piece + lane) * W - 8 * FIRST(piece, lane / 4); };
  static constexpr std::array<Bytes, 4> FROM = [] {
    std::array<Bytes, 4> out{};
    for (int p = 0; p < 4; ++p) out[static_cast<size_t>(p)] = bytes_of([=](int i) { return bit(p, i / 4) / 8 + i % 4; });
    return out;
  }();
  static constexpr std::array<Bytes, 4> DOWN = [] {
    std::array<Bytes, 4> out{};
    for (int p = 0; p < 4; ++p) out[static_cast<size_t>(p)] = bytes_of([=](int i) { return i % 4 ? 0 : bit(p, i / 4) % 8; });
    return out;
  }();
  const auto half = [&](int i) { return reinterpret_cast<const __m128i*>(p + FIRST(piece, i)); };
  const __m256i bytes = _mm256_loadu2_m128i(half(1), half(0));
  return _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, load(FROM[static_cast<size_t>(piece)])), load(DOWN[static_cast<size_t>(piece)]));
}

// The vectors of eight codes: 0, 1, 4, 5 and 2, 3, 6, 7.
template <class F>
BITSMITH_256_INLINE void look_up(const int8_t* vectors, __m256i code, __m256i (&out)[2]) {
  alignas(32) uint32_t index[F::INDICES][8];
  const __m256i mask = _mm256_set1_epi32((1 << F::INDEX_BITS) - 1);
  for (int i = 0; i < F::INDICES; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i*>(index[i]), _mm256_and_si256(_mm256_srli_epi32(code, i * F::INDEX_BITS), mask));
  asm("" : "+m"(index));
  for (int v = 0; v < 2; ++v) {
    const int a = 2 * v, b = a + 1, c = a + 4, d = a + 5;
    if constexpr (F::INDICES == 1) {
      const auto* t = reinterpret_cast<const int64_t*>(vectors);
      out[v] = _mm256_set_epi64x(t[index[0][d]], t[index[0][c]], t[index[0][b]], t[index[0][a]]);
    } else {
      const auto* t = reinterpret_cast<const int32_t*>(vectors);
      out[v] = _mm256_set_epi32(t[index[1][d]], t[index[0][d]], t[index[1][c]], t[index[0][c]], t[index[1][b]], t[index[0][b]], t[index[1][a]],
                                t[index[0][a]]);
    }
  }
}

// In the lowest byte of each code its eight signs. Of seven, the last makes their number even.
template <class F>
BITSMITH_256_INLINE __m256i signs_of(__m256i code) {
  const __m256i signs = _mm256_srli_epi32(code, F::PLACE);
  if constexpr (F::SIGNS == 8) return signs;
  static constexpr Bytes ODD = bytes_of([](int i) { return (i ^ i >> 1 ^ i >> 2 ^ i >> 3) & 1 ? 128 : 0; });
  const __m256i seven = _mm256_and_si256(signs, _mm256_set1_epi32(127));
  const __m256i four = _mm256_and_si256(_mm256_xor_si256(seven, _mm256_srli_epi32(seven, 4)), _mm256_set1_epi32(15));
  return _mm256_or_si256(seven, _mm256_shuffle_epi8(load(ODD), four));
}

// `from`, a byte a code, for the eight numbers of each code of vector v.
template <int V>
BITSMITH_256_INLINE __m256i each(__m256i from) {
  static constexpr Bytes FROM = bytes_of([](int i) { return 4 * (2 * V + i % 16 / 8); });
  return _mm256_shuffle_epi8(from, load(FROM));
}

// A super block of an output.
template <class F>
BITSMITH_256_INLINE void decode(const Weight& w, const Row& row, Numbers& to) {
  const __m128i level = scale_codes<F>(row.scales), codes = _mm_and_si128(level, _mm_set1_epi8(static_cast<char>(F::MASK)));
  const __m128i odd = _mm_or_si128(_mm_add_epi8(codes, codes), _mm_set1_epi8(1));
  const __m256i start = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(odd), _mm256_set1_epi16(-HALF_BIAS)), scale = _mm256_broadcastsi128_si256(odd);
  _mm256_store_si256(reinterpret_cast<__m256i*>(to.start), start);
  static constexpr auto SPREAD = [] {
    std::array<Bytes, 8> out{};
    for (int v = 0; v < 8; ++v) out[static_cast<size_t>(v)] = bytes_of([=](int i) { return i % 2 ? 128 : v / 2 * 4 + v % 2 + i / 16 * 2; });
    return out;
  }();
  for (size_t v = 0; v < 8; v += F::GROUP / 16) _mm256_store_si256(reinterpret_cast<__m256i*>(to.scale[v * 16 / F::GROUP]), _mm256_shuffle_epi8(scale, load(SPREAD[v])));
#pragma GCC unroll 4
  for (int piece = 0; piece < 4; ++piece) {
    const __m256i code = codes8<F>(row.codes, piece);
    __m256i v[2];
    look_up<F>(w.vectors, code, v);
    if constexpr (F::GROUP_SHIFT) {
      static constexpr auto BOTH = [] {
        std::array<Bytes, 4> out{};
        for (int p = 0; p < 4; ++p) out[static_cast<size_t>(p)] = bytes_of([=](int i) { return p * 4 + i / 16 * 2; });
        return out;
      }();
      const __m256i shift = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_cmpgt_epi8(level, _mm_set1_epi8(F::MASK))), load(BOTH[static_cast<size_t>(piece)]));
      const __m256i add = _mm256_add_epi8(_mm256_add_epi8(shift, shift), all(HALF_BIAS));
      for (auto& one : v) one = _mm256_add_epi8(one, add);
    } else if constexpr (F::SHIFT) {
      const __m256i less = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi32(code, F::PLACE - 1), _mm256_set1_epi32(2)), all(HALF_BIAS));
      v[0] = _mm256_sub_epi8(v[0], each<0>(less)), v[1] = _mm256_sub_epi8(v[1], each<1>(less));
    } else {
      static constexpr Bytes BIT = bytes_of([](int i) { return 1 << (i % 8); });
      const __m256i signs = signs_of<F>(code), bit = load(BIT);
      const __m256i own[2] = {each<0>(signs), each<1>(signs)};
      for (int i = 0; i < 2; ++i) {
        const __m256i negative = _mm256_cmpeq_epi8(_mm256_and_si256(own[i], bit), bit);
        v[i] = _mm256_add_epi8(_mm256_sign_epi8(v[i], _mm256_or_si256(negative, all(1))), all(HALF_BIAS));
      }
    }
    for (int i = 0; i < 2; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(to.number + 64 * piece + 32 * i), v[i]);
  }
}

// Sums of eight vectors.
BITSMITH_256_INLINE __m256i sums(const __m256i (&v)[8]) {
  // (`hadd` is slower than its parts.)
  const auto two = [](__m256i a, __m256i b) __attribute__((always_inline)) BITSMITH_256 { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); };
  const auto four = [&](const __m256i* v) __attribute__((always_inline)) BITSMITH_256 {
    const __m256i a = two(v[0], v[1]), b = two(v[2], v[3]);
    return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  };
  const __m256i a = four(v), b = four(v + 4);
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// Rows m .. m + MR - 1 of activations and, 8 / MR at a time, the outputs meet 128 inputs. total [16 outputs][MR].
template <class F, int MR>
BITSMITH_256_INLINE void meet(const Input& x, int64_t k, const Numbers (&block)[ROWS], const float* super, int64_t chunk, int64_t m, float* total) {
  alignas(32) float step[8];
  for (int i = 0; i < 8; ++i) step[i] = x.step[(m + i % MR) * (k / CHUNK) + chunk];
  const __m256 steps = _mm256_load_ps(step);
  const __m256i which = _mm256_setr_epi32(0, 1 / MR, 2 / MR, 3 / MR, 4 / MR, 5 / MR, 6 / MR, 7 / MR);
  const int8_t* q = x.q.data() + m * x.stride + chunk * CHUNK;
  const int16_t* sixteens = x.sums.data() + m * (k / 16) + chunk * (CHUNK / 16);
  const int64_t half = chunk % 2;
  for (int64_t r = 0; r < ROWS; r += 8 / MR, total += 8) {
    __m256i dot[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m128i start = _mm_load_si128(reinterpret_cast<const __m128i*>(block[r + i / MR].start + 8 * half));
      dot[i] = _mm256_zextsi128_si256(_mm_madd_epi16(start, _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteens + i % MR * (k / 16)))));
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i number = avx2::word(block[r + i / MR].number + 128 * half + 32 * v);
        const __m256i in = avx2::word(reinterpret_cast<const uint8_t*>(q + i % MR * x.stride + 32 * v));
        const __m256i scale = avx2::word(reinterpret_cast<const uint8_t*>(block[r + i / MR].scale[half * 64 / F::GROUP + v * 16 / F::GROUP]));
        dot[i] = _mm256_add_epi32(dot[i], _mm256_madd_epi16(_mm256_maddubs_epi16(number, in), scale));
      }
    const __m256 by = _mm256_mul_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(super + r), which), steps);
    _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums(dot)), by, _mm256_loadu_ps(total)));
  }
}

// One row of activations, each 64 of it in the order of Numbers.
BITSMITH_256 inline void prepare(const two_level::Weight& w, const void* x, int32_t dtype, int64_t row, Input& in) {
  two_level::vectors::prepare(w, x, dtype, row, in);
  for (int64_t k = 0; k < w.k; k += 64) {
    __m256i* at = reinterpret_cast<__m256i*>(in.q.data() + row * in.stride + k);
    const __m256i a = _mm256_loadu_si256(at), b = _mm256_loadu_si256(at + 1);
    _mm256_storeu_si256(at, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(a, b, 0x31));
  }
}

template <class F>
BITSMITH_256 void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  Numbers block[ROWS];
  float super[ROWS + 7];
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    for (int64_t r = 0; r < ROWS; ++r) {
      decode<F>(w, row_at<F>(w, nb, r, s), block[r]);
      super[r] = super_of(w, nb, r, s);
    }
    for (int64_t chunk = 2 * s; chunk < 2 * s + 2; ++chunk) {
      int64_t m = 0;
      for (; m + 8 <= x.m; m += 8) meet<F, 8>(x, w.k, block, super, chunk, m, totals.data() + m * ROWS);
      if (m + 4 <= x.m) meet<F, 4>(x, w.k, block, super, chunk, m, totals.data() + m * ROWS), m += 4;
      if (m + 2 <= x.m) meet<F, 2>(x, w.k, block, super, chunk, m, totals.data() + m * ROWS), m += 2;
      if (m < x.m) meet<F, 1>(x, w.k, block, super, chunk, m, totals.data() + m * ROWS);
    }
  }
  for (int64_t m = 0, mr; m < x.m; m += mr) {
    mr = 8;
    while (m + mr > x.m) mr /= 2;
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r)
      for (int64_t i = 0; i < mr; ++i) store(y, (m + i) * w.n + nb * ROWS + r, dtype, totals[static_cast<size_t>(m * ROWS + r * mr + i)]);
  }
}

inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows { return rows<decltype(form)>; });
}

}  // namespace bitsmith::grids::vectors
#endif
