// Products of packed rows (packed.h) with the steps of quantised weights, for AVX-512. A set defines how a step
// is unpacked and multiplied, as a class with
//   K: columns of a step of 64 bytes; NV: vectors that it unpacks to; AT: bytes of a packed number
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

// Up to two blocks of sixteen rows, from column k0 on.
template <int NB>
struct Blocks {
  const uint8_t* steps[NB];
  const float* scales[NB];  // of units: [unit][16]
  int64_t per_unit;         // floats from one unit's scales to the next: 16, or 0
};

// Sums of one output that do not wait for each other: a product takes some cycles, and one may start in each.
template <int OUTPUTS>
constexpr int CHAINS = OUTPUTS >= 6 ? 1 : OUTPUTS > 2 ? 2 : 4;

// first: number of the first chain to add to.
template <class F, int M, int NB, int C>
INLINE void multiply_step(const uint8_t* const (&steps)[NB], int64_t step, const char* x, const char* low, int64_t ld,
                          V table, int first, typename F::Sum (&acc)[M][NB][C]) {
  constexpr int TIMES = F::IS_TWICE ? 2 : 1;
  V v[NB][F::NV];
  UNROLLED for (int b = 0; b < NB; b++) {
    F::load(steps[b] + step * F::STEP, table, v[b]);
    if constexpr (F::STREAMS) _mm_prefetch((const char*)steps[b] + step * F::STEP + 4096, _MM_HINT_T0);
  }
  UNROLLED for (int i = 0; i < F::NV; i++)
    UNROLLED for (int m = 0; m < M; m++) {
      UNROLLED for (int twice = 0; twice < TIMES; twice++) {
        int32_t pair;
        __builtin_memcpy(&pair, (twice ? low : x) + m * ld + i * 4, 4);
        const int chain = ((first + i) * TIMES + twice) % C;
        UNROLLED for (int b = 0; b < NB; b++)
          acc[m][b][chain] = F::dot(acc[m][b][chain], v[b][i], _mm512_set1_epi32(pair));
      }
    }
}

// c[M][NB * 16] (+)= rows m0 .. of x, columns [k0, k1), times NB blocks; without the scales of x. G: columns of
// a unit, or 32 of which a unit has several.
template <class F, int G, int M, int NB>
void product(const Operand& x, int64_t m0, const Blocks<NB>& w, V table, int64_t k0, int64_t k1, float* c,
             int64_t ldc, bool adds) {
  constexpr int C = CHAINS<M * NB>;
  __m512 total[M][NB];
  UNROLLED for (int m = 0; m < M; m++)
    UNROLLED for (int b = 0; b < NB; b++)
      total[m][b] = adds ? _mm512_loadu_ps(c + m * ldc + b * 16) : _mm512_setzero_ps();
  const char *numbers = x.numbers + m0 * x.ld, *low = x.low + m0 * x.ld;
  for (int64_t u = k0 / x.unit, k = k0; k < k1; u++, k += x.unit) {
    typename F::Sum acc[M][NB][C];
    UNROLLED for (int m = 0; m < M; m++)
      UNROLLED for (int b = 0; b < NB; b++)
        UNROLLED for (int i = 0; i < C; i++)
          acc[m][b][i] = F::begin(i == 0 && x.inits ? x.inits + (m0 + m) * x.units + u : nullptr);
    const int64_t end = k + x.unit < k1 ? k + x.unit : k1;
    int64_t i = k;
    for (; i + G <= end; i += G)
      UNROLLED for (int t = 0; t < G / F::K; t++)
        multiply_step<F, M, NB, C>(w.steps, (i - k0) / F::K + t, numbers + (i + t * F::K) * F::AT,
                                   low + (i + t * F::K) * F::AT, x.ld, table, t * F::NV, acc);
    for (; i < end; i += F::K)
      multiply_step<F, M, NB, C>(w.steps, (i - k0) / F::K, numbers + i * F::AT, low + i * F::AT, x.ld, table, 0, acc);
    UNROLLED for (int b = 0; b < NB; b++) {
      const __m512 scale = _mm512_loadu_ps(w.scales[b] + (k - k0) / x.unit * w.per_unit);
      UNROLLED for (int m = 0; m < M; m++) {
        auto sum = acc[m][b][0];
        UNROLLED for (int i = 1; i < C; i++) sum = F::add(sum, acc[m][b][i]);
        total[m][b] = _mm512_fmadd_ps(F::real(sum), scale, total[m][b]);
      }
    }
  }
  UNROLLED for (int m = 0; m < M; m++)
    UNROLLED for (int b = 0; b < NB; b++) _mm512_storeu_ps(c + m * ldc + b * 16, total[m][b]);
}

