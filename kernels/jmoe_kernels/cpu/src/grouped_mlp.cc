// The routed experts of a layer for tokens in expert order:
//   y[t] = sum over the token's rows n of weight[n] * (down_e(act(gate_e x_t) * up_e x_t)),
// where the rows n of expert e are start_e .. start_e + size_e - 1, and row n is assignment order[n], of token
// order[n] / K. Weights are [E, 2, F, D] and [E, D, F] as in the checkpoint; only experts with rows are read.
#include <cstring>

#include "parallel.h"
#include "weight.h"

namespace jmoe {
namespace ffi = xla::ffi;

namespace {

constexpr int64_t BLOCK = 64;  // rows of one expert that are multiplied with a stretch of weights together

struct Group {
  int64_t expert, start, rows;  // start: first row, in expert order
  size_t x_at, h_at;            // offsets in bytes into the packed rows and the packed inner activations
};

struct Layer {
  int64_t inner, model;
  Weight gate_up, down;
  const float *gate_up_bias, *down_bias;  // null if there are none
  int activation;
};

// The attributes of a call.
struct Call {
  int64_t activation, gate_up_form, down_form;
};

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Computes inner units [f, f + count) of a group: gate and up products and activation, packed for the down
// product. If down is quantised they are kept in h_rows[row][inner], because a row is packed as a whole.
void inner_units(const Layer& layer, const Group& group, int64_t f, int64_t count, const char* x, char* h,
                 float* h_rows) {
  thread_local Scratch memory;
  const int64_t rows = group.rows, full = rows < BLOCK ? rows : BLOCK;
  float* gate = memory.get<float>(3 * full * count);
  float *up = gate + full * count, *act = up + full * count;
  const int64_t gate_row = group.expert * 2 * layer.inner + f;
  const float* bias = layer.gate_up_bias ? layer.gate_up_bias + group.expert * 2 * layer.inner + f : nullptr;
  for (int64_t t = 0; t < rows; t += BLOCK) {
    const int64_t n = t + BLOCK < rows ? BLOCK : rows - t;
    // Each block is packed as rows of its own: x of block t lies after the earlier blocks.
    const size_t x_block = aligned(layer.gate_up.packed_bytes(full)) * (t / BLOCK);
    const size_t h_block = aligned(layer.down.packed_bytes(full)) * (t / BLOCK);
    layer.gate_up.run(x + group.x_at + x_block, n, gate_row, count, gate, count);
    layer.gate_up.run(x + group.x_at + x_block, n, gate_row + layer.inner, count, up, count);
    if (bias)
      for (int64_t i = 0; i < n; i++) {
        isa().axpy(1.f, bias, count, gate + i * count);
        isa().axpy(1.f, bias + layer.inner, count, up + i * count);
      }
    isa().gated(layer.activation, gate, up, n * count, act);
    if (layer.down.is_quantised()) {
      for (int64_t i = 0; i < n; i++)
        std::memcpy(h_rows + (group.start + t + i) * layer.inner + f, act + i * count, count * sizeof(float));
      continue;
    }
    // The packer sees columns [f, f + count) of a matrix that starts f columns earlier.
    const Rows out = {act - f, count, false, nullptr};
    layer.down.pack_columns(out, n, f, f + count, h + group.h_at + h_block);
  }
}

// Packs all rows of a group for a product with `weight`, block after block from `to` on. Row i is
// data[i * weight.columns()], or that of index[i].
void pack_group(const Weight& weight, const Group& group, Rows from, char* to) {
  const int64_t full = group.rows < BLOCK ? group.rows : BLOCK, k = weight.columns();
  const size_t block = aligned(weight.packed_bytes(full));
  for (int64_t t = 0; t < group.rows; t += BLOCK) {
    Rows rows = from;
    if (from.index) rows.index += t;
    else rows.data = (const char*)from.data + t * k * (from.bf16 ? 2 : 4);
    weight.pack(rows, t + BLOCK < group.rows ? BLOCK : group.rows - t, to + block * (t / BLOCK));
  }
}

// Computes output units [j, j + count) of a group's rows and stores them to y[row][model].
void output_units(const Layer& layer, const Group& group, int64_t j, int64_t count, const char* h, float* y) {
  const int64_t rows = group.rows, full = rows < BLOCK ? rows : BLOCK, d = layer.model;
  for (int64_t t = 0; t < rows; t += BLOCK) {
    const int64_t n = t + BLOCK < rows ? BLOCK : rows - t;
    const size_t h_block = aligned(layer.down.packed_bytes(full)) * (t / BLOCK);
    float* out = y + (group.start + t) * d + j;
    layer.down.run(h + group.h_at + h_block, n, group.expert * d + j, count, out, d);
    if (layer.down_bias)
      for (int64_t i = 0; i < n; i++) isa().axpy(1.f, layer.down_bias + group.expert * d + j, count, out + i * d);
  }
}

std::vector<Group> groups_of(const int32_t* sizes, int64_t experts, int64_t rows, const Layer& layer, size_t& x_bytes,
                             size_t& h_bytes) {
  std::vector<Group> groups;
  int64_t start = 0;
  x_bytes = h_bytes = 0;
  for (int64_t e = 0; e < experts; e++) {
    int64_t n = sizes[e] < 0 ? 0 : sizes[e];
    n = n < rows - start ? n : rows - start;  // sizes may claim more rows than exist: never go past the end
    if (n == 0) continue;
    groups.push_back({e, start, n, x_bytes, h_bytes});
    const int64_t blocks = ceil_div(n, BLOCK), full = n < BLOCK ? n : BLOCK;
    x_bytes += blocks * aligned(layer.gate_up.packed_bytes(full));
    h_bytes += blocks * aligned(layer.down.packed_bytes(full));
    start += n;
  }
  return groups;
}

// Returns the units of a stretch: as many as 64 KB of weights hold, in multiples of 96 (the products' row blocks
// are 32 and 12), or 32 if that is less than 96. At most 384, so that two threads find work even if one expert is
// active.
int64_t stretch_of(int64_t units, int64_t row_bytes) {
  int64_t stretch = (64 << 10) / row_bytes / 96 * 96;
  if (stretch < 96) stretch = 32;
  if (stretch > 384) stretch = 384;
  return stretch < units ? stretch : units;
}

}  // namespace

// order [N], weights [T, K]: for the combined form. If they are null, row n is x[n] and its output is y[n].
// rest: scales and lows of gate and up, then of down, if their forms say that they are quantised.
ffi::Error grouped(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up, ffi::AnyBuffer down,
                   const float* gate_up_bias, const float* down_bias, const int32_t* sizes, const Call& call,
                   const ffi::RemainingArgs& rest, const int32_t* order, const float* weights, int64_t choices,
                   float* y) {
  const int64_t tokens = x.dimensions()[0], model = x.dimensions()[1], experts = gate_up.dimensions()[0];
  const int64_t inner = gate_up.dimensions()[2], rows = order ? tokens * choices : tokens;
  const bool x_bf16 = x.element_type() != ffi::F32;
  size_t next = 0;
  const Weight gate_up_w(gate_up, call.gate_up_form, rest, next, model), down_w(down, call.down_form, rest, next, inner);
  const Layer layer = {inner, model, gate_up_w, down_w, gate_up_bias, down_bias, (int)call.activation};
  size_t x_bytes, h_bytes;
  auto groups = std::make_shared<std::vector<Group>>(groups_of(sizes, experts, rows, layer, x_bytes, h_bytes));
  const int64_t used = groups->empty() ? 0 : groups->back().start + groups->back().rows;

  thread_local Scratch x_memory, h_memory, h_row_memory, y_memory, token_memory;
  char *xp = x_memory.get<char>(x_bytes), *hp = h_memory.get<char>(h_bytes);
  float* h_rows = down_w.is_quantised() ? h_row_memory.get<float>(used * inner) : nullptr;
  float* rows_y = order ? y_memory.get<float>(used * model) : y;
  int32_t* token_of = nullptr;
  if (order) {
    token_of = token_memory.get<int32_t>(used);
    for (int64_t n = 0; n < used; n++) token_of[n] = order[n] / (int32_t)choices;
  }
  const char* x_data = (const char*)x.untyped_data();

  const int64_t f_stretch = stretch_of(inner, 2 * layer.gate_up.row_bytes());
  const int64_t d_stretch = stretch_of(model, layer.down.row_bytes());
  const int64_t f_items = ceil_div(inner, f_stretch), d_items = ceil_div(model, d_stretch);
  const int64_t active = groups->size();
  std::vector<Phase> phases;
  phases.push_back({active, [=](int64_t g) {
                      const Group& group = (*groups)[g];
                      Rows from = {x_data, model, x_bf16, order ? token_of + group.start : nullptr};
                      if (!order) from.data = x_data + group.start * model * (x_bf16 ? 2 : 4);
                      pack_group(layer.gate_up, group, from, xp + group.x_at);
                    }});
  phases.push_back({active * f_items, [=](int64_t i) {
                      const int64_t f = i % f_items * f_stretch;
                      const int64_t count = f + f_stretch < inner ? f_stretch : inner - f;
                      inner_units(layer, (*groups)[i / f_items], f, count, xp, hp, h_rows);
                    }});
  if (down_w.is_quantised())
    phases.push_back({active, [=](int64_t g) {
                        const Group& group = (*groups)[g];
                        pack_group(layer.down, group, {h_rows + group.start * inner, inner, false, nullptr}, hp + group.h_at);
                      }});
  phases.push_back({active * d_items, [=](int64_t i) {
                      const int64_t j = i % d_items * d_stretch;
                      const int64_t count = j + d_stretch < model ? d_stretch : model - j;
                      output_units(layer, (*groups)[i / d_items], j, count, hp, rows_y);
                    }});
  const double per_row = 3.0 * inner * model, bytes = 2.0 * inner * gate_up_w.row_bytes() + model * down_w.row_bytes();
  run_phases(pool, std::move(phases), used * per_row / 32 + active * bytes / 16);

  if (!order) {
    std::memset(y + used * model, 0, (rows - used) * model * sizeof(float));
    return ffi::Error::Success();
  }
  std::memset(y, 0, tokens * model * sizeof(float));
  for (int64_t n = 0; n < used; n++) isa().axpy(weights[order[n]], rows_y + n * model, model, y + token_of[n] * model);
  return ffi::Error::Success();
}

namespace {
const float* bias_of(const ffi::Buffer<ffi::F32>& bias) { return bias.element_count() ? bias.typed_data() : nullptr; }
}  // namespace

ffi::Error GroupedMlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up, ffi::AnyBuffer down,
                      ffi::Buffer<ffi::F32> gate_up_bias, ffi::Buffer<ffi::F32> down_bias, ffi::Buffer<ffi::S32> sizes,
                      ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> y, int64_t activation, int64_t gate_up_form,
                      int64_t down_form) {
  return grouped(pool, x, gate_up, down, bias_of(gate_up_bias), bias_of(down_bias), sizes.typed_data(),
                 {activation, gate_up_form, down_form}, rest, nullptr, nullptr, 1, y->typed_data());
}

