// Arguments of the kernels that run a stack of blocks over a few samples at a time.
#pragma once

#include "common.h"

#include <vector>

namespace wbdit {

// One block's weights as right operands, packed by pack() for product().
struct PackedWeights {
  const float *first, *second, *third;  // forward: U^T, O^T and F; backward: (1 + eta F)^T, O and U
};

// What one block's forward pass saves for its backward pass. All matrices are fp32 and contiguous.
struct SavedActivations {
  float *normed, *halfway;     // modulated norms before both half-steps
  float *w, *subspaces, *lse;  // projections, and attention of them
  float *out, *product;        // output map, and product with F
  float *middle, *last;        // residual stream after both half-steps
};

// A stack of blocks: sizes, parameters, input x and output z, and one entry of `saved` per block; for inference none.
struct Blocks {
  int64_t batch, tokens, d, inner, heads, depth;
  float eta, lam, eps;
  std::vector<Rows> modulations;  // (B, d) each: six per block, then shift and scale of the final norm
  std::vector<PackedWeights> weights;
  std::vector<const float*> biases;
  std::vector<SavedActivations> saved;
  float *x, *z;
};

// What one block's backward pass writes: the gradients of its three products, from which the caller computes those of
// the weights, and the gradient of the bias per sample (B, d).
struct BlockGradients {
  float *projection, *out, *product, *bias;
};

struct Gradients {
  const float* dz;
  float* dx;
  std::vector<BlockGradients> blocks;
  std::vector<Rows> modulations;
};

}  // namespace wbdit
