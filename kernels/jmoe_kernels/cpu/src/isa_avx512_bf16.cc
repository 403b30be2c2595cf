// AVX-512 with native bfloat16 products (Zen 4, Cooper Lake, Sapphire Rapids and later).
//
// The product has two forms. In the first, sixteen rows of x are interleaved in pairs, [k / 2][16][2], and one
// instruction multiplies a pair of weights with the pairs of all sixteen. The few rows left over, or all rows if
// there are few, take the second: they stay as they are, [m][k], and one instruction multiplies 32 numbers of a
// weight row with 32 of an x row; the sum over lanes comes once, at the end. A packed x has its interleaved rows
// first.
#include "isa.h"
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>

#include "pairs.inc"

namespace jmoe {
namespace {

constexpr int64_t FEW = 8;  // rows of x up to which lanes run along k

// Returns how many of m rows are interleaved.
int64_t whole(int64_t m) { return m % 16 <= FEW ? m / 16 * 16 : m; }

size_t packed_bytes(int64_t m, int64_t k) {
  return interleaved_bytes(whole(m), k) + (size_t)(m - whole(m)) * padded(k) * 2;
}

void pack(const Rows& x, int64_t m, int64_t k, int64_t k0, int64_t k1, void* packed) {
  const int64_t first = whole(m);
  interleave(x, first, k, k0, k1, (uint16_t*)packed);
  uint16_t* const to = (uint16_t*)((char*)packed + interleaved_bytes(first, k));
  for (int64_t i = first; i < m; i++)
    for (int64_t c = k0; c < k1; c += 32)
      _mm512_storeu_si512(to + (i - first) * padded(k) + c, row32(x, i, c, k1 - c));
}

// Halves the vectors, as in portable.inc.
template <int LEFT>
inline void fold(__m512 (&v)[16]) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  UNROLLED for (int i = 0; i < LEFT; i++)
    v[i] = _mm512_add_ps(_mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]),
                         _mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]));
  if constexpr (LEFT > 1) fold<LEFT / 2>(v);
}

// Multiplies 32 numbers of S weight rows with 32 of M rows of x; `mask` says which weights exist.
template <int S, int M>
inline void lanes_step(const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw, __mmask32 mask,
                       __m512 (&acc)[S][M]) {
  __m512bh ws[S];
  UNROLLED for (int r = 0; r < S; r++) ws[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + r * ldw);
  UNROLLED for (int j = 0; j < M; j++) {
    const __m512bh xs = (__m512bh)_mm512_loadu_si512(x + j * ldx);
    UNROLLED for (int r = 0; r < S; r++) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], ws[r], xs);
  }
}

// Multiplies R weight rows, S at a time. S = 1 reads memory in order: four rows side by side miss in the first
// cache, whose few buffers for misses then hold the stream to half the speed of memory. S = 2 shares the loads
// of x.
// AHEAD: whether to prefetch the rows after these while they are multiplied. A row is about a page, where the
// processor's own prefetcher stops; without AHEAD, memory waits for the products and they for memory (4 rows of
// x: 12 GB/s a core, with AHEAD 21).
template <int R, int M, int S, bool AHEAD>
inline void lanes_block(const uint16_t* x, int64_t ldx, int64_t k, const uint16_t* w, int64_t ldw, float* c,
                        int64_t ldc) {
  __m512 sums[16];
  UNROLLED for (int j = 0; j < 16; j++) sums[j] = _mm512_setzero_ps();
  UNROLLED for (int r = 0; r < R; r += S) {
    __m512 even[S][M], odd[S][M];
    UNROLLED for (int j = 0; j < S * M; j++) even[j / M][j % M] = odd[j / M][j % M] = _mm512_setzero_ps();
    const uint16_t* rows = w + r * ldw;
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
      if constexpr (AHEAD) {
        _mm_prefetch((const char*)(rows + R * ldw + i), _MM_HINT_T1);
        _mm_prefetch((const char*)(rows + R * ldw + i + 32), _MM_HINT_T1);
      }
      lanes_step<S, M>(x + i, ldx, rows + i, ldw, 0xffffffffu, even);
      lanes_step<S, M>(x + i + 32, ldx, rows + i + 32, ldw, 0xffffffffu, odd);
    }
    for (; i + 32 <= k; i += 32) lanes_step<S, M>(x + i, ldx, rows + i, ldw, 0xffffffffu, even);
    if (i < k) lanes_step<S, M>(x + i, ldx, rows + i, ldw, (1u << (k - i)) - 1, odd);
    UNROLLED for (int j = 0; j < S * M; j++)
      sums[j % M * R + r + j / M] = _mm512_add_ps(even[j / M][j % M], odd[j / M][j % M]);
  }
  fold<8>(sums);
  float out[16];
  _mm512_storeu_ps(out, sums[0]);
  for (int j = 0; j < M; j++)
    for (int r = 0; r < R; r++) c[j * ldc + r] = out[j * R + r];
}

