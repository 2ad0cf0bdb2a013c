// Decoder of floats.h: the trellis family (kernels/trellis.py). See panel.h for the including.
//
// The 32 weights of outputs o and o + 8 of a tile follow each other in its ring, so a vector over o finds all of them in `bits` vectors
// of words at shifts known when compiling; the bits before the first are the last word of output o - 1.

namespace bitsmith::BITSMITH_FLOATS {

// float16(v) as float32, for |v| < 4 that is a multiple of 2^-18: 2^13 times as much added leaves 11 bits, ties to even. The product is
// exact, so it does not matter whether the compiler fuses it. tests/test_native_float.py tries all states.
BITSMITH_TARGET inline V to_half(V v) {
  const V far = v * 0x1p13f;
  return (v + far) - far;
}

template <int STATES>
BITSMITH_TARGET inline V value_of(U state) {
  if (STATES == MUL1) {
    const U x = state * 0x83DCD12Du, pairs = (x & 0x00ff00ffu) + (x >> 8 & 0x00ff00ffu);
    const U sum = (pairs & 0xffffu) + (pairs >> 16);
    // 0x1EEE and 0xC931 as float16. Exact in float32: a product of 11 by 11 bits, and a sum of 20.
    return to_half(__builtin_convertvector(reinterpret_cast<I>(sum + 1024u), V) * 0x1.bb8p-8f + -0x1.4c4p+3f);
  }
  const U x = STATES == INST3 ? state * 89226354u + 64248484u : state * 0xCBAC1FEDu;
  // Two float16, (x & 0x8fff8fff) ^ 0x3b603b60: their exponents are 12 to 15, so as float32 the upper bits of it are constant.
  const U keep = U{} + 0x81ffe000u, flip = U{} + (0x38000000u + (0x3b60u << 13));
  const V low = reinterpret_cast<V>((reinterpret_cast<U>(reinterpret_cast<I>(x << 16) >> 3) & keep) ^ flip);
  const V high = reinterpret_cast<V>((reinterpret_cast<U>(reinterpret_cast<I>(x) >> 3) & keep) ^ flip);
  return to_half(low + high);
}

// Weight T of the 32 of a pair of outputs, LANES pairs.
template <int BITS, int STATES, int T>
BITSMITH_TARGET inline void one(const uint32_t* words, U before, float* panel) {
  constexpr int END = (T + 1) * BITS, WORD = (END - 1) / 32, DOWN = (WORD + 1) * 32 - END;
  U state = get<U>(words + 8 * WORD) >> DOWN;
  if constexpr (DOWN > 16) state |= (WORD ? get<U>(words + 8 * (WORD - (WORD > 0))) : before) << (32 - DOWN);
  constexpr int LANE = T / 8, J = T % 8, INPUT = 2 * LANE + J % 2 + 8 * (J / 2 % 2);
  put(panel + INPUT * ROWS + J / 4 * 8, value_of<STATES>(DOWN == 16 ? state : state & 0xffffu));
}

template <int BITS, int STATES, int... T>
BITSMITH_TARGET inline void all(const uint32_t* words, U before, float* panel, std::integer_sequence<int, T...>) {
  (one<BITS, STATES, T>(words, before, panel), ...);
}

template <int BITS, int STATES>
BITSMITH_TARGET void trellis(const Source& s, int64_t nb, int64_t k0, int64_t count, float* panel) {
  const int64_t tiles = (s.w.k + 15) / 16;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(s.w.codes) + (nb * tiles + k0 / 16) * 8 * BITS;
  for (int64_t k = 0; k < count; k += 16, words += 8 * BITS, panel += 16 * ROWS) {
    const uint32_t* last = words + 8 * (BITS - 1);
    for (int at = 0; at < 8; at += LANES) {
      const U own = get<U>(last + at), left = get<U>(last + (at + 8 - LANES) % 8);
#if BITSMITH_LANES == 8
      const U before = __builtin_shufflevector(left, own, 7, 8, 9, 10, 11, 12, 13, 14);
#else
      const U before = __builtin_shufflevector(left, own, 3, 4, 5, 6);
#endif
      all<BITS, STATES>(words + at, before, panel + at, std::make_integer_sequence<int, 32>());
    }
  }
}

template <int STATES>
Decode trellis_of(int32_t bits) {
  BITSMITH_BY_BITS(bits, trellis, STATES)
}

}  // namespace bitsmith::BITSMITH_FLOATS
