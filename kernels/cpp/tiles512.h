// AVX-512: products of many rows of int8 activations, recorded eight rows by some inputs at a time, in the order they are read in.
#pragma once
#include "avx512.h"

#if BITSMITH_X86
namespace bitsmith::avx512 {

// Inputs of a record: what follows each other in a tile's sums.
constexpr int64_t step_of(int64_t chunk) { return std::max<int64_t>(chunk, 128); }

// Scales and zero points of the chunks of a record, four at most. `whole`: every zero point is the integer `zero`, where sums begin.
struct Levels {
  __m512 scale[4], zero[4];
  bool whole;
};

// A step of TILE rows, `place`d: codes of four inputs, then of each chunk the starts (`low`), scales and sums. Records of the tiles follow each
// other, then those of the next step: the order they are read in.
constexpr int64_t record_bytes(int64_t chunk) { return (step_of(chunk) + step_of(chunk) / chunk * 12) * TILE; }

// Whether activations are recorded: where there are many, or chunks are short. A tile's missing rows are multiplied too, whatever they hold.
inline bool recorded(const Input& x) { return x.m > TILE || (x.m > 4 && x.chunk == BLOCK); }

inline void record(const Input& x, int64_t tile, int64_t step, uint8_t* to) {
  const int64_t inputs = step_of(x.chunk), from = step * inputs, first = from / x.chunk;
  const int64_t chunks = std::min(inputs / x.chunk, x.chunks - first), next = inputs / x.chunk * TILE * 4;
  avx2::place_codes(x.q.data() + tile * TILE * x.stride + from, x.stride, std::min(inputs, x.inputs - from) / 4, to);
  for (int64_t row = tile * TILE; row < std::min(x.m, (tile + 1) * TILE); ++row, to += 4) {
    uint8_t* of_chunks = to + inputs * TILE;
    const int64_t at = row * x.chunks + first;
    place(x.low.data() + at, chunks, of_chunks);
    place(x.scale.data() + at, chunks, of_chunks + next);
    place(x.sum.data() + at, chunks, of_chunks + 2 * next);
  }
}

// The codes of the step after the next, of which every tile asks for a share: all asked for by the first tile come late (8 bits, 5632 x 2048, 32 rows,
// two cores: 0.94 -> 0.87 ms). `lines` of 64 bytes a block are a tile's, `left` those that nobody has asked for.
struct Coming {
  const uint8_t* at;
  int64_t lines, left;

  BITSMITH_512_INLINE void ask(int64_t block) const {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + (block * lines + i) * 64, 0, 2);
  }

  BITSMITH_512_INLINE void next(int64_t blocks) {
    at += blocks * lines * 64, left -= lines;
    if (left <= 0) lines = 0;
  }
};

// Blocks of a chunk where an output has one scale, which is left to the end (8 bits, 32 rows, in caches: 220 -> 226 of 236 GMAC/s a core).
constexpr int ONE = LONGEST;

// total [MR][16] += `blocks` times 32 inputs of MR rows of a record, PER blocks a chunk; starts: they are the first. codes: as stored. Unpacking them
// for every tile anew is done beside the dot products, where loads of bytes unpacked before are not (5632 x 2048, 4 bits, one core: 9 rows 0.91 ->
// 0.74 ms, 32 2.03 -> 1.92, 512 the same).
template <int BITS, int MR, int PER>
BITSMITH_512_INLINE void tile(const uint8_t* record, const uint8_t* codes, const Levels& by, int64_t blocks, bool starts, const Coming& coming, float* total) {
  constexpr int64_t inputs = step_of(PER * BLOCK), next = inputs / BLOCK / PER * TILE * 4;
  const uint8_t* of_chunk = record + inputs * TILE;
  __m512 all[MR];
  for (int m = 0; m < MR; ++m) all[m] = starts ? _mm512_setzero_ps() : _mm512_loadu_ps(total + m * ROWS);
  for (int64_t first = 0; first < blocks; first += PER, of_chunk += TILE * 4) {
    __m512i acc[MR];
    for (int m = 0; m < MR; ++m) acc[m] = by.whole ? spread(of_chunk + 4 * m) : _mm512_setzero_si512();
    for (int64_t b = first; b < (PER == 1 ? first + 1 : std::min(first + PER, blocks)); ++b) {
      __m512i v[8];
      if constexpr (PER == ONE) coming.ask(b);
      else ahead<BITS, MR>(codes + b * 64 * BITS);
      unpack<BITS>(codes + b * 64 * BITS, v);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) acc[m] = add_dot(acc[m], v[j], record + ((8 * b + j) * TILE + m) * 4);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512 dot = _mm512_cvtepi32_ps(acc[m]), step = _mm512_castsi512_ps(spread(of_chunk + next + 4 * m));
      __m512 value = PER == ONE ? _mm512_fmadd_ps(dot, step, all[m]) : _mm512_mul_ps(dot, step);
      if (!by.whole) value = _mm512_fnmadd_ps(by.zero[first / PER], _mm512_castsi512_ps(spread(of_chunk + 2 * next + 4 * m)), value);
      all[m] = PER == ONE ? value : _mm512_fmadd_ps(value, by.scale[first / PER], all[m]);
    }
  }
  for (int m = 0; m < MR; ++m) _mm512_storeu_ps(total + m * ROWS, all[m]);
}

