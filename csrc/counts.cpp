// count_mean, count_nll and its gradient, count_draw: counts at a few levels per gene, given the noised value of the
// same gene.
//
// A softmax over the levels of logit_l = (1 - w) b0_l + w b1_l + log_odds c_l - ((x - alpha v_l) / sigma)^2 / 2. It
// takes some 25 operations per cell, gene and level, and reads 12 bytes per cell and gene. Eager PyTorch writes every
// intermediate result to memory for each level.

#include "common.h"

namespace wbdit {

struct Counts {
  Rows x, log_odds, mixture, dnll, u;           // (B, G); count_draw gets ln(mean / size) as log_odds
  const float *alpha, *sigma;                   // (B,)
  const float *log_base0, *log_base1, *values;  // (G, L)
  const float* counts;                          // (L,)
  const int32_t* n_levels;                      // (G,)
  const uint8_t* target;                        // (B, G)
  const float* log_scale;                       // (B,): logarithms of the cells' factors
  const int32_t *lowest, *highest;              // (L,)
  Rows out, dmixture;  // (B, G): mean, NLL, int32 counts or gradient of log_odds; the gradient of the mixture
  float *dlog_base0, *dlog_base1;  // (G, L)
  float* expected;                 // (blocks of genes, whole strips of cells): sums of expected counts
  int64_t cells, genes, levels;
};

constexpr int64_t strip = 64;   // cells at a time: their scratch rows stay in L1
constexpr int64_t widest = 16;  // most floats per vector
constexpr int buffers = 10;     // rows of scratch

}  // namespace wbdit

#define KERNEL "counts_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

template <class T>
const T* dense(const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel, "wbdit: a table of counts has the wrong size or type");
  return static_cast<const T*>(t.const_data_ptr());
}

Rows cells_of(const Tensor& t, int64_t cells, int64_t genes) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == cells && t.size(1) == genes && t.scalar_type() == ScalarType::Float,
                  "wbdit: x, log_odds, mixture and dnll must be fp32 of one shape");
  return rows(t);
}

Counts given(const Tensor& x, const Tensor& log_odds, const Tensor& mixture, const Tensor& alpha, const Tensor& sigma,
             const Tensor& log_base0, const Tensor& log_base1, const Tensor& values, const Tensor& counts,
             const Tensor& n_levels) {
  const int64_t cells = x.size(0), genes = x.size(1), levels = counts.numel();
  Counts c{};
  c.x = cells_of(x, cells, genes);
  c.log_odds = cells_of(log_odds, cells, genes);
  c.mixture = cells_of(mixture, cells, genes);
  c.alpha = dense<float>(alpha, ScalarType::Float, cells), c.sigma = dense<float>(sigma, ScalarType::Float, cells);
  c.log_base0 = dense<float>(log_base0, ScalarType::Float, genes * levels);
  c.log_base1 = dense<float>(log_base1, ScalarType::Float, genes * levels);
  c.values = dense<float>(values, ScalarType::Float, genes * levels);
  c.counts = dense<float>(counts, ScalarType::Float, levels);
  c.n_levels = dense<int32_t>(n_levels, ScalarType::Int, genes);
  c.cells = cells, c.genes = genes, c.levels = levels;
  return c;
}

// Call run(first gene, scratch) for every block of `widest` genes. One task sums a gene over cells, in a fixed order.
template <class Run>
void each_block(const Counts& c, Run&& run) {
  const int64_t blocks = (c.genes + widest - 1) / widest;
  const int64_t grain = std::max<int64_t>(1, 16384 / (c.cells * c.levels * widest + 1));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(buffers, std::max(strip, 4 * c.levels) * widest);
    for (int64_t block = first; block < last; ++block) run(block * widest, scratch);
  });
}

void count_mean(Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0,
                Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor mean) {
  Counts c = given(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels);
  c.out = rows(mean);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_mean(c, gene, scratch)); });
}

void count_nll(Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0,
               Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor target, Tensor nll) {
  Counts c = given(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels);
  c.target = dense<uint8_t>(target, ScalarType::Byte, c.cells * c.genes);
  c.out = rows(nll);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_nll(c, gene, scratch)); });
}

