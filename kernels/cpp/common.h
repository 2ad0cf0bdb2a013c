// What every instruction set shares: the weight as Python hands it over, the activations as the kernels read them.
//
// Layout of codes: [ceil(N / 16)][ceil(K / 32)][64 * bits bytes]. A block holds 16 output rows by 32 inputs as bit planes of
// 8, 4, 2 or 1 bits, widest (= lowest bits) first; a plane of w bits is w vectors of 64 bytes. A vector has one 32-bit lane an
// output row. Unpacked, a block is 8 byte vectors; byte b of a lane of byte vector v is the code of input 4 v + b. A plane of w
// bits keeps byte vector v in vector v * w / 8, shifted left by w * (v % (8 / w)). That is the operand order of VNNI's dot
// products and of AMX's tiles, so decoding is a shift and a mask, and no code straddles a word at any width.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define BITSMITH_X86 1
#include <immintrin.h>
#else
#define BITSMITH_X86 0
#endif

// Returns FUNCTION<bits, OTHER>.
#define BITSMITH_BY_BITS(BITS, FUNCTION, OTHER) \
  switch (BITS) { \
    case 1: return FUNCTION<1, OTHER>; \
    case 2: return FUNCTION<2, OTHER>; \
    case 3: return FUNCTION<3, OTHER>; \
    case 4: return FUNCTION<4, OTHER>; \
    case 5: return FUNCTION<5, OTHER>; \
    case 6: return FUNCTION<6, OTHER>; \
    case 7: return FUNCTION<7, OTHER>; \
    default: return FUNCTION<8, OTHER>; \
  }

namespace bitsmith {

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, U8 = 3, E8M0 = 4, E4M3_BYTE = 5 };
// INT8: activations rounded to int8 a chunk, codes taken as integers. BFLOAT: activations in bfloat16, codes through a table.
enum Kind : int32_t { INT8 = 0, BFLOAT = 1 };

constexpr int64_t ROWS = 16, BLOCK = 32;
// Blocks in a chunk of int8 activations, at most.
constexpr int64_t LONGEST = 8;

// Mirrored by kernels/native.py; only pointers, int64, float and int32 in this order.
struct Weight {
  const uint8_t* codes;
  const void* scales;          // [blocks][groups][16], or [row tiles][groups] where scale_rows > 1
  const void* zeros;           // like scales, or null: `zero` for all; where `mins`, what is added to code * scale
  const void* supers;          // second level of the scales, or null
  const float* scale_table;    // [256], or null: the code is the number
  const uint16_t* values;      // bfloat16 [256] of BFLOAT
  int64_t n, k, group;         // group a multiple of 32 or >= k
  int64_t scale_rows;          // output rows that share a scale: 1, or a multiple of 16
  int64_t per_super;           // scales of a super scale, in row-major order of [n, groups]
  float zero, scale_offset;
  int32_t bits, kind, scale_dtype, zero_dtype, super_dtype, mins;

  int64_t row_blocks() const { return (n + ROWS - 1) / ROWS; }
  int64_t k_blocks() const { return (k + BLOCK - 1) / BLOCK; }
  int64_t groups() const { return (k + group - 1) / group; }
  bool one_scale() const { return group >= k; }
  // Inputs between two applications of scales. int8 activations get a scale of their own at least every 128, every 256 where there is no other.
  int64_t chunk() const {
    if (one_scale()) return kind == INT8 ? LONGEST * BLOCK : 128;
    if (kind == BFLOAT && group % 64 == 0) return group;
    return group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32;
  }
  // Whether `zero` is the zero point of all, and an integer that fits a sum of products.
  bool whole_zero() const { return !zeros && zero == std::floor(zero) && std::fabs(zero) <= 255; }
  const uint8_t* block(int64_t nb, int64_t kb) const { return codes + (nb * k_blocks() + kb) * 64 * bits; }
};

// The groups of chunks that follow each other: a division for each chunk takes as long as dot products of two rows (4 bits, g128, 512 x 2048, 32 rows,
// Zen 4: 174 -> 159 us).
struct Groups {
  int64_t size, at = 0, inside = 0;

  int64_t next(int64_t chunk) {
    const int64_t found = at;
    if ((inside += chunk) >= size) inside = 0, ++at;
    return found;
  }
};

// Activations of one product, in the order the kernels read.
struct Input {
  int64_t m, inputs;                 // inputs a row: k rounded up to whole chunks and to 64, zeros at the end
  int64_t stride;                    // from row to row
  int64_t chunk, chunks;
  std::vector<int8_t> q;             // INT8: [m][stride]
  std::vector<uint8_t> records;      // of avx512.h
  std::vector<uint16_t> b;           // BFLOAT: [m][stride], each four inputs in the order 0 2 1 3
  std::vector<int32_t> low;          // INT8 of avx512.h: [m][chunks], -zero * sum of the codes of a whole_zero()
  std::vector<float> scale, sum;     // [m][chunks]: int8 step; step * sum of the codes (BFLOAT: sum of the inputs)
};

// Rows of activations that a kernel takes at once.
constexpr int64_t TILE = 8;

