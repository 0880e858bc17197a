// Arguments of the adaln kernels: residual, gate, threshold, LayerNorm and modulation of rows of tokens.
#pragma once

#include "common.h"

namespace wbdit {

// The update before the normalization: none (without out), gate * (out + bias), or, with z and without bias,
// gate * relu(z + eta * out - eta * lam).
struct Forward {
  Rows x, out, bias, z, gate, shift, scale, x_new, z_new;
  int64_t tokens, d;
  float eta, lam, eps;
};

struct Backward {
  Rows dz_new, dx_new, x_new, out, bias, z, gate, scale, dx, dout;
  int64_t tokens, d;
  float eta, lam, eps;
};

}  // namespace wbdit
