// The epilogue of ista, relu(z + eta * product - eta * lam), on its own; blocks use ista_adaln, which includes it.

#include "common.h"

#define KERNEL "ista_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

int64_t row_count(const Tensor& t) { return t.size(-1) ? t.numel() / t.size(-1) : 0; }

void shrink(Tensor z, Tensor product, Tensor out, double eta, double lam) {
  const int64_t d = z.size(-1);
  const Rows a = rows(z), b = rows(product), to = rows(out);
  const float step = static_cast<float>(eta), bias = static_cast<float>(eta * lam);
  each_row(row_count(z), d,
           [&](int64_t row, Scratch& scratch) { ON_LEVEL(shrink(a, b, to, row, d, step, bias, scratch)); });
}

void shrink_backward(Tensor dout, Tensor out, Tensor dz) {
  const int64_t d = out.size(-1);
  const Rows g = rows(dout), o = rows(out), to = rows(dz);
  each_row(row_count(out), d,
           [&](int64_t row, Scratch& scratch) { ON_LEVEL(shrink_backward(g, o, to, row, d, scratch)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def("shrink(Tensor z, Tensor product, Tensor(a!) out, float eta, float lam) -> ()");
  m.def("shrink_backward(Tensor dout, Tensor out, Tensor(a!) dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("shrink", TORCH_BOX(&shrink));
  m.impl("shrink_backward", TORCH_BOX(&shrink_backward));
}

}  // namespace wbdit
