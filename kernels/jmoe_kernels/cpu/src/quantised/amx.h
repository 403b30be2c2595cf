// Products of quantised weights on AMX int8 tiles, for more than a few rows and units of 64 columns or more;
// the other products stay with the set before. Included by isa_amx.cc.
//
// A step of bytes has the layout of a tile's second operand, so sixteen steps of sixteen weight rows are a tile,
// and the result is [row of x][weight row]. An int16 activation is 256 times a signed byte plus an unsigned one.
#pragma once
#include "blocks.h"

namespace jmoe {
namespace {

bool fits_tiles(const Form& form, int64_t m) { return form.code != E4M3 && m > AT_ONCE && unit_of(form) % 64 == 0; }

// Where the parts of rows packed for tiles lie, in bytes from their beginning.
struct TilePacking {
  int64_t ld, groups;
  size_t scales, sums, high, low, bytes;
};

TilePacking tile_packing(const Form& form, int64_t m, int64_t k) {
  TilePacking p;
  const int64_t rows = (m + 15) / 16 * 16;
  p.ld = (k + 63) / 64 * 64, p.groups = groups_of(form, k);
  p.scales = 0, p.sums = m * 4;
  p.high = (p.sums + (form.has_lows ? m * p.groups * 4 : 0) + 63) / 64 * 64;
  p.low = p.high + rows * p.ld;
  p.bytes = p.low + (form.is_a8 ? 0 : rows * p.ld);
  return p;
}

size_t tile_bytes(const Form& form, int64_t m, int64_t k) {
  return fits_tiles(form, m) ? tile_packing(form, m, k).bytes : isa_avx512_bf16()->quantised.packed_bytes(form, m, k);
}

void tile_pack(const Form& form, const Rows& x, int64_t m, int64_t k, void* packed) {
  if (!fits_tiles(form, m)) return isa_avx512_bf16()->quantised.pack(form, x, m, k, packed);
  const TilePacking p = tile_packing(form, m, k);
  char* const out = (char*)packed;
  for (int64_t i = 0; i < (m + 15) / 16 * 16; i++) {
    char *high = out + p.high + i * p.ld, *low = out + p.low + i * p.ld;
    if (i >= m) {  // rows of zeros fill the last tile
      __builtin_memset(high, 0, p.ld);
      if (!form.is_a8) __builtin_memset(low, 0, p.ld);
      continue;
    }
    const int64_t at = x.ld * (x.index ? x.index[i] : i);
    const Rounding rounding = rounding_of(form, x, at, k);
    ((float*)(out + p.scales))[i] = rounding.scale;
    float* const sums = (float*)(out + p.sums) + i * p.groups;
    if (form.has_lows) for (int64_t g = 0; g < p.groups; g++) sums[g] = 0;
    for (int64_t c = 0; c < p.ld; c += 16) {
      const __m512 v = c < k ? row16(x, at + c, k - c) : _mm512_setzero_ps();
      const V q = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(rounding.per)));
      const V top = form.is_a8 ? q : _mm512_srai_epi32(q, 8);
      _mm_storeu_si128((__m128i*)(high + c), _mm512_cvtepi32_epi8(top));
      if (!form.is_a8) _mm_storeu_si128((__m128i*)(low + c), _mm512_cvtepi32_epi8(q));
      if (form.has_lows && c < k) sums[form.group ? c / form.group : 0] += (float)_mm512_reduce_add_epi32(q);
    }
  }
}

// Writes the signed bytes of columns [k0, k0 + SPAN) of a block as tiles, with zeros after column k1.
void tile_panel(const Form& form, const uint8_t* steps, __m128i table, int64_t columns, uint8_t* panel) {
  const int64_t width = step_of(form);
  const V numbers = _mm512_broadcast_i32x4(table), low = _mm512_set1_epi8(15);
  for (int64_t c = 0; c < SPAN; c += width) {
    const V w = c < columns ? _mm512_loadu_si512(steps + c / width * 64) : _mm512_setzero_si512();
    if (width == 4) {
      _mm512_store_si512(panel + c * 16, w);
      continue;
    }
    const V high = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
    _mm512_store_si512(panel + c * 16, _mm512_shuffle_epi8(numbers, _mm512_and_si512(w, low)));
    _mm512_store_si512(panel + c * 16 + 64, _mm512_shuffle_epi8(numbers, high));
  }
}

