// The products of grids.h with AVX2. A super block of 16 outputs becomes bytes without a sign, one output after the other; eight sums of
// products, of some outputs with some rows of activations, are then added up together. The integers are those of `grids::rows`.
#pragma once
#include "grids.h"

#if BITSMITH_X86
namespace bitsmith::grids::vectors {

// What is added to numbers, of which the largest is 62: two products with a sum of theirs fit 16 bits.
constexpr int32_t HALF_BIAS = 64;

using Bytes = std::array<uint8_t, 32>;

// [a][i]: f(a, i).
template <class F>
constexpr std::array<Bytes, 4> four_of(F f) {
  return {bytes_of<32>([=](int i) { return f(0, i); }), bytes_of<32>([=](int i) { return f(1, i); }), bytes_of<32>([=](int i) { return f(2, i); }),
          bytes_of<32>([=](int i) { return f(3, i); })};
}

BITSMITH_256_INLINE __m256i load(const void* at) { return _mm256_load_si256(static_cast<const __m256i*>(at)); }
BITSMITH_256_INLINE __m256i load(const Bytes& bytes) { return avx2::word(bytes.data()); }
BITSMITH_256_INLINE void keep(__m256i v, void* at) { _mm256_store_si256(static_cast<__m256i*>(at), v); }
BITSMITH_256_INLINE __m256i all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }

// The codes of an output in a super block, eight codes a piece.
template <class F>
struct Codes {
  alignas(32) uint32_t index[4][F::INDICES][8];
  alignas(32) uint8_t rest[8][4];  // [code][piece]: its eight signs; or what its shift takes from numbers of a clear bit, less HALF_BIAS
};

// Their numbers. Of 64 inputs one vector has 0-15 and 32-47, the next the others.
struct Numbers {
  alignas(32) uint8_t number[SUPER];      // plus HALF_BIAS
  alignas(32) int16_t start[SUPER / 16];  // -HALF_BIAS times `scale`
  alignas(16) uint8_t scale[SUPER / 16];  // of 16 inputs
};

// Eight codes, a lane each. PIECE: which of the four of a super block, at p.
template <class F, int PIECE>
BITSMITH_256_INLINE __m256i codes8(const uint8_t* p) {
  // Sixteen bytes that hold four codes, never beyond those of the super block.
  constexpr int W = F::WIDTH;
  static constexpr auto first = [](int half) { return std::min((8 * PIECE + (W > 16 ? 4 * half : 0)) * W / 8, 4 * W - 16); };
  static constexpr auto bit = [](int i) { return (8 * PIECE + i / 4) * W - 8 * first(i / 16); };
  static constexpr Bytes FROM = bytes_of<32>([](int i) { return bit(i) / 8 + i % 4; }), DOWN = bytes_of<32>([](int i) { return i % 4 ? 0 : bit(i) % 8; });
  const auto half = [&](int i) __attribute__((always_inline)) BITSMITH_256 { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + first(i))); };
  const __m256i bytes = W > 16 ? _mm256_set_m128i(half(1), half(0)) : _mm256_broadcastsi128_si256(half(0));
  return _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, load(FROM)), load(DOWN));
}

template <class F, int PIECE>
BITSMITH_256_INLINE void read_piece(const uint8_t* codes, Codes<F>& to, __m256i& rest) {
  const __m256i code = codes8<F, PIECE>(codes), mask = _mm256_set1_epi32((1 << F::INDEX_BITS) - 1);
  for (int i = 0; i < F::INDICES; ++i) keep(_mm256_and_si256(_mm256_srli_epi32(code, i * F::INDEX_BITS), mask), to.index[PIECE][i]);
  // A shift is 2 where the bit is set.
  constexpr int DOWN = F::PLACE - F::SHIFT - 8 * PIECE;
  const __m256i own = _mm256_set1_epi32(static_cast<int>((F::SHIFT ? 2u : (1u << F::SIGNS) - 1) << 8 * PIECE));
  const __m256i moved = DOWN >= 0 ? _mm256_srli_epi32(code, std::max(DOWN, 0)) : _mm256_slli_epi32(code, std::max(-DOWN, 0));
  rest = _mm256_or_si256(rest, _mm256_and_si256(moved, own));
}

