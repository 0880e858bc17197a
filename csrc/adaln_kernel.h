// Rows of tokens: residual, threshold, LayerNorm and modulation in one pass. Included once for each instruction set.

#include "sweep.h"

struct Moments {
  float mean, rstd;
};

static inline Moments moments(const float* row, int64_t d, float eps) {
  Sum first, second;
  sweep(d, [&](int64_t i, int u, auto lane) INLINE { first.add(u, at<decltype(lane)>(row + i)); });
  const float mean = first.total() / d;
  // a second sweep over a row in L1 is cheap and avoids the cancellation of E[x^2] - E[x]^2
  sweep(d, [&](int64_t i, int u, auto lane) INLINE {
    const auto off = at<decltype(lane)>(row + i) - mean;
    second.add(u, off * off);
  });
  return {mean, 1.f / std::sqrt(second.total() / d + eps)};
}

// Forward for tokens [begin, end) of sample b; Y is the type of the matrix products. `scratch` has 6 rows.
template <class Y>
static void forward(const Forward& f, int64_t b, int64_t begin, int64_t end, Scratch& scratch) {
  const int64_t d = f.d;
  const float *shift = read(f.shift, b, scratch.row(0), d), *scale = read(f.scale, b, scratch.row(1), d);
  const float* gate = f.gate ? read(f.gate, b, scratch.row(2), d) : nullptr;
  const float* bias_row = f.bias ? read(f.bias, 0, scratch.row(5), d) : nullptr;
  const float eta = f.eta, bias = f.eta * f.lam;
  for (int64_t r = b * f.tokens + begin; r < b * f.tokens + end; ++r) {
    const float* row = read(f.x, r, scratch.row(3), d);
    if (f.out) {
      const float* x = row;
      const Y *out = static_cast<const Y*>(f.out[r]), *z = static_cast<const Y*>(f.z[r]);
      float* x_new = writable(f.x_new, r, scratch.row(4));
      sweep(d, [&](int64_t i, int, auto lane) INLINE {
        using T = decltype(lane);
        T value = at<T>(out + i);
        if (bias_row) value += at<T>(bias_row + i);
        if (f.z) value = max(at<T>(z + i) + eta * value - bias, T{});
        put(x_new + i, at<T>(x + i) + at<T>(gate + i) * value);
      });
      store_row(f.x_new, r, x_new, d);
      row = x_new;
    }
    const auto [mean, rstd] = moments(row, d, f.eps);
    Y* z_new = static_cast<Y*>(f.z_new[r]);
    sweep(d, [&](int64_t i, int, auto lane) INLINE {
      using T = decltype(lane);
      put(z_new + i, (at<T>(row + i) - mean) * rstd * (1 + at<T>(scale + i)) + at<T>(shift + i));
    });
  }
}

// Backward of LayerNorm and modulation for one row: writes dx and the normalized row, adds to dshift and dscale.
template <class Y>
static inline void backward_norm(const float* x_new, const Y* dz, const float* dx_new, const float* scale,
                                 float* normed, float* dx, float* dshift, float* dscale, int64_t d, float eps) {
  const auto [mean, rstd] = moments(x_new, d, eps);
  Sum sum, along;
  sweep(d, [&](int64_t i, int u, auto lane) INLINE {
    using T = decltype(lane);
    const T n = (at<T>(x_new + i) - mean) * rstd, g = at<T>(dz + i), slope = g * (1 + at<T>(scale + i));
    put(dshift + i, at<T>(dshift + i) + g);
    put(dscale + i, at<T>(dscale + i) + g * n);
    put(normed + i, n);
    put(dx + i, slope);
    sum.add(u, slope);
    along.add(u, slope * n);
  });
  const float level = sum.total() / d, tilt = along.total() / d;
  sweep(d, [&](int64_t i, int, auto lane) INLINE {
    using T = decltype(lane);
    T value = rstd * (at<T>(dx + i) - level - at<T>(normed + i) * tilt);
    if (dx_new) value += at<T>(dx_new + i);
    put(dx + i, value);
  });
}

// Backward for tokens [begin, end) of sample b. `sums` (4 rows) accumulates the gradients of shift, scale, gate and
// bias. `scratch` has 7 rows.
template <class Y>
static void backward(const Backward& f, int64_t b, int64_t begin, int64_t end, Scratch& scratch, Scratch& sums) {
  const int64_t d = f.d;
  const float* scale = read(f.scale, b, scratch.row(0), d);
  const float* gate = f.gate ? read(f.gate, b, scratch.row(1), d) : nullptr;
  const float* bias_row = f.bias ? read(f.bias, 0, scratch.row(6), d) : nullptr;
  const float eta = f.eta, bias = f.eta * f.lam;
  for (int64_t r = b * f.tokens + begin; r < b * f.tokens + end; ++r) {
    const float* x_new = read(f.x_new, r, scratch.row(3), d);
    const float* dx_new = f.dx_new ? read(f.dx_new, r, scratch.row(4), d) : nullptr;
    float *dx = writable(f.dx, r, scratch.row(5)), *dgate = sums.row(2), *dbias = sums.row(3);
    backward_norm(x_new, static_cast<const Y*>(f.dz_new[r]), dx_new, scale, scratch.row(2), dx, sums.row(0),
                  sums.row(1), d, f.eps);
    store_row(f.dx, r, dx, d);
    if (!f.out) continue;
    const Y *out = static_cast<const Y*>(f.out[r]), *z = static_cast<const Y*>(f.z[r]);
    Y* dout = static_cast<Y*>(f.dout[r]);
    sweep(d, [&](int64_t i, int, auto lane) INLINE {
      using T = decltype(lane);
      const T g = at<T>(dx + i);
      T value = at<T>(out + i), through = at<T>(gate + i) * g;
      if (bias_row) {
        value += at<T>(bias_row + i);
        put(dbias + i, at<T>(dbias + i) + through);
      }
      if (f.z) {
        value = max(at<T>(z + i) + eta * value - bias, T{});
        through = value > 0 ? through : T{};
      }
      put(dgate + i, at<T>(dgate + i) + g * value);
      put(dout + i, through);
    });
  }
}
