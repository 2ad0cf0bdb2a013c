// Products of every path this processor has against sums in double, over seeded weights and activations of every width. Prints the path that
// would be chosen, how many products were compared and the largest error; exits with 1 at the first that is wrong. Run by tests/test_neon.py.
#include "../../kernels/cpp/native.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

std::mt19937 generator(20240607);

float uniform(float low, float high) { return low + (high - low) * static_cast<float>(generator()) / 4294967296.0f; }

void fail(const char* what, const char* where) {
  std::printf("%s: %s\n", where, what);
  std::exit(1);
}

// Numbers in the storage of `dtype`, and what they then are.
struct Stored {
  std::vector<float> value;
  std::vector<uint8_t> bytes;

  Stored(std::vector<float> numbers, int32_t dtype) : value(std::move(numbers)), bytes(value.size() * 4) {
    for (size_t i = 0; i < value.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      if (dtype == U8) bytes[i] = static_cast<uint8_t>(value[i]);
      else store(bytes.data(), at, dtype, value[i]);
      value[i] = load(bytes.data(), at, dtype);
    }
  }
};

struct Case {
  int32_t bits;
  int64_t n, k, group, m;
  int32_t x_dtype = F32, y_dtype = F32, scale_dtype = F32, zero_dtype = -1;
  bool mins = false, supers = false, extreme = false;
  int64_t scale_rows = 1;
};

std::vector<uint32_t> stream_of(const std::vector<uint8_t>& codes, int64_t n, int64_t k, int32_t bits) {
  const int64_t words = (k * bits + 31) / 32;
  std::vector<uint32_t> stream(static_cast<size_t>(n * words));
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < k * bits; ++i)
      stream[r * words + i / 32] |= static_cast<uint32_t>(codes[r * k + i / bits] >> (i % bits) & 1) << (i % 32);
  return stream;
}

// What int8 products do to row m of x: the definition of common.h, in double.
std::vector<double> rounded(const std::vector<float>& x, int64_t m, int64_t k, int64_t chunk) {
  std::vector<double> out(static_cast<size_t>(k));
  for (int64_t first = 0; first < k; first += chunk) {
    const int64_t stop = std::min(first + chunk, k);
    float peak = 0;
    for (int64_t i = first; i < stop; ++i) peak = std::max(peak, std::fabs(x[m * k + i]));
    for (int64_t i = first; i < stop; ++i) out[i] = peak > 0 ? std::nearbyint(x[m * k + i] * (127 / peak)) * (static_cast<double>(peak) / 127) : 0;
  }
  return out;
}

void same_activations(const Weight& w, const Stored& x, const Case& c, const char* name) {
  Input plain, fast;
  shape(w, INT8, c.m, plain), shape(w, INT8, c.m, fast);
  const Prepare prepare = prepare_of(w, best_path());
  for (int64_t row = 0; row < c.m; ++row) generic::prepare(w, x.bytes.data(), c.x_dtype, row, plain), prepare(w, x.bytes.data(), c.x_dtype, row, fast);
  if (plain.q != fast.q || plain.scale != fast.scale || plain.sum != fast.sum) fail("activations are rounded otherwise than by the definition", name);
}

