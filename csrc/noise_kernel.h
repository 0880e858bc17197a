// Counter-based Gaussian noise, and the updates that use it. Included once for each instruction set.

#include "sweep.h"

constexpr int64_t strip = 256;  // numbers per draw: they stay in L1

// Philox4x32-10 (Salmon et al. 2011): four random words for each of 64 consecutive counters.
static void philox(uint32_t first, const Address& at, uint32_t sample_low, uint32_t sample_high,
                   uint32_t (*__restrict words)[strip / 4]) {
#pragma omp simd
  for (int i = 0; i < strip / 4; ++i) {
    uint32_t c0 = first + i, c1 = sample_low, c2 = at.step, c3 = sample_high, k0 = at.key_low, k1 = at.key_high;
    for (int round = 0; round < 10; ++round) {
      const uint64_t low = uint64_t{c0} * 0xD2511F53u, high = uint64_t{c2} * 0xCD9E8D57u;
      const uint32_t n0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(high);
      c3 = static_cast<uint32_t>(low);
      c0 = n0;
      c2 = n2;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
}

// Box-Muller transform: two normal numbers from two words, 24 bits of each.
static inline void box_muller(uint32_t radius, uint32_t angle, float& first, float& second) {
  const float u = static_cast<float>(static_cast<int32_t>(radius >> 8) + 1) * 0x1p-24f;
  const float r = std::sqrt(-2 * natural_log(u));
  // the angle in quarter turns: the integer part selects the quadrant, the rest, within 1/2, goes into Taylor series
  const int32_t a = static_cast<int32_t>(angle >> 8), whole = (a + (1 << 21)) >> 22;
  const float x = static_cast<float>(a - (whole << 22)) * (1.5707963267948966f * 0x1p-22f), q = x * x;
  const float sine = x * (1 + q * (-1 / 6.f + q * (1 / 120.f + q * (-1 / 5040.f + q * (1 / 362880.f)))));
  const float cosine = 1 + q * (-1 / 2.f + q * (1 / 24.f + q * (-1 / 720.f + q * (1 / 40320.f))));
  const bool odd = whole & 1;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  first = r * ((whole + 1) & 2 ? -c : c);
  second = r * (whole & 2 ? -s : s);
}

// Numbers [begin, begin + strip) of one sample's noise; `begin` is a multiple of `strip`.
static void draw(const Address& at, int64_t sample, int64_t begin, float* __restrict z) {
  uint32_t words[4][strip / 4];
  philox(static_cast<uint32_t>(begin / 4), at, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32),
         words);
#pragma omp simd
  for (int i = 0; i < strip / 4; ++i) {
    box_muller(words[0][i], words[1][i], z[4 * i], z[4 * i + 1]);
    box_muller(words[2][i], words[3][i], z[4 * i + 2], z[4 * i + 3]);
  }
}

static void normal_row(const Address& at, int64_t sample, float* out, int64_t length) {
  float z[strip];
  for (int64_t begin = 0; begin < length; begin += strip) {
    draw(at, sample, begin, z);
    std::copy_n(z, std::min(strip, length - begin), out + begin);
  }
}

// One row of a x + b out + c previous + d earlier + e noise; the noise is read, or drawn here.
static void step_row(const Step& s, int64_t row, Scratch& scratch) {
  const int64_t n = s.length;
  const float* __restrict x = read(s.x, row, scratch.row(0), n);
  const float* __restrict out = read(s.out, row, scratch.row(1), n);
  float* __restrict to = writable(s.to, row, scratch.row(2));
  sweep(n, [&](int64_t i, int, auto lane) INLINE {
    using T = decltype(lane);
    put(to + i, s.a * at<T>(x + i) + s.b * at<T>(out + i));
  });
  const Rows* terms[] = {&s.previous, &s.earlier, &s.noise};
  const float factors[] = {s.c, s.d, s.e};
  for (int term = 0; term < 3; ++term) {
    if (!*terms[term]) continue;
    const float* __restrict from = read(*terms[term], row, scratch.row(0), n);
    const float factor = factors[term];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
  }
  if (s.samples) {
    float z[strip];
    for (int64_t begin = 0; begin < n; begin += strip) {
      draw(s.at, s.samples[row], begin, z);
      const int64_t count = std::min(strip, n - begin);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[begin + i] += s.e * z[i];
    }
  }
  // not std::max, which would drop a NaN
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to[i] < s.clamp_min ? s.clamp_min : to[i];
  store_row(s.to, row, to, n);
}

static void noising_row(const Rows& x0, const Rows& noise, const Rows& to, float alpha, float sigma, int64_t row,
                        int64_t n, Scratch& scratch) {
  const float* __restrict a = read(x0, row, scratch.row(0), n);
  const float* __restrict b = read(noise, row, scratch.row(1), n);
  float* __restrict out = writable(to, row, scratch.row(2));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = alpha * a[i] + sigma * b[i];
  store_row(to, row, out, n);
}
