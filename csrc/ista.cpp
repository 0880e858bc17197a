// ista's epilogue, relu(z + eta * product - eta * lam), where it stands alone; inside a block it is part of ista_adaln.

#include "common.h"

#define KERNEL "ista_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

template <class Run>
void each_row(const Tensor& t, Run&& run) {
  const int64_t d = t.size(-1), count = d ? t.numel() / d : 0;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 32768 / (d + 1)), [&](int64_t first, int64_t last) {
    Scratch scratch(3, d);
    for (int64_t row = first; row < last; ++row) run(row, d, scratch);
  });
}

void shrink(Tensor z, Tensor product, Tensor out, double eta, double lam) {
  const Rows a = rows(z), b = rows(product), to = rows(out);
  const float step = static_cast<float>(eta), bias = static_cast<float>(eta * lam);
  each_row(z, [&](int64_t row, int64_t d, Scratch& scratch) {
    ON_LEVEL(shrink(a, b, to, row, d, step, bias, scratch));
  });
}

void shrink_backward(Tensor dout, Tensor out, Tensor dz) {
  const Rows g = rows(dout), o = rows(out), to = rows(dz);
  each_row(out, [&](int64_t row, int64_t d, Scratch& scratch) {
    ON_LEVEL(shrink_backward(g, o, to, row, d, scratch));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("shrink_backward", TORCH_BOX(&shrink_backward));
}

}  // namespace wbdit
