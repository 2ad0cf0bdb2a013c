// Decoder of floats.h: codes that stand for 1, 2, 4 or 8 neighbouring inputs, entries of several tables added (kernels/codebook.py).
// Also the choice among all decoders. See panel.h for the including.

namespace bitsmith::BITSMITH_FLOATS {

template <class Code>
void copy_codes(const void* row, int64_t c0, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const Code*>(row)[c0 + i];
}

// Codes c0 .. c0 + count - 1 of a row's bit stream.
inline void read_codes(const uint32_t* row, int64_t words, int width, int64_t c0, int64_t count, uint32_t* out) {
  if (width == 8) return copy_codes<uint8_t>(row, c0, count, out);
  if (width == 16) return copy_codes<uint16_t>(row, c0, count, out);
  if (width == 32) return copy_codes<uint32_t>(row, c0, count, out);
  for (int64_t i = 0, at = c0 * width; i < count; ++i, at += width) {
    const int64_t word = at / 32;
    const uint64_t two = row[word] | static_cast<uint64_t>(row[std::min(word + 1, words - 1)]) << 32;
    out[i] = static_cast<uint32_t>(two >> (at % 32)) & ((1u << width) - 1);
  }
}

// Inputs i * LANES .. of eight, from the entries of their codes. Shorter entries are joined in a register: a load of what was just stored in
// pieces waits for all of them (AQLM 2x8, 4096 x 4096, 1 row: 14 ms).
template <int VEC, int DTYPE>
BITSMITH_TARGET inline V joined(const void* table, const uint32_t* codes, int down, uint32_t mask, int i) {
  constexpr int SIZE = DTYPE == F32 ? 4 : 2, ENTRY = VEC * SIZE;
  const auto entry = [&](int at) { return static_cast<int64_t>(codes[at] >> down & mask); };
  if constexpr (VEC >= LANES) return numbers(table, entry(i * LANES / VEC) * VEC + i * LANES % VEC, DTYPE);
  else {
    using Unit = std::conditional_t<ENTRY == 2, uint16_t, std::conditional_t<ENTRY == 4, uint32_t, uint64_t>>;
    constexpr int COUNT = LANES * SIZE / sizeof(Unit), EACH = ENTRY / sizeof(Unit);
    typedef Unit Units __attribute__((vector_size(LANES * SIZE)));
    Units all;
    for (int j = 0; j < COUNT; ++j) all[j] = get<Unit>(static_cast<const Unit*>(table) + entry(i * LANES / VEC + j / EACH) * EACH + j % EACH);
    return numbers(&all, 0, DTYPE);
  }
}

// Eight inputs of each of LANES outputs, whose codes lie `PANEL / VEC` apart, from the table of one book.
template <int VEC, int DTYPE, bool FIRST>
BITSMITH_TARGET inline void entries(const void* table, const uint32_t* codes, int down, uint32_t mask, V (&out)[8 / LANES][LANES]) {
#pragma GCC unroll 8
  for (int r = 0; r < LANES; ++r, codes += PANEL / VEC)
    for (int i = 0; i < 8 / LANES; ++i) {
      const V v = joined<VEC, DTYPE>(table, codes, down, mask, i);
      out[i][r] = FIRST ? v : out[i][r] + v;
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
  const int bits = s.w.bits, books = s.books;
  const uint32_t mask = (uint64_t{1} << bits) - 1;
  const int64_t octets = (count + 7) / 8, have = std::min(octets * (8 / VEC), (s.w.k + VEC - 1) / VEC - k0 / VEC);
  const int64_t book_bytes = (VEC * (DTYPE == F32 ? 4 : 2)) << bits;
  // Codes beyond the last input are those of a value that nobody multiplies.
  uint32_t codes[ROWS][PANEL / VEC] = {};
  for (int64_t r = 0; r < ROWS; ++r) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(s.w.codes) + std::min(nb * ROWS + r, s.w.n - 1) * s.words;
    read_codes(row, s.words, bits * books, k0 / VEC, have, codes[r]);
  }
  Scales scales(s, nb, k0);
  for (int64_t o = 0; o < octets; ++o, panel += 8 * ROWS) {
    scales.at(k0 + o * 8);
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
      const uint32_t* from = codes[p * LANES] + o * (8 / VEC);
      const char* table = static_cast<const char*>(s.table);
      V out[8 / LANES][LANES];
      entries<VEC, DTYPE, true>(table, from, 0, mask, out);
      for (int book = 1; book < books; ++book) entries<VEC, DTYPE, false>(table += book_bytes, from, book * bits, mask, out);
      for (int i = 0; i < 8 / LANES; ++i) {
        transpose(out[i]);
        for (int j = 0; j < LANES; ++j) put(panel + (i * LANES + j) * ROWS + p * LANES, out[i][j] * scales.scale[p]);
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
    case AFFINE: return s.w.mins ? scalars_of<Min>(s.w.bits) : scalars_of<Affine>(s.w.bits);
    case TABLE: return scalars_of<Table>(s.w.bits);
    case ROW_TABLE: return scalars_of<RowTable>(s.w.bits);
    case E4M3: return fp8<false>;
    case E5M2: return fp8<true>;
    case TRELLIS: return kind == INST3 ? trellis_of<INST3>(s.w.bits) : kind == MCG ? trellis_of<MCG>(s.w.bits) : trellis_of<MUL1>(s.w.bits);
    default: return s.vec == 1 ? vectors_of<1>(kind) : s.vec == 2 ? vectors_of<2>(kind) : s.vec == 4 ? vectors_of<4>(kind) : vectors_of<8>(kind);
  }
}

}  // namespace bitsmith::BITSMITH_FLOATS