// The largest error over all paths, relative to the sum of the magnitudes of the terms.
double compare(const Case& c, const std::vector<int32_t>& paths) {
  char name[160];
  std::snprintf(name, sizeof name, "%d bits, %ld x %ld, groups of %ld, %ld rows, x %d, y %d, scales %d, zeros %d, mins %d, supers %d, scale rows %ld", c.bits,
                static_cast<long>(c.n), static_cast<long>(c.k), static_cast<long>(c.group), static_cast<long>(c.m), c.x_dtype, c.y_dtype,
                c.scale_dtype, c.zero_dtype, c.mins, c.supers, static_cast<long>(c.scale_rows));
  const int64_t groups = (c.k + c.group - 1) / c.group, blocks = (c.n + ROWS - 1) / ROWS, words = (c.k * c.bits + 31) / 32;
  const uint32_t top = (1u << c.bits) - 1;
  std::vector<uint8_t> codes(static_cast<size_t>(c.n * c.k));
  for (auto& code : codes) code = static_cast<uint8_t>(c.extreme ? top : generator() & top);
  const std::vector<uint32_t> stream = stream_of(codes, c.n, c.k, c.bits);
  std::vector<uint8_t> packed(static_cast<size_t>(blocks * ((c.k + BLOCK - 1) / BLOCK) * 64 * c.bits), 0x55);
  bitsmith_pack(stream.data(), words, 1, c.n, c.k, c.bits, packed.data(), 1);
  std::vector<uint32_t> back(stream.size(), 0x55555555u);
  bitsmith_unpack(packed.data(), c.n, c.k, c.bits, back.data(), 1);
  if (back != stream) fail("codes do not come back", name);

  const auto random = [](int64_t count, float low, float high) {
    std::vector<float> found(static_cast<size_t>(count));
    for (auto& v : found) v = uniform(low, high);
    return found;
  };
  const int64_t scales = c.scale_rows == 1 ? blocks * groups * ROWS : (c.n + c.scale_rows - 1) / c.scale_rows * groups;
  std::vector<float> scale_numbers = random(scales, 0.5f, c.scale_dtype == U8 ? 200.0f : 1.5f);
  if (c.mins) scale_numbers[0] = 0;
  const Stored scale(scale_numbers, c.scale_dtype), super(random((c.n * groups + 3) / 4, 0.5f, 1.5f), F16);
  const Stored zero(random(scales, c.mins ? -1.0f : 0.0f, c.mins ? 1.0f : static_cast<float>(top)), c.zero_dtype < 0 ? F32 : c.zero_dtype);
  std::vector<float> numbers = random(c.m * c.k, -1.0f, 1.0f);
  for (size_t i = 0; i < numbers.size() && c.extreme; ++i) numbers[i] = i / static_cast<size_t>(c.k) % 2 ? -1.0f : 1.0f;
  if (!c.extreme) numbers[0] = 30;
  const Stored x(numbers, c.x_dtype);

  Weight w{};
  w.codes = packed.data(), w.scales = scale.bytes.data(), w.zeros = c.zero_dtype < 0 ? nullptr : zero.bytes.data();
  w.supers = c.supers ? super.bytes.data() : nullptr;
  w.n = c.n, w.k = c.k, w.group = c.group, w.scale_rows = c.scale_rows, w.per_super = 4;
  w.zero = static_cast<float>(top / 2), w.scale_offset = c.supers ? 0.25f : 0.0f;
  w.bits = c.bits, w.kind = INT8, w.scale_dtype = c.scale_dtype, w.zero_dtype = c.zero_dtype, w.super_dtype = F16, w.mins = c.mins;
  same_activations(w, x, c, name);

  std::vector<double> wanted(static_cast<size_t>(c.m * c.n)), size(wanted.size());
  for (int64_t m = 0; m < c.m; ++m) {
    const std::vector<double> in = rounded(x.value, m, c.k, w.chunk());
    for (int64_t r = 0; r < c.n; ++r)
      for (int64_t i = 0; i < c.k; ++i) {
        const int64_t g = i / c.group, at = c.scale_rows == 1 ? (r / ROWS * groups + g) * ROWS + r % ROWS : r / c.scale_rows * groups + g;
        double s = scale.value[at];
        if (c.supers) s = s * super.value[(r * groups + g) / 4] + 0.25;
        const double code = codes[r * c.k + i], from = c.zero_dtype < 0 ? w.zero : zero.value[at];
        wanted[m * c.n + r] += in[i] * (c.mins ? code * s + from : (code - from) * s);
        size[m * c.n + r] += std::fabs(in[i]) * (c.mins ? code * s + std::fabs(from) : (code + std::fabs(from)) * std::fabs(s));
      }
  }
  double most = 0;
  for (const int32_t path : paths)
    for (const int32_t threads : {1, 2}) {
      std::vector<float> y(static_cast<size_t>(c.m * c.n) + 16, NAN);
      bitsmith_linear(&w, x.bytes.data(), c.x_dtype, c.m, y.data(), c.y_dtype, threads, path);
      const auto element = static_cast<size_t>(c.y_dtype == F32 ? 4 : 2), end = static_cast<size_t>(c.m * c.n) * element;
      const std::vector<float> untouched(16, NAN);
      if (std::memcmp(reinterpret_cast<const char*>(y.data()) + end, untouched.data(), 16)) fail("wrote beyond the result", name);
      for (int64_t i = 0; i < c.m * c.n; ++i) {
        const double got = load(y.data(), i, c.y_dtype), narrow = c.y_dtype == F32 ? 0 : c.y_dtype == BF16 ? 0x1p-8 : 0x1p-11;
        const double error = (std::fabs(got - wanted[i]) - narrow * std::fabs(wanted[i])) / size[i];
        if (!(error < 1e-6)) {
          std::printf("path %d, output %ld: %g, wanted %g\n", path, static_cast<long>(i), got, wanted[i]);
          fail("wrong product", name);
        }
        most = std::max(most, error);
      }
    }
  return most;
}

