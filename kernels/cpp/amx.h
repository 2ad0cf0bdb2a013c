// AMX: many rows. 32 outputs are decoded a chunk at a time into the first-level cache and multiplied with 32 rows of
// activations; for more rows than that, all inputs of 32 outputs are decoded once into the second-level cache.
#pragma once
#include "avx512.h"

#if BITSMITH_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define BITSMITH_AMX \
  __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16,f16c,fma,avx2")))
#define BITSMITH_AMX_INLINE BITSMITH_AMX inline __attribute__((always_inline))

namespace bitsmith::amx {

inline bool supported() {
  // Linux hands out the tile registers on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  return avx512::supported() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums of (rows 0-15, 16-31) x (outputs 0-15, 16-31); 4, 5: activations; 6, 7: weights.
BITSMITH_AMX_INLINE void configure(int64_t rows, int64_t bytes) {
  Config config;
  const int high = static_cast<int>(std::min<int64_t>(rows, 16)), low = static_cast<int>(std::max<int64_t>(rows - 16, 1));
  for (int t = 0; t < 4; ++t) config.rows[t] = static_cast<uint8_t>(t < 2 ? high : low), config.columns[t] = 64;
  for (int t = 4; t < 6; ++t) config.rows[t] = static_cast<uint8_t>(t == 4 ? high : low), config.columns[t] = static_cast<uint16_t>(bytes);
  for (int t = 6; t < 8; ++t) config.rows[t] = static_cast<uint8_t>(bytes / 4), config.columns[t] = 64;
  _tile_loadconfig(&config);
}

// One chunk of two row blocks -> panel [chunk inputs / 4 (BFLOAT: / 2)][2][64 bytes].
template <int BITS, int KIND>
BITSMITH_AMX_INLINE void decode(const Weight& w, const avx512::Table<BITS>& table, int64_t nb, int64_t first, int64_t stop, uint8_t* panel) {
  const int64_t k_blocks = w.k_blocks(), last_block = w.row_blocks() - 1;
  for (int64_t kb = first; kb < stop; ++kb) {
    for (int64_t half = 0; half < 2; ++half) {
      __m512i v[8];
      if (kb < k_blocks) {
        const uint8_t* codes = w.block(std::min(nb + half, last_block), kb);
        if constexpr (BITS < 8) ahead<BITS, 2>(codes);
        avx512::unpack<BITS>(codes, v);
      } else {
        for (auto& one : v) one = _mm512_setzero_si512();
      }
      uint8_t* out = panel + (kb - first) * (KIND == INT8 ? 16 : 32) * 64 + half * 64;
      for (int j = 0; j < 8; ++j) {
        if constexpr (KIND == INT8) {
          _mm512_store_si512(out + j * 128, v[j]);
        } else {
          __m512i even, odd;
          table.look_up(v[j], even, odd);
          if (kb >= k_blocks) even = odd = _mm512_setzero_si512();
          _mm512_store_si512(out + j * 256, even);
          _mm512_store_si512(out + j * 256 + 128, odd);
        }
      }
    }
  }
}

// total [32 rows][32 outputs] += chunk c of rows m0 .. m0 + rows - 1.
template <int KIND>
BITSMITH_AMX_INLINE void multiply(const Input& x, const uint8_t* panel, int64_t c, int64_t inputs, int64_t bytes,
                                  int64_t m0, int64_t rows, const __m512 (&scale)[2], const __m512 (&zero)[2], float* total) {
  constexpr int64_t SIZE = KIND == INT8 ? 1 : 2;
  const int64_t stride = x.stride * SIZE;
  const uint8_t* a = (KIND == INT8 ? reinterpret_cast<const uint8_t*>(x.q.data()) : reinterpret_cast<const uint8_t*>(x.b.data())) +
                     m0 * stride + c * x.chunk * SIZE;
  const bool both = rows > 16;
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  // bytes of activations a step are bytes / 4 rows of the panel.
  for (int64_t at = 0; at < inputs * SIZE; at += bytes) {
    const uint8_t* b = panel + at / 4 * 128;
    _tile_loadd(6, b, 128);
    _tile_loadd(4, a + at, stride);
    _tile_loadd(7, b + 64, 128);
    if constexpr (KIND == INT8) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (both) {
      _tile_loadd(5, a + at + 16 * stride, stride);
      if constexpr (KIND == INT8) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  alignas(64) int32_t sums[32 * 32];
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if (both) {
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
  }
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t at = (m0 + m) * x.chunks + c;
    const __m512 sum = _mm512_set1_ps(x.sum[at]), step = _mm512_set1_ps(x.scale[at]);
    for (int64_t half = 0; half < 2; ++half) {
      float* out = total + m * 32 + half * 16;
      const __m512i raw = _mm512_load_si512(sums + m * 32 + half * 16);
      __m512 dot;
      if constexpr (KIND == INT8) dot = _mm512_mul_ps(_mm512_cvtepi32_ps(raw), step);
      else dot = _mm512_castsi512_ps(raw);
      dot = _mm512_fnmadd_ps(zero[half], sum, dot);
      _mm512_store_ps(out, _mm512_fmadd_ps(dot, scale[half], _mm512_load_ps(out)));
    }
  }
}

// Outputs of row blocks nb and nb + 1, all rows.
template <int BITS, int KIND>
BITSMITH_AMX void many(const Weight& w, const Input& x, int64_t nb, void* y, int32_t dtype) {
  constexpr int64_t SIZE = KIND == INT8 ? 1 : 2;
  const int64_t bytes = std::min<int64_t>(x.chunk * SIZE, 64), per = x.chunk / BLOCK, groups = w.groups();
  const int64_t last_block = w.row_blocks() - 1;
  const bool whole = x.m > 32;
  // Bytes of a decoded block: 32 inputs x 32 outputs.
  const int64_t decoded = BLOCK * 32 * SIZE, blocks = whole ? x.inputs / BLOCK : per;
  alignas(64) static thread_local std::vector<uint8_t> scratch;
  if (static_cast<int64_t>(scratch.size()) < blocks * decoded + 64) scratch.resize(blocks * decoded + 64);
  uint8_t* panel = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  const avx512::Table<BITS> table(KIND == BFLOAT ? w.values : nullptr);
  if (whole) decode<BITS, KIND>(w, table, nb, 0, x.inputs / BLOCK, panel);
  alignas(64) float total[32 * 32];
  int64_t configured = 0;
  for (int64_t m0 = 0; m0 < x.m; m0 += 32) {
    const int64_t rows = std::min<int64_t>(32, x.m - m0);
    if (rows != configured) configure(rows, bytes), configured = rows;
    std::memset(total, 0, sizeof total);
    Groups group{w.group};
    for (int64_t c = 0; c < x.chunks; ++c) {
      const int64_t inputs = std::min(x.chunk, x.inputs - c * x.chunk);
      if (!whole) decode<BITS, KIND>(w, table, nb, c * per, c * per + inputs / BLOCK, panel);
      __m512 scale[2], zero[2];
      const int64_t own = group.next(x.chunk);
      for (int64_t half = 0; half < 2; ++half) avx512::scales16(w, std::min(nb + half, last_block), own, groups, scale[half], zero[half]);
      multiply<KIND>(x, whole ? panel + c * per * decoded : panel, c, inputs, bytes, m0, rows, scale, zero, total);
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t half = 0; half < 2 && nb + half <= last_block; ++half)
        avx512::store16(y, (m0 + m) * w.n + (nb + half) * ROWS, dtype, _mm512_load_ps(total + m * 32 + half * 16), w.n - (nb + half) * ROWS);
  }
  _tile_release();
}

}  // namespace bitsmith::amx
#endif