void count_nll_backward(Tensor dnll, Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma,
                        Tensor log_base0, Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels,
                        Tensor target, Tensor dlog_odds, Tensor dmixture, Tensor dlog_base0, Tensor dlog_base1) {
  Counts c = given(x, log_odds, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels);
  c.target = dense<uint8_t>(target, ScalarType::Byte, c.cells * c.genes);
  c.dnll = cells_of(dnll, c.cells, c.genes);
  c.out = rows(dlog_odds), c.dmixture = rows(dmixture);
  c.dlog_base0 = static_cast<float*>(dlog_base0.mutable_data_ptr());
  c.dlog_base1 = static_cast<float*>(dlog_base1.mutable_data_ptr());
  std::fill_n(c.dlog_base0, c.genes * c.levels, 0.f);
  std::fill_n(c.dlog_base1, c.genes * c.levels, 0.f);
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_nll_backward(c, gene, scratch)); });
}

// Each round sums expected counts per block of genes, then over blocks: a cell's sum is the same in any batch.
void count_draw(Tensor x, Tensor log_ratio, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0,
                Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor lowest, Tensor highest,
                Tensor u, Tensor library, Tensor drawn, Tensor log_scale, int64_t rounds) {
  Counts c = given(x, log_ratio, mixture, alpha, sigma, log_base0, log_base1, values, counts, n_levels);
  const float* size = dense<float>(library, ScalarType::Float, c.cells);
  float* scale = static_cast<float*>(log_scale.mutable_data_ptr());
  std::fill_n(scale, c.cells, 0.f);
  c.u = cells_of(u, c.cells, c.genes);
  c.lowest = dense<int32_t>(lowest, ScalarType::Int, c.levels);
  c.highest = dense<int32_t>(highest, ScalarType::Int, c.levels);
  c.out = {drawn.mutable_data_ptr(), drawn.stride(0)};
  c.log_scale = scale;
  const int64_t blocks = (c.genes + widest - 1) / widest, padded = (c.cells + strip - 1) / strip * strip;
  std::vector<float> expected(blocks * padded);
  for (int64_t round = 0; round < rounds; ++round) {
    std::fill(expected.begin(), expected.end(), 0.f);
    c.expected = expected.data();
    each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_expect(c, gene, scratch)); });
    std::vector<double> total(c.cells);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t cell = 0; cell < c.cells; ++cell) total[cell] += expected[block * padded + cell];
    // the logarithm in fp32: that of fp64 needs glibc 2.29, which would make the wheel refuse older systems
    for (int64_t cell = 0; cell < c.cells; ++cell)
      scale[cell] += std::log(static_cast<float>(size[cell] / total[cell]));
  }
  each_block(c, [&](int64_t gene, Scratch& scratch) { ON_LEVEL(count_draw(c, gene, scratch)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def(
      "count_mean(Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0, "
      "Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor(a!) mean) -> ()");
  m.def(
      "count_nll(Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0, "
      "Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor target, Tensor(a!) nll) -> ()");
  m.def(
      "count_nll_backward(Tensor dnll, Tensor x, Tensor log_odds, Tensor mixture, Tensor alpha, Tensor sigma, "
      "Tensor log_base0, Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor target, "
      "Tensor(a!) dlog_odds, Tensor(b!) dmixture, Tensor(c!) dlog_base0, Tensor(d!) dlog_base1) -> ()");
  m.def(
      "count_draw(Tensor x, Tensor log_ratio, Tensor mixture, Tensor alpha, Tensor sigma, Tensor log_base0, "
      "Tensor log_base1, Tensor values, Tensor counts, Tensor n_levels, Tensor lowest, Tensor highest, Tensor u, "
      "Tensor library, Tensor(a!) drawn, Tensor(b!) log_scale, int rounds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("count_mean", TORCH_BOX(&count_mean));
  m.impl("count_nll", TORCH_BOX(&count_nll));
  m.impl("count_nll_backward", TORCH_BOX(&count_nll_backward));
  m.impl("count_draw", TORCH_BOX(&count_draw));
}

}  // namespace wbdit
