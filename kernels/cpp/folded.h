// AMX, more rows than decoding costs: weights are decoded once, scaled, rounded to bfloat16 and kept in the second-level cache
// while all rows of bfloat16 activations pass. Sums stay in the tiles over the whole of K.
#pragma once
#include "amx.h"

#if BITSMITH_X86 && defined(__linux__)
namespace bitsmith::folded {

// A panel: [inputs / 2][2][64 bytes] of 32 outputs, as amx::decode writes for BFLOAT.
constexpr int64_t PANEL_OUTPUTS = 32, PANEL_BYTES = 512 << 10;

// Two vectors of float32 (inputs of even and odd words) -> 16 lanes of bfloat16 pairs.
BITSMITH_AMX_INLINE __m512i pairs(__m512 low, __m512 high, __m512i order) {
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

template <int BITS, int KIND>
BITSMITH_AMX_INLINE void decode(const Weight& w, const avx512::Table<BITS>& table, int64_t nb, int64_t k_end, uint8_t* panel) {
  const int64_t k_blocks = w.k_blocks(), groups = w.groups(), last_block = w.row_blocks() - 1;
  alignas(64) uint16_t interleave[32];
  for (int i = 0; i < 16; ++i) interleave[2 * i] = static_cast<uint16_t>(i), interleave[2 * i + 1] = static_cast<uint16_t>(16 + i);
  const __m512i order = _mm512_load_si512(interleave), byte = _mm512_set1_epi32(0xff), upper = _mm512_set1_epi32(0xffff0000);
  for (int64_t half = 0; half < 2; ++half) {
    __m512 scale = _mm512_setzero_ps(), zero = scale;
    int64_t group = -1;
    for (int64_t kb = 0; kb < k_end; ++kb) {
      uint8_t* out = panel + kb * 32 * 64 + half * 64;
      if (kb >= k_blocks) {
        for (int j = 0; j < 16; ++j) _mm512_store_si512(out + j * 128, _mm512_setzero_si512());
        continue;
      }
      if (kb * BLOCK / w.group != group) {
        group = kb * BLOCK / w.group;
        avx512::scales16(w, std::min(nb + half, last_block), group, groups, scale, zero);
      }
      __m512i v[8];
      const uint8_t* codes = w.block(std::min(nb + half, last_block), kb);
      if constexpr (BITS < 8) ahead<BITS, 2>(codes);
      avx512::unpack<BITS>(codes, v);
      for (int j = 0; j < 8; ++j) {
        __m512 value[4];
        if constexpr (KIND == INT8) {
          for (int b = 0; b < 4; ++b)
            value[b] = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v[j], 8 * b), byte)), zero);
        } else {
          __m512i even, odd;
          table.look_up(v[j], even, odd);
          value[0] = _mm512_castsi512_ps(_mm512_slli_epi32(even, 16));
          value[2] = _mm512_castsi512_ps(_mm512_and_si512(even, upper));
          value[1] = _mm512_castsi512_ps(_mm512_slli_epi32(odd, 16));
          value[3] = _mm512_castsi512_ps(_mm512_and_si512(odd, upper));
          if (w.zeros)
            for (auto& one : value) one = _mm512_sub_ps(one, zero);
        }
        for (auto& one : value) one = _mm512_mul_ps(one, scale);
        _mm512_store_si512(out + j * 256, pairs(value[0], value[2], order));
        _mm512_store_si512(out + j * 256 + 128, pairs(value[1], value[3], order));
      }
    }
  }
}

// Row blocks that share one pass over the activations.
inline int64_t width(const Weight& w, int64_t threads) {
  const int64_t inputs = (w.k + 63) / 64 * 64, pairs_of_blocks = (w.row_blocks() + 1) / 2;
  const int64_t fit = std::max<int64_t>(1, PANEL_BYTES / (inputs * PANEL_OUTPUTS * 2));
  return 2 * std::min(fit, std::max<int64_t>(1, pairs_of_blocks / (4 * threads)));
}

BITSMITH_AMX_INLINE void multiply(const uint16_t* a, int64_t inputs, int64_t stride, const uint8_t* panel, bool both) {
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < inputs; k += 32) {
    const uint8_t* b = panel + k / 2 * 128;
    _tile_loadd(6, b, 128);
    _tile_loadd(4, a + k, stride * 2);
    _tile_loadd(7, b + 64, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, a + k + 16 * stride, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Outputs of row blocks nb .. nb + count - 1, all rows. x as BFLOAT, whatever the kind.
template <int BITS, int KIND>
BITSMITH_AMX void rows(const Weight& w, const Input& x, int64_t nb, int64_t count, void* y, int32_t dtype) {
  const int64_t panel_size = x.inputs * PANEL_OUTPUTS * 2, last = std::min(nb + count, w.row_blocks());
  static thread_local std::vector<uint8_t> scratch;
  if (static_cast<int64_t>(scratch.size()) < panel_size * ((count + 1) / 2) + 64) scratch.resize(panel_size * ((count + 1) / 2) + 64);
  uint8_t* panels = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  const avx512::Table<BITS> table(KIND == BFLOAT ? w.values : nullptr);
  for (int64_t b = nb; b < last; b += 2) decode<BITS, KIND>(w, table, b, x.inputs / BLOCK, panels + (b - nb) / 2 * panel_size);
  alignas(64) float sums[32 * 32];
  int64_t configured = 0;
  for (int64_t m0 = 0; m0 < x.m; m0 += 32) {
    const int64_t present = std::min<int64_t>(32, x.m - m0);
    if (present != configured) amx::configure(present, 64), configured = present;
    for (int64_t b = nb; b < last; b += 2) {
      multiply(x.b.data() + m0 * x.stride, x.inputs, x.stride, panels + (b - nb) / 2 * panel_size, present > 16);
      _tile_stored(0, sums, 128);
      _tile_stored(1, sums + 16, 128);
      if (present > 16) {
        _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 528, 128);
      }
      for (int64_t m = 0; m < present; ++m)
        for (int64_t half = 0; half < 2 && b + half < last; ++half)
          avx512::store16(y, (m0 + m) * w.n + (b + half) * ROWS, dtype, _mm512_load_ps(sums + m * 32 + half * 16), w.n - (b + half) * ROWS);
    }
  }
  _tile_release();
}

}  // namespace bitsmith::folded
#endif
