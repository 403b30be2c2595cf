// Rotary embedding, half-rotation form, of queries or keys, after the RMS norm that some families put there.
// A scale of d numbers means a norm over each head, one of H * d numbers a norm over all heads of a token.
#include <cmath>

#include "parallel.h"

namespace jmoe {
namespace ffi = xla::ffi;

namespace {

// Returns the factor that gives n numbers a root mean square of 1.
float unit(const float* x, int64_t n, float eps) {
  float part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) part[j] += x[i + j] * x[i + j];
  for (; i < n; i++) part[0] += x[i] * x[i];
  float sum = 0.f;
  for (float p : part) sum += p;
  return 1.f / std::sqrt(sum / n + eps);
}

// Rotates one head: y = rotated(x * norm * scale); scale may be null.
void rotate_head(const float* x, float norm, const float* scale, const float* cos, const float* sin, int64_t half,
                 float* y) {
  for (int64_t i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    if (scale) a *= norm * scale[i], b *= norm * scale[half + i];
    y[i] = a * cos[i] - b * sin[i];
    y[half + i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace

ffi::Error Rotate(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                  ffi::Buffer<ffi::F32> scale, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const auto dims = x.dimensions();
  const int64_t tokens = dims[0] * dims[1], heads = dims[2], d = dims[3], scales = scale.element_count();
  const float *from = x.typed_data(), *cos_data = cos.typed_data(), *sin_data = sin.typed_data();
  const float* scale_data = scales ? scale.typed_data() : nullptr;
  float* to = y->typed_data();
  const bool whole = scales > d;  // one norm over all heads
  const auto token = [=](int64_t t) {
    const float norm = whole ? unit(from + t * heads * d, heads * d, eps) : 1.f;
    for (int64_t h = 0; h < heads; h++) {
      const float* head = from + (t * heads + h) * d;
      const float head_norm = whole || !scale_data ? norm : unit(head, d, eps);
      rotate_head(head, head_norm, scale_data && whole ? scale_data + h * d : scale_data, cos_data + t * (d / 2),
                  sin_data + t * (d / 2), d / 2, to + (t * heads + h) * d);
    }
  };
  const int64_t strip = 32;
  run_phases(pool, {{ceil_div(tokens, strip), [=](int64_t s) {
                       for (int64_t t = s * strip; t < tokens && t < (s + 1) * strip; t++) token(t);
                     }}},
             (double)tokens * heads * d);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeRotate, Rotate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps"));

}  // namespace jmoe