ffi::Error CombinedMlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up, ffi::AnyBuffer down,
                       ffi::Buffer<ffi::F32> gate_up_bias, ffi::Buffer<ffi::F32> down_bias,
                       ffi::Buffer<ffi::S32> sizes, ffi::Buffer<ffi::S32> order, ffi::Buffer<ffi::F32> weights,
                       ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> y, int64_t activation, int64_t gate_up_form,
                       int64_t down_form) {
  return grouped(pool, x, gate_up, down, bias_of(gate_up_bias), bias_of(down_bias), sizes.typed_data(),
                 {activation, gate_up_form, down_form}, rest, order.typed_data(), weights.typed_data(),
                 weights.dimensions()[1], y->typed_data());
}

// The arguments of both: x, gate_up, down, their biases, group sizes.
static auto bind_rows_and_weights() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>();
}

template <class Binding>
static auto bind_rest(Binding binding) {
  return std::move(binding).RemainingArgs()
      .template Ret<ffi::Buffer<ffi::F32>>()
      .template Attr<int64_t>("activation")
      .template Attr<int64_t>("gate_up_form")
      .template Attr<int64_t>("down_form");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeGroupedMlp, GroupedMlp, bind_rest(bind_rows_and_weights()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeCombinedMlp, CombinedMlp,
                              bind_rest(bind_rows_and_weights()
                                            .Arg<ffi::Buffer<ffi::S32>>()
                                            .Arg<ffi::Buffer<ffi::F32>>()));

}  // namespace jmoe
