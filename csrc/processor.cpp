// Which instruction sets this processor has, found out once.

#include "common.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wbdit {
namespace {

constexpr std::string_view names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__) && defined(__linux__)
// AMX tiles are a state that the kernel hands out on request (Linux, Documentation/arch/x86/xstate.rst).
bool request_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d & (1u << 24), products = d & (1u << 22);  // amx-tile, amx-bf16
  return tiles && products && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
bool request_tiles() { return false; }
#endif

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Level::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Level::avx512;
  return request_tiles() ? Level::amx : Level::avx512_bf16;
#else
  return Level::baseline;
#endif
}

Level allowed() {
  const char* wanted = std::getenv("WBDIT_CPU");
  Level level = detect();
  for (int i = 0; wanted && i < static_cast<int>(level); ++i)
    if (names[i] == wanted) level = static_cast<Level>(i);
  return level;
}

int64_t level() { return static_cast<int64_t>(processor_level()); }

}  // namespace

Level processor_level() {
  static const Level level = allowed();
  return level;
}

STABLE_TORCH_LIBRARY(wbdit_csrc, m) {
  m.def("processor_level() -> int");
  m.def(
      "residual_adaln(Tensor x, Tensor? out, Tensor? bias, Tensor? z, Tensor? gate, Tensor shift, Tensor scale, "
      "Tensor(a!)? x_new, Tensor(b!) z_new, float eta, float lam, float eps) -> ()");
  m.def(
      "residual_adaln_backward(Tensor dz_new, Tensor? dx_new, Tensor x_new, Tensor? out, Tensor? bias, Tensor? z, "
      "Tensor? gate, Tensor scale, Tensor(a!) dx, Tensor(b!)? dout, Tensor(c!)? dgate, Tensor(d!) dshift, "
      "Tensor(e!) dscale, Tensor(f!)? dbias, float eta, float lam, float eps) -> ()");
  m.def("mssa(Tensor w, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("mssa_backward(Tensor dout, Tensor w, Tensor out, Tensor lse, Tensor(a!) dw) -> ()");
  m.def("shrink(Tensor z, Tensor product, Tensor(a!) out, float eta, float lam) -> ()");
  m.def("shrink_backward(Tensor dout, Tensor out, Tensor(a!) dz) -> ()");
  m.def("noising(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma, Tensor(a!) xt) -> ()");
  m.def(
      "sampler_step(Tensor x, Tensor out, Tensor? previous, Tensor? earlier, Tensor? noise, Tensor? samples, "
      "Tensor(a!) new, float a, float b, float c, float d, float e, float clamp_min, int seed, int step) -> ()");
  m.def("normal(Tensor samples, Tensor(a!) out, int seed, int step) -> ()");
  m.def(
      "count_mean(Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, Tensor base1, "
      "Tensor values, Tensor counts, Tensor sizes, Tensor(a!) mean) -> ()");
  m.def(
      "count_nll(Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, Tensor base1, "
      "Tensor values, Tensor counts, Tensor sizes, Tensor target, Tensor(a!) nll) -> ()");
  m.def(
      "count_nll_backward(Tensor dnll, Tensor x, Tensor eta, Tensor weight, Tensor alpha, Tensor sigma, Tensor base0, "
      "Tensor base1, Tensor values, Tensor counts, Tensor sizes, Tensor target, Tensor(a!) deta, Tensor(b!) dweight, "
      "Tensor(c!) dbase0, Tensor(d!) dbase1) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CompositeExplicitAutograd, m) { m.impl("processor_level", TORCH_BOX(&level)); }

}  // namespace wbdit
