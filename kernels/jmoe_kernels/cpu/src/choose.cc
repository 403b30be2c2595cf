// The choice of the instruction set: the best one that this processor and this build have.
#include <cstring>

#include "parallel.h"

namespace jmoe {
namespace {

constexpr int COUNT = 6;

// The sets from the best to the plainest; null where one cannot run.
const Isa* const* all() {
  static const Isa* const sets[COUNT] = {isa_amx(),    isa_avx512_bf16(), isa_avx512_vnni(),
                                         isa_avx512(), isa_avx2(),        isa_base()};
  return sets;
}

const Isa* named(const char* name) {  // or the best, if null
  for (int i = 0; i < COUNT; i++)
    if (all()[i] && (!name || !std::strcmp(all()[i]->name, name))) return all()[i];
  return nullptr;
}

const Isa*& chosen() {
  static const Isa* isa = named(nullptr);
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
    for (int i = 0; i < jmoe::COUNT; i++)
      if (jmoe::all()[i]) std::strcat(std::strcat(names, jmoe::all()[i]->name), "\n");
  return names;
}

// Uses the set of that name from now on; returns false if it cannot run here. Tests call it.
bool jmoe_use_isa(const char* name) {
  const jmoe::Isa* isa = jmoe::named(name);
  if (isa) jmoe::chosen() = isa;
  return isa;
}

}  // extern "C"
