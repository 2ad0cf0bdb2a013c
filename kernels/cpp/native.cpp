// Products of quantized weights with activations on the CPU; Python calls it through kernels/library.py. See common.h for the layout.
#include "amx.h"
#include "attend.h"
#include "attend512.h"
#include "avx2.h"
#include "avx512.h"
#include "blocks.h"
#include "chain.h"
#include "chunk512.h"
#include "common.h"
#include "floats.h"
#include "floats512.h"
#include "folded.h"
#include "generic.h"
#include "grids.h"
#include "grids256.h"
#include "grids512.h"
#include "grids_row512.h"
#include "layer.h"
#include "neon.h"
#include "neon_grids.h"
#include "neon_two_level.h"
#include "pack.h"
#include "pool.h"
#include "rotate.h"
#include "tiles512.h"
#include "trellis512.h"
#include "two_level.h"
#include "two_level256.h"
#include "two_level512.h"

#if defined(_WIN32)
#define BITSMITH_API extern "C" __declspec(dllexport)
#else
#define BITSMITH_API extern "C" __attribute__((visibility("default")))
#endif

using namespace bitsmith;

namespace {

enum Path : int32_t { GENERIC = 0, AVX2 = 1, AVX512 = 2, AMX = 3, FOLDED = 4, NEON = 5, NEON_SDOT = 6 };

using Rows = void (*)(const Weight&, const Input&, int64_t nb, void* y, int32_t dtype);
using Prepare = void (*)(const Weight&, const void* x, int32_t dtype, int64_t row, Input&);

int32_t best_path() {
#if BITSMITH_X86
#if defined(__linux__)
  static const bool tiles = amx::supported();
  if (tiles) return AMX;
#endif
  if (avx512::supported()) return AVX512;
  if (avx2::supported()) return AVX2;
#endif
#if BITSMITH_NEON
  return neon::has_sdot() ? NEON_SDOT : NEON;
#endif
  return GENERIC;
}

// Several row blocks at a time, or null where one is taken after the other.
using Panels = void (*)(const Weight&, const Input&, int64_t nb, int64_t count, void* y, int32_t dtype);

Panels panels_of([[maybe_unused]] const Weight& w, [[maybe_unused]] int64_t m, [[maybe_unused]] int32_t path) {
#if BITSMITH_X86
#if defined(__linux__)
  if (path == FOLDED && w.kind == INT8) BITSMITH_BY_BITS(w.bits, folded::rows, INT8)
  if (path == FOLDED) BITSMITH_BY_BITS(w.bits, folded::rows, BFLOAT)
#endif
  if (path == AVX512 && pairs512::taken(w, m)) BITSMITH_BY_BITS(w.bits, pairs512::table_rows, BFLOAT)
#endif
  return nullptr;
}

Rows rows_of([[maybe_unused]] const Weight& w, [[maybe_unused]] int32_t path) {
#if BITSMITH_X86
#if defined(__linux__)
  if (path == AMX && w.kind == INT8) BITSMITH_BY_BITS(w.bits, amx::many, INT8)
  if (path == AMX) BITSMITH_BY_BITS(w.bits, amx::many, BFLOAT)
#endif
  if (path == AVX512 && w.kind == INT8) BITSMITH_BY_BITS(w.bits, avx512::rows, INT8)
  if (path == AVX512) BITSMITH_BY_BITS(w.bits, avx512::rows, BFLOAT)
  if (path == AVX2) BITSMITH_BY_BITS(w.bits, avx2::rows, INT8)
#endif
#if BITSMITH_NEON
  if (path == NEON_SDOT) BITSMITH_BY_BITS(w.bits, neon::rows, neon::Dot)
  if (path == NEON) BITSMITH_BY_BITS(w.bits, neon::rows, neon::Widen)
#endif
  return generic::rows;
}

Prepare prepare_of([[maybe_unused]] const Weight& w, [[maybe_unused]] int32_t path) {
#if BITSMITH_X86
  if (path == FOLDED) return avx512::prepare<BFLOAT>;
  if (path == AVX2) return avx2::prepare;
  if (path >= AVX512) return w.kind == INT8 ? avx512::prepare<INT8> : avx512::prepare<BFLOAT>;
#endif
#if BITSMITH_NEON
  if (path >= NEON) return neon::prepare;
#endif
  return generic::prepare;
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

void shape(const Weight& w, int32_t kind, int64_t m, Input& x) {
  x.m = m;
  x.chunk = w.chunk();
  x.inputs = round_up(round_up(w.k, 64), x.chunk <= 128 ? x.chunk : 64);
  // A cache line more, or the 16 rows of a tile would share a few sets of the first-level cache (pages of 4 KB).
  x.stride = x.inputs + 64;
  x.chunks = (round_up(w.k, BLOCK) + x.chunk - 1) / x.chunk;
  // Tiles read 16 rows, whatever their number.
  const size_t size = static_cast<size_t>(round_up(m, 16) * x.stride);
  if (kind == INT8 && x.q.size() < size) x.q.resize(size);
  if (kind == BFLOAT && x.b.size() < size) x.b.resize(size);
  const size_t sums = static_cast<size_t>(m * x.chunks);
  if (x.scale.size() < sums) x.scale.resize(sums), x.sum.resize(sums), x.low.resize(sums);
}

// Where tiles begin to pay (below, their fixed 16 rows are mostly padding), and then panels. Short chunks apply scales more often.
// Measured on a Xeon with AMX, 5632 x 2048, 4 bits, two threads (ms): 8 rows, chunks of 32: vectors 0.40, tiles 0.45; 32 rows, chunks of
// 32 / 64 / 128: tiles 0.97 / 0.62 / 0.48, panels 0.74 / 0.71 / 0.69; 128 rows, chunks of 128: tiles 1.71, panels 1.47.
constexpr int64_t FEW_ROWS = 4;

int32_t choose(const Weight& w, int64_t m) {
  const int32_t best = best_path();
  if (best != AMX) return best;
  const int64_t chunk = w.chunk(), panels = w.kind == BFLOAT ? 48 : chunk == 32 ? 24 : chunk == 64 ? 40 : 80;
  const int64_t few = w.kind == BFLOAT ? 2 : chunk == 32 ? 8 : FEW_ROWS;
  return m <= few ? AVX512 : m < panels ? AMX : FOLDED;
}

#if BITSMITH_X86
// record(tile, step, bytes) for every tile of m rows and every step, in their order.
template <class Record>
void records(int64_t m, int64_t steps, int64_t size, int32_t threads, std::vector<uint8_t>& out, const Record& record) {
  const int64_t tiles = (m + TILE - 1) / TILE, count = tiles * steps;
  if (static_cast<int64_t>(out.size()) < count * size) out.resize(static_cast<size_t>(count * size));
  pool().run(count, threads, [&](int64_t i) { record(i % tiles, i / tiles, out.data() + i * size); });
}
#endif

// Rows that go through a product together: activations of more would leave the second-level cache between two blocks of outputs (4096 x 14336,
// 2048 rows, two threads: 4-bit 381 -> 320 ms, Q4_K 775 -> 454).
constexpr int64_t TOGETHER = 1 << 19;

// Rows of bfloat16 activations that pass each panel of pairs512.h, at most: decoding it takes what 4 to 16 rows do.
constexpr int64_t PAIRED = 512;

// m rows in equal parts of whole tiles, at least one: the rows of a part.
int64_t part_of(int64_t m, int64_t parts) {
  parts = std::max<int64_t>(1, parts);
  return round_up((m + parts - 1) / parts, TILE);
}

int64_t together(int64_t m, int64_t k) { return part_of(m, (m * k + TOGETHER - 1) / TOGETHER); }
int64_t paired(int64_t m) { return part_of(m, (m + PAIRED - 1) / PAIRED); }

const void* row_of(const void* p, int64_t at, int32_t dtype) { return static_cast<const char*>(p) + at * (dtype == F32 ? 4 : 2); }
void* row_of(void* p, int64_t at, int32_t dtype) { return static_cast<char*>(p) + at * (dtype == F32 ? 4 : 2); }

// bitsmith_linear of rows that fit a cache.
void product(const Weight& w, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype, int32_t threads, int32_t path) {
  static thread_local Input buffers;
  Input& in = buffers;
  shape(w, path == FOLDED ? BFLOAT : w.kind, m, in);
  const Prepare prepare = prepare_of(w, path);
  const Panels panels = panels_of(w, m, path);
  int64_t wide = path == AMX ? 2 : panels ? PANELS : 1;
#if BITSMITH_X86 && defined(__linux__)
  if (path == FOLDED) wide = folded::width(w, threads);
#endif
  const Rows rows = rows_of(w, path);
  const int64_t count = (w.row_blocks() + wide - 1) / wide;
  const auto one = [&](int64_t row) { prepare(w, x, x_dtype, row, in); };
  // Waking a thread costs what 16 thousand inputs do.
  pool().run(m, m * w.k < (1 << 15) ? 1 : threads, one);
#if BITSMITH_X86
  if (path == AVX512 && w.kind == INT8 && avx512::recorded(in))
    records(m, (in.inputs + avx512::step_of(in.chunk) - 1) / avx512::step_of(in.chunk), avx512::record_bytes(in.chunk), threads, in.records,
            [&](int64_t tile, int64_t step, uint8_t* to) { avx512::record(in, tile, step, to); });
  if (path == AVX512 && panels)
    records(m, (w.k_blocks() * BLOCK + pairs512::STEP - 1) / pairs512::STEP, pairs512::RECORD_BYTES, threads, in.records,
            [&](int64_t tile, int64_t step, uint8_t* to) { pairs512::record(in.b.data(), in.stride, m, w.k_blocks() * BLOCK, tile, step, to); });
#endif
  pool().run(count, threads, [&](int64_t i) {
    if (panels) return panels(w, in, i * wide, std::min(wide, w.row_blocks() - i * wide), y, y_dtype);
    rows(w, in, i * wide, y, y_dtype);
  });
}

#if BITSMITH_X86
// bitsmith_floats of bfloat16 activations with AVX-512.
void floats_pairs(const Source& s, const uint16_t* x, int64_t m, void* y, int32_t y_dtype, int32_t threads) {
  static thread_local std::vector<uint8_t> buffer;
  const int64_t k = s.w.k, steps = (k + pairs512::STEP - 1) / pairs512::STEP, count = s.w.row_blocks(), most = paired(m);
  for (int64_t first = 0; first < m; first += most) {
    const int64_t part = std::min(most, m - first), wide = part <= TILE ? 1 : PANELS;
    const uint16_t* from = x + first * k;
    void* to = row_of(y, first * s.w.n, y_dtype);
    records(part, steps, pairs512::RECORD_BYTES, part * k < (1 << 15) ? 1 : threads, buffer,
            [&](int64_t tile, int64_t step, uint8_t* out) { pairs512::record(from, k, part, k, tile, step, out); });
    // Of this thread: a task may be another's.
    const uint8_t* recorded = buffer.data();
    pool().run((count + wide - 1) / wide, threads, [&](int64_t task) {
      floats512::rows(s, part, recorded, task * wide, std::min(wide, count - task * wide), to, y_dtype);
    });
  }
}
#endif

// Whether activations of many rows are recorded, and what of their groups.
enum class Records { NONE, STARTS, PAIRS };

// Parts of the rows one after the other: rounds and records their activations, then rows(activations, nb, y of the part) for each block of 16 outputs.
template <class Rows>
void two_level_product(const two_level::Weight& w, void (*prepare)(const two_level::Weight&, const void*, int32_t, int64_t, two_level::Input&),
                       [[maybe_unused]] Records kind, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype, int32_t threads, const Rows& rows) {
  static thread_local two_level::Input buffers;
  two_level::Input& in = buffers;
  const int64_t step = together(m, w.k), count = w.row_blocks();
  for (int64_t first = 0; first < m; first += step) {
    const int64_t part = std::min(step, m - first);
    const void* from = row_of(x, first * w.k, x_dtype);
    void* to = row_of(y, first * w.n, y_dtype);
    two_level::shape(w, part, in);
    pool().run(part, part * w.k < (1 << 15) ? 1 : threads, [&](int64_t row) { prepare(w, from, x_dtype, row, in); });
#if BITSMITH_X86
    const bool pairs = kind == Records::PAIRS;
    if (kind != Records::NONE && two_level::recorded(part))
      records(part, w.chunks(), two_level::record_bytes(w.chunk(), w.group, pairs), threads, in.records,
              [&](int64_t tile, int64_t chunk, uint8_t* to) { two_level::record(w, in, pairs, tile, chunk, to); });
#endif
    pool().run(count, threads, [&](int64_t nb) { rows(in, nb, to); });
  }
}

}  // namespace

// Raised with every change of a signature or a structure below; kernels/library.py refuses a library of another number.
BITSMITH_API int32_t bitsmith_abi() { return 19; }

BITSMITH_API int32_t bitsmith_path() { return best_path(); }

// y [m, n] = x [m, k] @ W^T. x and y dense, float32, bfloat16 or float16. path: -1 = the best for this machine and m.
BITSMITH_API void bitsmith_linear(const Weight* weight, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype,
                                  int32_t threads, int32_t path) {
  const Weight& w = *weight;
  if (path < 0) path = choose(w, m);
  const int64_t step = path == AMX || path == FOLDED ? m : path == AVX512 && w.kind == BFLOAT ? paired(m) : together(m, w.k);
  for (int64_t first = 0; first < m; first += step)
    product(w, row_of(x, first * w.k, x_dtype), x_dtype, std::min(step, m - first), row_of(y, first * w.n, y_dtype), y_dtype, threads, path);
}

// The same of everything that floats.h decodes, in float32; bfloat16 x as in floats512.h where there is AVX-512. path: -1 = the best of this machine;
// AVX2 and GENERIC, which is without its instructions, are for tests.
BITSMITH_API void bitsmith_floats(const Source* source, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype, int32_t threads,
                                  [[maybe_unused]] int32_t path) {
  const Source& s = *source;
  Decode decode = floats::decode_of(s);
  auto prepare = floats::prepare;
  auto rows = floats::rows;
  Dots dots = floats::dots_of(s, m);
#if BITSMITH_X86
  if (path != GENERIC && floats256::supported()) decode = floats256::decode_of(s), prepare = floats256::prepare, rows = floats256::rows, dots = floats256::dots_of(s, m);
  if (path < 0 && x_dtype == BF16 && floats512::taken(s, m) && avx512::supported()) return floats_pairs(s, static_cast<const uint16_t*>(x), m, y, y_dtype, threads);
#endif
  static thread_local Slab buffers;
  Slab& slab = buffers;
  const int64_t count = s.w.row_blocks();
  if (dots) {
    slab.shape(m, s.w.k, 1);
    pool().run(m, m * s.w.k < (1 << 15) ? 1 : threads, [&](int64_t row) { prepare(x, x_dtype, row, slab); });
    pool().run(count, threads, [&](int64_t nb) { dots(s, slab, nb, y, y_dtype); });
    return;
  }
  for (int64_t first = 0; first < m; first += SLAB) {
    const void* from = row_of(x, first * s.w.k, x_dtype);
    void* to = row_of(y, first * s.w.n, y_dtype);
    slab.shape(std::min(SLAB, m - first), s.w.k);
    pool().run(slab.blocks, slab.m * s.w.k < (1 << 15) ? 1 : threads, [&](int64_t block) { prepare(from, x_dtype, block, slab); });
    const int64_t wide = slab.m <= FEW_ROWS ? 1 : PANELS;
    pool().run((count + wide - 1) / wide, threads, [&](int64_t task) {
      rows(decode, s, slab, task * wide, std::min(wide, count - task * wide), to, y_dtype);
    });
  }
}

// Bit stream int32 [n, ceil(k * bits / 32)] of any strides (in words) -> codes of common.h; rows and inputs beyond n and k are zeros.
BITSMITH_API void bitsmith_pack(const uint32_t* stream, int64_t row_stride, int64_t word_stride, int64_t n, int64_t k, int32_t bits, uint8_t* out,
                                int32_t threads) {
  const int64_t k_blocks = (k + BLOCK - 1) / BLOCK, count = (n + ROWS - 1) / ROWS;
  // Where neighbours in memory are rows: a cache line of each word at a time would meet a page each.
  const int64_t share = row_stride == 1 ? 8 : 1;
  pool().run((count + share - 1) / share, threads, [&](int64_t task) {
    for (int64_t kb = 0; kb < k_blocks; ++kb)
      for (int64_t nb = task * share; nb < std::min(count, (task + 1) * share); ++nb) {
        const pack::Stream from{stream + nb * ROWS * row_stride, row_stride, word_stride};
        pack::block(from, kb, std::min(ROWS, n - nb * ROWS), k, bits, out + (nb * k_blocks + kb) * 64 * bits);
      }
  });
}

// Numbers of `size` bytes [n, groups] of any strides (in numbers) -> [row blocks][groups][16]; rows beyond n are zeros.
BITSMITH_API void bitsmith_pack_groups(const void* numbers, int64_t row_stride, int64_t group_stride, int64_t n, int64_t groups, int32_t size,
                                       void* out) {
  if (size == 1) pack::groups(static_cast<const uint8_t*>(numbers), row_stride, group_stride, n, groups, static_cast<uint8_t*>(out));
  else if (size == 2) pack::groups(static_cast<const uint16_t*>(numbers), row_stride, group_stride, n, groups, static_cast<uint16_t*>(out));
  else pack::groups(static_cast<const uint32_t*>(numbers), row_stride, group_stride, n, groups, static_cast<uint32_t*>(out));
}

// Blocks of a file -> all parts, see blocks.h.
BITSMITH_API void bitsmith_pack_blocks(const blocks::Source* source, int32_t threads) {
  pool().run(source->row_blocks(), threads, [&](int64_t nb) { blocks::row_block(*source, nb); });
}

// The inverse of bitsmith_pack.
BITSMITH_API void bitsmith_unpack(const uint8_t* packed, int64_t n, int64_t k, int32_t bits, uint32_t* out, int32_t threads) {
  const int64_t words = (k * bits + 31) / 32, k_blocks = (k + BLOCK - 1) / BLOCK, count = (n + ROWS - 1) / ROWS;
  pool().run(count, threads, [&](int64_t nb) {
    for (int64_t kb = 0; kb < k_blocks; ++kb) {
      alignas(64) uint32_t lane[8][ROWS], word[9][ROWS];
      generic::unpack(packed + (nb * k_blocks + kb) * 64 * bits, bits, reinterpret_cast<uint8_t*>(lane));
      pack::words(lane, bits, word);
      const int64_t have = std::min<int64_t>(bits, words - kb * bits);
      for (int64_t r = 0; r < std::min(ROWS, n - nb * ROWS); ++r)
        for (int64_t i = 0; i < have; ++i) out[(nb * ROWS + r) * words + kb * bits + i] = word[i][r];
    }
  });
}

// Bit streams, `stride` words a row -> codes [n, columns], a byte each up to 8 bits, else int32.
BITSMITH_API void bitsmith_codes(const uint32_t* stream, int64_t stride, int64_t n, int64_t columns, int32_t bits, void* out, int32_t threads) {
  pool().run(n, n * columns < (1 << 16) ? 1 : threads, [&](int64_t row) {
    if (bits <= 8)
      pack::codes(stream + row * stride, columns, bits, static_cast<uint8_t*>(out) + row * columns);
    else
      pack::codes(stream + row * stride, columns, bits, static_cast<uint32_t*>(out) + row * columns);
  });
}

// bitsmith_linear for weights of two_level.h. path: GENERIC = plain loops, for tests; AVX2, NEON, NEON_SDOT; otherwise the best of this machine,
// which must have one of these.
BITSMITH_API void bitsmith_two_level_linear(const two_level::Weight* weight, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype,
                                            int32_t threads, [[maybe_unused]] int32_t path) {
  const two_level::Weight& w = *weight;
  auto prepare = two_level::prepare;
  auto rows = two_level::rows;
  Records kind = Records::NONE;
#if BITSMITH_X86
  const bool wide = path != AVX2 && avx512::supported();
  if (path != GENERIC) {
    kind = wide && !w.mins ? Records::STARTS : Records::PAIRS;
    prepare = wide ? two_level::wide::prepare : two_level::vectors::prepare;
    rows = wide ? two_level::wide::rows_of(w) : two_level::vectors::rows_of(w);
  }
#elif BITSMITH_NEON
  if (path < 0) path = best_path();
  if (path != GENERIC) {
    prepare = two_level::neon::prepare;
    rows = path == NEON ? two_level::neon::rows_of<two_level::neon::Widen>(w) : two_level::neon::rows_of<two_level::neon::Dot>(w);
  }
#endif
  two_level_product(w, prepare, kind, x, x_dtype, m, y, y_dtype, threads,
                    [=](const two_level::Input& in, int64_t nb, void* to) { rows(w, in, nb, to, y_dtype); });
}

// bitsmith_linear for weights of grids.h; path as in bitsmith_two_level_linear.
BITSMITH_API void bitsmith_grids_linear(const grids::Weight* weight, const void* x, int32_t x_dtype, int64_t m, void* y, int32_t y_dtype,
                                        int32_t threads, [[maybe_unused]] int32_t path) {
  const grids::Weight& w = *weight;
  two_level::Weight as{};
  as.n = w.n, as.k = w.k, as.group = w.group;
  as.supers = w.supers;  // For `chunk` alone: they lie otherwise.
  auto prepare = two_level::prepare;
  auto rows = grids::rows;
  Records kind = Records::NONE;
#if BITSMITH_X86
  const bool wide = path != AVX2 && avx512::supported();
  if (path != GENERIC) {
    const grids::Rows alone = wide && m == 1 ? grids::row::rows_of(w) : nullptr;
    if (wide) kind = Records::STARTS, as.zero = alone ? grids::row::UP : grids::BIAS;
    else as.group = 16;  // The sums that grids256.h reads.
    prepare = wide ? two_level::wide::prepare : two_level::vectors::prepare;
    rows = !wide ? grids::vectors::rows_of(w) : alone ? alone : grids::wide::rows_of(w);
  }
#elif BITSMITH_NEON
  if (path < 0) path = best_path();
  if (path != GENERIC) {
    prepare = two_level::neon::prepare;
    rows = path == NEON ? grids::neon::rows_of<grids::neon::Widen>(w) : grids::neon::rows_of<grids::neon::Dot>(w);
  }
#endif
  two_level_product(as, prepare, kind, x, x_dtype, m, y, y_dtype, threads,
                    [=](const two_level::Input& in, int64_t nb, void* to) { rows(w, as, in, nb, to, y_dtype); });
}

// Codes of the scales of n rows, a byte each [n][groups], `per` groups a super block -> the bytes of two_level.h; rows beyond n are zeros.
BITSMITH_API void bitsmith_pack_levels(const uint8_t* codes, int64_t n, int64_t groups, int32_t per, int32_t bits, uint8_t* out) {
  const int64_t size = per * ROWS * bits / 8;
  for (int64_t nb = 0; nb < (n + ROWS - 1) / ROWS; ++nb)
    for (int64_t g = 0; g < groups; g += per, out += size) {
      uint8_t block[16][ROWS] = {};
      for (int64_t i = 0; i < per; ++i)
        for (int64_t r = 0; r < std::min(ROWS, n - nb * ROWS); ++r) block[i][r] = codes[(nb * ROWS + r) * groups + g + i];
      two_level::pack_sub_codes(block, bits, per, out);
    }
}

// The inverse of bitsmith_pack_levels.
BITSMITH_API void bitsmith_unpack_levels(const uint8_t* packed, int64_t n, int64_t groups, int32_t per, int32_t bits, uint8_t* out) {
  const int64_t size = per * ROWS * bits / 8;
  for (int64_t nb = 0; nb < (n + ROWS - 1) / ROWS; ++nb)
    for (int64_t g = 0; g < groups; g += per, packed += size) {
      uint8_t block[16][ROWS];
      two_level::sub_codes(packed, bits, per, block);
      for (int64_t i = 0; i < per; ++i)
        for (int64_t r = 0; r < std::min(ROWS, n - nb * ROWS); ++r) out[(nb * ROWS + r) * groups + g + i] = block[i][r];
    }
}

// Row i of x lies at i / inner * outer_stride + i % inner * inner_stride; y is dense. bfloat16.
BITSMITH_API void bitsmith_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows, int64_t width, int64_t inner,
                                int64_t outer_stride, int64_t inner_stride, float eps, int32_t form, int32_t threads) {
  pool().run(rows, rows * width < (1 << 16) ? 1 : threads, [&](int64_t row) {
    layer::norm(x + row / inner * outer_stride + row % inner * inner_stride, weight, y + row * width, width, eps, form);
  });
}