template <class F>
BITSMITH_256_INLINE void read(const uint8_t* codes, Codes<F>& to) {
  __m256i rest = _mm256_setzero_si256();
  read_piece<F, 0>(codes, to, rest), read_piece<F, 1>(codes, to, rest), read_piece<F, 2>(codes, to, rest), read_piece<F, 3>(codes, to, rest);
  if constexpr (F::SIGNS == 7) {
    // The eighth makes their number even.
    static constexpr Bytes ODD = bytes_of<32>([](int i) { return (i ^ i >> 1 ^ i >> 2 ^ i >> 3) & 1 ? 128 : 0; });
    const __m256i half = _mm256_and_si256(_mm256_xor_si256(rest, _mm256_srli_epi32(rest, 4)), all(15));
    rest = _mm256_or_si256(rest, _mm256_shuffle_epi8(load(ODD), half));
  }
  keep(F::SHIFT ? _mm256_sub_epi8(rest, all(HALF_BIAS)) : rest, to.rest);
}

// The table's vectors of codes c and c + 1, of a clear shift bit where there is one.
template <class F>
BITSMITH_256_INLINE __m128i two_vectors(const int8_t* vectors, const uint32_t (&index)[F::INDICES][8], int c) {
  if constexpr (F::INDICES == 1) {
    const auto* t = reinterpret_cast<const int64_t*>(vectors);
    return _mm_set_epi64x(t[index[0][c + 1]], t[index[0][c]]);
  } else {
    const auto* t = reinterpret_cast<const int32_t*>(vectors);
    return _mm_set_epi32(t[index[1][c + 1]], t[index[0][c + 1]], t[index[1][c]], t[index[0][c]]);
  }
}

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

template <class F>
BITSMITH_256_INLINE __m128i scales(const uint8_t* p, Numbers& to) {
  const __m128i code = scale_codes<F>(p), masked = _mm_and_si128(code, _mm_set1_epi8(static_cast<char>(F::MASK)));
  const __m128i odd = _mm_or_si128(_mm_add_epi8(masked, masked), _mm_set1_epi8(1));
  _mm_store_si128(reinterpret_cast<__m128i*>(to.scale), odd);
  keep(_mm256_mullo_epi16(_mm256_cvtepu8_epi16(odd), _mm256_set1_epi16(-HALF_BIAS)), to.start);
  return code;
}

template <class F>
BITSMITH_256_INLINE void decode(const int8_t* vectors, const Codes<F>& codes, const uint8_t* scale, Numbers& to) {
  static constexpr Bytes BIT = bytes_of<32>([](int i) { return 1 << (i % 8); });
  // [piece]: the bytes of `rest` of a vector's codes, and of the vector after it; codes of the scales of its 32 inputs.
  static constexpr auto REST = four_of([](int piece, int i) { return i % 16 / 8 * 4 + piece; });
  static constexpr auto REST2 = four_of([](int piece, int i) { return (i % 16 / 8 + 2) * 4 + piece; });
  static constexpr auto GROUP = four_of([](int piece, int i) { return piece * 4 + i / 16 * 2; });
  const __m256i rest = load(codes.rest), level = _mm256_broadcastsi128_si256(scales<F>(scale, to)), bit = load(BIT);
#pragma GCC unroll 4
  for (size_t piece = 0; piece < 4; ++piece) {
    __m256i v[2], other[2] = {_mm256_shuffle_epi8(rest, load(REST[piece])), _mm256_shuffle_epi8(rest, load(REST2[piece]))};
    if constexpr (F::GROUP_SHIFT) {
      const __m256i set = _mm256_cmpgt_epi8(_mm256_shuffle_epi8(level, load(GROUP[piece])), all(F::MASK));
      other[0] = other[1] = _mm256_sub_epi8(_mm256_and_si256(set, all(2)), all(HALF_BIAS));
    }
    for (int i = 0; i < 2; ++i) {
      v[i] = _mm256_set_m128i(two_vectors<F>(vectors, codes.index[piece], 2 * i + 4), two_vectors<F>(vectors, codes.index[piece], 2 * i));
      if constexpr (F::SHIFT) {
        v[i] = _mm256_sub_epi8(v[i], other[i]);
      } else {
        const __m256i negative = _mm256_cmpeq_epi8(_mm256_and_si256(other[i], bit), bit);
        v[i] = _mm256_add_epi8(_mm256_sign_epi8(v[i], _mm256_or_si256(negative, all(1))), all(HALF_BIAS));
      }
      keep(v[i], to.number + 64 * piece + 32 * static_cast<size_t>(i));
    }
  }
}

