// y[M, N] = x[M, K] . w[N, K]^T in w's dtype, or with a quantised w, with float32 accumulation.
#include "parallel.h"
#include "weight.h"

namespace jmoe {
namespace ffi = xla::ffi;

namespace {

// Returns the rows of a weight that an item multiplies with all rows of x; they stay in the second-level cache.
// Blocks of quantised rows have sixteen.
int64_t stretch_of(const Weight& weight) {
  const int64_t unit = weight.is_quantised() ? 32 : 24;
  const int64_t stretch = (int64_t)(64 << 10) / weight.row_bytes() / unit * unit;
  return stretch < unit ? unit : stretch > 192 ? 192 : stretch;
}

}  // namespace

ffi::Error Linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs rest,
                  ffi::ResultBuffer<ffi::F32> y, int64_t form) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  const Rows rows = {x.untyped_data(), k, x.element_type() != ffi::F32, nullptr};
  float* out = y->typed_data();
  if (m == 0 || n == 0) return ffi::Error::Success();
  size_t next = 0;
  const Weight weight(w, form, rest, next, k);

  const int64_t stretch = stretch_of(weight);
  thread_local Scratch packed_memory;
  const int64_t strip = 64;  // rows of x packed together
  const int64_t strips = ceil_div(m, strip);
  const size_t strip_bytes = (weight.packed_bytes(m < strip ? m : strip) + 63) / 64 * 64;
  char* packed = packed_memory.get<char>(strips * strip_bytes);
  const auto rows_of = [=](int64_t s) { return s + 1 < strips ? strip : m - s * strip; };

  std::vector<Phase> phases;
  phases.push_back({strips, [=](int64_t s) {
                      Rows mine = rows;
                      mine.data = static_cast<const char*>(rows.data) + s * strip * k * (mine.bf16 ? 2 : 4);
                      weight.pack(mine, rows_of(s), packed + s * strip_bytes);
                    }});
  const int64_t stretches = ceil_div(n, stretch);
  phases.push_back({stretches, [=](int64_t i) {
                      const int64_t j = i * stretch, count = j + stretch < n ? stretch : n - j;
                      for (int64_t s = 0; s < strips; s++)
                        weight.run(packed + s * strip_bytes, rows_of(s), j, count, out + s * strip * n + j, n);
                    }});
  run_phases(pool, std::move(phases), (double)m * n * k / 32 + (double)n * weight.row_bytes() / 16);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeLinear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("form"));

}  // namespace jmoe