template <class F, int M, int NB>
inline void product_of(const Operand& x, int64_t m0, const Blocks<NB>& w, V table, int64_t k0, int64_t k1, float* c,
                       int64_t ldc, bool adds) {
  if (x.unit == 16) return product<F, 16, M, NB>(x, m0, w, table, k0, k1, c, ldc, adds);
  product<F, 32, M, NB>(x, m0, w, table, k0, k1, c, ldc, adds);
}

// Multiplies all m rows, most of them M at a time.
template <class F, int M, int NB>
inline void product_rows(const Operand& x, int64_t m, const Blocks<NB>& w, V table, int64_t k0, int64_t k1, float* c,
                         int64_t ldc, bool adds) {
  int64_t i = 0;
  for (; i + M <= m; i += M) product_of<F, M, NB>(x, i, w, table, k0, k1, c + i * ldc, ldc, adds);
  if constexpr (M > 2)
    for (; i + 2 <= m; i += 2) product_of<F, 2, NB>(x, i, w, table, k0, k1, c + i * ldc, ldc, adds);
  for (; i < m; i++) product_of<F, 1, NB>(x, i, w, table, k0, k1, c + i * ldc, ldc, adds);
}

// Unpacks the steps of columns [k0, k1) to vectors for F::Panel.
template <class F>
inline const uint8_t* unpack_steps(const uint8_t* steps, V table, int64_t columns, uint8_t* to) {
  for (int64_t t = 0; t * F::K < columns; t++) {
    V v[F::NV];
    F::load(steps + t * F::STEP, table, v);
    UNROLLED for (int i = 0; i < F::NV; i++) _mm512_store_si512(to + (t * F::NV + i) * 64, v[i]);
  }
  return to;
}

// c[m][16] += sums of x in groups [g0, g1), times their lows.
inline void add_lows(const float* sums, int64_t groups, int64_t m, int64_t g0, int64_t g1, const float* lows,
                     float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i++) {
    __m512 v = _mm512_loadu_ps(c + i * ldc);
    for (int64_t g = g0; g < g1; g++)
      v = _mm512_fmadd_ps(_mm512_loadu_ps(lows + (g - g0) * 16), _mm512_set1_ps(sums[i * groups + g]), v);
    _mm512_storeu_ps(c + i * ldc, v);
  }
}

