// AVX2 with FMA: vectors of eight.
#include "isa.h"
#if defined(__AVX2__) && defined(__FMA__)
#define VL 8
#define TILE_R 2
#define TILE_M 4
#include "portable.inc"

namespace jmoe {
const Isa* isa_avx2() {
  static const Isa isa = PORTABLE_ISA("AVX2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &isa : nullptr;
}
}  // namespace jmoe
#else
namespace jmoe {
const Isa* isa_avx2() { return nullptr; }
}  // namespace jmoe
#endif
