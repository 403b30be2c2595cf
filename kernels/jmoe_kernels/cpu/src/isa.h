// What an instruction set must offer, and which sets this binary carries.
//
// The drivers (grouped_mlp.cc, linear.cc, attention.cc) are written once against these tables. Every
// isa_*.cc is compiled with its own machine flags and must therefore use no inline library code: the linker
// could choose that copy for all files.
#pragma once
#include <cstddef>
#include <cstdint>

namespace jmoe {

// m rows of k numbers, bfloat16 or float32; row i starts at data + ld * (index ? index[i] : i).
struct Rows {
  const void* data;
  int64_t ld;
  bool bf16;
  const int32_t* index;
};

// y[m, n] = x[m, k] . w[n, k]^T with float32 accumulation; x is packed first, in a layout that the set chooses.
struct Gemm {
  size_t (*packed_bytes)(int64_t m, int64_t k);
  // Packs columns [k0, k1) of all m rows; k0 is a multiple of 32, and k1 too unless it is k.
  void (*pack)(const Rows& x, int64_t m, int64_t k, int64_t k0, int64_t k1, void* packed);
  // c[i * ldc + j] = packed row i of m . row j of n rows of w, which lie ldw apart.
  void (*run)(const void* packed, int64_t m, int64_t k, const void* w, int64_t ldw, int64_t n, float* c, int64_t ldc);
};

// How numbers lie in memory.
enum class Kept { F32, BF16, INT8, E4M3 };
enum Code : int8_t { PLAIN, INT8, E4M3, INT4, E2M1, IQ4 };
enum ScaleType : int8_t { FLOAT32, BFLOAT16, FLOAT16, E8M0 };

// How a quantised weight is stored (see quantised/form.h) and multiplied.
struct Form {
  Code code;
  ScaleType scales;
  bool has_lows, is_n16;
  bool is_a8;     // whether activations are rounded to int8, and not to int16 or not at all
  bool is_bf16;   // whether products with eight-bit floats are computed in bfloat16, as the model's others are
  int64_t group;  // numbers of a row that share a scale; 0 is the whole row
};

// Rows of a quantised weight, from some row on. In the layout "n16" that row is a multiple of 16.
struct Codes {
  const void *values, *scales, *lows;
};

// The product with a quantised weight, as in Gemm. x is packed in whole rows, because a row has one scale.
struct QuantisedGemm {
  size_t (*packed_bytes)(const Form& form, int64_t m, int64_t k);
  void (*pack)(const Form& form, const Rows& x, int64_t m, int64_t k, void* packed);
  void (*run)(const Form& form, const void* packed, int64_t m, int64_t k, const Codes& w, int64_t n, float* c,
              int64_t ldc);
};

struct Isa {
  const char* name;
  Gemm bf16, f32, int8, e4m3;  // by what w is
  // h = act(gate) * up over n numbers; activation as in grouped_mlp/cpu.py.
  void (*gated)(int activation, const float* gate, const float* up, int64_t n, float* h);
  // y += weight * x over n numbers
  void (*axpy)(float weight, const float* x, int64_t n, float* y);
  // Does a step of online softmax for one query: scores[n], with room up to the next multiple of 16, become
  // exp(score - running maximum); the running sum and weighted values acc[d] are rescaled to that maximum.
  void (*online)(float* scores, int64_t n, float* top, float* total, float* acc, int64_t d);
  // acc[q, d] += share[q, n] . v[n, d]; rows of share are lds apart; scratch holds n * d floats.
  void (*values)(const float* share, int64_t lds, int64_t queries, const void* v, Kept kept, int64_t n, float* acc,
                 int64_t d, float* scratch);
  QuantisedGemm quantised;
};

const Isa* isa_base();
const Isa* isa_avx2();         // null if the processor or the build lacks it, as below
const Isa* isa_avx512();
const Isa* isa_avx512_vnni();
const Isa* isa_avx512_bf16();
const Isa* isa_amx();
const QuantisedGemm* e4m3_bf16();  // for weights of that code only

}  // namespace jmoe