// Multiplies c[m][16] with the scales of the rows of x.
inline void scale_rows(const float* scales, int64_t m, float* c, int64_t ldc) {
  for (int64_t i = 0; i < m; i++) {
    const __m512 scale = _mm512_set1_ps(scales[i]);
    _mm512_storeu_ps(c + i * ldc, _mm512_mul_ps(_mm512_loadu_ps(c + i * ldc), scale));
  }
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

constexpr int64_t FEW = 8;           // rows of x up to which weights are unpacked in registers
constexpr int64_t MOST_UNITS = 256;  // of which scales are spread at a time

// What a product with one form needs besides its class.
struct Numbers {
  V table;       // for F::load
  float factor;  // of the numbers that F unpacks to those of the code
};

// The whole product: QuantisedGemm::run for a form whose class is F, and at most 64 rows.
template <class F>
void run_form(const Form& form, const Numbers& numbers, const void* packed, int64_t m, int64_t k, const Codes& w,
              int64_t n, float* c, int64_t ldc) {
  constexpr int NB = 2;
  alignas(64) uint32_t room[NB][SPAN / 4 * 16];
  alignas(64) uint8_t panel[NB][SPAN * 32];
  alignas(64) float scales[NB][MOST_UNITS * 16], lows[MOST_UNITS * 16], edge[64 * 16 * NB];
  const Packing p = packing_of(form, m, k);
  const char* x_data = (const char*)packed;
  const int64_t unit = unit_of(form);
  const Operand x = {x_data + p.numbers, x_data + p.numbers + (F::IS_TWICE ? p.low : 0), (int64_t)p.ld,
                     zero_point(form) ? (const int32_t*)(x_data + p.inits) : nullptr, p.units, unit};
  const bool few = m <= FEW, whole = few && form.is_n16 && form.group <= unit;
  const int64_t span = whole ? unit * MOST_UNITS : SPAN, step = step_of(form);
  for (int64_t j = 0; j < n;) {
    const int blocks = few ? 1 : 2;  // the second may be beyond the last row, and is then the first again
    const bool is_edge = n - j < 16 * blocks;
    float* out = is_edge ? edge : c + j;
    const int64_t ldo = is_edge ? 16 * NB : ldc;
    for (int64_t k0 = 0; k0 < k; k0 += span) {
      const int64_t k1 = k0 + span < k ? k0 + span : k, columns = (k1 - k0 + step - 1) / step * step;
      const int64_t g0 = form.group ? k0 / form.group : 0, g1 = form.group ? (k1 - 1) / form.group + 1 : 1;
      Blocks<2> both = {{}, {}, form.group && form.group <= unit ? 16 : 0};
      for (int b = 0; b < blocks; b++) {
        if (n - j <= b * 16) {
          both.steps[b] = both.steps[0], both.scales[b] = both.scales[0];
          break;
        }
        const Codes block = codes_at(form, w, k, j + b * 16);
        const int rows = least(16, n - j - b * 16);
        both.steps[b] = (const uint8_t*)steps_at(form, block.values, k, k0, k1, rows, room[b]);
        spread_scaled(form, block.scales, p.groups, g0, g1, rows, numbers.factor, scales[b]);
        both.scales[b] = scales[b];
        if (!few) both.steps[b] = unpack_steps<F>(both.steps[b], numbers.table, columns, panel[b]);
      }
      const Blocks<1> one = {{both.steps[0]}, {both.scales[0]}, both.per_unit};
      if (few && m == FEW) product_of<F, FEW, 1>(x, 0, one, numbers.table, k0, k0 + columns, out, ldo, k0 > 0);
      else if (few) product_rows<F, 4, 1>(x, m, one, numbers.table, k0, k0 + columns, out, ldo, k0 > 0);
      else product_rows<typename F::Panel, 6, 2>(x, m, both, numbers.table, k0, k0 + columns, out, ldo, k0 > 0);
    }
    for (int b = 0; b < blocks && j + b * 16 < n; b++) {
      const Codes block = codes_at(form, w, k, j + b * 16);
      const int rows = least(16, n - j - b * 16);
      for (int64_t g = 0; form.has_lows && g < p.groups; g += MOST_UNITS) {
        const int64_t end = g + MOST_UNITS < p.groups ? g + MOST_UNITS : p.groups;
        spread_scaled(form, block.lows, p.groups, g, end, rows, 1.f, lows);
        add_lows((const float*)(x_data + p.sums), p.groups, m, g, end, lows, out + b * 16, ldo);
      }
      scale_rows((const float*)(x_data + p.scales), m, out + b * 16, ldo);
      if (is_edge)
        for (int64_t i = 0; i < m; i++)
          for (int r = 0; r < rows; r++) c[i * ldc + j + b * 16 + r] = out[i * ldo + b * 16 + r];
    }
    j += 16 * blocks;
  }
}

}  // namespace
}  // namespace jmoe
