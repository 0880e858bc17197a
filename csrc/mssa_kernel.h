// Attention of one head of one sample. Included once for each instruction set and each MicroKernel.
//
// MicroKernel::tile computes every matrix product. It needs an operand (tokens, p) in three layouts, which `Packed`
// holds: by rows (left operand), transposed (right operand over p), and, if an element is a pair, by pairs of rows
// (right operand over tokens).

using Element = MicroKernel::Element;

constexpr int64_t tile_width = MicroKernel::tile_vectors * VL;
constexpr int64_t block_rows = 32;  // rows of scores at a time: they stay in L1 together with one panel
constexpr int64_t block_columns = 256;
constexpr int64_t whole_rows = 320;  // up to this many tokens, the whole symmetric matrix of scores is kept in L2
constexpr int64_t widest = std::max(block_columns, whole_rows);

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Shape {
  int64_t tokens, p;   // in numbers
  int64_t rows;        // tokens, padded to full tiles and vectors
  int64_t inner;       // p, in elements
  int64_t row_stride;  // in elements; the extra vector puts rows in different cache sets
  int64_t column_stride;
  int64_t value_stride;

  Shape(int64_t tokens, int64_t p)
      : tokens(tokens),
        p(p),
        rows(round_up(tokens,
                      std::max({VL, MicroKernel::tile_rows, MicroKernel::per_element * MicroKernel::inner_multiple}))),
        inner(round_up((p + MicroKernel::per_element - 1) / MicroKernel::per_element, MicroKernel::inner_multiple)),
        row_stride(round_up(inner, VL) + VL),
        column_stride(rows + VL),
        value_stride(round_up(p, VL) + VL) {}

  int64_t floats_for_operand() const {
    return rows * row_stride + round_up(inner, VL) * column_stride + rows / MicroKernel::per_element * value_stride;
  }
};

struct Packed {
  Element *rows, *columns, *values;
};

// A bump allocator over one thread's memory.
struct Arena {
  float* next;

  float* floats(int64_t n) {
    float* piece = next;
    next += round_up(n, 16);
    return piece;
  }
  Element* elements(int64_t n) { return reinterpret_cast<Element*>(floats(n)); }
};

static inline void copy_row(const float* from, float* to, int64_t p) { std::copy_n(from, p, to); }
static inline void copy_row(const bf16* from, uint32_t* to, int64_t p) { std::memcpy(to, from, p * 2); }
static inline void copy_row(const bf16* from, float* to, int64_t p) {
  sweep(p, [&](int64_t i, int, auto lane) INLINE { put(to + i, at<decltype(lane)>(from + i)); });
}

// to (columns, rows) = from (rows, columns) transposed; both are multiples of VL, elements are any 32 bits.
static void mirror(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                   int64_t columns) {
  for (int64_t i = 0; i < rows; i += VL)
    for (int64_t j = 0; j < columns; j += VL) {
      V block[VL];
      for (int k = 0; k < VL; ++k) block[k] = load(from + (i + k) * from_stride + j);
      transpose(block);
      for (int k = 0; k < VL; ++k) store(to + (j + k) * to_stride + i, block[k]);
    }
}

// Pack an operand with the given row stride into its three layouts.
template <class T>
static Packed pack(const T* from, int64_t stride, const Shape& s, Arena& arena) {
  Packed packed{arena.elements(s.rows * s.row_stride), arena.elements(round_up(s.inner, VL) * s.column_stride),
                nullptr};
  std::memset(packed.rows, 0, s.rows * s.row_stride * 4);
  for (int64_t n = 0; n < s.tokens; ++n) copy_row(from + n * stride, packed.rows + n * s.row_stride, s.p);
  mirror(reinterpret_cast<const float*>(packed.rows), s.row_stride, reinterpret_cast<float*>(packed.columns),
         s.column_stride, s.rows, round_up(s.inner, VL));
  if constexpr (MicroKernel::per_element == 1) {
    packed.values = packed.rows;
  } else {
    packed.values = arena.elements(s.rows / 2 * s.value_stride);
    for (int64_t n = 0; n < s.rows; n += 2) {
      const uint16_t* __restrict even = reinterpret_cast<const uint16_t*>(packed.rows + n * s.row_stride);
      const uint16_t* __restrict odd = reinterpret_cast<const uint16_t*>(packed.rows + (n + 1) * s.row_stride);
      uint32_t* __restrict pairs = packed.values + n / 2 * s.value_stride;
      const int64_t width = round_up(s.p, VL);  // within a row's 2 * row_stride numbers
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) pairs[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    }
  }
  return packed;
}