// y = a + b, dense bfloat16.
BITSMITH_API void bitsmith_add(const uint16_t* a, const uint16_t* b, uint16_t* y, int64_t count, int32_t threads) {
  constexpr int64_t PIECE = 1 << 14;
  pool().run((count + PIECE - 1) / PIECE, count < (1 << 16) ? 1 : threads, [&](int64_t i) {
    const int64_t at = i * PIECE;
    layer::add(a + at, b + at, y + at, std::min(PIECE, count - at));
  });
}

// Row i of x -> row slots[i] of `to`; rows of `size` bytes, strides in bytes.
BITSMITH_API void bitsmith_scatter(const char* x, int64_t x_stride, const int64_t* slots, char* to, int64_t to_stride, int64_t rows, int64_t size) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(to + slots[i] * to_stride, x + i * x_stride, static_cast<size_t>(size));
}

// Row rows[i] of the `count` of x -> row i of `to`, dense. Negative numbers count from the end; of one that is not there every bit is set (NaN).
BITSMITH_API void bitsmith_gather(const char* x, int64_t x_stride, int64_t count, const int64_t* rows, char* to, int64_t wanted, int64_t size) {
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t row = rows[i] < 0 ? rows[i] + count : rows[i];
    if (row >= 0 && row < count)
      std::memcpy(to + i * size, x + row * x_stride, static_cast<size_t>(size));
    else
      std::memset(to + i * size, 0xff, static_cast<size_t>(size));
  }
}

