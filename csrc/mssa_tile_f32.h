// Micro-kernel for fp32: an element is one number. Included once for each instruction set.

struct MicroKernel {
  using Element = float;
  static constexpr int per_element = 1;               // numbers of the inner dimension in one element
  static constexpr int tile_rows = VL == 16 ? 8 : 4;  // with tile_vectors, as many sums as fit the registers
  static constexpr int tile_vectors = VL == 4 ? 2 : 3;
  static constexpr bool mirrors = true;  // computing symmetric scores costs more than transposing them
  static constexpr int inner_multiple = 1;

  static void begin() {}
  static void end() {}

  // c (tile_rows, vectors * VL) = or += a (tile_rows, inner) b (inner, vectors * VL)
  template <int vectors, bool add>
  static void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t inner) {
    V sums[tile_rows][vectors] = {};
    for (int64_t k = 0; k < inner; ++k) {
      V row[vectors];
      for (int v = 0; v < vectors; ++v) row[v] = load(b + k * ldb + v * VL);
      for (int m = 0; m < tile_rows; ++m)
        for (int v = 0; v < vectors; ++v) sums[m][v] += a[m * lda + k] * row[v];
    }
    for (int m = 0; m < tile_rows; ++m)
      for (int v = 0; v < vectors; ++v) {
        float* to = c + m * ldc + v * VL;
        store(to, add ? load(to) + sums[m][v] : sums[m][v]);
      }
  }
};
