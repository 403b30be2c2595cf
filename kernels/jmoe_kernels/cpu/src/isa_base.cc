// Plain C++ for any processor: vectors of four, which every 64-bit machine has.
#include "isa.h"
#define VL 4
#define TILE_R 2
#define TILE_M 4
#include "portable.inc"

namespace jmoe {
const Isa* isa_base() {
  static const Isa isa = PORTABLE_ISA("plain C++");
  return &isa;
}
}  // namespace jmoe
