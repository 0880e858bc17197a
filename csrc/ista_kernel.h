// The threshold of ista, and its gradient's mask. Included once for each instruction set.

#include "rows.h"

static void shrink(const Rows& z, const Rows& product, const Rows& out, int64_t row, int64_t d, float eta, float bias,
                   float* scratch) {
  const float* __restrict a = read(z, row, scratch, d);
  const float* __restrict b = read(product, row, scratch + d, d);
  float* __restrict to = writable(out, row, scratch + 2 * d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) to[i] = std::max(a[i] + eta * b[i] - bias, 0.f);
  written(out, row, to, d);
}

static void shrink_backward(const Rows& dout, const Rows& out, const Rows& dz, int64_t row, int64_t d, float* scratch) {
  const float* __restrict g = read(dout, row, scratch, d);
  const float* __restrict o = read(out, row, scratch + d, d);
  float* __restrict to = writable(dz, row, scratch + 2 * d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) to[i] = o[i] > 0 ? g[i] : 0.f;
  written(dz, row, to, d);
}