static int64_t stride_of_values(const Shape& s) {
  return MicroKernel::per_element == 1 ? s.row_stride : s.value_stride;
}

// c (rows, width) = or += a (rows, inner) b (inner, width); `width` is a multiple of VL, `rows` of tile_rows.
template <bool add>
static void multiply(const Element* a, int64_t lda, const Element* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                     int64_t width, int64_t inner) {
  for (int64_t n = 0; n < width; n += tile_width)
    for (int64_t m = 0; m < rows; m += MicroKernel::tile_rows) {
      const Element* left = a + m * lda;
      const Element* right = b + n;
      float* to = c + m * ldc + n;
      const int64_t vectors = (width - n) / VL;
      if (vectors >= MicroKernel::tile_vectors)
        MicroKernel::tile<MicroKernel::tile_vectors, add>(left, lda, right, ldb, to, ldc, inner);
      else if (vectors == 2)
        MicroKernel::tile<2, add>(left, lda, right, ldb, to, ldc, inner);
      else
        MicroKernel::tile<1, add>(left, lda, right, ldb, to, ldc, inner);
    }
}

// Write VL weights at column j of a row of a left operand.
static inline void store_weights(float* row, int64_t j, V v) { store(row + j, v); }
static inline void store_weights(uint32_t* row, int64_t j, V v) { store(reinterpret_cast<bf16*>(row) + j, v); }

// Set the weights of the padding columns [from, to) to zero.
static inline void clear_weights(float* row, int64_t from, int64_t to) { std::fill(row + from, row + to, 0.f); }
static inline void clear_weights(uint32_t* row, int64_t from, int64_t to) {
  std::fill(row + from / 2, row + to / 2, 0u);
}

// 1 for columns that are tokens, 0 for the padding of the last vector.
static V is_token(int64_t column, int64_t tokens) {
  V v;
  for (int i = 0; i < VL; ++i) v[i] = column + i < tokens ? 1.f : 0.f;
  return v;
}

template <class T>
static void write_row(const float* from, float factor, T* to, int64_t p) {
  sweep(p, [&](int64_t i, int, auto lane) INLINE { put(to + i, factor * at<decltype(lane)>(from + i)); });
}

static void multiply(bool add, const Element* a, int64_t lda, const Element* b, int64_t ldb, float* c, int64_t ldc,
                     int64_t rows, int64_t width, int64_t inner) {
  add ? multiply<true>(a, lda, b, ldb, c, ldc, rows, width, inner)
      : multiply<false>(a, lda, b, ldb, c, ldc, rows, width, inner);
}

// Online softmax for one row of a block of scores: weights 2^(c s - top), with running maximum `top` and sum `total`
// (Milakov and Gimelshein 2018). `last` is 1 for the tokens of the last vector and 0 for its padding. Returns the
// factor that rescales the sums so far.
static float soften(const float* scores, Element* weights, int64_t width, V last, float c, float& top, float& total) {
  // padding scores are 0; they cannot exceed the maximum, since a token's score with itself is never negative
  V most = load(scores);
  for (int64_t j = VL; j < width; j += VL) most = max(most, load(scores + j));
  const float higher = std::max(top, c * largest(most));
  const float kept = std::exp2(top - higher);
  V parts = V{};
  for (int64_t j = 0; j < width - VL; j += VL) {
    const V weight = exp2(c * load(scores + j) - higher);
    parts += weight;
    store_weights(weights, j, weight);
  }
  const V weight = exp2(c * load(scores + width - VL) - higher) * last;
  store_weights(weights, width - VL, weight);
  total = total * kept + sum(parts + weight);
  top = higher;
  return kept;
}

// Blocks of scores, `rows` by `width` tokens. Small heads keep all scores in one square matrix: each row of blocks is
// then computed from its diagonal on only, and its transpose fills the columns below the diagonal.
struct Scores {
  const Shape& s;
  const Packed& u;
  bool whole;
  int64_t width, stride;
  float* memory;

  Scores(const Shape& s, const Packed& u, Arena& arena)
      : s(s),
        u(u),
        whole(fits(s)),
        width(whole ? s.rows : block_columns),
        stride(width + VL),
        memory(arena.floats(floats(s))) {}

  static bool fits(const Shape& s) { return MicroKernel::mirrors && s.rows <= whole_rows; }

  static int64_t floats(const Shape& s) { return fits(s) ? s.rows * (s.rows + VL) : block_rows * (block_columns + VL); }

