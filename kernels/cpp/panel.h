// The skeleton of floats.h, which includes this once for each instruction set: vectors, scales, activations, the product.

namespace bitsmith::BITSMITH_FLOATS {

constexpr int LANES = BITSMITH_LANES, PARTS = ROWS / LANES;

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef uint8_t Byte __attribute__((vector_size(LANES)));

template <class T>
BITSMITH_TARGET inline T get(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

BITSMITH_TARGET inline void put(float* p, V v) { std::memcpy(p, &v, sizeof v); }

// As `rounded` of common.h.
BITSMITH_TARGET inline V unfused(V product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// float16 numbers as float32.
BITSMITH_TARGET inline V wide(Half h) {
#if BITSMITH_LANES == 8
  return reinterpret_cast<V>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
  V v;
  for (int i = 0; i < LANES; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}

// LANES numbers of a dtype, from element i on.
BITSMITH_TARGET inline V numbers(const void* p, int64_t i, int32_t dtype) {
  switch (dtype) {
    case F32: return get<V>(static_cast<const float*>(p) + i);
    case F16: return wide(get<Half>(static_cast<const uint16_t*>(p) + i));
    case BF16: return reinterpret_cast<V>(__builtin_convertvector(get<Half>(static_cast<const uint16_t*>(p) + i), U) << 16);
    default: break;
  }
  const U byte = __builtin_convertvector(get<Byte>(static_cast<const uint8_t*>(p) + i), U);
  if (dtype == U8) return __builtin_convertvector(reinterpret_cast<I>(byte), V);
  if (dtype == E4M3_BYTE) {
    // Below the normal numbers a multiple of 2^-9; above, the exponent's bias is 120 smaller than a float32's.
    const U size = byte & 0x7fu, large = reinterpret_cast<U>(size > 7u), none = reinterpret_cast<U>(size == 0x7fu) & 0x7fc00000u;
    const U small = reinterpret_cast<U>(__builtin_convertvector(reinterpret_cast<I>(size), V) * 0x1p-9f);
    return reinterpret_cast<V>((((size << 20) + (120u << 23)) & large) | (small & ~large) | (byte & 0x80u) << 24 | none);
  }
  // 2^-127 is below the normal numbers.
  return reinterpret_cast<V>(byte << 23 | (reinterpret_cast<U>(byte == 0) & 0x00400000u));
}

// table[index % 8].
BITSMITH_TARGET inline V pick8(const float* table, U index) {
#if BITSMITH_LANES == 8
  return reinterpret_cast<V>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), reinterpret_cast<__m256i>(index)));
#else
  V v;
  for (int i = 0; i < LANES; ++i) v[i] = table[index[i] & 7];
  return v;
#endif
}

// table[index % 16].
BITSMITH_TARGET inline V pick16(const float* table, U index) {
#if BITSMITH_LANES == 8
  const V low = pick8(table, index), high = pick8(table + 8, index);
  return reinterpret_cast<V>(_mm256_blendv_ps(reinterpret_cast<__m256>(low), reinterpret_cast<__m256>(high), reinterpret_cast<__m256>(index << 28)));
#else
  V v;
  for (int i = 0; i < LANES; ++i) v[i] = table[index[i] & 15];
  return v;
#endif
}

// table[index].
BITSMITH_TARGET inline V pick(const float* table, U index) {
#if BITSMITH_LANES == 8
  return reinterpret_cast<V>(_mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4));
#else
  V v;
  for (int i = 0; i < LANES; ++i) v[i] = table[index[i]];
  return v;
#endif
}

// Scales and zero points of 16 outputs, followed along the inputs.
struct Scales {
  const Weight& w;
  const float factor;
  int64_t nb, group, next;
  V scale[PARTS], zero[PARTS];

  BITSMITH_TARGET Scales(const Source& s, int64_t block, int64_t k0) : w(s.w), factor(s.factor), nb(block), group(k0 / s.w.group), next(k0) {}

  // Those of the group that input k lies in. Inputs are asked for in their order from k0 on, the first of each group among them.
  BITSMITH_TARGET inline void at(int64_t k) {
    if (k < next) return;
    read();
    next = ++group * w.group;
  }

  BITSMITH_TARGET void read() {
    const int64_t at = (nb * w.groups() + group) * ROWS;
    if (w.supers && w.super_dtype == F32 && w.scale_rows == 1) return second_level(at);
    if (w.supers || w.scale_rows != 1) {
      float s[ROWS], z[ROWS];
      scales_of(w, nb, group, s, z);
      for (int p = 0; p < PARTS; ++p) scale[p] = get<V>(s + p * LANES) * factor, zero[p] = get<V>(z + p * LANES);
      return;
    }
    for (int p = 0; p < PARTS; ++p) {
      scale[p] = numbers(w.scales, at + p * LANES, w.scale_dtype) * factor;
      zero[p] = zeros(at + p * LANES);
    }
  }

  // What scales_of does: one by one, and with a division a row, it takes a third of decoding NF4.
  BITSMITH_TARGET __attribute__((noinline)) void second_level(int64_t at) {
    const int64_t first = nb * ROWS * w.groups() + group, whole = w.groups() / w.per_super, part = w.groups() % w.per_super;
    const float* super = static_cast<const float*>(w.supers) + first / w.per_super;
    int64_t place = first % w.per_super;
    for (int64_t r = 0; r < ROWS; r += LANES, at += LANES) {
      V supers;
      for (int i = 0; i < LANES; ++i) {
        supers[i] = *super;
        if (nb * ROWS + r + i >= w.n - 1) continue;
        super += whole, place += part;
        if (place >= w.per_super) ++super, place -= w.per_super;
      }
      V code = numbers(w.scales, at, w.scale_dtype);
      if (w.scale_table) code = pick(w.scale_table, __builtin_convertvector(code, U));
      scale[r / LANES] = unfused(code * supers) + w.scale_offset;
      zero[r / LANES] = zeros(at);
    }
  }

