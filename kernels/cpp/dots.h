// Products of few rows with the weights of vectors.h where one code is eight inputs: a table entry meets those inputs of x as it is, and nothing
// is turned round. See panel.h for the including.

namespace bitsmith::BITSMITH_FLOATS {

// sum += x [R][8] by the eight inputs of an output that `code` stands for. BOOKS: as many, or any number where 0.
template <int DTYPE, int BOOKS, int R>
BITSMITH_TARGET inline void octet(const Source& s, const uint32_t* code, const float* x, V (&sum)[R][8 / LANES]) {
  const int bits = s.w.bits, books = BOOKS ? BOOKS : s.books;
  const uint32_t mask = (uint64_t{1} << bits) - 1;
  const int64_t book_bytes = int64_t{8 * (DTYPE == F32 ? 4 : 2)} << bits;
  for (int i = 0; i < 8 / LANES; ++i) {
    const char* table = static_cast<const char*>(s.table);
    V v = joined<8, DTYPE>(table, code, 0, mask, i);
    for (int book = 1; book < books; ++book) v += joined<8, DTYPE>(table += book_bytes, code, book * bits, mask, i);
    for (int r = 0; r < R; ++r) sum[r][i] += v * get<V>(x + 8 * r + LANES * i);
  }
}

// total += scale times the same of `octets` codes and x [octets][R][8].
template <int DTYPE, int BOOKS, int R>
BITSMITH_TARGET void dot(const Source& s, const uint32_t* codes, int64_t octets, const float* x, float scale, V (&total)[R][8 / LANES]) {
  // As in `multiply` of panel.h.
  constexpr int APART = R == 1 ? 4 : R == 2 ? 2 : 1;
  V sum[APART][R][8 / LANES] = {};
  int64_t o = 0;
  for (; o + APART <= octets; o += APART)
    for (int a = 0; a < APART; ++a) octet<DTYPE, BOOKS>(s, codes + o + a, x + (o + a) * 8 * R, sum[a]);
  for (; o < octets; ++o) octet<DTYPE, BOOKS>(s, codes + o, x + o * 8 * R, sum[0]);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 8 / LANES; ++i) {
      V all = sum[0][r][i];
      for (int a = 1; a < APART; ++a) all += sum[a][r][i];
      total[r][i] += all * scale;
    }
}

// 16 outputs of row block nb, all rows of the slab (at most R), which lie one after the other.
template <int DTYPE, int BOOKS, int R>
BITSMITH_TARGET void dots(const Source& s, const Slab& slab, int64_t nb, void* y, int32_t dtype) {
  const int64_t outputs = std::min(ROWS, s.w.n - nb * ROWS);
  V total[ROWS][R][8 / LANES] = {};
  Scales scales(s, nb, 0);
  for (int64_t k0 = 0, count; k0 < slab.k; k0 += count) {
    scales.at(k0);
    count = std::min({PANEL, slab.k - k0, scales.next - k0});
    // Rows side by side: apart, they compete for sets of the first-level cache. Those beyond the slab's are zeros.
    alignas(64) float near[PANEL * R];
    const float* x = slab.x.data() + k0;
    for (int64_t i = 0; R > 1 && i < count * R; i += 8) {
      const int64_t r = i / 8 % R;
      if (r < slab.m) std::memcpy(near + i, x + r * slab.k + i / (8 * R) * 8, 32);
      else std::memset(near + i, 0, 32);
    }
    for (int64_t o = 0; o < outputs; ++o) {
      uint32_t codes[PANEL / 8];
      read_codes(reinterpret_cast<const uint32_t*>(s.w.codes) + (nb * ROWS + o) * s.words, s.words, s.w.bits * s.books, k0 / 8, count / 8, codes);
      dot<DTYPE, BOOKS, R>(s, codes, count / 8, R > 1 ? near : x, scales.scale[o / LANES][o % LANES], total[o]);
    }
  }
  for (int64_t r = 0; r < slab.m; ++r) {
    float sums[ROWS] = {};
    for (int64_t o = 0; o < outputs; ++o)
      for (int i = 0; i < 8; ++i) sums[o] += total[o][r][i / LANES][i % LANES];
    finish(sums, y, r * s.w.n + nb * ROWS, outputs, dtype);
  }
}

template <int DTYPE, int BOOKS>
Dots dots_of(int64_t rows) {
  return rows == 1 ? dots<DTYPE, BOOKS, 1> : rows == 2 ? dots<DTYPE, BOOKS, 2> : rows <= 4 ? dots<DTYPE, BOOKS, 4> : dots<DTYPE, BOOKS, 8>;
}

template <int DTYPE>
Dots dots_of(int64_t rows, int32_t books) {
  return books == 1 ? dots_of<DTYPE, 1>(rows) : books == 2 ? dots_of<DTYPE, 2>(rows) : dots_of<DTYPE, 0>(rows);
}

// Null where panels are the way.
inline Dots dots_of(const Source& s, int64_t rows) {
  if (s.form != VECTORS || s.vec != 8 || s.w.k % 8 || rows > 8) return nullptr;
  return s.table_kind == F32 ? dots_of<F32>(rows, s.books) : s.table_kind == F16 ? dots_of<F16>(rows, s.books) : dots_of<BF16>(rows, s.books);
}

}  // namespace bitsmith::BITSMITH_FLOATS
