// adamw: clipping by norm, decoupled weight decay, Adam and a moving average of the weights, over all weights at once.
//
// Bytes per weight: 4 for the norm, then 20 read and 16 written. PyTorch's calls, each of which passes over memory
// once, read and write 60.

#include "common.h"

namespace wbdit {

struct Update {
  const float* gradient;
  float *weight, *first, *second, *average;  // Adam's two moments; the average may be null
  float clip, keep, rate;                    // factor of the gradient, of the weight, and step size
  float beta1, beta2, root, eps, toward;     // root: of the second moment's bias; toward: weight of the new value
};

}  // namespace wbdit

#define KERNEL "adamw_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

constexpr int64_t chunk = 16384;  // weights a task; fixed, so that the norm does not depend on the number of threads

struct Piece {
  int64_t tensor, begin, end;
};

std::vector<Piece> pieces_of(const std::vector<Tensor>& tensors) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += chunk)
      pieces.push_back({static_cast<int64_t>(i), begin, std::min(begin + chunk, tensors[i].numel())});
  return pieces;
}

std::vector<float*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<float*> all;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "wbdit: adamw takes contiguous fp32");
    all.push_back(static_cast<float*>(t.mutable_data_ptr()));
  }
  return all;
}

template <class Run>
void each(const std::vector<Piece>& pieces, Run&& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(i, pieces[i]);
  });
}

// The factor that limits the norm of all gradients, as torch.nn.utils.clip_grad_norm_ computes it.
float clip_factor(const std::vector<Piece>& pieces, const std::vector<float*>& gradients, double largest) {
  std::vector<float> sums(pieces.size());
  each(pieces, [&](int64_t i, const Piece& piece) {
    sums[i] = ON_LEVEL(sum_of_squares(gradients[piece.tensor] + piece.begin, piece.end - piece.begin));
  });
  double total = 0;
  for (float sum : sums) total += sum;
  const double factor = largest / (std::sqrt(total) + 1e-6);
  return factor < 1 || std::isnan(factor) ? static_cast<float>(factor) : 1.f;
}

// Per tensor: the factor of the weight that its decay leaves, the step size, and the root of the second moment's bias.
void adamw(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> first,
           std::vector<Tensor> second, std::vector<Tensor> averages, std::vector<double> keeps,
           std::vector<double> rates, std::vector<double> roots, double beta1, double beta2, double eps,
           double clip_norm, double toward) {
  const std::vector<Piece> pieces = pieces_of(weights);
  const auto w = pointers(weights), g = pointers(gradients), m = pointers(first), v = pointers(second),
             a = pointers(averages);
  const float clip = clip_norm > 0 ? clip_factor(pieces, g, clip_norm) : 1.f;
  std::vector<Update> updates;
  for (size_t i = 0; i < w.size(); ++i)
    updates.push_back({g[i], w[i], m[i], v[i], a.empty() ? nullptr : a[i], clip, static_cast<float>(keeps[i]),
                       static_cast<float>(rates[i]), static_cast<float>(beta1), static_cast<float>(beta2),
                       static_cast<float>(roots[i]), static_cast<float>(eps), static_cast<float>(toward)});
  each(pieces, [&](int64_t, const Piece& piece) { ON_LEVEL(update(updates[piece.tensor], piece.begin, piece.end)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def(
      "adamw(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, "
      "Tensor(d!)[] averages, float[] keeps, float[] rates, float[] roots, float beta1, float beta2, float eps, "
      "float clip_norm, float toward) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) { m.impl("adamw", TORCH_BOX(&adamw)); }

}  // namespace wbdit
