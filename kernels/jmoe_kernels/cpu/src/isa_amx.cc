// AMX bfloat16 and int8 tiles (Sapphire Rapids and later). In bfloat16, weights are the first operand, straight from
// memory in the checkpoint's layout, and x is interleaved in pairs as the second; quantised/amx.h has int8.
#include "isa.h"
#if defined(JMOE_EMULATE_AMX)
#include <immintrin.h>

#include "amx_emulated.inc"
#define HAVE_AMX 1
#elif defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAVE_AMX 1
#endif

#ifdef HAVE_AMX
#include "pairs.inc"

namespace jmoe {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

void configure_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace jmoe

#include "quantised/amx.h"

namespace jmoe {
namespace {

// Stores a tile of products, [16 weight rows][16 rows of x], to c[row of x][weight row].
inline void keep(const float* tile, int64_t rows, float* c, int64_t ldc) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile + i * 16);
  transpose16(r);
  for (int64_t i = 0; i < rows; i++) _mm512_storeu_si512(c + i * ldc, r[i]);
}

// Multiplies 32 weight rows with up to 32 rows of x.
inline void tile_block(const uint16_t* x, int64_t rows, int64_t k, const uint16_t* w, int64_t ldw, float* c,
                       int64_t ldc) {
  const uint16_t *x1 = x + 16 * k, *w1 = w + 16 * ldw;
  const bool two = rows > 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < k; i += 32) {
    _tile_loadd(4, w + i, ldw * 2);
    _tile_loadd(5, w1 + i, ldw * 2);
    _tile_loadd(6, x + i * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (two) {
      _tile_loadd(7, x1 + i * 16, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float out[4][256];
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  keep(out[0], rows < 16 ? rows : 16, c, ldc);
  keep(out[1], rows < 16 ? rows : 16, c + 16, ldc);
  if (!two) return;
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
  keep(out[2], rows - 16, c + 16 * ldc, ldc);
  keep(out[3], rows - 16, c + 16 * ldc + 16, ldc);
}

// Prefetches rows while 32 others are multiplied: tiles read sixteen rows at once, which defeats the
// processor's own prefetcher.
inline void prefetch(const uint16_t* w, int64_t numbers) {
  for (int64_t i = 0; i < numbers; i += 32) _mm_prefetch((const char*)(w + i), _MM_HINT_T1);
}

void run(const void* packed, int64_t m, int64_t k, const void* weights, int64_t ldw, int64_t n, float* c,
         int64_t ldc) {
  const uint16_t* x = (const uint16_t*)packed;
  const uint16_t* w = (const uint16_t*)weights;
  int64_t j = 0;
  if (k % 32 == 0 && n >= 32) {
    configure_tiles();
    for (; j + 32 <= n; j += 32) {
      if (j + 64 <= n) prefetch(w + (j + 32) * ldw, 32 * ldw);
      for (int64_t t = 0; t < m; t += 32)
        tile_block(x + t * k, m - t < 32 ? m - t : 32, k, w + j * ldw, ldw, c + t * ldc + j, ldc);
    }
    _tile_release();
  }
  if (j < n) pairs(x, m, k, w + j * ldw, ldw, n - j, c + j, ldc);
}

void pack(const Rows& x, int64_t m, int64_t k, int64_t k0, int64_t k1, void* packed) {
  interleave(x, m, k, k0, k1, (uint16_t*)packed);
}

bool permitted() {
#ifdef JMOE_EMULATE_AMX
  return true;
#else
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#endif
}

}  // namespace

const Isa* isa_amx() {
  static Isa isa;
  const Isa* base = isa_avx512_bf16();
  if (!base || !permitted()) return nullptr;
  isa = *base;
  isa.name = "AMX bfloat16";
  isa.bf16 = {interleaved_bytes, pack, run};
  isa.quantised = {tile_bytes, tile_pack, tile_run};
  return &isa;
}
}  // namespace jmoe
#else
namespace jmoe {
const Isa* isa_amx() { return nullptr; }
}  // namespace jmoe
#endif
