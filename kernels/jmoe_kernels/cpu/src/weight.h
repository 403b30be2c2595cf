// A weight as the drivers multiply with it: its rows in the checkpoint's order, plain or quantised.
#pragma once
#include "parallel.h"

namespace jmoe {

class Weight {
 public:
  // rest: operands of a call from which a quantised weight takes its scales, and its lows if it has some; `next`
  // is the first of them. form: PLAIN, or as cpu/calls.py writes it.
  Weight(const xla::ffi::AnyBuffer& values, int64_t form, const xla::ffi::RemainingArgs& rest, size_t& next, int64_t k)
      : k_(k) {
    form_ = {(Code)(form & 15), (ScaleType)(form >> 4 & 15), (form >> 8 & 1) != 0, (form >> 9 & 1) != 0,
             (form >> 10 & 1) != 0, (form >> 11 & 1) != 0, form >> 16};
    codes_.values = values.untyped_data();
    if (!is_quantised()) {
      width_ = values.element_type() != xla::ffi::F32 ? 2 : 4;
      gemm_ = width_ == 2 ? &isa().bf16 : &isa().f32;
      return;
    }
    static const int SIZES[] = {4, 2, 2, 1};
    const int64_t groups = form_.group ? (k + form_.group - 1) / form_.group : 1;
    scale_bytes_ = groups * SIZES[form_.scales];
    codes_.scales = rest.get<xla::ffi::AnyBuffer>(next++)->untyped_data();
    if (form_.has_lows) codes_.lows = rest.get<xla::ffi::AnyBuffer>(next++)->untyped_data();
  }

  bool is_quantised() const { return form_.code != PLAIN; }
  int64_t columns() const { return k_; }

  // Bytes of a row, without scales.
  int64_t row_bytes() const {
    if (!is_quantised()) return k_ * width_;
    return form_.code >= INT4 ? k_ / 2 : k_;
  }

  size_t packed_bytes(int64_t m) const {
    return is_quantised() ? isa().quantised.packed_bytes(form_, m, k_) : gemm_->packed_bytes(m, k_);
  }

  // Packs all columns of m rows.
  void pack(const Rows& x, int64_t m, void* packed) const {
    if (is_quantised()) isa().quantised.pack(form_, x, m, k_, packed);
    else gemm_->pack(x, m, k_, 0, k_, packed);
  }

  // Packs columns [k0, k1), which only a plain weight can.
  void pack_columns(const Rows& x, int64_t m, int64_t k0, int64_t k1, void* packed) const {
    gemm_->pack(x, m, k_, k0, k1, packed);
  }

  // Multiplies m packed rows with rows [row, row + n) of the weight.
  void run(const void* packed, int64_t m, int64_t row, int64_t n, float* c, int64_t ldc) const {
    const char* values = (const char*)codes_.values + row * row_bytes();
    if (!is_quantised()) return gemm_->run(packed, m, k_, values, k_, n, c, ldc);
    const char* lows = codes_.lows ? (const char*)codes_.lows + row * scale_bytes_ : nullptr;
    isa().quantised.run(form_, packed, m, k_, {values, (const char*)codes_.scales + row * scale_bytes_, lows}, n, c, ldc);
  }

 private:
  Form form_;
  Codes codes_ = {nullptr, nullptr, nullptr};
  int64_t k_, width_ = 0, scale_bytes_ = 0;
  const Gemm* gemm_ = nullptr;
};

}  // namespace jmoe
