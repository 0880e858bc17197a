// Micro-kernel for AMX: tiles of 16 rows by 16 pairs of bf16 (Intel, Architecture Instruction Set Extensions).

struct MicroKernel {
  using Element = uint32_t;
  static constexpr int per_element = 2;
  static constexpr int tile_rows = 32;  // 2 x 2 tiles of sums and two tiles per operand: all eight registers
  static constexpr int tile_vectors = 2;
  static constexpr bool mirrors = false;  // a product is cheaper than a transpose
  static constexpr int inner_multiple = 16;

  // 64 bytes: palette 1, then the bytes per row (from byte 16) and the rows (from byte 48) of each of the eight tiles.
  // Static, because GCC assumes that the instruction reads only eight bytes and drops the writes to a local array.
  static void begin() {
    alignas(64) static const uint8_t config[64] = {1, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,  0,  0,  0,  0,  0,  64, 0, 64,
                                                   0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,  64, 0,  0,  0,  0,  0,  0, 0,
                                                   0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  16, 16, 16, 16, 16, 16, 16, 16};
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }

  template <int vectors, bool add>
  static void tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                   int64_t inner) {
    // sums in tiles 0 to 3, a in 4 and 5, b in 6 and 7
    if constexpr (add) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      if constexpr (vectors == 2) {
        _tile_loadd(1, c + 16, ldc * 4);
        _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < inner; k += 16) {
      _tile_loadd(4, a + k, lda * 4);
      _tile_loadd(6, b + k * ldb, ldb * 4);
      _tile_loadd(5, a + 16 * lda + k, lda * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (vectors == 2) {
        _tile_loadd(7, b + k * ldb + 16, ldb * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    if constexpr (vectors == 2) {
      _tile_stored(1, c + 16, ldc * 4);
      _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
    }
  }
};
