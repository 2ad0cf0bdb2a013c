// Decoder of floats.h: codes that stand for 1, 2, 4 or 8 neighbouring inputs, entries of several tables added (kernels/codebook.py).
// Also the choice among all decoders. See panel.h for the including.

namespace bitsmith::BITSMITH_FLOATS {

// Codes c0 .. c0 + count - 1 of a row's bit stream.
inline void read_codes(const uint32_t* row, int64_t words, int width, int64_t c0, int64_t count, uint32_t* out) {
  if (width == 16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + c0;
    for (int64_t i = 0; i < count; ++i) out[i] = from[i];
    return;
  }
  const uint32_t mask = width == 32 ? ~0u : (1u << width) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (c0 + i) * width, word = at / 32;
    const uint64_t two = row[word] | static_cast<uint64_t>(row[std::min(word + 1, words - 1)]) << 32;
    out[i] = static_cast<uint32_t>(two >> (at % 32)) & mask;
  }
}

// Eight inputs of one output, 8 / VEC codes.
template <int VEC, int DTYPE>
BITSMITH_TARGET inline void octet(const Source& s, const uint32_t* codes, V (&out)[8 / LANES]) {
  const uint32_t mask = (uint64_t{1} << s.w.bits) - 1;
  using Entry = std::conditional_t<DTYPE == F32, float, uint16_t>;
  const Entry* table = static_cast<const Entry*>(s.table);
  for (int32_t book = 0; book < s.books; ++book, table += static_cast<int64_t>(VEC) << s.w.bits) {
    Entry found[8];
    for (int i = 0; i < 8 / VEC; ++i) {
      const int64_t at = (codes[i] >> (book * s.w.bits)) & mask;
      std::memcpy(found + i * VEC, table + at * VEC, VEC * sizeof(Entry));
    }
    for (int i = 0; i < 8 / LANES; ++i) {
      const V v = numbers(found, i * LANES, DTYPE);
      out[i] = book ? out[i] + v : v;
    }
  }
}

// Columns of LANES vectors.
BITSMITH_TARGET inline void transpose(V (&v)[LANES]) {
  V t[LANES];
#if BITSMITH_LANES == 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      v[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = __builtin_shufflevector(v[i], v[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[i + 4] = __builtin_shufflevector(v[i], v[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
#else
  for (int i = 0; i < 4; i += 2) {
    t[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 4, 1, 5);
    t[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    v[2 * i] = __builtin_shufflevector(t[i], t[2 + i], 0, 1, 4, 5);
    v[2 * i + 1] = __builtin_shufflevector(t[i], t[2 + i], 2, 3, 6, 7);
  }
#endif
}

template <int VEC, int DTYPE>
BITSMITH_TARGET void vectors(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel) {
  constexpr int64_t MOST = PANEL / VEC;
  const int64_t octets = (count + 7) / 8, have = std::min(octets * (8 / VEC), (s.w.k + VEC - 1) / VEC - k0 / VEC);
  // Codes beyond the last input are those of a value that nobody multiplies.
  uint32_t codes[ROWS][MOST] = {};
  for (int64_t r = 0; r < ROWS; ++r) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(s.w.codes) + std::min(nb * ROWS + r, s.w.n - 1) * s.words;
    read_codes(row, s.words, s.w.bits * s.books, k0 / VEC, have, codes[r]);
  }
  Scales scales(s.w, nb);
  for (int64_t o = 0; o < octets; ++o, panel += 8 * ROWS) {
    scales.at(k0 + o * 8);
    for (int p = 0; p < PARTS; ++p) {
      V columns[8 / LANES][LANES];
      for (int r = 0; r < LANES; ++r) {
        V row[8 / LANES];
        octet<VEC, DTYPE>(s, codes[p * LANES + r] + o * (8 / VEC), row);
        for (int i = 0; i < 8 / LANES; ++i) columns[i][r] = row[i];
      }
      for (int i = 0; i < 8 / LANES; ++i) {
        transpose(columns[i]);
        for (int j = 0; j < LANES; ++j) put(panel + (i * LANES + j) * ROWS + p * LANES, columns[i][j] * scales.scale[p]);
      }
    }
  }
}

template <int VEC>
Decode vectors_of(int32_t dtype) {
  return dtype == F32 ? vectors<VEC, F32> : dtype == F16 ? vectors<VEC, F16> : vectors<VEC, BF16>;
}

inline Decode decode_of(const Source& s) {
  const int32_t kind = s.table_kind;
  switch (s.form) {
    case AFFINE: return scalars_of<Affine>(s.w.bits);
    case TABLE: return scalars_of<Table>(s.w.bits);
    case ROW_TABLE: return scalars_of<RowTable>(s.w.bits);
    case E4M3: return fp8<false>;
    case E5M2: return fp8<true>;
    case TRELLIS: return kind == INST3 ? trellis_of<INST3>(s.w.bits) : kind == MCG ? trellis_of<MCG>(s.w.bits) : trellis_of<MUL1>(s.w.bits);
    default: return s.vec == 1 ? vectors_of<1>(kind) : s.vec == 2 ? vectors_of<2>(kind) : s.vec == 4 ? vectors_of<4>(kind) : vectors_of<8>(kind);
  }
}

}  // namespace bitsmith::BITSMITH_FLOATS
