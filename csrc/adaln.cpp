// adaln, gated_adaln and ista_adaln: x' = x + gate * out (+ threshold), z' = LN(x') * (1 + scale) + shift.
//
// Bytes a value, fp32 x and bf16 products: forward reads x, out (and z) and writes x', z': 12 (14); one pass where eager
// PyTorch takes eight. The row (d floats) stays in L1 between its sweeps.

#include "common.h"

namespace wbdit {

// What stands before the normalisation: nothing (no out), gate * out, or gate * relu(z + eta * out - eta * lam) (with z).
struct Forward {
  Rows x, out, z, gate, shift, scale, x_new, z_new;
  int64_t tokens, d;
  float eta, lam, eps;
};

struct Backward {
  Rows dz_new, dx_new, x_new, out, z, gate, scale, dx, dout;
  int64_t tokens, d;
  float eta, lam, eps;
};

}  // namespace wbdit

#define KERNEL "adaln_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

constexpr int64_t rows_a_task = 64;  // a sum's order is a function of the shape alone, whatever the threads

void residual_adaln(Tensor x, MaybeTensor out, MaybeTensor z, MaybeTensor gate, Tensor shift, Tensor scale,
                    MaybeTensor x_new, Tensor z_new, double eta, double lam, double eps) {
  const int64_t batch = x.size(0), tokens = x.size(1), d = x.size(2);
  const Forward f{rows(x),     rows(out), rows(z), rows(gate),
                  rows(shift), rows(scale), rows(x_new), rows(z_new),
                  tokens,      d, static_cast<float>(eta), static_cast<float>(lam), static_cast<float>(eps)};
  const int64_t parts = (tokens + rows_a_task - 1) / rows_a_task;
  const int64_t grain = std::max<int64_t>(1, 32768 / (d * std::min(tokens, rows_a_task) + 1));
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    std::unique_ptr<float[]> scratch(new float[8 * d]);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % parts * rows_a_task, end = std::min(tokens, begin + rows_a_task);
      ON_LEVEL(forward(f, task / parts, begin, end, scratch.get()));
    }
  });
}

// Sum the tasks' parts of sample b and write them in the type of the gradient.
void gather(const float* sums, int64_t parts, int64_t d, const Rows& to, int64_t b) {
  for (int64_t i = 0; i < d; ++i) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[(b * parts + part) * 3 * d + i];
    if (to.low)
      static_cast<bf16*>(to[b])[i] = from_float<bf16>(sum);
    else
      static_cast<float*>(to[b])[i] = sum;
  }
}

void residual_adaln_backward(Tensor dz_new, MaybeTensor dx_new, Tensor x_new, MaybeTensor out, MaybeTensor z,
                             MaybeTensor gate, Tensor scale, Tensor dx, MaybeTensor dout, MaybeTensor dgate,
                             Tensor dshift, Tensor dscale, double eta, double lam, double eps) {
  const int64_t batch = x_new.size(0), tokens = x_new.size(1), d = x_new.size(2);
  const Backward f{rows(dz_new), rows(dx_new), rows(x_new), rows(out), rows(z), rows(gate), rows(scale), rows(dx),
                   rows(dout),   tokens,       d, static_cast<float>(eta), static_cast<float>(lam),
                   static_cast<float>(eps)};
  const int64_t parts = (tokens + rows_a_task - 1) / rows_a_task;
  const int64_t grain = std::max<int64_t>(1, 16384 / (d * std::min(tokens, rows_a_task) + 1));
  std::unique_ptr<float[]> sums(new float[batch * parts * 3 * d]());
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    std::unique_ptr<float[]> scratch(new float[7 * d]);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % parts * rows_a_task, end = std::min(tokens, begin + rows_a_task);
      ON_LEVEL(backward(f, task / parts, begin, end, scratch.get(), sums.get() + task * 3 * d));
    }
  });
  const Rows to[] = {rows(dshift), rows(dscale), rows(dgate)};
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 8192 / (d * parts + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      for (int i = 0; i < 3; ++i)
        if (to[i]) gather(sums.get() + i * d, parts, d, to[i], b);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("residual_adaln", TORCH_BOX(&residual_adaln));
  m.impl("residual_adaln_backward", TORCH_BOX(&residual_adaln_backward));
}

}  // namespace wbdit