// Adds the products of sixteen rows of x with a unit of sixteen weight rows to out[rows][16].
void tile_unit(const char* high, const char* low, int64_t ld, const uint8_t* panel, int64_t columns, int64_t rows,
               const float* scales, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t c = 0; c < columns; c += 64) {
    _tile_loadd(4, panel + c * 16, 64);
    _tile_loadd(5, high + c, ld);
    _tile_dpbssd(0, 5, 4);
    if (low) {
      _tile_loadd(6, low + c, ld);
      _tile_dpbusd(1, 6, 4);
    }
  }
  alignas(64) int32_t sums[2][256];
  _tile_stored(0, sums[0], 64);
  if (low) _tile_stored(1, sums[1], 64);
  const __m512 scale = _mm512_loadu_ps(scales);
  for (int64_t i = 0; i < rows; i++) {
    V sum = _mm512_load_si512(sums[0] + i * 16);
    if (low) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(sums[1] + i * 16));
    _mm512_storeu_ps(out + i * 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(out + i * 16)));
  }
}

void tile_run(const Form& form, const void* packed, int64_t m, int64_t k, const Codes& w, int64_t n, float* c,
              int64_t ldc) {
  if (!fits_tiles(form, m)) return isa_avx512_bf16()->quantised.run(form, packed, m, k, w, n, c, ldc);
  alignas(64) uint32_t room[SPAN / 4 * 16];
  alignas(64) uint8_t panel[SPAN * 16];
  alignas(64) float scales[SPAN / 64 * 16], lows[16], out[MOST_ROWS * 16];
  const TilePacking p = tile_packing(form, m, k);
  const char* x = (const char*)packed;
  const int64_t unit = unit_of(form);
  const __m128i table = numbers_of(form);
  const float factor = form.code == E2M1 ? 0.5f : 1.f;
  configure_tiles();
  for (int64_t j = 0; j < n; j += 16) {
    const Codes block = codes_at(form, w, k, j);
    const int rows = least(16, n - j);
    for (int64_t i = 0; i < m * 16; i++) out[i] = 0;
    for (int64_t k0 = 0; k0 < k; k0 += SPAN) {
      const int64_t k1 = k0 + SPAN < k ? k0 + SPAN : k;
      const int64_t g0 = form.group ? k0 / form.group : 0, g1 = form.group ? (k1 - 1) / form.group + 1 : 1;
      tile_panel(form, (const uint8_t*)steps_at(form, block.values, k, k0, k1, rows, room), table, k1 - k0, panel);
      spread_scaled(form, block.scales, p.groups, g0, g1, rows, factor, scales);
      for (int64_t u = k0; u < k1; u += unit)
        for (int64_t t = 0; t < m; t += 16) {
          const int64_t group = form.group ? u / form.group - g0 : 0, columns = u + unit < k1 ? unit : k1 - u;
          const char *high = x + p.high + t * p.ld + u, *low = form.is_a8 ? nullptr : x + p.low + t * p.ld + u;
          tile_unit(high, low, p.ld, panel + (u - k0) * 16, columns, least(16, m - t), scales + group * 16, out + t * 16);
        }
    }
    for (int64_t g = 0; form.has_lows && g < p.groups; g++) {
      spread_scaled(form, block.lows, p.groups, g, g + 1, rows, 1.f, lows);
      add_lows((const float*)(x + p.sums), p.groups, m, g, g + 1, lows, out);
    }
    store_scaled((const float*)(x + p.scales), m, out, rows, c + j, ldc);
  }
  _tile_release();
}

}  // namespace
}  // namespace jmoe
