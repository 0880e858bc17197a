// mssa: softmax(w w^T / sqrt(p)) w for every head; w and the result have the layout (B, N, h * p).
//
// FLOPs per head: 4 N^2 p forward, 10 N^2 p backward. The operand of a head (N p numbers) is packed once and stays in
// L2, and a block of its scores stays in L1. Scores are never written to main memory. bf16 products use AMX or
// AVX512-BF16 if the processor has it, else they are computed in fp32.

#include "mssa.h"

#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KERNEL "mssa_fp32.h"
#include "foreach_target.h"

#if defined(__x86_64__)
#define VL 16
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
namespace wbdit::avx512_bf16 {
#include "sweep.h"
#include "mssa_tile_bf16.h"
#include "mssa_kernel.h"
}  // namespace wbdit::avx512_bf16
END_TARGET
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")
namespace wbdit::amx {
#include "sweep.h"
#include "mssa_tile_amx.h"
#include "mssa_kernel.h"
}  // namespace wbdit::amx
END_TARGET
#undef VL
#endif

namespace wbdit {
namespace {

// The best copy of a kernel for type T on this processor.
#if defined(__x86_64__)
#define KERNEL_FOR(T, name)                                            \
  [] {                                                                 \
    const Level level = cpu_level();                                   \
    if constexpr (std::is_same_v<T, bf16>) {                           \
      if (level >= Level::amx) return &amx::name<T>;                   \
      if (level >= Level::avx512_bf16) return &avx512_bf16::name<T>;   \
    }                                                                  \
    if (level >= Level::avx512) return &avx512::name<T>;               \
    return level >= Level::avx2 ? &avx2::name<T> : &baseline::name<T>; \
  }()
#else
#define KERNEL_FOR(T, name) &baseline::name<T>
#endif

// Aligned, thread-local memory.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats + 16) memory.resize(floats + 16);
  return aligned(memory);
}

// Call run(offset of the head's first number, index of the head) for every head of every sample.
template <class Run>
void each_head(const Tensor& w, const Tensor& lse, Run&& run) {
  const int64_t heads = lse.size(1), tokens = w.size(1), width = w.size(2), p = width / heads;
  const int64_t grain = 1 + 65536 / (tokens * tokens * p + 1);
  torch::stable::parallel_for(0, w.size(0) * heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) run(i / heads * tokens * width + i % heads * p, i);
  });
}

template <class T>
void forward(const Tensor& w, const Tensor& out, const Tensor& lse) {
  const Head head{w.size(1), w.size(2) / lse.size(1), w.size(2)};
  const auto kernel = KERNEL_FOR(T, forward);
  const int64_t floats = KERNEL_FOR(T, forward_floats)(head);
  const T* from = static_cast<const T*>(w.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  float* sums = static_cast<float*>(lse.mutable_data_ptr());
  each_head(w, lse,
            [&](int64_t at, int64_t i) { kernel(from + at, to + at, sums + i * head.tokens, head, scratch(floats)); });
}

template <class T>
void backward(const Tensor& dout, const Tensor& w, const Tensor& out, const Tensor& lse, const Tensor& dw) {
  const Head head{w.size(1), w.size(2) / lse.size(1), w.size(2)};
  const auto kernel = KERNEL_FOR(T, backward);
  const int64_t floats = KERNEL_FOR(T, backward_floats)(head);
  const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *g = data(dout), *u = data(w), *o = data(out);
  const float* sums = static_cast<const float*>(lse.const_data_ptr());
  T* to = static_cast<T*>(dw.mutable_data_ptr());
  each_head(w, lse, [&](int64_t at, int64_t i) {
    kernel(g + at, u + at, o + at, sums + i * head.tokens, to + at, head, scratch(floats));
  });
}

void mssa(Tensor w, Tensor out, Tensor lse) {
  w.scalar_type() == ScalarType::BFloat16 ? forward<bf16>(w, out, lse) : forward<float>(w, out, lse);
}

void mssa_backward(Tensor dout, Tensor w, Tensor out, Tensor lse, Tensor dw) {
  w.scalar_type() == ScalarType::BFloat16 ? backward<bf16>(dout, w, out, lse, dw)
                                          : backward<float>(dout, w, out, lse, dw);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def("mssa(Tensor w, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("mssa_backward(Tensor dout, Tensor w, Tensor out, Tensor lse, Tensor(a!) dw) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("mssa", TORCH_BOX(&mssa));
  m.impl("mssa_backward", TORCH_BOX(&mssa_backward));
}

}  // namespace wbdit
