// Shared by all ops: PyTorch's stable ABI, bf16, views of tensors as rows, scratch memory and the processor level.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

// Forces inlining of a sweep's body at each of its call sites, so that its sums stay in registers.
#define INLINE __attribute__((always_inline))

namespace wbdit {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// bfloat16: the upper half of an fp32, rounded to nearest even
struct bf16 {
  uint16_t bits;
};

static inline float to_float(float v) { return v; }
static inline float to_float(bf16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

template <class T>
static inline T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  // rounding could carry a NaN's mantissa over into infinity
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded)};
}

// A view of a tensor as a matrix of fp32 or bf16: the last dimension is contiguous, all others are merged into rows.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  bool low = false;  // bf16

  explicit operator bool() const { return data != nullptr; }
  void* operator[](int64_t row) const { return static_cast<char*>(data) + row * stride * (low ? 2 : 4); }
};

// The Python side passes contiguous tensors, or (B, d) views with any row stride.
static inline Rows rows(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "wbdit: tensors must be fp32 or bf16");
  return {t.mutable_data_ptr(), t.dim() == 2 ? t.stride(0) : t.size(-1), type == ScalarType::BFloat16};
}

static inline Rows rows(const MaybeTensor& t) { return t ? rows(*t) : Rows{}; }

// The first cache line boundary in `memory`, which must have 16 floats to spare.
static inline float* aligned(std::vector<float>& memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

// fp32 rows for one thread. Rows start on cache lines, and the padding keeps them in different cache sets.
class Scratch {
 public:
  Scratch(int64_t count, int64_t d) : stride_((d + 15) / 16 * 16 + 16), memory_(count * stride_ + 16) {}
  float* row(int64_t i) { return aligned(memory_) + i * stride_; }

 private:
  int64_t stride_;
  std::vector<float> memory_;
};

// Call run(row, scratch) for every row of d numbers, in parallel; `scratch` has three rows.
template <class Run>
static void each_row(int64_t count, int64_t d, Run&& run) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16384 / (d + 1)), [&](int64_t first, int64_t last) {
    Scratch scratch(3, d);
    for (int64_t row = first; row < last; ++row) run(row, scratch);
  });
}

// Instruction sets with a compiled kernel, lowest first.
enum class Level { baseline, avx2, avx512, avx512_bf16, amx };

// The highest level that this processor supports, or the level named by WBDIT_CPU if that is lower (cpu_level.cpp).
Level cpu_level();

}  // namespace wbdit
