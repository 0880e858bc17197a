// The threshold of ista, and the mask of its gradient. Included once for each instruction set.

#include "sweep.h"

static void shrink(const Rows& z, const Rows& product, const Rows& out, int64_t row, int64_t d, float eta, float bias,
                   Scratch& scratch) {
  const float *a = read(z, row, scratch.row(0), d), *b = read(product, row, scratch.row(1), d);
  float* to = writable(out, row, scratch.row(2));
  sweep(d, [&](int64_t i, int, auto lane) INLINE {
    using T = decltype(lane);
    put(to + i, max(at<T>(a + i) + eta * at<T>(b + i) - bias, T{}));
  });
  store_row(out, row, to, d);
}

static void shrink_backward(const Rows& dout, const Rows& out, const Rows& dz, int64_t row, int64_t d,
                            Scratch& scratch) {
  const float *g = read(dout, row, scratch.row(0), d), *o = read(out, row, scratch.row(1), d);
  float* to = writable(dz, row, scratch.row(2));
  sweep(d, [&](int64_t i, int, auto lane) INLINE {
    using T = decltype(lane);
    put(to + i, at<T>(o + i) > 0 ? at<T>(g + i) : T{});
  });
  store_row(dz, row, to, d);
}
