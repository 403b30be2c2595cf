// Products of packed rows (packed.h) with the steps of quantised weights, for AVX-512. A set defines how a step
// is unpacked and multiplied, as a class with
//   K: columns of a step of 64 bytes; NV: vectors that it unpacks to; AT: bytes of a packed number
//   AHEAD: rows of x from which codes are prefetched; with fewer, the processor's own prefetcher is quicker alone
//   IS_TWICE: whether a number of x is the sum of two packed ones
//   Sum: the vector type of sums; load(step, table, vectors), dot(sum, vector, pair), add(sum, sum), real(sum)
// A lane is a row of the weight, so nothing is summed over lanes, and an activation is broadcast.
#pragma once
#include "packed.h"

namespace jmoe {
namespace {

struct Operand {
  const char *numbers, *low;  // low: null, or the second numbers
  int64_t ld;
  const int32_t* inits;  // null, or the beginning of each sum
  int64_t units, unit;
};

// Sixteen rows of a weight, from column k0 on.
struct Block {
  const uint8_t* steps;
  const float* scales;  // of units: [unit][16]
  int64_t per_unit;     // floats from one unit's scales to the next: 16, or 0
};

// Sums of one output that do not wait for each other: a product takes some cycles, and one may start in each.
template <int OUTPUTS>
constexpr int CHAINS = OUTPUTS >= 6 ? 1 : OUTPUTS > 2 ? 2 : 4;

// first: number of the first chain to add to.
template <class F, int M, int C>
INLINE void multiply_step(const uint8_t* steps, int64_t step, const char* x, const char* low, int64_t ld, V table,
                          int first, typename F::Sum (&acc)[M][C]) {
  constexpr int TIMES = F::IS_TWICE ? 2 : 1;
  V v[F::NV];
  F::load(steps + step * 64, table, v);
  if constexpr (M >= F::AHEAD) _mm_prefetch((const char*)steps + step * 64 + 12288, _MM_HINT_T1);
  UNROLLED for (int i = 0; i < F::NV; i++)
    UNROLLED for (int m = 0; m < M; m++)
      UNROLLED for (int twice = 0; twice < TIMES; twice++) {
        int32_t pair;
        __builtin_memcpy(&pair, (twice ? low : x) + m * ld + i * 4, 4);
        const int chain = ((first + i) * TIMES + twice) % C;
        acc[m][chain] = F::dot(acc[m][chain], v[i], _mm512_set1_epi32(pair));
      }
}

// c[M][16] (+)= rows m0 .. of x, columns [k0, k1), times a block; without the scales of x. G: columns of a unit,
// or 32 of which a unit has several.
template <class F, int G, int M>
void product(const Operand& x, int64_t m0, const Block& w, V table, int64_t k0, int64_t k1, float* c, bool adds) {
  constexpr int C = CHAINS<M>;
  __m512 total[M];
  UNROLLED for (int m = 0; m < M; m++) total[m] = adds ? _mm512_load_ps(c + m * 16) : _mm512_setzero_ps();
  const char *numbers = x.numbers + m0 * x.ld, *low = x.low + m0 * x.ld;
  for (int64_t u = k0 / x.unit, k = k0; k < k1; u++, k += x.unit) {
    typename F::Sum acc[M][C];
    UNROLLED for (int m = 0; m < M; m++)
      UNROLLED for (int i = 0; i < C; i++)
        acc[m][i] = F::begin(i == 0 && x.inits ? x.inits + (m0 + m) * x.units + u : nullptr);
    const int64_t end = k + x.unit < k1 ? k + x.unit : k1;
    int64_t i = k;
    for (; i + G <= end; i += G)
      UNROLLED for (int t = 0; t < G / F::K; t++)
        multiply_step<F, M, C>(w.steps, (i - k0) / F::K + t, numbers + (i + t * F::K) * F::AT,
                               low + (i + t * F::K) * F::AT, x.ld, table, t * F::NV, acc);
    for (; i < end; i += F::K)
      multiply_step<F, M, C>(w.steps, (i - k0) / F::K, numbers + i * F::AT, low + i * F::AT, x.ld, table, 0, acc);
    const __m512 scale = _mm512_loadu_ps(w.scales + (k - k0) / x.unit * w.per_unit);
    UNROLLED for (int m = 0; m < M; m++) {
      auto sum = acc[m][0];
      UNROLLED for (int i = 1; i < C; i++) sum = F::add(sum, acc[m][i]);
      total[m] = _mm512_fmadd_ps(F::real(sum), scale, total[m]);
    }
  }
  UNROLLED for (int m = 0; m < M; m++) _mm512_store_ps(c + m * 16, total[m]);
}

// Multiplies rows [i, m) of x, at most M, with a block.
template <class F, int M>
inline void product_of(const Operand& x, int64_t i, int64_t m, const Block& w, V table, int64_t k0, int64_t k1,
                       float* c, bool adds) {
  if (m - i < M) {
    if constexpr (M > 1) product_of<F, M - 1>(x, i, m, w, table, k0, k1, c, adds);
  } else if (x.unit == 16) {
    product<F, 16, M>(x, i, w, table, k0, k1, c + i * 16, adds);
  } else {
    product<F, 32, M>(x, i, w, table, k0, k1, c + i * 16, adds);
  }
}

constexpr int AT_ONCE = 8;  // rows of x that are multiplied with a block unpacked in registers

// c[][16] += sums of x in groups [g0, g1), times their lows, for the first rows of m, at most M. Returns how many.
template <int M>
inline int64_t add_lows_of(const float* sums, int64_t groups, int64_t m, int64_t g0, int64_t g1, const float* lows,
                           float* c) {
  if constexpr (M > 1)
    if (m < M) return add_lows_of<M / 2>(sums, groups, m, g0, g1, lows, c);
  constexpr int C = CHAINS<M>;
  __m512 v[M][C];
  UNROLLED for (int i = 0; i < M; i++)
    UNROLLED for (int k = 0; k < C; k++) v[i][k] = k ? _mm512_setzero_ps() : _mm512_load_ps(c + i * 16);
  const auto add = [&](int64_t g, int k) __attribute__((always_inline)) {
    const __m512 low = _mm512_loadu_ps(lows + (g - g0) * 16);
    UNROLLED for (int i = 0; i < M; i++)
      v[i][k] = _mm512_fmadd_ps(low, _mm512_set1_ps(sums[i * groups + g]), v[i][k]);
  };
  int64_t g = g0;
  for (; g + C <= g1; g += C)
    UNROLLED for (int k = 0; k < C; k++) add(g + k, k);
  for (; g < g1; g++) add(g, 0);
  UNROLLED for (int i = 0; i < M; i++) {
    UNROLLED for (int k = 1; k < C; k++) v[i][0] = _mm512_add_ps(v[i][0], v[i][k]);
    _mm512_store_ps(c + i * 16, v[i][0]);
  }
  return M;
}

// The same for all m rows.
inline void add_lows(const float* sums, int64_t groups, int64_t m, int64_t g0, int64_t g1, const float* lows,
                     float* c) {
  for (int64_t i = 0; i < m;)
    i += add_lows_of<AT_ONCE>(sums + i * groups, groups, m - i, g0, g1, lows, c + i * 16);
}

// c[m][n] = out[m][16] times the scales of the rows of x, for n columns of sixteen.
inline void store_scaled(const float* scales, int64_t m, const float* out, int64_t n, float* c, int64_t ldc) {
  const __mmask16 mask = (1u << n) - 1;
  for (int64_t i = 0; i < m; i++)
    _mm512_mask_storeu_ps(c + i * ldc, mask, _mm512_mul_ps(_mm512_loadu_ps(out + i * 16), _mm512_set1_ps(scales[i])));
}

// Sixteen scales of the layout "n16" as float32.
INLINE __m512 scales16(const Form& form, const void* scales, int64_t i) {
  const char* at = (const char*)scales;
  if (form.scales == FLOAT32) return _mm512_loadu_ps(at + i * 4);
  if (form.scales == FLOAT16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(at + i * 2)));
  if (form.scales == BFLOAT16)
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(at + i * 2))), 16);
  const V bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(at + i)));
  return (__m512)_mm512_max_epi32(_mm512_slli_epi32(bytes, 23), _mm512_set1_epi32(1 << 22));
}