// 16 outputs, all rows of int8 activations.
template <int BITS, int PER>
BITSMITH_512 void many(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  constexpr int64_t step = step_of(PER * BLOCK) / BLOCK;
  float* const totals = scratch((x.m + TILE) * ROWS);
  const int64_t size = record_bytes(x.chunk), k_blocks = w.k_blocks(), groups = w.groups();
  const int64_t tiles = (x.m + TILE - 1) / TILE, lines = (BITS + tiles - 1) / tiles;
  const uint8_t* record = x.records.data();
  Groups group{w.group};
  Levels by;
  by.whole = w.whole_zero();
  for (int64_t kb = 0; kb < k_blocks; kb += step) {
    const int64_t blocks = std::min(step, k_blocks - kb);
    const uint8_t* codes = w.block(nb, kb);
    for (int64_t i = 0; i * PER < blocks; ++i) scales16(w, nb, group.next(x.chunk), groups, by.scale[i], by.zero[i]);
    float* total = totals;
    Coming coming{codes + 2 * step * 64 * BITS, lines, BITS};
    for (int64_t left = x.m; left > 0; left -= TILE, record += size, total += TILE * ROWS) {
      if (left > 4) tile<BITS, TILE, PER>(record, codes, by, blocks, kb == 0, coming, total);
      else if (left > 2) tile<BITS, 4, PER>(record, codes, by, blocks, kb == 0, coming, total);
      else tile<BITS, 2, PER>(record, codes, by, blocks, kb == 0, coming, total);
      coming.next(step);
    }
  }
  const __m512 last = PER == ONE ? by.scale[0] : _mm512_set1_ps(1);
  for (int64_t m = 0; m < x.m; ++m) store16(y, m * w.n + nb * ROWS, dtype, _mm512_mul_ps(_mm512_loadu_ps(totals + m * ROWS), last), w.n - nb * ROWS);
}

template <int BITS, int KIND>
BITSMITH_512 void rows(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  if constexpr (KIND == INT8)
    if (recorded(x)) {
      if (w.one_scale()) return many<BITS, ONE>(w, x, nb, y, dtype);
      if (x.chunk == BLOCK) return many<BITS, 1>(w, x, nb, y, dtype);
      return x.chunk == 2 * BLOCK ? many<BITS, 2>(w, x, nb, y, dtype) : many<BITS, 4>(w, x, nb, y, dtype);
    }
  int64_t m = 0;
  for (; m + 8 <= x.m; m += 8) few<BITS, KIND, 8>(w, x, m, nb, y, dtype);
  switch (x.m - m) {
    case 1: return few<BITS, KIND, 1>(w, x, m, nb, y, dtype);
    case 2: return few<BITS, KIND, 2>(w, x, m, nb, y, dtype);
    case 3: return few<BITS, KIND, 3>(w, x, m, nb, y, dtype);
    case 4: return few<BITS, KIND, 4>(w, x, m, nb, y, dtype);
    case 5: return few<BITS, KIND, 5>(w, x, m, nb, y, dtype);
    case 6: return few<BITS, KIND, 6>(w, x, m, nb, y, dtype);
    case 7: return few<BITS, KIND, 7>(w, x, m, nb, y, dtype);
    default: return;
  }
}

}  // namespace bitsmith::avx512
#endif