  // Scores of the tokens from i0 on with those from j0 on: `tiled` rows by `columns`, with row stride `stride`.
  float* block(int64_t i0, int64_t j0, int64_t tiled, int64_t columns) const {
    const Element* rows = u.rows + i0 * s.row_stride;
    if (!whole) {
      multiply<false>(rows, s.row_stride, u.columns + j0, s.column_stride, memory, stride, tiled, columns, s.inner);
      return memory;
    }
    float* row = memory + i0 * stride;
    multiply<false>(rows, s.row_stride, u.columns + i0, s.column_stride, row + i0, stride, tiled, s.rows - i0, s.inner);
    const int64_t next = i0 + block_rows;
    if (next < s.rows) mirror(row + next, stride, memory + next * stride + i0, stride, block_rows, s.rows - next);
    return row;
  }
};

template <class T>
static int64_t forward_floats(const Head& head) {
  const Shape s(head.tokens, head.p);
  return s.floats_for_operand() + Scores::floats(s) + block_rows * (widest + VL + s.value_stride) + 256;
}

template <class T>
static void forward(const T* w, T* out, float* lse, const Head& head, float* memory) {
  const Shape s(head.tokens, head.p);
  Arena arena{memory};
  const Packed u = pack(w, head.stride, s, arena);
  const Scores scores(s, u, arena);
  const int64_t ld = scores.stride, ldo = s.value_stride, width_p = round_up(s.p, VL), ldv = stride_of_values(s);
  Element* low = MicroKernel::per_element == 1 ? nullptr : arena.elements(block_rows * ld);
  float* sums = arena.floats(block_rows * ldo);
  MicroKernel::begin();
  const float c = 1.4426950408889634f / std::sqrt(static_cast<float>(s.p));  // softmax in base 2
  for (int64_t i0 = 0; i0 < s.tokens; i0 += block_rows) {
    float top[block_rows], total[block_rows];
    std::fill_n(top, block_rows, -std::numeric_limits<float>::infinity());
    std::fill_n(total, block_rows, 0.f);
    const int64_t rows = std::min(block_rows, s.tokens - i0);
    const int64_t tiled = round_up(rows, MicroKernel::tile_rows);
    for (int64_t j0 = 0; j0 < s.tokens; j0 += scores.width) {
      const int64_t width = std::min(scores.width, s.rows - j0);
      const int64_t live = std::min(width, round_up(s.tokens - j0, VL));
      const V last = is_token(j0 + live - VL, s.tokens);
      float* block = scores.block(i0, j0, tiled, width);
      Element* weights;
      if constexpr (MicroKernel::per_element == 1)
        weights = block;  // in place, to use less of L1
      else
        weights = low;
      for (int64_t i = 0; i < rows; ++i) {
        const float kept = soften(block + i * ld, weights + i * ld, live, last, c, top[i], total[i]);
        clear_weights(weights + i * ld, live, width);
        if (j0 > 0)
          for (int64_t k = 0; k < width_p; k += VL) store(sums + i * ldo + k, kept * load(sums + i * ldo + k));
      }
      multiply(j0 > 0, weights, ld, u.values + j0 / MicroKernel::per_element * ldv, ldv, sums, ldo, tiled, width_p,
               width / MicroKernel::per_element);
    }
    for (int64_t i = 0; i < rows; ++i) {
      write_row(sums + i * ldo, 1 / total[i], out + (i0 + i) * head.stride, s.p);
      lse[i0 + i] = (top[i] + std::log2(total[i])) * 0.6931471805599453f;
    }
  }
  MicroKernel::end();
}

// g u^T and its transpose u g^T: in one square matrix for small heads, as in Scores, else block by block.
struct Slopes {
  const Shape& s;
  const Packed &u, &g;
  const Scores& scores;
  float *square, *turned;

  Slopes(const Shape& s, const Packed& u, const Packed& g, const Scores& scores, Arena& arena)
      : s(s),
        u(u),
        g(g),
        scores(scores),
        square(arena.floats(Scores::floats(s))),
        turned(arena.floats(block_rows * scores.stride)) {
    if (scores.whole)
      multiply<false>(g.rows, s.row_stride, u.columns, s.column_stride, square, scores.stride, s.rows, s.rows, s.inner);
  }

  static int64_t floats(const Shape& s) { return Scores::floats(s) + block_rows * (widest + VL); }

