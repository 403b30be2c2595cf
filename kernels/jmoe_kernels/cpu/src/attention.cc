// Attention over paged keys and values: a query attends to the keys at its own position and before it, within
// the window or chunk if there is one. Pages are [P, H, S, d]; position p of sequence b lies in row p % S of
// page table[b, p / S]. Latent pages are keys and values at once: both pointers are the same.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "parallel.h"

namespace jmoe {
namespace ffi = xla::ffi;

namespace {

constexpr float NEVER = -1e30f;

struct Problem {
  int64_t sequences, tokens, heads, d;       // q: [B, T, heads, d]
  int64_t pages, kv_heads, page, table_len;  // pages: [P, kv_heads, page, d]
  const float* q;
  const char *k, *v;
  const int32_t *positions, *table;
  bool bf16;
  int64_t window, chunk;  // 0: none
  const float* sinks;     // for each query head a score that has no value; or null
  float* out;

  // Returns the first position that a query at `position` sees; it may be below 0 for a window.
  int64_t first(int64_t position) const {
    if (window) return position - window + 1;
    return chunk ? position / chunk * chunk : 0;
  }
};

constexpr int64_t QUERIES = 64;  // that are multiplied with a page together: tokens of a sequence, heads of a KV head
constexpr int64_t LANES = 16;    // queries that every set packs together: fewer would not be faster

// Tokens [t0, t1) of sequence b, query heads [h0, h1), which share KV head g.
struct Item {
  int64_t b, g, t0, t1, h0, h1;
};

// Scratch of one item, in the order of its parts. clean: a page's values with 0 for what is not finite.
struct State {
  float *q, *acc, *top, *total, *scores, *scratch, *clean;
  char* packed;
  State(const Problem& p, const Gemm& gemm, int64_t queries) {
    thread_local Scratch floats, bytes;
    const int64_t d = p.d, lanes = (p.page + 15) / 16 * 16;
    q = floats.get<float>(2 * queries * d + 2 * queries + queries * lanes + 2 * p.page * d);
    acc = q + queries * d, top = acc + queries * d, total = top + queries;
    scores = total + queries, scratch = scores + queries * lanes, clean = scratch + p.page * d;
    packed = bytes.get<char>(gemm.packed_bytes(queries, d));
  }
};

// Sets the scores of a page's keys outside [from, limit) to NEVER.
void hide(float* scores, int64_t from, int64_t limit, int64_t keys) {
  for (int64_t s = 0; s < from && s < keys; s++) scores[s] = NEVER;
  for (int64_t s = limit < 0 ? 0 : limit; s < keys; s++) scores[s] = NEVER;
}

// Prefetches a page's keys and values: pages lie anywhere, so the processor cannot guess.
void ask_for(const Problem& p, int64_t page, int64_t g) {
  if (page < 0 || page >= p.pages) return;
  const int64_t bytes = p.page * p.d * (p.bf16 ? 2 : 4), at = (page * p.kv_heads + g) * bytes;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p.k + at + i);
    if (p.v != p.k) __builtin_prefetch(p.v + at + i);
  }
}

bool all_finite(const float* numbers, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most < 0x7f800000u;
}

// Copies `keys` rows of d values to `to`, with 0 for each number that is not finite; its row is then `broken`.
template <typename Bits>
void clean_rows(const char* from, Bits inf, int64_t keys, int64_t d, char* to, bool* broken) {
  for (int64_t s = 0; s < keys; s++) {
    broken[s] = false;
    for (int64_t e = s * d; e < (s + 1) * d; e++) {
      Bits bits;
      std::memcpy(&bits, from + e * sizeof bits, sizeof bits);
      if ((bits & inf) == inf) bits = 0, broken[s] = true;
      std::memcpy(to + e * sizeof bits, &bits, sizeof bits);
    }
  }
}