// x [rows, k] -> y [rows, k rounded up to blocks of a power of two], see rotate::row.
BITSMITH_API void bitsmith_rotate(const uint16_t* x, int64_t rows, int64_t k, int64_t block, const void* vector, int32_t vector_dtype, int32_t first,
                                  uint16_t* y, int32_t threads) {
  const int64_t width = round_up(k, block);
  pool().run(rows, rows * width < (1 << 15) ? 1 : threads,
             [&](int64_t i) { rotate::row(x + i * k, k, block, vector, vector_dtype, first != 0, y + i * width); });
}

BITSMITH_API void bitsmith_gated(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t rows, int64_t width, int64_t gate_stride,
                                 int64_t up_stride, int32_t act, int32_t threads) {
  pool().run(rows, rows * width < (1 << 15) ? 1 : threads,
             [&](int64_t row) { layer::gated(gate + row * gate_stride, up + row * up_stride, y + row * width, width, act); });
}

// x [tokens, heads, d] of any strides but the last -> y dense; cosine and sine [tokens, r].
BITSMITH_API void bitsmith_rope(const uint16_t* x, const uint16_t* cosine, const uint16_t* sine, uint16_t* y, int64_t tokens, int64_t heads, int64_t d,
                                int64_t r, int64_t token_stride, int64_t head_stride, int32_t interleaved, int32_t threads) {
  pool().run(tokens, tokens * heads * d < (1 << 16) ? 1 : threads, [&](int64_t t) {
    for (int64_t h = 0; h < heads; ++h)
      layer::rope(x + t * token_stride + h * head_stride, cosine + t * r, sine + t * r, y + (t * heads + h) * d, d, r, interleaved != 0);
  });
}

