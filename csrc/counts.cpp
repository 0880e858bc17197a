// count_mean, count_nll and its gradient: counts of a few levels a gene, given the gene's own noised value.
//
// logit_l = (1 - w) b0_l + w b1_l + eta c_l - ((x - alpha v_l) / sigma)^2 / 2, of which a softmax is taken: some 25
// operations a cell, gene and level, and 12 bytes read a cell and gene; eager PyTorch writes each of them out by level.

#include "common.h"

namespace wbdit {

struct Counts {
  Rows x, eta, weight, dnll;  // (B, G)
  const float *alpha, *sigma;  // (B,)
  const float *base0, *base1, *values;  // (G, L)
  const float* counts;  // (L,)
  const int32_t* sizes;  // (G,)
  const uint8_t* target;  // (B, G)
  Rows out, dweight;  // (B, G): the mean, the likelihood or the gradient of eta, and that of the weight
  float *dbase0, *dbase1;  // (G, L)
  int64_t cells, genes, levels;
};

constexpr int64_t strip = 64;  // cells at a time: what is kept of them stays in L1
constexpr int64_t widest = 16;  // floats a vector
constexpr int buffers = 10;  // rows of scratch

}  // namespace wbdit

#define KERNEL "counts_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

template <class T>
const T* dense(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel, "wbdit: the tables of counts differ in shape or type");
  return static_cast<const T*>(t.const_data_ptr());
}

Rows cells_of(const Tensor& t, int64_t cells, int64_t genes) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == cells && t.size(1) == genes && t.scalar_type() == ScalarType::Float,
                  "wbdit: x, eta and weight must be fp32 of one shape");
  return rows(t);
}

Counts given(const Tensor& x, const Tensor& eta, const Tensor& weight, const Tensor& alpha, const Tensor& sigma,
             const Tensor& base0, const Tensor& base1, const Tensor& values, const Tensor& counts,
             const Tensor& sizes) {
  const int64_t cells = x.size(0), genes = x.size(1), levels = counts.numel();
  Counts c{};
  c.x = cells_of(x, cells, genes), c.eta = cells_of(eta, cells, genes), c.weight = cells_of(weight, cells, genes);
  c.alpha = dense<float>(alpha, ScalarType::Float, cells), c.sigma = dense<float>(sigma, ScalarType::Float, cells);
  c.base0 = dense<float>(base0, ScalarType::Float, genes * levels);
  c.base1 = dense<float>(base1, ScalarType::Float, genes * levels);
  c.values = dense<float>(values, ScalarType::Float, genes * levels);
  c.counts = dense<float>(counts, ScalarType::Float, levels);
  c.sizes = dense<int32_t>(sizes, ScalarType::Int, genes);
  c.cells = cells, c.genes = genes, c.levels = levels;
  return c;
}

// Call run(first gene, scratch) for every `widest` genes: a gene's sums over cells are one task's, in one order.
template <class Run>
void each_block(const Counts& c, Run&& run) {
  const int64_t blocks = (c.genes + widest - 1) / widest;
  const int64_t grain = std::max<int64_t>(1, 16384 / (c.cells * c.levels * widest + 1));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(buffers, std::max(strip, 4 * c.levels) * widest);
    for (int64_t block = first; block < last; ++block) run(block * widest, scratch);
  });
}

void count_mean(Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, Tensor base1,
                Tensor values, Tensor counts, Tensor sizes, Tensor mean) {
  Counts c = given(x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes);
  c.out = rows(mean);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_mean(c, gene, scratch)); });
}

void count_nll(Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, Tensor base1,
               Tensor values, Tensor counts, Tensor sizes, Tensor target, Tensor nll) {
  Counts c = given(x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes);
  c.target = dense<uint8_t>(target, ScalarType::Byte, c.cells * c.genes);
  c.out = rows(nll);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_nll(c, gene, scratch)); });
}

void count_nll_backward(Tensor dnll, Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0,
                        Tensor base1, Tensor values, Tensor counts, Tensor sizes, Tensor target, Tensor deta,
                        Tensor dweight, Tensor dbase0, Tensor dbase1) {
  Counts c = given(x, eta, weight, alpha, sigma, base0, base1, values, counts, sizes);
  c.target = dense<uint8_t>(target, ScalarType::Byte, c.cells * c.genes);
  c.dnll = cells_of(dnll, c.cells, c.genes);
  c.out = rows(deta), c.dweight = rows(dweight);
  c.dbase0 = static_cast<float*>(dbase0.mutable_data_ptr());
  c.dbase1 = static_cast<float*>(dbase1.mutable_data_ptr());
  std::fill_n(c.dbase0, c.genes * c.levels, 0.f);
  std::fill_n(c.dbase1, c.genes * c.levels, 0.f);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_nll_backward(c, gene, scratch)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("count_mean", TORCH_BOX(&count_mean));
  m.impl("count_nll", TORCH_BOX(&count_nll));
  m.impl("count_nll_backward", TORCH_BOX(&count_nll_backward));
}

}  // namespace wbdit
