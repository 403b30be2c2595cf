// y[M, N] = x[M, K] . w[N, K]^T in w's dtype with float32 accumulation.
#include "parallel.h"

namespace jmoe {
namespace ffi = xla::ffi;

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  const bool bf16 = w.element_type() != ffi::F32;
  const Gemm& gemm = bf16 ? isa().bf16 : isa().f32;
  const Rows rows = {x.untyped_data(), k, x.element_type() != ffi::F32, nullptr};
  const char* weights = static_cast<const char*>(w.untyped_data());
  float* out = y->typed_data();
  if (m == 0 || n == 0) return ffi::Error::Success();

  // An item multiplies a stretch of weight rows with all rows of x; the stretch stays in the second-level cache.
  const int64_t width = bf16 ? 2 : 4;
  int64_t stretch = (int64_t)(64 << 10) / (k * width) / 24 * 24;
  stretch = stretch < 24 ? 24 : stretch > 192 ? 192 : stretch;
  thread_local Scratch packed_memory;
  const int64_t strip = 64;  // rows of x packed together
  const int64_t strips = ceil_div(m, strip);
  const size_t strip_bytes = (gemm.packed_bytes(m < strip ? m : strip, k) + 63) / 64 * 64;
  char* packed = packed_memory.get<char>(strips * strip_bytes);
  const auto rows_of = [=](int64_t s) { return s + 1 < strips ? strip : m - s * strip; };

  std::vector<Phase> phases;
  phases.push_back({strips, [=, &gemm](int64_t s) {
                      Rows mine = rows;
                      const int64_t size = mine.bf16 ? 2 : 4;
                      mine.data = static_cast<const char*>(rows.data) + s * strip * k * size;
                      gemm.pack(mine, rows_of(s), k, 0, k, packed + s * strip_bytes);
                    }});
  const int64_t stretches = ceil_div(n, stretch);
  phases.push_back({stretches, [=, &gemm](int64_t i) {
                      const int64_t j = i * stretch, count = j + stretch < n ? stretch : n - j;
                      for (int64_t s = 0; s < strips; s++)
                        gemm.run(packed + s * strip_bytes, rows_of(s), k, weights + j * k * width, k,
                                 count, out + s * strip * n + j, n);
                    }});
  run_phases(pool, std::move(phases), (double)m * n * k / 32 + (double)n * k * width / 16);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace jmoe