// careful: no query is multiplied with a value that it does not see. A weight of 0 does not prevent harm: 0 times
// NaN is NaN. That costs a copy of every page, so an item runs this way only if its first result is not finite.
void attend_item(const Problem& p, const Item& item, bool careful = false) {
  const auto [b, g, t0, t1, h0, h1] = item;
  const int64_t share = h1 - h0, queries = (t1 - t0) * share, d = p.d;
  const int64_t lanes = (p.page + 15) / 16 * 16, width = p.bf16 ? 2 : 4;
  const Gemm& gemm = p.bf16 ? isa().bf16 : isa().f32;
  State state(p, gemm, queries);
  const float scale = 1.f / std::sqrt((float)d);
  const int32_t* positions = p.positions + b * p.tokens;
  int64_t last = -1, first = std::numeric_limits<int32_t>::max();
  for (int64_t t = t0; t < t1; t++) {
    last = positions[t] > last ? positions[t] : last;
    if (positions[t] >= 0 && positions[t] < first) first = positions[t];
    for (int64_t h = 0; h < share; h++) {
      const int64_t i = (t - t0) * share + h;
      const float* from = p.q + ((b * p.tokens + t) * p.heads + h0 + h) * d;
      for (int64_t e = 0; e < d; e++) state.q[i * d + e] = from[e] * scale, state.acc[i * d + e] = 0.f;
      state.top[i] = p.sinks ? p.sinks[h0 + h] : NEVER, state.total[i] = p.sinks ? 1.f : 0.f;
    }
  }
  std::vector<char> tainted(careful ? queries : 0);
  const auto broken = std::make_unique<bool[]>(careful ? p.page : 0);
  gemm.pack({state.q, d, false, nullptr}, queries, d, 0, d, state.packed);
  const int64_t first_key = p.first(first);
  for (int64_t j = first_key > 0 ? first_key / p.page : 0; last >= 0 && j <= last / p.page && j < p.table_len; j++) {
    const int64_t page = p.table[b * p.table_len + j], base = j * p.page;
    if (page < 0 || page >= p.pages) continue;
    const int64_t keys = last + 1 - base < p.page ? last + 1 - base : p.page;
    const int64_t at = (page * p.kv_heads + g) * p.page * d * width;
    if (j < last / p.page && j + 1 < p.table_len) ask_for(p, p.table[b * p.table_len + j + 1], g);
    gemm.run(state.packed, queries, d, p.k + at, d, keys, state.scores, lanes);
    const char* values = p.v + at;
    if (careful) {
      p.bf16 ? clean_rows<uint16_t>(values, 0x7f80u, keys, d, (char*)state.clean, broken.get())
             : clean_rows<uint32_t>(values, 0x7f800000u, keys, d, (char*)state.clean, broken.get());
      values = (char*)state.clean;
    }
    for (int64_t i = 0; i < queries; i++) {
      const int64_t position = positions[t0 + i / share];
      float* scores = state.scores + i * lanes;
      const int64_t from = p.first(position) - base;
      if (position < base || from >= keys) {
        for (int64_t s = 0; s < keys; s++) scores[s] = 0.f;  // nothing visible: no share of any value
        continue;
      }
      hide(scores, from, position + 1 - base, keys);
      for (int64_t s = from > 0 ? from : 0; careful && s < keys && s <= position - base; s++) {
        if (broken[s]) tainted[i] = 1;
      }
      isa().online(scores, keys, state.top + i, state.total + i, state.acc + i * d, d);
    }
    isa().values(state.scores, lanes, queries, values, p.bf16, keys, state.acc, d, state.scratch);
  }
  if (!careful && !all_finite(state.acc, queries * d)) return attend_item(p, item, true);
  for (int64_t i = 0; i < queries; i++) {
    float* to = p.out + ((b * p.tokens + t0 + i / share) * p.heads + h0 + i % share) * d;
    const float total = state.total[i], norm = total == 0.f ? 0.f : 1.f / total;
    for (int64_t e = 0; e < d; e++) to[e] = state.acc[i * d + e] * norm;
    if (careful && tainted[i]) std::fill(to, to + d, std::numeric_limits<float>::quiet_NaN());
  }
}

// Copies a row of d numbers to a page's row, in the pages' dtype.
void keep_row(const float* from, int64_t d, bool bf16, char* to) {
  if (!bf16) {
    std::memcpy(to, from, d * sizeof(float));
    return;
  }
  uint16_t* out = (uint16_t*)to;
  for (int64_t e = 0; e < d; e++) out[e] = narrow(from[e]);
}

// Rows [B, T, H, d] and the pages to which they are written.
struct Kept {
  const float* rows;
  char* pages;
};