std::vector<Case> cases() {
  std::vector<Case> found;
  for (int32_t bits = 1; bits <= 8; ++bits) {
    // As many rows as are taken together, and odd ones; inputs that fill chunks, blocks or neither.
    for (int64_t m = 1; m <= 5; ++m) found.push_back({bits, 33, 288, 32, m, F32, F32, F16, U8});
    found.push_back({bits, 16, 256, 128, 7, BF16, F32, BF16, F16});
    found.push_back({bits, 40, 320, 64, 1, F16, F32, F32, F32});
    found.push_back({bits, 17, 608, 608, 3, F32});
    found.push_back({bits, 1, 44, 44, 2, F32});
    found.push_back({bits, 20, 173, 173, 1, BF16, BF16, F16});
    found.push_back({bits, 20, 173, 173, 4, F16, F16, F16});
    for (const int64_t m : {1, 4}) {
      Case extreme{bits, 16, 512, 128, m, F32, F32, F32, U8};
      extreme.extreme = true;
      found.push_back(extreme);
      Case mins{bits, 24, 192, 64, m, F32, F32, F16, F16};
      mins.mins = true;
      found.push_back(mins);
      Case supers{bits, 24, 192, 32, m, F32, F32, U8, U8};
      supers.supers = true;
      found.push_back(supers);
      Case tiles{bits, 48, 128, 64, m};
      tiles.scale_rows = 32;
      found.push_back(tiles);
    }
  }
  return found;
}

struct TwoLevel {
  int32_t bits, sub_bits;
  int64_t group;
  bool mins, table;
};

