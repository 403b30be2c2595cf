// Rows of x packed for products of whole numbers: each row rounded to steps of its own, with the sums that zero
// points and lows need. Included by the files of AVX-512 sets.
//
// Within four columns, numbers of 16 bits are in the order 0, 2, 1, 3: a word of four weights unpacks into pairs
// of its even and its odd bytes.
#pragma once
#include <immintrin.h>

#include "form.h"

// Loops over registers must vanish, or the compiler keeps the registers in memory; but checks of every access
// make unrolled loops so long that they compile for minutes.
#ifdef __SANITIZE_ADDRESS__
#undef UNROLLED
#define UNROLLED
#elif !defined(UNROLLED)
#define UNROLLED _Pragma("GCC unroll 32")
#endif
#define INLINE inline __attribute__((always_inline))

namespace jmoe {
namespace {

typedef __m512i V;

enum Kind { BYTES, WORDS, BRAINS };  // int8, int16, one or two bfloat16 whose sum is the number

inline Kind kind_of(const Form& form) { return form.code == E4M3 ? BRAINS : form.is_a8 ? BYTES : WORDS; }

inline bool has_rest(const Form& form) { return kind_of(form) == BRAINS && !form.is_a8 && !form.is_bf16; }

// The unsigned codes of int8 activations have this zero point; those of int16 activations have none.
inline int zero_point(const Form& form) {
  static const int ZEROS[] = {0, 128, 0, 8, 12, 127};
  return kind_of(form) == BYTES ? ZEROS[form.code] : 0;
}

// Where the parts of packed rows lie, in bytes from their beginning.
struct Packing {
  int64_t columns, units, groups;   // columns: padded
  size_t scales, inits, sums, low;  // low: the second bfloat16 of each number, `low` bytes after the first
  size_t numbers, ld, bytes;        // ld: bytes of a row's numbers
};

inline Packing packing_of(const Form& form, int64_t m, int64_t k) {
  Packing p;
  p.columns = (k + 63) / 64 * 64;
  p.units = (k + unit_of(form) - 1) / unit_of(form), p.groups = groups_of(form, k);
  p.scales = 0;
  p.inits = p.scales + m * 4;
  p.sums = p.inits + (zero_point(form) ? m * p.units * 4 : 0);
  p.numbers = (p.sums + (form.has_lows ? m * p.groups * 4 : 0) + 63) / 64 * 64;
  p.ld = p.columns * (kind_of(form) == BYTES ? 1 : 2);
  p.low = m * p.ld;
  p.bytes = p.numbers + m * p.ld * (has_rest(form) ? 2 : 1);
  return p;
}

inline __m512 row16(const Rows& x, int64_t at, int64_t left) {
  const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
  if (!x.bf16) return _mm512_maskz_loadu_ps(mask, (const float*)x.data + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)x.data + at);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

// Returns sixteen 32-bit numbers as 16 bits each, in the order of the packing.
inline __m256i pairs16(V v) {
  const __m128i order = _mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0);
  return _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(v), _mm256_broadcastsi128_si256(order));
}

inline V to_brain(__m512 v) {  // rounds to nearest even
  const V bits = (V)v, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}

// How a row of x is rounded: to whole numbers of x * per, each of which means scale.
struct Rounding {
  float per, scale;
};

inline Rounding rounding_of(const Form& form, const Rows& x, int64_t at, int64_t k) {
  V tops = _mm512_setzero_si512();  // as bits, so that a NaN is the greatest
  for (int64_t c = 0; c < k; c += 16)
    tops = _mm512_max_epi32(tops, (V)_mm512_abs_ps(row16(x, at + c, k - c)));
  const float top = bits_float(_mm512_reduce_max_epi32(tops)), most = form.is_a8 ? 127.f : 32767.f;
  if (top - top != 0) return {0.f, __builtin_nanf("")};
  // A row whose largest number is so small that its inverse overflows counts as zeros.
  return {top > 1e-33f ? most / top : 0.f, top / most};
}

// The numbers of a nibble, twice those of E2M1.
inline __m128i numbers_of(const Form& form) {
  static const int8_t NUMBERS[3][16] = {
      {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
      {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
      {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
  return has_nibbles(form) ? _mm_loadu_si128((const __m128i*)NUMBERS[form.code - INT4]) : _mm_setzero_si128();
}

size_t whole_bytes(const Form& form, int64_t m, int64_t k) { return packing_of(form, m, k).bytes; }

void whole_pack(const Form& form, const Rows& x, int64_t m, int64_t k, void* packed) {
  const Packing p = packing_of(form, m, k);
  const Kind kind = kind_of(form);
  const int64_t unit = unit_of(form);
  const int zero = zero_point(form);
  char* const out = (char*)packed;
  for (int64_t i = 0; i < m; i++) {
    const int64_t at = x.ld * (x.index ? x.index[i] : i);
    const Rounding rounding = rounding_of(form, x, at, k);
    const bool rounds = kind != BRAINS || form.is_a8 || rounding.scale != rounding.scale;
    ((float*)(out + p.scales))[i] = rounds ? rounding.scale : 1.f;
    char* const numbers = out + p.numbers + i * p.ld;
    float* const sums = (float*)(out + p.sums) + i * p.groups;
    int32_t* const inits = (int32_t*)(out + p.inits) + i * p.units;
    if (form.has_lows) for (int64_t g = 0; g < p.groups; g++) sums[g] = 0;
    for (int64_t u = 0; u * unit < p.columns; u++) {
      V whole = _mm512_setzero_si512();
      __m512 real = _mm512_setzero_ps();
      const int64_t end = (u + 1) * unit < p.columns ? (u + 1) * unit : p.columns;
      for (int64_t c = u * unit; c < end; c += 16) {
        const __m512 v = c < k ? row16(x, at + c, k - c) : _mm512_setzero_ps();
        const V q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(rounding.per)));
        if (kind == BYTES) _mm_storeu_si128((__m128i*)(numbers + c), _mm512_cvtepi32_epi8(q));
        if (kind == WORDS) _mm256_storeu_si256((__m256i*)(numbers + c * 2), pairs16(q));
        if (kind == BRAINS) {
          const __m512 number = form.is_a8 ? _mm512_cvtepi32_ps(q) : v;
          const V high = to_brain(number);
          _mm256_storeu_si256((__m256i*)(numbers + c * 2), pairs16(high));
          if (has_rest(form)) {
            const __m512 rest = _mm512_sub_ps(number, (__m512)_mm512_slli_epi32(high, 16));
            _mm256_storeu_si256((__m256i*)(numbers + p.low + c * 2), pairs16(to_brain(rest)));
          }
          real = _mm512_add_ps(real, number);
        }
        whole = _mm512_add_epi32(whole, q);
      }
      if (u >= p.units) break;
      const int32_t total = kind == BRAINS ? 0 : _mm512_reduce_add_epi32(whole);
      if (zero) inits[u] = -zero * total;
      if (form.has_lows)
        sums[form.group ? u * unit / form.group : 0] += kind == BRAINS ? _mm512_reduce_add_ps(real) : (float)total;
    }
  }
}

}  // namespace
}  // namespace jmoe