// What the 16 outputs after these will read in this place: more streams than the hardware follows (one row of
// activations, weights of 6 matrices in turn, 4096 x 4096: IQ2_S 1.27 -> 0.61 ms, IQ3_S 1.64 -> 0.82).
template <class F>
BITSMITH_256_INLINE void ahead(const uint8_t* codes, const uint8_t* scales, int64_t r) {
  constexpr int64_t LINES = (F::GROUPS * F::SCALE_BITS / 8 * ROWS + 63) / 64;
  for (int64_t i = r; i < F::WIDTH; i += ROWS) _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i), _MM_HINT_T1);
  if (r < LINES) _mm_prefetch(reinterpret_cast<const char*>(scales + 64 * r), _MM_HINT_T1);
}

// Super block s of 16 outputs, whose rows begin at `from`.
template <class F>
BITSMITH_256 void super_block(const Weight& w, const Row (&from)[ROWS + 1], int64_t s, Numbers (&to)[ROWS]) {
  const int64_t codes = s * 4 * F::WIDTH, scales = s * F::GROUPS / 8 * F::SCALE_BITS;
  const int8_t* vectors = w.vectors;
  // A row ahead: an index that was stored just before is loaded slowly (2.0 -> 2.8 cycles a code).
  Codes<F> near[2];
  read<F>(from[0].codes + codes, near[0]);
  for (int64_t r = 0; r < ROWS; ++r) {
    read<F>(from[r + 1].codes + codes, near[(r + 1) % 2]);
    decode<F>(vectors, near[r % 2], from[r].scales + scales, to[r]);
    ahead<F>(from[0].codes + ROWS * (4 * w.words + codes), from[0].scales + ROWS * (4 * w.scale_words + scales), r);
  }
}