// Writes the rows of every `kept` into its pages at their positions; position -1 writes nothing.
template <size_t N>
void write_rows(ffi::ThreadPool& pool, const Kept (&kept)[N], const ffi::Buffer<ffi::F32>& like,
                const ffi::Buffer<ffi::S32>& positions, const ffi::Buffer<ffi::S32>& table,
                const ffi::AnyBuffer& to) {
  const auto pd = to.dimensions(), kd = like.dimensions();
  const int64_t pages = pd[0], heads = pd[1], page = pd[2], d = pd[3], tokens = kd[1];
  const int64_t table_len = table.dimensions()[1];
  const bool bf16 = to.element_type() != ffi::F32;
  const int64_t row_bytes = d * (bf16 ? 2 : 4);
  const int32_t *at = positions.typed_data(), *pages_of = table.typed_data();
  std::array<Kept, N> all;
  std::copy(kept, kept + N, all.begin());
  const auto write = [=](int64_t i) {
    const int64_t slot = at[i] / page;
    if (at[i] < 0 || slot >= table_len) return;
    const int64_t id = pages_of[i / tokens * table_len + slot];
    if (id < 0 || id >= pages) return;
    for (int64_t h = 0; h < heads; h++) {
      const int64_t into = ((id * heads + h) * page + at[i] % page) * row_bytes;
      for (const Kept& one : all) keep_row(one.rows + (i * heads + h) * d, d, bf16, one.pages + into);
    }
  };
  const int64_t rows = kd[0] * tokens, strip = 64;
  run_phases(pool, {{ceil_div(rows, strip), [=](int64_t s) {
                       for (int64_t i = s * strip; i < rows && i < (s + 1) * strip; i++) write(i);
                     }}},
             (double)rows * heads * d);
}

}  // namespace

// WritePages and WriteLatent write in place: their results are their first arguments.
ffi::Error WritePages(ffi::ThreadPool pool, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::F32> k,
                      ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> table,
                      ffi::Result<ffi::AnyBuffer> k_pages, ffi::Result<ffi::AnyBuffer> v_pages) {
  const Kept kept[] = {{k.typed_data(), (char*)k_pages->untyped_data()},
                       {v.typed_data(), (char*)v_pages->untyped_data()}};
  write_rows(pool, kept, k, positions, table, *k_pages);
  return ffi::Error::Success();
}

ffi::Error WriteLatent(ffi::ThreadPool pool, ffi::AnyBuffer, ffi::Buffer<ffi::F32> rows,
                       ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> table,
                       ffi::Result<ffi::AnyBuffer> pages) {
  const Kept kept[] = {{rows.typed_data(), (char*)pages->untyped_data()}};
  write_rows(pool, kept, rows, positions, table, *pages);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeWritePages, WritePages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeWriteLatent, WriteLatent,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::F32> sinks,
                  ffi::ResultBuffer<ffi::F32> out, int64_t window, int64_t chunk) {
  const auto qd = q.dimensions(), kd = k.dimensions();
  const Problem p = {qd[0], qd[1], qd[2], qd[3], kd[0], kd[1], kd[2], table.dimensions()[1], q.typed_data(),
                     (const char*)k.untyped_data(), (const char*)v.untyped_data(), positions.typed_data(),
                     table.typed_data(), k.element_type() != ffi::F32, window, chunk,
                     sinks.element_count() ? sinks.typed_data() : nullptr, out->typed_data()};
  const int64_t share = p.heads / p.kv_heads, together = QUERIES / share > 0 ? QUERIES / share : 1;  // tokens
  const int64_t blocks = ceil_div(p.tokens, together);
  // Heads that share their keys are split if they are too many, or if there are too few items for all threads.
  int64_t parts = ceil_div(share, QUERIES), items = blocks * p.sequences * p.kv_heads;
  while (items * parts < pool.num_threads() && share / (2 * parts) >= LANES) parts *= 2;
  double keys = 0;
  for (int64_t i = 0; i < p.sequences * p.tokens; i++) {
    const int64_t position = p.positions[i], first = p.first(position);
    if (position >= 0) keys += position + 1 - (first > 0 ? first : 0);
  }
  std::vector<Phase> phases;
  // The longest contexts come first: the last tokens of a run see the most keys.
  phases.push_back({items * parts, [=](int64_t i) {
                      const int64_t part = i % parts, g = i / parts % p.kv_heads;
                      const int64_t b = i / (parts * p.kv_heads) % p.sequences;
                      const int64_t t0 = (blocks - 1 - i / (parts * p.kv_heads * p.sequences)) * together;
                      const int64_t t1 = t0 + together < p.tokens ? t0 + together : p.tokens, h = g * share;
                      attend_item(p, {b, g, t0, t1, h + share * part / parts, h + share * (part + 1) / parts});
                    }});
  run_phases(pool, std::move(phases), keys * p.heads * p.d / 8);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk"));

}  // namespace jmoe
