// A stack of white-box blocks over a few samples: their rows stay in L2 from one product to the next. Included once for
// each instruction set.

#include "adaln_kernel.h"

#include "mssa_tile_f32.h"

#include "mssa_kernel.h"

constexpr int64_t product_rows = VL == 16  ? 12
                                 : VL == 8 ? 6
                                           : 4;  // with two vectors, as many sums as fit the registers
constexpr int64_t panel = 2 * VL;                // columns of a packed right operand

// Pack the right operand b (inner, width), with the given strides, into panels of adjacent columns; `width` is a
// multiple of `panel`.
static void pack_panels(const float* b, int64_t row_stride, int64_t column_stride, float* to, int64_t inner,
                        int64_t width) {
  for (int64_t n = 0; n < width; n += panel, to += inner * panel)
    if (column_stride == 1)
      for (int64_t k = 0; k < inner; ++k) std::copy_n(b + k * row_stride + n, panel, to + k * panel);
    else
      for (int64_t j = 0; j < panel; ++j)
        for (int64_t k = 0; k < inner; ++k) to[k * panel + j] = b[k * row_stride + (n + j) * column_stride];
}

template <int rows>
static inline void product_tile(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t inner) {
  V sums[rows][2] = {};
  for (int64_t k = 0; k < inner; ++k) {
    const V left = load(b + k * panel), right = load(b + k * panel + VL);
    for (int m = 0; m < rows; ++m) {
      sums[m][0] += a[m * lda + k] * left;
      sums[m][1] += a[m * lda + k] * right;
    }
  }
  for (int m = 0; m < rows; ++m) {
    store(c + m * ldc, sums[m][0]);
    store(c + m * ldc + VL, sums[m][1]);
  }
}

// c (rows, width) = a (rows, inner) b (inner, width), b in panels; a and c are dense. The last tile of rows overlaps
// the one before. Each number is a sum over `inner` in order, whatever the other rows are.
static void product(const float* a, const float* b, float* c, int64_t rows, int64_t width, int64_t inner) {
  for (int64_t n = 0; n < width; n += panel, b += inner * panel) {
    if (rows < product_rows) {
      for (int64_t m = 0; m < rows; ++m) product_tile<1>(a + m * inner, inner, b, c + m * width + n, width, inner);
      continue;
    }
    for (int64_t at = 0; at < rows; at += product_rows) {
      const int64_t m = std::min(at, rows - product_rows);
      product_tile<product_rows>(a + m * inner, inner, b, c + m * width + n, width, inner);
    }
  }
}

static Rows dense_from(const float* data, int64_t d) { return {const_cast<float*>(data), d, false}; }

static Rows rows_from(const Rows& rows, int64_t first) { return {rows[first], rows.stride, rows.low}; }

static int64_t blocks_floats(const Blocks& n, int64_t count) {
  const Head head{n.tokens, n.inner / n.heads, n.inner};
  const int64_t rows = count * n.tokens,
                attention = std::max(forward_floats<float>(head), backward_floats<float>(head));
  return rows * (4 * n.d + 2 * n.inner + n.heads) + attention + 256;
}

// The rows of samples `first` on, in the activations that the forward pass saves.
static SavedActivations saved_from(const Blocks& n, int64_t k, int64_t first) {
  const int64_t at = first * n.tokens * n.d, of_heads = first * n.tokens * n.inner;
  const SavedActivations& all = n.saved[k];
  return {all.normed + at,
          all.halfway + at,
          all.w + of_heads,
          all.subspaces + of_heads,
          all.lse + first * n.heads * n.tokens,
          all.out + at,
          all.product + at,
          all.middle + at,
          all.last + at};
}

// Run all blocks on samples [first, first + count). `scratch` has 6 rows of d floats.
static void blocks_forward(const Blocks& n, int64_t first, int64_t count, float* memory, Scratch& scratch) {
  const int64_t d = n.d, rows = count * n.tokens, p = n.inner / n.heads, at = first * n.tokens * d;
  const Head head{n.tokens, p, n.inner};
  const bool saves = !n.saved.empty();
  Arena arena{memory};
  SavedActivations own{};
  own.normed = own.halfway = arena.floats(rows * d), own.middle = own.last = arena.floats(rows * d);
  own.out = own.product = arena.floats(rows * d), own.lse = arena.floats(count * n.heads * n.tokens);
  own.w = arena.floats(rows * n.inner), own.subspaces = arena.floats(rows * n.inner);
  float* attention = arena.floats(0);
  const auto of_block = [&](int64_t k) { return saves ? saved_from(n, k, first) : own; };
  const auto step = [&](const Forward& f) {
    for (int64_t b = 0; b < count; ++b) forward<float>(f, b, 0, n.tokens, scratch);
  };
  Forward f{};
  f.tokens = n.tokens, f.d = d, f.eps = n.eps, f.eta = n.eta, f.lam = n.lam;
  const auto modulate = [&](int64_t shift) {
    f.shift = rows_from(n.modulations[shift], first), f.scale = rows_from(n.modulations[shift + 1], first);
  };
  modulate(0);
  f.x = dense_from(n.x + at, d), f.z_new = dense_from(of_block(0).normed, d);
  step(f);
  for (int64_t k = 0; k < n.depth; ++k) {
    const SavedActivations to = of_block(k);
    product(to.normed, n.weights[k].first, to.w, rows, n.inner, d);
    for (int64_t i = 0; i < count * n.heads; ++i) {
      const int64_t number = i / n.heads * n.tokens * n.inner + i % n.heads * p;
      forward<float>(to.w + number, to.subspaces + number, to.lse + i * n.tokens, head, attention);
    }
    product(to.subspaces, n.weights[k].second, to.out, rows, d, n.inner);
    f.out = dense_from(to.out, d), f.bias = dense_from(n.biases[k], d), f.z = Rows{};
    f.gate = rows_from(n.modulations[6 * k + 2], first);
    modulate(6 * k + 3);
    f.x_new = dense_from(to.middle, d), f.z_new = dense_from(to.halfway, d);
    step(f);
    product(to.halfway, n.weights[k].third, to.product, rows, d, d);
    f.x = f.x_new, f.out = dense_from(to.product, d), f.bias = Rows{}, f.z = dense_from(to.halfway, d);
    f.gate = rows_from(n.modulations[6 * k + 5], first);
    modulate(6 * k + 6);
    f.x_new = dense_from(to.last, d), f.z_new = dense_from(k + 1 < n.depth ? of_block(k + 1).normed : n.z + at, d);
    step(f);
    f.x = f.x_new;
  }
}

