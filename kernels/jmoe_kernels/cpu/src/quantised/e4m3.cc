// Products of weights of eight-bit floats (e4m3) on AVX-512 with bfloat16 and VBMI (Zen 4, Sapphire Rapids and
// later). A code is a bfloat16 exactly. An activation is the sum of two bfloat16 numbers; or it is one, if the
// model computes in bfloat16, or if activations are rounded to int8, whose steps are bfloat16 numbers too.
#include "../isa.h"
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include "blocks.h"

namespace jmoe {
namespace {

// The bfloat16 of every code without its sign. Denormal codes are normal in bfloat16, so a table is exact where
// shifted exponents are not.
struct Tables {
  alignas(64) uint8_t high[128], low[128];
};

constexpr Tables make_tables() {
  Tables t = {};
  for (int i = 0; i < 128; i++) {
    int exponent = i >> 3, mantissa = i & 7;
    if (exponent == 0 && mantissa) {  // mantissa * 2^-9
      exponent = 1;
      for (; mantissa < 8; mantissa *= 2) exponent--;
      mantissa &= 7;
    }
    const int brain = i == 0 ? 0 : i == 127 ? 0x7fc0 : (exponent + 120) << 7 | mantissa << 4;
    t.high[i] = brain >> 8, t.low[i] = brain & 255;
  }
  return t;
}

constexpr Tables TABLES = make_tables();

template <bool TWICE>
struct Brain {
  typedef __m512 Sum;
  static constexpr int K = 4, NV = 2, AT = 2, AHEAD = 2;
  static constexpr bool IS_TWICE = TWICE;
  static INLINE __m512 begin(const int32_t*) { return _mm512_setzero_ps(); }
  static INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static INLINE __m512 real(__m512 sum) { return sum; }
  static INLINE __m512 dot(__m512 sum, V w, V x) {  // an instruction for the reason in isa_avx512_vnni.cc
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

template <bool TWICE>
struct E4m3 : Brain<TWICE> {
  static INLINE void load(const uint8_t* p, V, V (&v)[2]) {
    const V w = _mm512_loadu_si512(p);
    const V low = _mm512_permutex2var_epi8(_mm512_load_si512(TABLES.low), w, _mm512_load_si512(TABLES.low + 64));
    V high = _mm512_permutex2var_epi8(_mm512_load_si512(TABLES.high), w, _mm512_load_si512(TABLES.high + 64));
    high = _mm512_ternarylogic_epi32(high, w, _mm512_set1_epi8((char)128), 0xf8);  // high | (w & sign)
    constexpr __mmask64 ODD = 0xaaaaaaaaaaaaaaaa;
    v[0] = _mm512_mask_blend_epi8(ODD, low, _mm512_slli_epi16(high, 8));
    v[1] = _mm512_mask_blend_epi8(ODD, _mm512_srli_epi16(low, 8), high);
  }
};

void run(const Form& form, const void* packed, int64_t m, int64_t k, const Codes& w, int64_t n, float* c,
         int64_t ldc) {
  const Numbers numbers = {_mm512_setzero_si512(), 1.f};
  if (!has_rest(form)) run_form<E4m3<false>>(form, numbers, packed, m, k, w, n, c, ldc);
  else run_form<E4m3<true>>(form, numbers, packed, m, k, w, n, c, ldc);
}

}  // namespace

const QuantisedGemm* e4m3_bf16() {
  static const QuantisedGemm gemm = {whole_bytes, whole_pack, run};
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? &gemm : nullptr;
}
}  // namespace jmoe
#else
namespace jmoe {
const QuantisedGemm* e4m3_bf16() { return nullptr; }
}  // namespace jmoe
#endif