  BITSMITH_TARGET V zeros(int64_t at) const { return w.zeros ? numbers(w.zeros, at, w.zero_dtype) : V{} + w.zero; }
};

// One block of rows: x [m, k] of `dtype` -> [k][rows].
BITSMITH_TARGET inline void prepare(const void* x, int32_t dtype, int64_t block, Slab& slab) {
  const int64_t k = slab.k, first = slab.first(block), rows = slab.rows(block);
  float* out = slab.x.data() + first * k;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t from = (first + r) * k;
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      const V v = numbers(x, from + i, dtype);
      if (rows == 1) put(out + i, v);
      else
        for (int lane = 0; lane < LANES; ++lane) out[(i + lane) * rows + r] = v[lane];
    }
    for (; i < k; ++i) out[i * rows + r] = load(x, from + i, dtype);
  }
}

// sum [R][16] += x [R] by one input's weights [16].
template <int R>
BITSMITH_TARGET inline void step(const float* weights, const float* x, V (&sum)[R][PARTS]) {
  V w[PARTS];
  for (int p = 0; p < PARTS; ++p) w[p] = get<V>(weights + p * LANES);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < PARTS; ++p) sum[r][p] += w[p] * x[r];
}

// totals [R][16] += x [count][R] by panel [count][16].
template <int R>
BITSMITH_TARGET void multiply(const float* panel, const float* x, int64_t count, float* totals) {
  // Sums of their own for neighbouring inputs where there are few rows: an addition takes four cycles, two begin in each.
  constexpr int APART = R == 1 ? 4 : R <= 3 ? 2 : 1;
  V sum[APART][R][PARTS] = {};
  int64_t k = 0;
  for (; k + APART <= count; k += APART)
    for (int a = 0; a < APART; ++a) step<R>(panel + (k + a) * ROWS, x + (k + a) * R, sum[a]);
  for (; k < count; ++k) step<R>(panel + k * ROWS, x + k * R, sum[0]);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < PARTS; ++p) {
      V all = sum[0][r][p];
      for (int a = 1; a < APART; ++a) all += sum[a][r][p];
      float* to = totals + r * ROWS + p * LANES;
      put(to, get<V>(to) + all);
    }
}

BITSMITH_TARGET inline void multiply(int64_t rows, const float* panel, const float* x, int64_t count, float* totals) {
  switch (rows) {
    case 1: return multiply<1>(panel, x, count, totals);
    case 2: return multiply<2>(panel, x, count, totals);
    case 3: return multiply<3>(panel, x, count, totals);
    case 4: return multiply<4>(panel, x, count, totals);
    case 5: return multiply<5>(panel, x, count, totals);
    default: return multiply<6>(panel, x, count, totals);
  }
}

// Sums of 16 outputs -> y[at ..], the first `count` of them.
BITSMITH_TARGET inline void finish(const float* sums, void* y, int64_t at, int64_t count, int32_t dtype) {
  if (count == ROWS && dtype == F32) {
    std::memcpy(static_cast<float*>(y) + at, sums, ROWS * 4);
  } else if (count == ROWS && dtype == BF16) {
    for (int p = 0; p < PARTS; ++p) {
      const V v = get<V>(sums + p * LANES);
      const U raw = reinterpret_cast<U>(v), rounded = (raw + 0x7fffu + (raw >> 16 & 1u)) >> 16;
      const U nan = reinterpret_cast<U>(v != v);
      const Half h = __builtin_convertvector((rounded & ~nan) | ((raw >> 16 | 0x40u) & nan), Half);
      std::memcpy(static_cast<uint16_t*>(y) + at + p * LANES, &h, sizeof h);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) store(y, at + i, dtype, sums[i]);
  }
}

// 16 * count outputs from row block `nb` on, all rows of the slab. y: the slab's first row.
BITSMITH_TARGET inline void rows(Decode decode, const Source& s, const Slab& slab, int64_t nb, int64_t count, void* y, int32_t dtype) {
  alignas(64) float panel[PANEL * ROWS];
  static thread_local std::vector<float> totals;
  totals.assign(static_cast<size_t>(count * slab.m * ROWS), 0.0f);
  for (int64_t k0 = 0; k0 < slab.k; k0 += PANEL) {
    const int64_t inputs = std::min(PANEL, slab.k - k0);
    for (int64_t i = 0; i < count; ++i) {
      decode(s, nb + i, k0, inputs, panel);
      for (int64_t block = 0; block < slab.blocks; ++block) {
        const int64_t first = slab.first(block), rows = slab.rows(block);
        multiply(rows, panel, slab.x.data() + first * slab.k + k0 * rows, inputs, totals.data() + (i * slab.m + first) * ROWS);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (nb + i) * ROWS, outputs = std::min(ROWS, s.w.n - at);
    for (int64_t m = 0; m < slab.m; ++m) finish(totals.data() + (i * slab.m + m) * ROWS, y, m * s.w.n + at, outputs, dtype);
  }
}

}  // namespace bitsmith::BITSMITH_FLOATS