  // The block of g u^T with rows from i0 on and columns from j0 on; the same block of u g^T goes to `turned`.
  const float* block(int64_t i0, int64_t j0, int64_t tiled, int64_t columns) const {
    const int64_t stride = scores.stride;
    if (scores.whole) {
      mirror(square + i0, stride, turned, stride, s.rows, std::min(block_rows, s.rows - i0));
      return square + i0 * stride;
    }
    multiply<false>(g.rows + i0 * s.row_stride, s.row_stride, u.columns + j0, s.column_stride, square, stride, tiled,
                    columns, s.inner);
    multiply<false>(u.rows + i0 * s.row_stride, s.row_stride, g.columns + j0, s.column_stride, turned, stride, tiled,
                    columns, s.inner);
    return square;
  }
};

// Per token: lse in base 2 (`log_sum`), and the sum of dout * out (`delta`).
template <class T>
static void row_constants(const T* dout, const T* out, const float* lse, const Head& head, float* log_sum,
                          float* delta) {
  for (int64_t n = 0; n < head.tokens; ++n) {
    log_sum[n] = lse[n] * 1.4426950408889634f;
    const T *a = dout + n * head.stride, *b = out + n * head.stride;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < head.p; ++i) total += to_float(a[i]) * to_float(b[i]);
    delta[n] = total;
  }
}

template <class T>
static int64_t backward_floats(const Head& head) {
  const Shape s(head.tokens, head.p);
  return 2 * s.floats_for_operand() + 2 * (s.rows + 16) + Scores::floats(s) + Slopes::floats(s) +
         block_rows * (2 * (widest + VL) + s.value_stride) + 256;
}

// The scores are symmetric, so row i of the transposed weights, exp(s_ij - lse_j), depends only on row i of the scores
// (and on lse). Row i alone thus gives dw_i, and no sums across rows are needed.
template <class T>
static void backward(const T* dout, const T* w, const T* out, const float* lse, T* dw, const Head& head,
                     float* memory) {
  const Shape s(head.tokens, head.p);
  Arena arena{memory};
  MicroKernel::begin();
  const Packed u = pack(w, head.stride, s, arena), g = pack(dout, head.stride, s, arena);
  float *log_sum = arena.floats(s.rows), *delta = arena.floats(s.rows);
  std::fill_n(log_sum, s.rows, std::numeric_limits<float>::infinity());  // gives padding columns a weight of 0
  std::fill_n(delta, s.rows, 0.f);
  row_constants(dout, out, lse, head, log_sum, delta);
  const Scores scores(s, u, arena);
  const Slopes products(s, u, g, scores, arena);
  const int64_t ld = scores.stride, ldo = s.value_stride, width_p = round_up(s.p, VL), ldv = stride_of_values(s);
  Element *turned = arena.elements(block_rows * ld), *slopes = arena.elements(block_rows * ld);
  float* sums = arena.floats(block_rows * ldo);
  const float root = 1 / std::sqrt(static_cast<float>(s.p)), c = 1.4426950408889634f * root;
  for (int64_t i0 = 0; i0 < s.tokens; i0 += block_rows) {
    const int64_t rows = std::min(block_rows, s.tokens - i0), tiled = round_up(rows, MicroKernel::tile_rows);
    for (int64_t j0 = 0; j0 < s.tokens; j0 += scores.width) {
      const int64_t width = std::min(scores.width, s.rows - j0);
      const int64_t live = std::min(width, round_up(s.tokens - j0, VL));
      const V last = is_token(j0 + live - VL, s.tokens);
      const float* block = scores.block(i0, j0, tiled, width);
      const float *gu = products.block(i0, j0, tiled, width), *ug = products.turned;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < live; j += VL) {
          const V score = c * load(block + i * ld + j);
          V weight = exp2(score - log_sum[i0 + i]);
          if (j == live - VL) weight *= last;
          const V across = exp2(score - load(log_sum + j0 + j));
          const V slope = weight * (load(gu + i * ld + j) - delta[i0 + i]) +
                          across * (load(ug + i * ld + j) - load(delta + j0 + j));
          store_weights(turned + i * ld, j, across);
          store_weights(slopes + i * ld, j, root * slope);
        }
        clear_weights(turned + i * ld, live, width);
        clear_weights(slopes + i * ld, live, width);
      }
      const int64_t value = j0 / MicroKernel::per_element * ldv, inner = width / MicroKernel::per_element;
      multiply(j0 > 0, turned, ld, g.values + value, ldv, sums, ldo, tiled, width_p, inner);
      multiply<true>(slopes, ld, u.values + value, ldv, sums, ldo, tiled, width_p, inner);
    }
    for (int64_t i = 0; i < rows; ++i) write_row(sums + i * ldo, 1.f, dw + (i0 + i) * head.stride, s.p);
  }
  MicroKernel::end();
}
