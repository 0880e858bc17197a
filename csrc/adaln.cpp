// adaln, gated_adaln and ista_adaln: x' = x + gate * out (+ threshold), z' = LN(x') * (1 + scale) + shift.
//
// Bytes per value, with fp32 x and bf16 products: forward reads x and out (and z) and writes x' and z', 12 (14) bytes.
// It is one pass over memory; eager PyTorch takes eight. A row (d floats) stays in L1 between its sweeps.

#include "adaln.h"

#define KERNEL "adaln_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

constexpr int sum_rows = 4;          // gradients of shift, scale, gate and bias
constexpr int64_t rows_a_task = 64;  // fixed, so that the order of summation does not depend on the number of threads

void residual_adaln(Tensor x, MaybeTensor out, MaybeTensor bias, MaybeTensor z, MaybeTensor gate, Tensor shift,
                    Tensor scale, MaybeTensor x_new, Tensor z_new, double eta, double lam, double eps) {
  const int64_t batch = x.size(0), tokens = x.size(1), d = x.size(2);
  const Forward f{rows(x),
                  rows(out),
                  rows(bias),
                  rows(z),
                  rows(gate),
                  rows(shift),
                  rows(scale),
                  rows(x_new),
                  rows(z_new),
                  tokens,
                  d,
                  static_cast<float>(eta),
                  static_cast<float>(lam),
                  static_cast<float>(eps)};
  for (const Rows& t : {f.out, f.z}) STD_TORCH_CHECK(!t || t.low == f.z_new.low, "wbdit: out, z, z_new differ in type");
  const int64_t parts = (tokens + rows_a_task - 1) / rows_a_task;
  const int64_t grain = std::max<int64_t>(1, 32768 / (d * std::min(tokens, rows_a_task) + 1));
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(6, d);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % parts * rows_a_task, end = std::min(tokens, begin + rows_a_task);
      if (f.z_new.low)
        ON_LEVEL(forward<bf16>(f, task / parts, begin, end, scratch));
      else
        ON_LEVEL(forward<float>(f, task / parts, begin, end, scratch));
    }
  });
}

// Add up the tasks' partial sums of sample b, in order, and write the result in the type of the gradient.
void gather(const float* sums, int64_t parts, int64_t d, const Rows& to, int64_t b) {
  for (int64_t i = 0; i < d; ++i) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[(b * parts + part) * sum_rows * d + i];
    if (to.low)
      static_cast<bf16*>(to[b])[i] = from_float<bf16>(sum);
    else
      static_cast<float*>(to[b])[i] = sum;
  }
}

void residual_adaln_backward(Tensor dz_new, Tensor x_new, MaybeTensor dx_new, MaybeTensor out, MaybeTensor bias,
                             MaybeTensor z, MaybeTensor gate, Tensor scale, Tensor dx, MaybeTensor dout,
                             MaybeTensor dgate, Tensor dshift, Tensor dscale, MaybeTensor dbias, double eta, double lam,
                             double eps) {
  const int64_t batch = x_new.size(0), tokens = x_new.size(1), d = x_new.size(2);
  const Backward f{rows(dz_new),
                   rows(dx_new),
                   rows(x_new),
                   rows(out),
                   rows(bias),
                   rows(z),
                   rows(gate),
                   rows(scale),
                   rows(dx),
                   rows(dout),
                   tokens,
                   d,
                   static_cast<float>(eta),
                   static_cast<float>(lam),
                   static_cast<float>(eps)};
  for (const Rows& t : {f.out, f.z, f.dout})
    STD_TORCH_CHECK(!t || t.low == f.dz_new.low, "wbdit: dz_new, out, z, dout differ in type");
  const int64_t parts = (tokens + rows_a_task - 1) / rows_a_task;
  const int64_t grain = std::max<int64_t>(1, 16384 / (d * std::min(tokens, rows_a_task) + 1));
  std::vector<float> sums(batch * parts * sum_rows * d);
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(7, d), sum(sum_rows, d);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % parts * rows_a_task, end = std::min(tokens, begin + rows_a_task);
      for (int i = 0; i < sum_rows; ++i) std::fill_n(sum.row(i), d, 0.f);
      if (f.dz_new.low)
        ON_LEVEL(backward<bf16>(f, task / parts, begin, end, scratch, sum));
      else
        ON_LEVEL(backward<float>(f, task / parts, begin, end, scratch, sum));
      for (int i = 0; i < sum_rows; ++i) std::copy_n(sum.row(i), d, sums.data() + (task * sum_rows + i) * d);
    }
  });
  const Rows to[] = {rows(dshift), rows(dscale), rows(dgate), rows(dbias)};
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 8192 / (d * parts + 1)), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      for (int i = 0; i < sum_rows; ++i)
        if (to[i]) gather(sums.data() + i * d, parts, d, to[i], b);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def(
      "residual_adaln(Tensor x, *, Tensor? out=None, Tensor? bias=None, Tensor? z=None, Tensor? gate=None, "
      "Tensor shift, Tensor scale, Tensor(a!)? x_new=None, Tensor(b!) z_new, float eta=0., float lam=0., "
      "float eps) -> ()");
  m.def(
      "residual_adaln_backward(Tensor dz_new, Tensor x_new, *, Tensor? dx_new=None, Tensor? out=None, "
      "Tensor? bias=None, Tensor? z=None, Tensor? gate=None, Tensor scale, Tensor(a!) dx, Tensor(b!)? dout=None, "
      "Tensor(c!)? dgate=None, Tensor(d!) dshift, Tensor(e!) dscale, Tensor(f!)? dbias=None, float eta=0., "
      "float lam=0., float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("residual_adaln", TORCH_BOX(&residual_adaln));
  m.impl("residual_adaln_backward", TORCH_BOX(&residual_adaln_backward));
}

}  // namespace wbdit
