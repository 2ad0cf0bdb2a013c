// Decoders of floats.h: codes of up to 8 bits in the layout of common.h, one value each. See panel.h for the including.

namespace bitsmith::BITSMITH_FLOATS {

// The codes of byte b of the lanes of byte vector v: input 4 v + b of LANES outputs. Bits above a code of one plane are left in.
template <int BITS>
BITSMITH_TARGET inline U code(const uint8_t* block, int v, int b, int part) {
  U found = {};
  int below = 0;
  for (int width = 8; width; width /= 2) {
    if (!(BITS & width)) continue;
    const int per = 8 / width;
    const U field = get<U>(block + v / per * 64 + part * 4 * LANES) >> (8 * b + width * (v % per));
    if (width == BITS) return field;
    found |= (field & ((1u << width) - 1)) << below;
    block += 64 * width;
    below += width;
  }
  return found;
}

struct Affine {
  const Scales& scales;
  BITSMITH_TARGET Affine(const Source&, int64_t, const Scales& s) : scales(s) {}
  template <int BITS>
  BITSMITH_TARGET V value(U code, int part) const {
    const U alone = code & ((1u << BITS) - 1);
    return (__builtin_convertvector(reinterpret_cast<I>(alone), V) - scales.zero[part]) * scales.scale[part];
  }
};

struct Min {
  const Scales& scales;
  BITSMITH_TARGET Min(const Source&, int64_t, const Scales& s) : scales(s) {}
  template <int BITS>
  BITSMITH_TARGET V value(U code, int part) const {
    const U alone = code & ((1u << BITS) - 1);
    return unfused(__builtin_convertvector(reinterpret_cast<I>(alone), V) * scales.scale[part]) + scales.zero[part];
  }
};

struct Table {
  const float* table;
  const Scales& scales;
  BITSMITH_TARGET Table(const Source& source, int64_t, const Scales& s) : table(static_cast<const float*>(source.table)), scales(s) {}
  template <int BITS>
  BITSMITH_TARGET V value(U code, int part) const {
    const U alone = code & ((1u << BITS) - 1);
    // Entries beyond 2^BITS are zeros, and vectors look at the low 3 or 4 bits alone.
    const V found = BITS == 3 ? pick8(table, code) : BITS < 4 ? pick8(table, alone) : BITS == 4 ? pick16(table, code) : pick(table, alone);
    return found * scales.scale[part];
  }
};

struct RowTable {
  float table[ROWS * 256];
  const Scales& scales;
  BITSMITH_TARGET RowTable(const Source& source, int64_t nb, const Scales& s) : scales(s) {
    const int64_t size = int64_t{1} << source.w.bits, rows = std::min(ROWS, source.w.n - nb * ROWS);
    if (rows < ROWS) std::memset(table, 0, sizeof table);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) put(table + r * size + i, numbers(source.table, (nb * ROWS + r) * size + i, source.table_kind));
      for (; i < size; ++i) table[r * size + i] = load(source.table, (nb * ROWS + r) * size + i, source.table_kind);
    }
  }
  template <int BITS>
  BITSMITH_TARGET V value(U code, int part) const {
    U row;
    for (int i = 0; i < LANES; ++i) row[i] = static_cast<uint32_t>(part * LANES + i) << BITS;
    return pick(table, (code & ((1u << BITS) - 1)) + row) * scales.scale[part];
  }
};

template <class Values, int BITS>
BITSMITH_TARGET void scalars(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel) {
  Scales scales(s, nb, k0);
  const Values values(s, nb, scales);
  // Octets of inputs: two byte vectors.
  for (int64_t k = k0; k < k0 + count; k += 8, panel += 8 * ROWS) {
    scales.at(k);
    const uint8_t* block = s.w.block(nb, k / BLOCK);
    const int v = static_cast<int>(k % BLOCK / 4);
    for (int i = 0; i < 8; ++i)
      for (int p = 0; p < PARTS; ++p) put(panel + i * ROWS + p * LANES, values.template value<BITS>(code<BITS>(block, v + i / 4, i % 4, p), p));
  }
}

#if BITSMITH_LANES == 8
// FP8 through float16: E5M2 is its upper byte, and E4M3, one place lower and its exponent's bias 8 smaller, 2^-8 of its value, below the
// normal numbers too. A lane holds inputs b and b + 2 of a byte vector.
template <bool WIDE_EXPONENT>
BITSMITH_TARGET void fp8(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel) {
  const __m256i sides = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  Scales scales(s, nb, k0);
  for (int64_t k = k0; k < k0 + count; k += 4, panel += 4 * ROWS) {
    scales.at(k);
    const uint8_t* from = s.w.block(nb, k / BLOCK) + k % BLOCK / 4 * 64;
    for (int p = 0; p < PARTS; ++p) {
      const V scale = scales.scale[p] * (WIDE_EXPONENT ? 1.0f : 256.0f);
      const U word = get<U>(from + p * 32);
      for (int b = 0; b < 2; ++b) {
        const U top = (b ? word : word << 8) & 0xff00ff00u;
        const U half = WIDE_EXPONENT ? top : (top & 0x80008000u) | ((top & 0x7f007f00u) >> 1);
        const __m256i apart = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(half), sides), 0xd8);
        float* to = panel + b * ROWS + p * LANES;
        put(to, reinterpret_cast<V>(_mm256_cvtph_ps(_mm256_castsi256_si128(apart))) * scale);
        put(to + 2 * ROWS, reinterpret_cast<V>(_mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1))) * scale);
      }
    }
  }
}
#else
template <bool>
void fp8(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel) {
  scalars<Table, 8>(s, nb, k0, count, panel);
}
#endif

template <class Values>
Decode scalars_of(int32_t bits) {
  switch (bits) {
    case 1: return scalars<Values, 1>;
    case 2: return scalars<Values, 2>;
    case 3: return scalars<Values, 3>;
    case 4: return scalars<Values, 4>;
    case 5: return scalars<Values, 5>;
    case 6: return scalars<Values, 6>;
    case 7: return scalars<Values, 7>;
    default: return scalars<Values, 8>;
  }
}

}  // namespace bitsmith::BITSMITH_FLOATS
