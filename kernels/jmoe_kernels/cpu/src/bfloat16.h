// Conversion between float32 and bfloat16.
#pragma once
#include <cstdint>

namespace jmoe {
namespace {

inline float widen(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest even; a NaN stays a NaN.
inline uint16_t narrow(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded);
}

}  // namespace
}  // namespace jmoe