// The gradients of one half-step or of the first norm: `f` without sizes, for samples [first, first + count). Sums over
// tokens go to the rows of the modulations `shift`, `shift` + 1 (scale) and `gate` (if any), and to `dbias` (if any).
static void step_backward(const Blocks& n, const Gradients& g, Backward f, int64_t first, int64_t count, int64_t shift,
                          int64_t gate, float* dbias, Scratch& scratch, Scratch& sums) {
  f.tokens = n.tokens, f.d = n.d, f.eps = n.eps, f.eta = n.eta, f.lam = n.lam;
  f.scale = rows_from(n.modulations[shift + 1], first);
  if (gate >= 0) f.gate = rows_from(n.modulations[gate], first);
  for (int64_t b = 0; b < count; ++b) {
    for (int i = 0; i < 4; ++i) std::fill_n(sums.row(i), n.d, 0.f);
    backward<float>(f, b, 0, n.tokens, scratch, sums);
    const auto keep = [&](int i, int64_t of) {
      std::copy_n(sums.row(i), n.d, static_cast<float*>(g.modulations[of][first + b]));
    };
    keep(0, shift);
    keep(1, shift + 1);
    if (gate >= 0) keep(2, gate);
    if (dbias) std::copy_n(sums.row(3), n.d, dbias + (first + b) * n.d);
  }
}

// The gradients of all blocks for samples [first, first + count), except those of the weights. `scratch` has 7 rows of
// d floats, `sums` has 4.
static void blocks_backward(const Blocks& n, const Gradients& g, int64_t first, int64_t count, float* memory,
                            Scratch& scratch, Scratch& sums) {
  const int64_t d = n.d, rows = count * n.tokens, p = n.inner / n.heads, at = first * n.tokens * d;
  const Head head{n.tokens, p, n.inner};
  Arena arena{memory};
  float *dz = arena.floats(rows * d), *dx = arena.floats(rows * d), *dmiddle = arena.floats(rows * d);
  float *dsubspaces = arena.floats(rows * n.inner), *attention = arena.floats(0);
  Backward f{};
  f.dz_new = dense_from(g.dz + at, d);
  for (int64_t k = n.depth - 1; k >= 0; --k) {
    const SavedActivations from = saved_from(n, k, first);
    const BlockGradients& to = g.blocks[k];
    float *dproduct = to.product + at, *dout = to.out + at, *dw = to.projection + first * n.tokens * n.inner;
    f.x_new = dense_from(from.last, d), f.out = dense_from(from.product, d);
    f.bias = Rows{}, f.z = dense_from(from.halfway, d);
    f.dx = dense_from(dmiddle, d), f.dout = dense_from(dproduct, d);
    step_backward(n, g, f, first, count, 6 * k + 6, 6 * k + 5, nullptr, scratch, sums);
    product(dproduct, n.weights[k].third, dz, rows, d, d);
    f.dz_new = dense_from(dz, d), f.dx_new = dense_from(dmiddle, d);
    f.x_new = dense_from(from.middle, d), f.out = dense_from(from.out, d);
    f.bias = dense_from(n.biases[k], d), f.z = Rows{};
    f.dx = dense_from(dx, d), f.dout = dense_from(dout, d);
    step_backward(n, g, f, first, count, 6 * k + 3, 6 * k + 2, to.bias, scratch, sums);
    product(dout, n.weights[k].second, dsubspaces, rows, n.inner, d);
    for (int64_t i = 0; i < count * n.heads; ++i) {
      const int64_t number = i / n.heads * n.tokens * n.inner + i % n.heads * p;
      backward<float>(dsubspaces + number, from.w + number, from.subspaces + number, from.lse + i * n.tokens,
                      dw + number, head, attention);
    }
    product(dw, n.weights[k].first, dz, rows, d, n.inner);
    f.dx_new = dense_from(dx, d);
  }
  f.x_new = dense_from(n.x + at, d), f.out = f.bias = f.z = f.dout = Rows{};
  f.dx = dense_from(g.dx + at, d);
  step_backward(n, g, f, first, count, 0, -1, nullptr, scratch, sums);
}