// Words of one row among those of the other rows of its tile, to[count][TILE] from this row's first place on: a kernel that takes the rows together
// then reads one stream, where rows apart compete for sets of the first-level cache (4-bit, 128 rows: 180 -> 198 GMAC/s a core).
inline void place(const void* words, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * TILE * 4, static_cast<const uint8_t*>(words) + 4 * i, 4);
}

// Asks for the codes further on, as a product of MR rows needs it: far ahead, into the second-level cache (2 KB ahead into the first, as it was, 8 rows
// of 5632 x 2048 took on two cores of Zen 4: Q8_0 0.46 ms, now 0.31, 4-bit g128 0.31 and 0.28, FP8 0.98 and 0.56; 2 rows of Q4_K 0.16 and 0.12). One
// row keeps up with the hardware by itself but for codes of 2, 6 and 8 bits; asking gets in the way of others (all products of a step of 1.1 B in 4-bit
// GPTQ, times what only reading them takes: 1.31 so and 1.02 without).
template <int BITS, int MR>
inline __attribute__((always_inline)) void ahead(const uint8_t* p) {
  if constexpr (MR == 1 && BITS != 2 && BITS != 6 && BITS != 8) return;
  for (int j = 0; j < BITS; ++j) __builtin_prefetch(p + 8192 + 64 * j, 0, 2);
}

// This thread's room for `count` sums, whatever it holds.
inline float* scratch(int64_t count) {
  static thread_local std::vector<float> room;
  if (static_cast<int64_t>(room.size()) < count) room.resize(static_cast<size_t>(count));
  return room.data();
}

#if defined(__aarch64__)
using Half = __fp16;  // GCC before 13 has no _Float16 in C++ there.
#else
using Half = _Float16;
#endif

inline float half_to_float(uint16_t h) {
#if BITSMITH_X86 || defined(__aarch64__)
  Half v;
  std::memcpy(&v, &h, 2);
  return static_cast<float>(v);
#else
  const uint32_t sign = (h & 0x8000u) << 16, mag = h & 0x7fffu;
  uint32_t bits;
  if (mag >= 0x7c00u) bits = 0x7f800000u | (mag & 0x3ffu) << 13;
  else bits = mag << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  if (mag < 0x7c00u) v *= 5.192296858534828e+33f;  // 2^112: from exponent bias 15 to 127
  std::memcpy(&bits, &v, 4);
  bits |= sign;
  std::memcpy(&v, &bits, 4);
  return v;
#endif
}

inline float bfloat_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline uint16_t float_to_bfloat(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Through float16, whose exponent's bias is 8 larger.
inline float e4m3_to_float(uint8_t e) {
  if ((e & 0x7f) == 0x7f) return std::nanf("");
  return half_to_float(static_cast<uint16_t>((e & 0x80) << 8 | (e & 0x7f) << 7)) * 256.0f;
}

inline float load(const void* p, int64_t i, int32_t dtype) {
  switch (dtype) {
    case F32: return static_cast<const float*>(p)[i];
    case BF16: return bfloat_to_float(static_cast<const uint16_t*>(p)[i]);
    case F16: return half_to_float(static_cast<const uint16_t*>(p)[i]);
    case U8: return static_cast<const uint8_t*>(p)[i];
    case E4M3_BYTE: return e4m3_to_float(static_cast<const uint8_t*>(p)[i]);
    default: return std::ldexp(1.0f, static_cast<const uint8_t*>(p)[i] - 127);
  }
}

inline void store(void* p, int64_t i, int32_t dtype, float v) {
  if (dtype == F32) static_cast<float*>(p)[i] = v;
  else if (dtype == BF16) static_cast<uint16_t*>(p)[i] = float_to_bfloat(v);
  else {
    const Half h = static_cast<Half>(v);
    std::memcpy(static_cast<uint16_t*>(p) + i, &h, 2);
  }
}

// A product that is rounded before anything is added to it, whatever the compiler may fuse.
inline float rounded(float product) {
#if defined(__x86_64__) && defined(__GNUC__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// A min as the zero point that has the same effect. Where the scale is 0 the min is all there is: a scale of 2^-60 leaves it so.
constexpr float NO_SCALE = 0x1p-60f;

inline void zero_of_min(float& scale, float& zero) {
  if (scale == 0) scale = NO_SCALE;
  zero = -zero / scale;
}

// Scales and zero points of 16 rows in one group, as float32.
inline void scales_of(const Weight& w, int64_t nb, int64_t g, float* scale, float* zero) {
  const int64_t groups = w.groups();
  for (int64_t r = 0; r < ROWS; ++r) {
    const int64_t at = w.scale_rows == 1 ? (nb * groups + g) * ROWS + r : nb * ROWS / w.scale_rows * groups + g;
    float s = load(w.scales, at, w.scale_dtype);
    if (w.supers) {
      if (w.scale_table) s = w.scale_table[static_cast<int>(s)];
      const int64_t row = std::min(nb * ROWS + r, w.n - 1);
      s = rounded(s * load(w.supers, (row * groups + g) / w.per_super, w.super_dtype)) + w.scale_offset;
    }
    scale[r] = s;
    zero[r] = w.zeros ? load(w.zeros, at, w.zero_dtype) : w.zero;
    if (w.mins) zero_of_min(scale[r], zero[r]);
  }
}

}  // namespace bitsmith
