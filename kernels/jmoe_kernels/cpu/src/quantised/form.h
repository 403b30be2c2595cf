// How a quantised weight is stored, and what every product with one needs of it: the codes of sixteen rows as
// steps, and their scales and lows as float32.
//
// A step is sixteen 32-bit words, one a row. A word holds four neighbouring bytes of the row, or eight nibbles,
// of which number c is in bits 8 * (c % 4) + 4 * (c / 4). Weights in the layout "n16" (see quantised/interleave.py) are
// stored as steps; the scales of their blocks are [group][16]. Rows as a checkpoint has them become steps here,
// one stretch of columns at a time, which takes longer.
#pragma once
#include "../bfloat16.h"
#include "../isa.h"

namespace jmoe {
namespace {

constexpr int64_t SPAN = 256;  // columns whose codes are made steps, or are unpacked, at a time

inline bool has_nibbles(const Form& form) { return form.code >= INT4; }
inline int64_t step_of(const Form& form) { return has_nibbles(form) ? 8 : 4; }
inline int64_t bytes_of(const Form& form, int64_t columns) { return has_nibbles(form) ? columns / 2 : columns; }
inline int64_t groups_of(const Form& form, int64_t k) { return form.group ? (k + form.group - 1) / form.group : 1; }
// Returns the columns that are added up as integers before they are scaled.
inline int64_t unit_of(const Form& form) { return form.group && form.group < SPAN ? form.group : SPAN; }

inline float bits_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// IEEE half precision; in whole numbers where it is denormal, since a processor may take those as zero.
inline float half_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
  const float small = (float)(int32_t)mantissa * 0x1p-24f;
  uint32_t small_bits;
  __builtin_memcpy(&small_bits, &small, 4);
  const uint32_t normal = (exponent + (exponent == 31 ? 224 : 112)) << 23 | mantissa << 13;
  return bits_float(sign | (exponent ? normal : small_bits));
}

inline float scale_at(const Form& form, const void* scales, int64_t i) {
  switch (form.scales) {
    case FLOAT32: return ((const float*)scales)[i];
    case BFLOAT16: return widen(((const uint16_t*)scales)[i]);
    case FLOAT16: return half_float(((const uint16_t*)scales)[i]);
    default: break;
  }
  const uint32_t b = ((const uint8_t*)scales)[i];
  return bits_float(b ? b << 23 : 1u << 22);
}

// Writes the scales, or lows, of groups [g0, g1) of sixteen rows to out[g - g0][16]; those of absent rows are 0.
inline void spread(const Form& form, const void* scales, int64_t groups, int64_t g0, int64_t g1, int64_t rows,
                   float* out) {
  if (form.is_n16) {
    for (int64_t i = 0; i < (g1 - g0) * 16; i++) out[i] = scale_at(form, scales, g0 * 16 + i);
    return;
  }
  for (int64_t g = g0; g < g1; g++)
    for (int64_t r = 0; r < 16; r++)
      out[(g - g0) * 16 + r] = r < rows ? scale_at(form, scales, r * groups + g) : 0.f;
}

// Puts nibbles 0, 1, 2 .. of a word, lowest first, where a step has them.
inline uint32_t step_nibbles(uint32_t word) {
  uint32_t low = word & 0xffff, high = word >> 16;
  low = (low | low << 8) & 0x00ff00ff, high = (high | high << 8) & 0x00ff00ff;
  low = (low | low << 4) & 0x0f0f0f0f, high = (high | high << 4) & 0x0f0f0f0f;
  return low | high << 4;
}

// Returns the steps of columns [k0, k1) of sixteen rows, of which `rows` exist. k0 is a multiple of SPAN, and
// k1 - k0 at most SPAN, for rows as a checkpoint has them: `room` has 16 words for every 4 columns.
inline const uint32_t* steps_at(const Form& form, const void* values, int64_t k, int64_t k0, int64_t k1, int64_t rows,
                                uint32_t* room) {
  const int64_t width = step_of(form);
  if (form.is_n16) return (const uint32_t*)values + k0 / width * 16;
  const int64_t row_bytes = bytes_of(form, k), first = bytes_of(form, k0), bytes = bytes_of(form, k1) - first;
  for (int64_t r = 0; r < 16; r++) {
    const char* from = (const char*)values + r * row_bytes + first;
    for (int64_t i = 0; i < bytes; i += 4) {
      uint32_t word = 0;
      if (r < rows && i + 4 <= bytes) __builtin_memcpy(&word, from + i, 4);
      else if (r < rows) __builtin_memcpy(&word, from + i, bytes - i);
      room[i / 4 * 16 + r] = width == 8 ? step_nibbles(word) : word;
    }
  }
  return room;
}

// Returns the rows of w from row j on, a multiple of 16.
inline Codes codes_at(const Form& form, const Codes& w, int64_t k, int64_t j) {
  static const int SIZES[] = {4, 2, 2, 1};
  const int64_t scales = j * groups_of(form, k) * SIZES[form.scales];
  return {(const char*)w.values + j * bytes_of(form, k), (const char*)w.scales + scales,
          w.lows ? (const char*)w.lows + scales : nullptr};
}

inline int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

}  // namespace
}  // namespace jmoe
