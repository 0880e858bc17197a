// Detection of the processor's instruction sets, once per process.

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
// A process must ask Linux for permission to use AMX tiles (Linux, Documentation/arch/x86/xstate.rst).
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

int64_t level() { return static_cast<int64_t>(cpu_level()); }

}  // namespace

Level cpu_level() {
  static const Level level = allowed();
  return level;
}

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) { m.def("cpu_level() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CompositeExplicitAutograd, m) { m.impl("cpu_level", TORCH_BOX(&level)); }

}  // namespace wbdit
