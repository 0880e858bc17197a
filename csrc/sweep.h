// Loops over rows of fp32 or bf16: full vectors, then single numbers. Included once for each instruction set.

#include "simd.h"

// Call body(i, unroll, T{}) over n numbers. T is V for VL numbers from i on, or float for the single number i.
// `unroll`, 0 to 3, selects one of four accumulators, which hide the latency of additions.
template <class Body>
static inline void sweep(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    body(i, 0, V{});
    body(i + VL, 1, V{});
    body(i + 2 * VL, 2, V{});
    body(i + 3 * VL, 3, V{});
  }
  for (; i + VL <= n; i += VL) body(i, 0, V{});
  for (; i < n; ++i) body(i, 0, 0.f);
}

// Load a V or a float from memory, and store it.
template <class T, class From>
static inline T at(const From* p) {
  if constexpr (std::is_same_v<T, V>)
    return load(p);
  else
    return to_float(*p);
}

template <class To>
static inline void put(To* p, V v) {
  store(p, v);
}

template <class To>
static inline void put(To* p, float v) {
  *p = from_float<To>(v);
}

static inline float max(float a, float b) { return a > b ? a : b; }

struct Sum {
  V parts[4] = {};
  float rest = 0;

  void add(int unroll, V v) { parts[unroll] += v; }
  void add(int, float v) { rest += v; }
  float total() const { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])) + rest; }
};

// A row as fp32: in place, or converted from bf16 into the buffer.
static inline const float* read(const Rows& from, int64_t row, float* buffer, int64_t d) {
  if (!from.low) return static_cast<const float*>(from[row]);
  const bf16* source = static_cast<const bf16*>(from[row]);
  sweep(d, [&](int64_t i, int, auto lane) INLINE { put(buffer + i, at<decltype(lane)>(source + i)); });
  return buffer;
}

// The memory to write an fp32 row to: the row itself, or the buffer, which store_row() converts to bf16.
static inline float* writable(const Rows& to, int64_t row, float* buffer) {
  return to.low ? buffer : static_cast<float*>(to[row]);
}

static inline void store_row(const Rows& to, int64_t row, const float* buffer, int64_t d) {
  if (!to.low) return;
  bf16* target = static_cast<bf16*>(to[row]);
  sweep(d, [&](int64_t i, int, auto lane) INLINE { put(target + i, at<decltype(lane)>(buffer + i)); });
}
