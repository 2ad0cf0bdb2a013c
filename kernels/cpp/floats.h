// Products in float32 of weights that are decoded a panel at a time: 16 outputs by some inputs, in the first-level cache. Activations
// are not rounded. One skeleton (panel.h), several decoders (scalars.h, trellis.h, vectors.h), each a function that fills a panel;
// and dots.h, which does without. With AVX-512, bfloat16 activations take floats512.h, which rounds weights to bfloat16.
//
// The bodies are written in vectors that GCC and Clang lower to any machine and are compiled twice on x86: for AVX2 with FMA and
// F16C, and plainly, which is also what ARM gets. Only look-ups and conversions differ (panel.h).
#pragma once
#include <type_traits>
#include <utility>

#include "common.h"

namespace bitsmith {

// How codes become values. AFFINE .. ROW_TABLE read the codes of common.h; E4M3 and E5M2 are tables that vectors can compute.
enum Form : int32_t { AFFINE = 0, TABLE = 1, E4M3 = 2, E5M2 = 3, ROW_TABLE = 4, TRELLIS = 5, VECTORS = 6 };
// Functions of a trellis state, Source::table_kind.
enum States : int32_t { INST3 = 0, MCG = 1, MUL1 = 2 };

// Mirrored by kernels/native_float.py. Groups are multiples of 8, or >= k.
//
//   TRELLIS  codes [n / 16][k / 16][bits][8] words: a tile's 8 * bits words (kernels/trellis.py) are `bits` words for each pair of
//            outputs, kept with those of all pairs side by side
//   VECTORS  codes as a QTensor has them, a bit stream a row of `words` words
struct Source {
  Weight w;
  // TABLE, E4M3, E5M2: float32 [256]. ROW_TABLE: [n][2^bits]. VECTORS: [books][2^bits][vec].
  const void* table;
  int64_t words;
  float factor;  // of all scales that have one level
  int32_t form, table_kind, vec, books;  // table_kind: States of TRELLIS, Dtype of ROW_TABLE and VECTORS
};

// Activations of a slab of rows as float32, in blocks of up to 6: [k][rows of the block].
struct Slab {
  static constexpr int64_t BLOCK_ROWS = 6;
  int64_t m, k, blocks;
  std::vector<float> x;

  void shape(int64_t rows, int64_t inputs, int64_t block_rows = BLOCK_ROWS) {
    m = rows, k = inputs, blocks = (rows + block_rows - 1) / block_rows;
    if (static_cast<int64_t>(x.size()) < m * k) x.resize(static_cast<size_t>(m * k));
  }
  int64_t first(int64_t block) const { return block * m / blocks; }
  int64_t rows(int64_t block) const { return first(block + 1) - first(block); }
};

// Inputs of a panel: 16 KB of float32, half of a first-level cache.
constexpr int64_t PANEL = 256;
// Panels whose products with one stretch of the activations follow each other, so that those stay in the second-level cache.
constexpr int64_t PANELS = 4;
// Rows multiplied with a panel before it is decoded anew: their stretch of activations takes 250 KB.
constexpr int64_t SLAB = 40 * Slab::BLOCK_ROWS;

using Decode = void (*)(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel);
using Dots = void (*)(const Source& s, const Slab& slab, int64_t nb, void* y, int32_t dtype);

}  // namespace bitsmith

#if BITSMITH_X86
#define BITSMITH_FLOATS floats256
#define BITSMITH_LANES 8
#define BITSMITH_TARGET __attribute__((target("avx2,fma,f16c")))
#include "panel.h"
#include "scalars.h"
#include "trellis.h"
#include "vectors.h"
#include "dots.h"
#undef BITSMITH_FLOATS
#undef BITSMITH_LANES
#undef BITSMITH_TARGET

namespace bitsmith::floats256 {
inline bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
}  // namespace bitsmith::floats256
#endif

#define BITSMITH_FLOATS floats
#define BITSMITH_LANES 4
#define BITSMITH_TARGET
#include "panel.h"
#include "scalars.h"
#include "trellis.h"
#include "vectors.h"
#include "dots.h"
#undef BITSMITH_FLOATS
#undef BITSMITH_LANES
#undef BITSMITH_TARGET
