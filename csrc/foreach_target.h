// Compiles the file KERNEL once for each instruction set, each time in a separate namespace with vectors of VL floats.
// KERNEL and the headers that it includes must have no include guard. ON_LEVEL calls the best copy for this processor.

#if defined(__clang__)
#define BEGIN_TARGET(t) _Pragma(STRINGIFY_(clang attribute push(__attribute__((target(t))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_TARGET(t) _Pragma("GCC push_options") _Pragma(STRINGIFY_(GCC target(t)))
#define END_TARGET _Pragma("GCC pop_options")
#endif
#define STRINGIFY_(...) #__VA_ARGS__

#if defined(__x86_64__)
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#define VL 16
namespace wbdit::avx512 {
#include KERNEL
}
#undef VL
END_TARGET
BEGIN_TARGET("avx2,fma")
#define VL 8
namespace wbdit::avx2 {
#include KERNEL
}
#undef VL
END_TARGET
#endif
#define VL 4
namespace wbdit::baseline {
#include KERNEL
}
#undef VL

#if defined(__x86_64__)
#define ON_LEVEL(...)                                               \
  (wbdit::cpu_level() >= wbdit::Level::avx512 ? avx512::__VA_ARGS__ \
   : wbdit::cpu_level() >= wbdit::Level::avx2 ? avx2::__VA_ARGS__   \
                                              : baseline::__VA_ARGS__)
#else
#define ON_LEVEL(...) baseline::__VA_ARGS__
#endif
