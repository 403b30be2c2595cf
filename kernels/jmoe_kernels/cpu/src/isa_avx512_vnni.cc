// AVX-512 with VNNI (Cascade Lake, Zen 4 and later): products of quantised weights in whole numbers. Weights of
// eight-bit floats run as in plain AVX-512.
#include "isa.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "quantised/blocks.h"

namespace jmoe {
namespace {

struct Whole {
  typedef V Sum;
  static constexpr bool IS_TWICE = false;
  static INLINE V begin(const int32_t* init) { return init ? _mm512_set1_epi32(*init) : _mm512_setzero_si512(); }
  static INLINE V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static INLINE __m512 real(V sum) { return _mm512_cvtepi32_ps(sum); }
};

// The products are written as instructions, because GCC 12 copies the sums around its own functions for them, up
// to twice for each product (315 GFlop/s instead of 469 in a loop of twelve sums on a Zen 4 core).
//
// Products with int8 activations want unsigned weights.
struct A8 : Whole {
  static constexpr int AT = 1;
  static INLINE V dot(V sum, V w, V x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};
struct A16 : Whole {
  static constexpr int AT = 2;
  static INLINE V dot(V sum, V w, V x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
};

struct BytesA8 : A8 {
  static constexpr int K = 4, NV = 1, AHEAD = 4;
  static INLINE void load(const uint8_t* p, V, V (&v)[NV]) {
    v[0] = _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)128));
  }
};
struct BytesA16 : A16 {
  static constexpr int K = 4, NV = 2, AHEAD = 2;
  static INLINE void load(const uint8_t* p, V, V (&v)[NV]) {
    const V w = _mm512_loadu_si512(p);
    v[0] = _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), v[1] = _mm512_srai_epi16(w, 8);
  }
};
struct NibblesA8 : A8 {
  static constexpr int K = 8, NV = 2, AHEAD = 5;
  static INLINE void load(const uint8_t* p, V table, V (&v)[NV]) {
    const V w = _mm512_loadu_si512(p), low = _mm512_set1_epi8(15);
    v[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(w, low));
    v[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(w, 4), low));
  }
};
struct NibblesA16 : A16 {
  static constexpr int K = 8, NV = 4, AHEAD = 5;
  // The index of vpermw is the low five bits; the table has its sixteen numbers twice.
  static INLINE void load(const uint8_t* p, V table, V (&v)[NV]) {
    const V w = _mm512_loadu_si512(p);
    v[0] = _mm512_permutexvar_epi16(w, table), v[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), table);
    v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table);
    v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), table);
  }
};

// The numbers of a nibble as signed words, or as bytes with a zero point.
V table_of(const Form& form) {
  const __m128i numbers = numbers_of(form);
  if (!form.is_a8) return _mm512_broadcast_i64x4(_mm256_cvtepi8_epi16(numbers));
  return _mm512_broadcast_i32x4(_mm_add_epi8(numbers, _mm_set1_epi8((char)zero_point(form))));
}

size_t packed_bytes(const Form& form, int64_t m, int64_t k) {
  return form.code == E4M3 ? isa_avx512()->quantised.packed_bytes(form, m, k) : whole_bytes(form, m, k);
}

void pack(const Form& form, const Rows& x, int64_t m, int64_t k, void* packed) {
  form.code == E4M3 ? isa_avx512()->quantised.pack(form, x, m, k, packed) : whole_pack(form, x, m, k, packed);
}

void run(const Form& form, const void* packed, int64_t m, int64_t k, const Codes& w, int64_t n, float* c,
         int64_t ldc) {
  if (form.code == E4M3) return isa_avx512()->quantised.run(form, packed, m, k, w, n, c, ldc);
  const Numbers numbers = {table_of(form), form.code == E2M1 ? 0.5f : 1.f};
  if (has_nibbles(form) && form.is_a8) return run_form<NibblesA8>(form, numbers, packed, m, k, w, n, c, ldc);
  if (has_nibbles(form)) return run_form<NibblesA16>(form, numbers, packed, m, k, w, n, c, ldc);
  if (form.is_a8) return run_form<BytesA8>(form, numbers, packed, m, k, w, n, c, ldc);
  run_form<BytesA16>(form, numbers, packed, m, k, w, n, c, ldc);
}

}  // namespace

const Isa* isa_avx512_vnni() {
  static Isa isa;
  const Isa* base = isa_avx512();
  if (!base || !__builtin_cpu_supports("avx512vnni")) return nullptr;
  isa = *base;
  isa.name = "AVX-512 VNNI";
  isa.quantised = {packed_bytes, pack, run};
  return &isa;
}
}  // namespace jmoe
#else
namespace jmoe {
const Isa* isa_avx512_vnni() { return nullptr; }
}  // namespace jmoe
#endif