// Decode rows only, see attend.h. plain: its own loops, for tests.
BITSMITH_API void bitsmith_attend(const attend::Attention* what, int32_t threads, [[maybe_unused]] int32_t plain) {
#if BITSMITH_X86
  if (!plain && attend512::takes(*what)) return attend::attend(*what, threads, attend512::KERNELS);
#endif
  attend::attend(*what, threads, attend::plain::KERNELS);
}

// Whether bitsmith_attend_chunk has the instructions and takes heads of these sizes.
BITSMITH_API int32_t bitsmith_chunk_taken([[maybe_unused]] int64_t key_dim, [[maybe_unused]] int64_t value_dim) {
#if BITSMITH_X86
  return avx512::supported() && key_dim % 2 == 0 && value_dim % chunk512::LANES == 0;
#else
  return 0;
#endif
}

// A chunk of one sequence's queries, see chunk512.h: `rows` of them, block table and context of that sequence alone.
BITSMITH_API void bitsmith_attend_chunk([[maybe_unused]] const attend::Attention* what, [[maybe_unused]] int32_t threads) {
#if BITSMITH_X86
  const attend::Attention& a = *what;
  static thread_local std::vector<uint32_t> packed_keys, packed_values;
  const chunk512::Span span(a);
  const int64_t pairs = a.key_dim / 2, of_keys = span.keys * pairs, of_values = span.keys / 2 * a.value_dim, parts = span.keys / chunk512::LANES;
  if (static_cast<int64_t>(packed_keys.size()) < a.kv_heads * of_keys) packed_keys.resize(static_cast<size_t>(a.kv_heads * of_keys));
  if (static_cast<int64_t>(packed_values.size()) < a.kv_heads * of_values) packed_values.resize(static_cast<size_t>(a.kv_heads * of_values));
  uint32_t *keys = packed_keys.data(), *values = packed_values.data();
  pool().run(a.kv_heads * parts, threads, [&](int64_t task) {
    const int64_t kv = task / parts, at = task % parts * chunk512::LANES;
    chunk512::pack_keys(a, kv, span.first + at, keys + kv * of_keys + at * pairs);
    chunk512::pack_values(a, kv, span.first + at, values + kv * of_values + at / 2 * a.value_dim);
  });
  const int64_t tiles = (a.rows + chunk512::QUERIES - 1) / chunk512::QUERIES, shared = a.heads / a.kv_heads;
  pool().run(a.heads * tiles, threads, [&](int64_t task) {
    static thread_local chunk512::State state;
    // The last queries see most keys: begun first.
    const int64_t head = task % a.heads, tile = tiles - 1 - task / a.heads;
    chunk512::attend(a, span, head, tile * chunk512::QUERIES, keys + head / shared * of_keys, values + head / shared * of_values, state);
  });
#endif
}

// What calls one of the library's functions that a step is made of; null for others.
BITSMITH_API chain::Invoker bitsmith_invoker(const void* function) {
  using chain::entry;
  static const chain::Entry known[] = {
      entry<bitsmith_linear>(), entry<bitsmith_floats>(), entry<bitsmith_two_level_linear>(), entry<bitsmith_grids_linear>(), entry<bitsmith_codes>(),
      entry<bitsmith_norm>(),   entry<bitsmith_add>(),    entry<bitsmith_scatter>(),          entry<bitsmith_gather>(),       entry<bitsmith_rotate>(),
      entry<bitsmith_gated>(),  entry<bitsmith_rope>(),   entry<bitsmith_attend>(),
  };
  for (const chain::Entry& one : known)
    if (one.function == function) return one.invoke;
  return nullptr;
}

BITSMITH_API void bitsmith_run(const chain::Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) calls[i].invoke(calls[i].slots);
}