// Writes the scales or lows of groups [g0, g1) of a block to out[g - g0][16], times `factor`.
inline void spread_scaled(const Form& form, const void* scales, int64_t groups, int64_t g0, int64_t g1, int64_t rows,
                          float factor, float* out) {
  if (!form.is_n16) spread(form, scales, groups, g0, g1, rows, out);
  for (int64_t i = 0; i < (g1 - g0) * 16; i += 16) {
    const __m512 v = form.is_n16 ? scales16(form, scales, g0 * 16 + i) : _mm512_loadu_ps(out + i);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(v, _mm512_set1_ps(factor)));
  }
}

constexpr int64_t MOST_UNITS = 256;  // of which scales are spread at a time
constexpr int64_t MOST_ROWS = 64;    // of x, in one product

// What a product with one form needs besides its class.
struct Numbers {
  V table;       // for F::load
  float factor;  // of the numbers that F unpacks to those of the code
};

// The whole product: QuantisedGemm::run for a form whose class is F, and at most MOST_ROWS rows. Weights are
// unpacked again for every AT_ONCE rows, which is quicker than to keep them unpacked, and they come from the
// first cache then. Sums are kept side by side: at a great distance from row to row they would miss there.
template <class F>
void run_form(const Form& form, const Numbers& numbers, const void* packed, int64_t m, int64_t k, const Codes& w,
              int64_t n, float* c, int64_t ldc) {
  alignas(64) uint32_t room[SPAN / 4 * 16];
  alignas(64) float scales[MOST_UNITS * 16], out[MOST_ROWS * 16];
  const Packing p = packing_of(form, m, k);
  const char* x_data = (const char*)packed;
  const int64_t unit = unit_of(form), step = step_of(form);
  const Operand x = {x_data + p.numbers, x_data + p.numbers + (F::IS_TWICE ? p.low : 0), (int64_t)p.ld,
                     zero_point(form) ? (const int32_t*)(x_data + p.inits) : nullptr, p.units, unit};
  const int64_t span = form.is_n16 && form.group <= unit ? unit * MOST_UNITS : SPAN;
  for (int64_t j = 0; j < n; j += 16) {
    const Codes block = codes_at(form, w, k, j);
    const int rows = least(16, n - j);
    for (int64_t k0 = 0; k0 < k; k0 += span) {
      const int64_t k1 = k0 + span < k ? k0 + span : k, end = k0 + (k1 - k0 + step - 1) / step * step;
      const int64_t g0 = form.group ? k0 / form.group : 0, g1 = form.group ? (k1 - 1) / form.group + 1 : 1;
      const uint8_t* steps = (const uint8_t*)steps_at(form, block.values, k, k0, k1, rows, room);
      spread_scaled(form, block.scales, p.groups, g0, g1, rows, numbers.factor, scales);
      const Block codes = {steps, scales, form.group && form.group <= unit ? 16 : 0};
      for (int64_t i = 0; i < m; i += AT_ONCE)
        product_of<F, AT_ONCE>(x, i, least(m, i + AT_ONCE), codes, numbers.table, k0, end, out, k0 > 0);
    }
    for (int64_t g = 0; form.has_lows && g < p.groups; g += MOST_UNITS) {
      const int64_t last = g + MOST_UNITS < p.groups ? g + MOST_UNITS : p.groups;
      spread_scaled(form, block.lows, p.groups, g, last, rows, 1.f, scales);
      add_lows((const float*)(x_data + p.sums), p.groups, m, g, last, scales, out);
    }
    store_scaled((const float*)(x_data + p.scales), m, out, rows, c + j, ldc);
  }
}

}  // namespace
}  // namespace jmoe