double compare(const TwoLevel& f, int64_t n, int64_t k, int64_t rows, bool extreme, const std::vector<int32_t>& paths) {
  char name[96];
  std::snprintf(name, sizeof name, "two levels, %d bits, scales of %d, %ld x %ld, %ld rows, extreme %d", f.bits, f.sub_bits, static_cast<long>(n),
                static_cast<long>(k), static_cast<long>(rows), extreme);
  const int64_t supers = k / two_level::SUPER, groups = k / f.group, per = two_level::SUPER / f.group, blocks = (n + ROWS - 1) / ROWS;
  const uint32_t top = (1u << f.bits) - 1, sub_top = (1u << f.sub_bits) - 1;
  const auto random = [&](int64_t count, uint32_t most) {
    std::vector<uint8_t> found(static_cast<size_t>(count));
    for (auto& code : found) code = static_cast<uint8_t>(extreme ? most : generator() & most);
    return found;
  };
  const std::vector<uint8_t> codes = random(n * k, top), scale = random(n * groups, sub_top), min = random(n * groups, sub_top);
  const std::vector<uint32_t> stream = stream_of(codes, n, k, f.bits);
  std::vector<uint8_t> packed(static_cast<size_t>(blocks * k / BLOCK * 64 * f.bits)), packed_scale(blocks * supers * per * ROWS * f.sub_bits / 8);
  std::vector<uint8_t> packed_min(packed_scale.size()), back(scale.size());
  bitsmith_pack(stream.data(), k * f.bits / 32, 1, n, k, f.bits, packed.data(), 1);
  bitsmith_pack_levels(scale.data(), n, groups, static_cast<int32_t>(per), f.sub_bits, packed_scale.data());
  bitsmith_pack_levels(min.data(), n, groups, static_cast<int32_t>(per), f.sub_bits, packed_min.data());
  bitsmith_unpack_levels(packed_scale.data(), n, groups, static_cast<int32_t>(per), f.sub_bits, back.data());
  if (back != scale) fail("scales do not come back", name);
  const auto factors = [&](float low, float high) {
    std::vector<float> found(static_cast<size_t>(blocks * supers * ROWS));
    for (auto& v : found) v = uniform(low, high);
    return Stored(found, F16);
  };
  const Stored super = factors(0.01f, 0.02f), super_min = factors(-0.02f, 0.02f);
  std::vector<float> x(static_cast<size_t>(rows * k));
  for (auto& v : x) v = extreme ? 1.0f : uniform(-1.0f, 1.0f);
  int8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(17 * i - 128 + (i == 0));

  two_level::Weight w{};
  w.codes = packed.data(), w.scales = packed_scale.data(), w.mins = f.mins ? packed_min.data() : nullptr;
  w.supers = reinterpret_cast<const uint16_t*>(super.bytes.data()), w.super_mins = reinterpret_cast<const uint16_t*>(super_min.bytes.data());
  w.table = f.table ? table : nullptr;
  w.n = n, w.k = k, w.bits = f.bits, w.group = static_cast<int32_t>(f.group), w.sub_bits = f.sub_bits;
  w.offset = f.mins ? 0 : 1 << (f.sub_bits - 1), w.zero = f.mins || f.table ? 0 : 1 << (f.bits - 1);
  std::vector<double> wanted(static_cast<size_t>(rows * n)), size(wanted.size());
  for (int64_t m = 0; m < rows; ++m) {
    const std::vector<double> in = rounded(x, m, k, two_level::SUPER);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < k; ++i) {
        const int64_t g = i / f.group, at = (r / ROWS * supers + i / two_level::SUPER) * ROWS + r % ROWS;
        const uint8_t code = codes[r * k + i];
        const double value = (f.table ? table[code] : code) - w.zero, by = (scale[r * groups + g] - w.offset) * static_cast<double>(super.value[at]);
        const double low = f.mins ? min[r * groups + g] * static_cast<double>(super_min.value[at]) : 0;
        wanted[m * n + r] += in[i] * (value * by + low);
        size[m * n + r] += std::fabs(in[i]) * (std::fabs(value * by) + std::fabs(low));
      }
  }
  double most = 0;
  for (const int32_t path : paths) {
    std::vector<float> y(wanted.size(), NAN);
    bitsmith_two_level_linear(&w, x.data(), F32, rows, y.data(), F32, 2, path);
    for (size_t i = 0; i < y.size(); ++i) {
      const double error = std::fabs(y[i] - wanted[i]) / size[i];
      if (!(error < 1e-6)) {
        std::printf("path %d, output %zu: %g, wanted %g\n", path, i, y[i], wanted[i]);
        fail("wrong product", name);
      }
      most = std::max(most, error);
    }
  }
  return most;
}

}  // namespace

int main() {
  std::vector<int32_t> paths{GENERIC};
#if BITSMITH_NEON
  paths.push_back(NEON);
  if (neon::has_sdot()) paths.push_back(NEON_SDOT);
#endif
  double most = 0;
  size_t count = 0;
  for (const Case& c : cases()) most = std::max(most, compare(c, paths)), ++count;
  for (const TwoLevel& f : {TwoLevel{2, 4, 16, true, false}, {3, 6, 16, false, false}, {4, 6, 32, true, false}, {4, 6, 32, false, true},
                            {5, 6, 32, true, false}, {6, 8, 16, false, false}})
    for (const int64_t rows : {1, 2, 3, 7})
      for (const bool extreme : {false, true}) most = std::max(most, compare(f, 19, 512, rows, extreme, paths)), ++count;
  std::printf("%d %zu %g\n", bitsmith_path(), count * paths.size(), most);
  return 0;
}
