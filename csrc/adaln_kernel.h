// Rows of tokens: residual, threshold, LayerNorm and modulation in one pass. Included once for each instruction set.

#include "rows.h"

struct Moments {
  float mean, rstd;
};

static Moments moments(const float* __restrict row, int64_t d, float eps) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) sum += row[i];
  const float mean = sum / d;
  // a second sweep over a row in L1 costs little and does not cancel
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < d; ++i) squares += (row[i] - mean) * (row[i] - mean);
  return {mean, 1.f / std::sqrt(squares / d + eps)};
}

// Rows [begin, end) of sample b. scratch: 8 d floats.
static void forward(const Forward& f, int64_t b, int64_t begin, int64_t end, float* __restrict scratch) {
  const int64_t d = f.d;
  const float* __restrict shift = read(f.shift, b, scratch, d);
  const float* __restrict scale = read(f.scale, b, scratch + d, d);
  const float* __restrict gate = f.gate ? read(f.gate, b, scratch + 2 * d, d) : nullptr;
  float *x_buffer = scratch + 3 * d, *out_buffer = scratch + 4 * d, *z_buffer = scratch + 5 * d;
  const float eta = f.eta, bias = f.eta * f.lam;
  for (int64_t r = b * f.tokens + begin; r < b * f.tokens + end; ++r) {
    const float* row = read(f.x, r, x_buffer, d);
    if (f.out) {
      const float* x = row;
      const float* __restrict out = read(f.out, r, out_buffer, d);
      float* x_new = writable(f.x_new, r, scratch + 6 * d);  // may be x itself
      if (f.z) {
        const float* __restrict z = read(f.z, r, z_buffer, d);
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) x_new[i] = x[i] + gate[i] * std::max(z[i] + eta * out[i] - bias, 0.f);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) x_new[i] = x[i] + gate[i] * out[i];
      }
      written(f.x_new, r, x_new, d);
      row = x_new;
    }
    const auto [mean, rstd] = moments(row, d, f.eps);
    float* __restrict z_new = writable(f.z_new, r, scratch + 7 * d);
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) z_new[i] = (row[i] - mean) * rstd * (1 + scale[i]) + shift[i];
    written(f.z_new, r, z_new, d);
  }
}

// dLN: rows x' and dz' give dx, which comes back in `dx`; the modulation's gradients are summed into `sums`.
static void backward_norm(const float* __restrict x_new, const float* __restrict dz, const float* __restrict dx_new,
                          const float* __restrict scale, float* __restrict normed, float* __restrict dx,
                          float* __restrict sums, int64_t d, float eps) {
  const auto [mean, rstd] = moments(x_new, d, eps);
  float *__restrict dshift = sums, *__restrict dscale = sums + d, sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t i = 0; i < d; ++i) {
    const float n = (x_new[i] - mean) * rstd, slope = dz[i] * (1 + scale[i]);
    dshift[i] += dz[i];
    dscale[i] += dz[i] * n;
    normed[i] = n;
    dx[i] = slope;
    sum += slope;
    along += slope * n;
  }
  sum /= d;
  along /= d;
  if (dx_new) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) dx[i] = dx_new[i] + rstd * (dx[i] - sum - normed[i] * along);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) dx[i] = rstd * (dx[i] - sum - normed[i] * along);
  }
}

// Rows [begin, end) of sample b; sums the gradients of shift, scale and gate over them into `sums` (3 d).
static void backward(const Backward& f, int64_t b, int64_t begin, int64_t end, float* __restrict scratch,
                     float* __restrict sums) {
  const int64_t d = f.d;
  const float* __restrict scale = read(f.scale, b, scratch, d);
  const float* __restrict gate = f.gate ? read(f.gate, b, scratch + d, d) : nullptr;
  float *__restrict normed = scratch + 2 * d, *__restrict dgate = sums + 2 * d;
  const float eta = f.eta, bias = f.eta * f.lam;
  for (int64_t r = b * f.tokens + begin; r < b * f.tokens + end; ++r) {
    const float* x_new = read(f.x_new, r, scratch + 3 * d, d);
    const float* dz = read(f.dz_new, r, scratch + 4 * d, d);
    const float* dx_new = f.dx_new ? read(f.dx_new, r, scratch + 5 * d, d) : nullptr;
    float* dx = writable(f.dx, r, scratch + 6 * d);
    backward_norm(x_new, dz, dx_new, scale, normed, dx, sums, d, f.eps);
    written(f.dx, r, dx, d);
    if (!f.out) continue;
    // x' and dz' are done with: their buffers are free
    const float* __restrict out = read(f.out, r, scratch + 3 * d, d);
    float* __restrict dout = writable(f.dout, r, scratch + 5 * d);
    if (f.z) {
      const float* __restrict z = read(f.z, r, scratch + 4 * d, d);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        const float value = std::max(z[i] + eta * out[i] - bias, 0.f);
        dgate[i] += dx[i] * value;
        dout[i] = value > 0 ? gate[i] * dx[i] : 0.f;
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) {
        dgate[i] += dx[i] * out[i];
        dout[i] = gate[i] * dx[i];
      }
    }
    written(f.dout, r, dout, d);
  }
}
