// The choice of the instruction set: the best one that this processor and this build have.
#include <cstring>

#include "parallel.h"

namespace jmoe {
namespace {

const Isa* best() {
  for (const Isa* isa : {isa_amx(), isa_avx512_bf16(), isa_avx512(), isa_avx2()})
    if (isa) return isa;
  return isa_base();
}

const Isa*& chosen() {
  static const Isa* isa = best();
  return isa;
}

}  // namespace

const Isa& isa() { return *chosen(); }
}  // namespace jmoe

extern "C" {

// Returns the name of the set in use.
const char* jmoe_isa() { return jmoe::isa().name; }

// Returns the names of all sets that can run here, one a line.
const char* jmoe_isas() {
  static char names[256] = "";
  if (!names[0])
    for (const jmoe::Isa* isa :
         {jmoe::isa_amx(), jmoe::isa_avx512_bf16(), jmoe::isa_avx512(), jmoe::isa_avx2(), jmoe::isa_base()})
      if (isa) std::strcat(std::strcat(names, isa->name), "\n");
  return names;
}

// Uses the set of that name from now on; returns false if it cannot run here. Tests call it.
bool jmoe_use_isa(const char* name) {
  for (const jmoe::Isa* isa :
       {jmoe::isa_amx(), jmoe::isa_avx512_bf16(), jmoe::isa_avx512(), jmoe::isa_avx2(), jmoe::isa_base()})
    if (isa && !std::strcmp(isa->name, name)) return jmoe::chosen() = isa, true;
  return false;
}

}  // extern "C"
