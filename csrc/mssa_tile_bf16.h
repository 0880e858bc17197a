// Micro-kernel for AVX512-BF16: an element is a pair of bf16, adjacent along the inner dimension.

struct MicroKernel {
  using Element = uint32_t;
  static constexpr int per_element = 2;
  static constexpr int tile_rows = 8;
  static constexpr int tile_vectors = 3;
  static constexpr bool mirrors = true;  // computing symmetric scores costs more than transposing them
  static constexpr int inner_multiple = 1;

  static void begin() {}
  static void end() {}

  template <int vectors, bool add>
  static void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                   int64_t inner) {
    __m512 sums[tile_rows][vectors];
    for (int m = 0; m < tile_rows; ++m)
      for (int v = 0; v < vectors; ++v) sums[m][v] = add ? _mm512_loadu_ps(c + m * ldc + v * VL) : _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; ++k) {
      __m512bh row[vectors];
      for (int v = 0; v < vectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + v * VL);
      for (int m = 0; m < tile_rows; ++m) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[m * lda + k]));
        for (int v = 0; v < vectors; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], pair, row[v]);
      }
    }
    for (int m = 0; m < tile_rows; ++m)
      for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(c + m * ldc + v * VL, sums[m][v]);
  }
};
