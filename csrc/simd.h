// Vectors of VL floats. Included once for each instruction set.

typedef float V __attribute__((vector_size(VL * 4)));
typedef int32_t I __attribute__((vector_size(VL * 4)));

static inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }

typedef uint32_t U __attribute__((vector_size(VL * 4)));
typedef uint16_t H __attribute__((vector_size(VL * 2)));

static inline V load(const bf16* p) {
  H h;
  std::memcpy(&h, p, sizeof h);
  return std::bit_cast<V>(__builtin_convertvector(h, U) << 16);
}

// Rounds to nearest even, like from_float.
static inline void store(bf16* p, V v) {
  const U u = std::bit_cast<U>(v);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const H h = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded, H);
  std::memcpy(p, &h, sizeof h);
}

static inline V set1(float v) { return V{} + v; }

static inline V max(V a, V b) { return a > b ? a : b; }

// A permutation for reductions in halves: lane i takes lane i ^ stage.
template <int stage, int... lane>
static inline V partner(V v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (lane ^ stage)...);
}

template <int stage = VL / 2>
static inline float sum(V v) {
  v += partner<stage>(v, std::make_integer_sequence<int, VL>{});
  if constexpr (stage > 1)
    return sum<stage / 2>(v);
  else
    return v[0];
}

template <int stage = VL / 2>
static inline float largest(V v) {
  v = max(v, partner<stage>(v, std::make_integer_sequence<int, VL>{}));
  if constexpr (stage > 1)
    return largest<stage / 2>(v);
  else
    return v[0];
}

// 2^x for x <= 127, and 2^-126 for x < -126. The integer part goes into the exponent bits. The fractional part, in
// [-1/2, 1/2], goes into a polynomial that was fitted for the least relative error, at most 7.5e-8.
static inline V exp2(V x) {
  const V magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  x = max(x, set1(-126.f));
  const V whole = x + magic;
  const V f = x - (whole - magic);
  V y = f * 1.32764715e-3f + 9.67554133e-3f;
  y = y * f + 5.55071327e-2f;
  y = y * f + 2.40221197e-1f;
  y = y * f + 6.93146967e-1f;
  y = y * f + 1.00000007f;
  return y * std::bit_cast<V>((std::bit_cast<I>(whole) + (127 - 0x4B400000)) << 23);
}

// ln(u) of a positive normal number, written as a scalar for loops that the compiler vectorizes. It is ln 2 times the
// exponent plus ln(m) = 2 artanh(s) for the mantissa m = (1 + s) / (1 - s), between sqrt(1/2) and sqrt(2). The first
// omitted term of the series of artanh is 4e-9.
static inline float natural_log(float u) {
  const uint32_t bits = std::bit_cast<uint32_t>(u);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // the bits of sqrt(1/2)
  const float m = std::bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23));
  const float s = (m - 1) / (m + 1), q = s * s;
  const float series = 2 * s * (1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * (1 / 9.f)))));
  return static_cast<float>(exponent) * 0.693147180559945f + series;
}

// Transpose VL x VL numbers of 32 bits: each stage swaps the off-diagonal blocks.
template <int stage, int... lane>
static inline void swap_blocks(V& a, V& b, std::integer_sequence<int, lane...>) {
  const V c = __builtin_shufflevector(a, b, (lane & stage ? VL + lane - stage : lane)...);
  b = __builtin_shufflevector(a, b, (lane & stage ? VL + lane : lane + stage)...);
  a = c;
}

template <int stage = VL / 2>
static inline void transpose(V* row) {
  for (int i = 0; i < VL; ++i)
    if (!(i & stage)) swap_blocks<stage>(row[i], row[i + stage], std::make_integer_sequence<int, VL>{});
  if constexpr (stage > 1) transpose<stage / 2>(row);
}
