// A stack of white-box blocks in fp32, forward and backward, without the gradients of the weights.
//
// A task takes a few samples through all blocks. Their rows stay in L2 between products and passes, where PyTorch's
// products write and read main memory or L3. The weights are packed once per call.

#include "blocks.h"

#include <memory>
#include <utility>

#include "adaln.h"
#include "mssa.h"

#define KERNEL "blocks_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

constexpr size_t saved_tensors = 10;  // per block
constexpr int64_t rows_a_task = 66;  // tokens; a task has at least one sample
constexpr int64_t fewest_tasks = 16;  // for many threads, as far as there are samples

float* data(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "wbdit: blocks take contiguous fp32");
  return static_cast<float*>(t.mutable_data_ptr());
}

Blocks sizes(const Tensor& x, const std::vector<Tensor>& modulations, const std::vector<Tensor>& projections,
             const std::vector<Tensor>& biases, const std::vector<Tensor>& saved, int64_t heads, double eta, double lam,
             double eps) {
  Blocks n{};
  n.batch = x.size(0), n.tokens = x.size(1), n.d = x.size(2), n.heads = heads;
  n.inner = projections[0].size(0), n.depth = static_cast<int64_t>(projections.size());
  n.eta = static_cast<float>(eta), n.lam = static_cast<float>(lam), n.eps = static_cast<float>(eps);
  n.x = data(x);
  for (size_t i = 0; i + saved_tensors <= saved.size(); i += saved_tensors) {
    const Tensor* t = &saved[i];  // the order of training_blocks.SavedActivations, in which 7 is the folded dictionary
    n.saved.push_back(
        {data(t[0]), data(t[6]), data(t[1]), data(t[2]), data(t[3]), data(t[4]), data(t[8]), data(t[5]), data(t[9])});
  }
  for (const Tensor& part : modulations) n.modulations.push_back(rows(part));
  for (const Tensor& bias : biases) n.biases.push_back(data(bias));
  return n;
}

// A right operand before it is packed.
struct Operand {
  const float* data;
  int64_t inner, width;
  bool transposed;
};

// Pack operands, in parallel, three for each block.
std::vector<float> pack(Blocks& n, const std::vector<Operand>& operands) {
  std::vector<int64_t> begins{0};
  for (const Operand& b : operands) begins.push_back(begins.back() + b.inner * b.width);
  std::vector<float> memory(begins.back() + 16);
  float* to = aligned(memory);
  torch::stable::parallel_for(0, static_cast<int64_t>(operands.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Operand& b = operands[i];
      const int64_t row_stride = b.transposed ? 1 : b.width, column_stride = b.transposed ? b.inner : 1;
      ON_LEVEL(pack_panels(b.data, row_stride, column_stride, to + begins[i], b.inner, b.width));
    }
  });
  for (size_t i = 0; i < operands.size(); i += 3)
    n.weights.push_back({to + begins[i], to + begins[i + 1], to + begins[i + 2]});
  return memory;
}

// Call run(first sample, number of samples, memory) for all samples, a few at a time.
template <class Run>
void each_task(const Blocks& n, Run&& run) {
  const int64_t count = std::max<int64_t>(1, std::min(rows_a_task / n.tokens, n.batch / fewest_tasks));
  const int64_t floats = ON_LEVEL(blocks_floats(n, count));
  torch::stable::parallel_for(0, (n.batch + count - 1) / count, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
    for (int64_t task = begin; task < end; ++task)
      run(task * count, std::min(count, n.batch - task * count), aligned(memory));
  });
}

void blocks(Tensor x, std::vector<Tensor> modulations, std::vector<Tensor> projections, std::vector<Tensor> outs,
            std::vector<Tensor> biases, std::vector<Tensor> folded, Tensor z, std::vector<Tensor> saved, int64_t heads,
            double eta, double lam, double eps) {
  Blocks n = sizes(x, modulations, projections, biases, saved, heads, eta, lam, eps);
  n.z = data(z);
  std::vector<Operand> operands;
  for (int64_t k = 0; k < n.depth; ++k) {
    operands.push_back({data(projections[k]), n.d, n.inner, true});
    operands.push_back({data(outs[k]), n.inner, n.d, true});
    operands.push_back({data(folded[k]), n.d, n.d, false});
  }
  const std::vector<float> packed = pack(n, operands);
  each_task(n, [&](int64_t first, int64_t count, float* memory) {
    Scratch scratch(6, n.d);
    ON_LEVEL(blocks_forward(n, first, count, memory, scratch));
  });
}

// `steps` are 1 + eta F. `dproducts` are the gradients of each block's products: projection, output map, dictionary.
void blocks_backward(Tensor dz, Tensor x, std::vector<Tensor> modulations, std::vector<Tensor> projections,
                     std::vector<Tensor> outs, std::vector<Tensor> biases, std::vector<Tensor> steps,
                     std::vector<Tensor> saved, Tensor dx, std::vector<Tensor> dmodulations,
                     std::vector<Tensor> dproducts, std::vector<Tensor> dbiases, int64_t heads, double eta, double lam,
                     double eps) {
  Blocks n = sizes(x, modulations, projections, biases, saved, heads, eta, lam, eps);
  Gradients g{data(dz), data(dx), {}, {}};
  for (int64_t k = 0; k < n.depth; ++k)
    g.blocks.push_back(
        {data(dproducts[3 * k]), data(dproducts[3 * k + 1]), data(dproducts[3 * k + 2]), data(dbiases[k])});
  for (const Tensor& part : dmodulations) g.modulations.push_back(rows(part));
  std::vector<Operand> operands;
  for (int64_t k = 0; k < n.depth; ++k) {
    operands.push_back({data(projections[k]), n.inner, n.d, false});
    operands.push_back({data(outs[k]), n.d, n.inner, false});
    operands.push_back({data(steps[k]), n.d, n.d, true});
  }
  const std::vector<float> packed = pack(n, operands);
  each_task(n, [&](int64_t first, int64_t count, float* memory) {
    Scratch scratch(7, n.d), sums(4, n.d);
    ON_LEVEL(blocks_backward(n, g, first, count, memory, scratch, sums));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def(
      "blocks(Tensor x, Tensor[] modulations, Tensor[] projections, Tensor[] outs, Tensor[] biases, Tensor[] folded, "
      "*, "
      "Tensor(a!) z, Tensor(b!)[] saved, int heads, float eta, float lam, float eps) -> ()");
  m.def(
      "blocks_backward(Tensor dz, Tensor x, Tensor[] modulations, Tensor[] projections, Tensor[] outs, "
      "Tensor[] biases, Tensor[] steps, Tensor[] saved, *, Tensor(a!) dx, Tensor(b!)[] dmodulations, "
      "Tensor(c!)[] dproducts, Tensor(d!)[] dbiases, int heads, float eta, float lam, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("blocks", TORCH_BOX(&blocks));
  m.impl("blocks_backward", TORCH_BOX(&blocks_backward));
}

}  // namespace wbdit
