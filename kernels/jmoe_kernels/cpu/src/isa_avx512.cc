// AVX-512: vectors of sixteen.
#include "isa.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VL 16
#define TILE_R 4
#define TILE_M 4
#include "portable.inc"

namespace jmoe {
const Isa* isa_avx512() {
  static const Isa isa = PORTABLE_ISA("AVX-512");
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return here ? &isa : nullptr;
}
}  // namespace jmoe
#else
namespace jmoe {
const Isa* isa_avx512() { return nullptr; }
}  // namespace jmoe
#endif