template <int R, int S, bool AHEAD>
inline void lanes_rows(const uint16_t* x, int64_t ldx, int64_t m, int64_t k, const uint16_t* w, int64_t ldw,
                       float* c, int64_t ldc) {
  for (; m >= 4; m -= 4, x += 4 * ldx, c += 4 * ldc) lanes_block<R, 4, S, AHEAD>(x, ldx, k, w, ldw, c, ldc);
  if (m == 3) lanes_block<R, 3, S, AHEAD>(x, ldx, k, w, ldw, c, ldc);
  if (m == 2) lanes_block<R, 2, 1, AHEAD>(x, ldx, k, w, ldw, c, ldc);
  if (m == 1) lanes_block<R, 1, 1, AHEAD>(x, ldx, k, w, ldw, c, ldc);
}

// Multiplies rows [0, m) of x with n rows of w. Short rows belong to small models, whose weights stay in the
// caches: for them sharing the loads of x pays; the order of memory and prefetching do not.
void lanes(const uint16_t* x, int64_t m, int64_t k, const uint16_t* w, int64_t ldw, int64_t n, float* c,
           int64_t ldc) {
  const int64_t ldx = padded(k);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    if (k < 512) lanes_rows<4, 2, false>(x, ldx, m, k, w + j * ldw, ldw, c + j, ldc);
    else lanes_rows<4, 1, true>(x, ldx, m, k, w + j * ldw, ldw, c + j, ldc);
  for (; j < n; j++) lanes_rows<1, 1, false>(x, ldx, m, k, w + j * ldw, ldw, c + j, ldc);
}

void run(const void* packed, int64_t m, int64_t k, const void* weights, int64_t ldw, int64_t n, float* c,
         int64_t ldc) {
  const int64_t first = whole(m), left = m - first;
  const uint16_t* w = (const uint16_t*)weights;
  const uint16_t* x = (const uint16_t*)((const char*)packed + interleaved_bytes(first, k));
  pairs((const uint16_t*)packed, first, k, w, ldw, n, c, ldc);
  lanes(x, left, k, w, ldw, n, c + first * ldc, ldc);
}

const Isa* before() { return isa_avx512_vnni() ? isa_avx512_vnni() : isa_avx512(); }

const QuantisedGemm& quantised_by(const Form& form) {
  const QuantisedGemm* e4m3 = form.code == E4M3 ? e4m3_bf16() : nullptr;
  return e4m3 ? *e4m3 : before()->quantised;
}

size_t quantised_bytes(const Form& form, int64_t m, int64_t k) { return quantised_by(form).packed_bytes(form, m, k); }

void quantised_pack(const Form& form, const Rows& x, int64_t m, int64_t k, void* packed) {
  quantised_by(form).pack(form, x, m, k, packed);
}

void quantised_run(const Form& form, const void* packed, int64_t m, int64_t k, const Codes& w, int64_t n, float* c,
                   int64_t ldc) {
  quantised_by(form).run(form, packed, m, k, w, n, c, ldc);
}

}  // namespace

const Isa* isa_avx512_bf16() {
  static Isa isa;
  const Isa* base = before();
  if (!base || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  isa = *base;
  isa.name = "AVX-512 bfloat16";
  isa.bf16 = {packed_bytes, pack, run};
  isa.quantised = {quantised_bytes, quantised_pack, quantised_run};
  return &isa;
}
}  // namespace jmoe
#else
namespace jmoe {
const Isa* isa_avx512_bf16() { return nullptr; }
}  // namespace jmoe
#endif