// The sums of eight vectors.
BITSMITH_256_INLINE __m256i sums(const __m256i (&v)[8]) {
  __m256i two[4], four[2];
  for (int i = 0; i < 4; ++i) two[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 2; ++i) four[i] = _mm256_hadd_epi32(two[2 * i], two[2 * i + 1]);
  return _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

// A super block of MR rows of activations, their steps for each output of 8 / MR.
template <int MR>
struct Inputs {
  alignas(32) int8_t q[MR][SUPER];
  alignas(32) int16_t sums[MR][SUPER / 16];
  alignas(32) float step[8];

  BITSMITH_256_INLINE Inputs(const Input& x, int64_t k, int64_t s, int64_t m) {
    for (int64_t i = 0; i < MR; ++i) {
      const auto* from = reinterpret_cast<const __m256i*>(x.q.data() + (m + i) * x.stride + s * SUPER);
      for (int v = 0; v < 8; v += 2) {
        const __m256i a = _mm256_loadu_si256(from + v), b = _mm256_loadu_si256(from + v + 1);
        keep(_mm256_permute2x128_si256(a, b, 0x20), q[i] + 32 * v), keep(_mm256_permute2x128_si256(a, b, 0x31), q[i] + 32 * v + 32);
      }
      std::memcpy(sums[i], x.group_sums.data() + (m + i) * (k / 16) + s * (SUPER / 16), SUPER / 8);
      for (int r = 0; r < 8 / MR; ++r) step[r * MR + i] = x.step[(m + i) * (k / SUPER) + s];
    }
  }
};

// Those rows and, 8 / MR at a time, the outputs meet. total [16 outputs][MR].
template <int MR>
BITSMITH_256_INLINE void meet(const Inputs<MR>& x, const Numbers (&block)[ROWS], const float* super, float* total) {
  static constexpr auto LOW = four_of([](int v, int i) { return i % 2 ? 128 : v / 2 * 4 + v % 2 + i / 16 * 2; });
  static constexpr auto HIGH = four_of([](int v, int i) { return i % 2 ? 128 : 8 + v / 2 * 4 + v % 2 + i / 16 * 2; });
  const __m256 steps = _mm256_load_ps(x.step);
  const __m256i which = _mm256_setr_epi32(0, 1 / MR, 2 / MR, 3 / MR, 4 / MR, 5 / MR, 6 / MR, 7 / MR);
  for (int64_t r = 0; r < ROWS; r += 8 / MR, total += 8) {
    __m256i dot[8];
#pragma GCC unroll 8
    for (int o = 0; o < 8 / MR; ++o) {
      const Numbers& row = block[r + o];
      const __m256i scale = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row.scale)));
      for (int m = 0; m < MR; ++m) dot[o * MR + m] = _mm256_madd_epi16(load(row.start), load(x.sums[m]));
#pragma GCC unroll 8
      for (size_t v = 0; v < 8; ++v) {
        const __m256i number = load(row.number + 32 * v), by = _mm256_shuffle_epi8(scale, load(v < 4 ? LOW[v] : HIGH[v - 4]));
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          __m256i& to = dot[o * MR + m];
          to = _mm256_add_epi32(to, _mm256_madd_epi16(_mm256_maddubs_epi16(number, load(x.q[m] + 32 * v)), by));
          // As in `avx2::added`.
          asm("" : "+x"(to));
        }
      }
    }
    const __m256 by = _mm256_mul_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(super + r), which), steps);
    _mm256_storeu_ps(total, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums(dot)), by, _mm256_loadu_ps(total)));
  }
}

template <int MR>
BITSMITH_256_INLINE void meet(const Input& x, int64_t k, const Numbers (&block)[ROWS], const float* super, int64_t s, int64_t m, float* totals) {
  meet<MR>(Inputs<MR>(x, k, s, m), block, super, totals + m * ROWS);
}

template <class F>
BITSMITH_256 void rows(const Weight& w, const two_level::Weight&, const Input& x, int64_t nb, void* y, int32_t dtype) {
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(x.m * ROWS), 0.0f);
  float* total = totals.data();
  Row from[ROWS + 1];
  for (int64_t r = 0; r <= ROWS; ++r) from[r] = row_at<F>(w, nb, r, 0);
  Numbers block[ROWS];
  // `meet` loads eight.
  float super[ROWS + 7] = {};
  for (int64_t s = 0; s < w.k / SUPER; ++s) {
    super_block<F>(w, from, s, block);
    for (int64_t r = 0; r < ROWS; ++r) super[r] = super_of(w, nb, r, s);
    int64_t m = 0;
    for (; m + 8 <= x.m; m += 8) meet<8>(x, w.k, block, super, s, m, total);
    if (m + 4 <= x.m) meet<4>(x, w.k, block, super, s, m, total), m += 4;
    if (m + 2 <= x.m) meet<2>(x, w.k, block, super, s, m, total), m += 2;
    if (m < x.m) meet<1>(x, w.k, block, super, s, m, total);
  }
  for (int64_t m = 0, mr = 8; m < x.m; m += mr) {
    while (m + mr > x.m) mr /= 2;
    for (int64_t r = 0; r < std::min(ROWS, w.n - nb * ROWS); ++r)
      for (int64_t i = 0; i < mr; ++i) store(y, (m + i) * w.n + nb * ROWS + r, dtype, total[m * ROWS + r * mr + i]);
  }
}

inline Rows rows_of(const Weight& w) {
  return with_form(w, [](auto form) -> Rows { return rows<decltype(form)>; });
}

}  // namespace bitsmith::grids::vectors
#endif
