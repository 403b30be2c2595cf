// Attention over paged keys and values: a query attends to the keys at its own position and before it, within
// the window or chunk if there is one. Pages are [P, H, S, d]; position p of sequence b lies in row p % S of
// page table[b, p / S]. Latent pages are keys and values at once: both pointers are the same. Pages of one byte a
// number have a float32 scale for each row, [P, H, S], with which scores and shares are multiplied.
#include <algorithm>
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

Kept kept_as(const ffi::AnyBuffer& pages) {
  switch (pages.element_type()) {
    case ffi::F32: return Kept::F32;
    case ffi::S8: return Kept::INT8;
    case ffi::U8:
    case ffi::F8E4M3FN: return Kept::E4M3;
    default: return Kept::BF16;
  }
}

int64_t bytes_of(Kept kept) { return kept == Kept::F32 ? 4 : kept == Kept::BF16 ? 2 : 1; }
bool has_scales(Kept kept) { return kept == Kept::INT8 || kept == Kept::E4M3; }

struct Problem {
  int64_t sequences, tokens, heads, d;       // q: [B, T, heads, d]
  int64_t pages, kv_heads, page, table_len;  // pages: [P, kv_heads, page, d]
  const float* q;
  const char *k, *v;
  const float *k_scales, *v_scales;  // [P, kv_heads, page]; used if the pages have scales
  const int32_t *positions, *table;
  Kept kept;
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

const Gemm& gemm_of(Kept kept) {
  const Isa& set = isa();
  return kept == Kept::F32 ? set.f32 : kept == Kept::BF16 ? set.bf16 : kept == Kept::INT8 ? set.int8 : set.e4m3;
}

// Scratch of one item, in the order of its parts. clean: a page's values, or their scales, with 0 for what is not
// finite.
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
  const int64_t bytes = p.page * p.d * bytes_of(p.kept), at = (page * p.kv_heads + g) * bytes;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p.k + at + i);
    if (p.v != p.k) __builtin_prefetch(p.v + at + i);
  }
}

// Returns the bits of the largest magnitude; they are INF or more if a number is not finite.
constexpr uint32_t INF = 0x7f800000u;
uint32_t largest_bits(const float* numbers, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
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
  const int64_t lanes = (p.page + 15) / 16 * 16, width = bytes_of(p.kept);
  const bool scaled = has_scales(p.kept);
  const Gemm& gemm = gemm_of(p.kept);
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
    const int64_t row = (page * p.kv_heads + g) * p.page, at = row * d * width;
    if (j < last / p.page && j + 1 < p.table_len) ask_for(p, p.table[b * p.table_len + j + 1], g);
    gemm.run(state.packed, queries, d, p.k + at, d, keys, state.scores, lanes);
    const char* values = p.v + at;
    const float* scales = p.v_scales + row;
    if (careful && scaled) {
      clean_rows<uint32_t>((const char*)scales, INF, keys, 1, (char*)state.clean, broken.get());
      scales = state.clean;
    } else if (careful) {
      p.kept == Kept::BF16 ? clean_rows<uint16_t>(values, 0x7f80u, keys, d, (char*)state.clean, broken.get())
                           : clean_rows<uint32_t>(values, INF, keys, d, (char*)state.clean, broken.get());
      values = (char*)state.clean;
    }
    for (int64_t i = 0; i < queries; i++) {
      const int64_t position = positions[t0 + i / share];
      float* scores = state.scores + i * lanes;
      for (int64_t s = 0; scaled && s < keys; s++) scores[s] *= p.k_scales[row + s];
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
      for (int64_t s = 0; scaled && s < keys; s++) scores[s] *= scales[s];
    }
    isa().values(state.scores, lanes, queries, values, p.kept, keys, state.acc, d, state.scratch);
  }
  if (!careful && largest_bits(state.acc, queries * d) >= INF) return attend_item(p, item, true);
  for (int64_t i = 0; i < queries; i++) {
    float* to = p.out + ((b * p.tokens + t0 + i / share) * p.heads + h0 + i % share) * d;
    const float total = state.total[i], norm = total == 0.f ? 0.f : 1.f / total;
    for (int64_t e = 0; e < d; e++) to[e] = state.acc[i * d + e] * norm;
    if (careful && tainted[i]) std::fill(to, to + d, std::numeric_limits<float>::quiet_NaN());
  }
}

// Returns the code of the e4m3 number nearest to x, which is at most 448.
uint8_t narrow_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint8_t sign = bits >> 24 & 0x80;
  const float magnitude = std::fabs(x);
  if (magnitude < 0x1p-6f) return sign | (uint8_t)std::nearbyint(magnitude * 0x1p9f);
  bits &= 0x7fffffffu;
  return sign | (uint8_t)(((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
}

// Writes codes of d numbers and their scale, which brings the largest magnitude to the largest code. A number that
// is not finite makes the scale so.
void keep_codes(const float* from, int64_t d, bool e4m3, uint8_t* to, float* scale) {
  constexpr float SMALLEST = 1e-30f;  // up to which codes are 0: the scale's inverse is not finite
  const float largest = e4m3 ? 448.f : 127.f;
  const uint32_t bits = largest_bits(from, d);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  *scale = most * (1.f / largest);
  const bool usual = most > SMALLEST && bits < INF;
  for (int64_t e = 0; e < d; e++) {
    const float scaled = usual ? from[e] * (largest / most) : 0.f;
    to[e] = e4m3 ? narrow_e4m3(scaled) : (uint8_t)(int8_t)std::nearbyint(scaled);
  }
}

// Copies a row of d numbers to a page's row, as the pages keep them.
void keep_row(const float* from, int64_t d, Kept kept, char* to, float* scale) {
  if (kept == Kept::F32) {
    std::memcpy(to, from, d * sizeof(float));
  } else if (kept == Kept::BF16) {
    for (int64_t e = 0; e < d; e++) ((uint16_t*)to)[e] = narrow(from[e]);
  } else {
    keep_codes(from, d, kept == Kept::E4M3, (uint8_t*)to, scale);
  }
}

// Rows [B, T, H, d] and the pages to which they are written, with their scales if they have any.
struct Written {
  const float* rows;
  char* pages;
  float* scales;
};

// Writes the rows of every array into its pages at their positions; position -1 writes nothing.
void write_rows(ffi::ThreadPool& pool, const std::vector<Written>& all, const ffi::AnyBuffer& like,
                const ffi::Buffer<ffi::S32>& positions, const ffi::Buffer<ffi::S32>& table,
                const ffi::AnyBuffer& to) {
  const auto pd = to.dimensions(), kd = like.dimensions();
  const int64_t pages = pd[0], heads = pd[1], page = pd[2], d = pd[3], tokens = kd[1];
  const int64_t table_len = table.dimensions()[1];
  const Kept kept = kept_as(to);
  const int64_t row_bytes = d * bytes_of(kept);
  const int32_t *at = positions.typed_data(), *pages_of = table.typed_data();
  const auto write = [=](int64_t i) {
    const int64_t slot = at[i] / page;
    if (at[i] < 0 || slot >= table_len) return;
    const int64_t id = pages_of[i / tokens * table_len + slot];
    if (id < 0 || id >= pages) return;
    for (int64_t h = 0; h < heads; h++) {
      const int64_t into = (id * heads + h) * page + at[i] % page;
      for (const Written& one : all)
        keep_row(one.rows + (i * heads + h) * d, d, kept, one.pages + into * row_bytes,
                 one.scales ? one.scales + into : nullptr);
    }
  };
  const int64_t rows = kd[0] * tokens, strip = 64;
  run_phases(pool, {{ceil_div(rows, strip), [=](int64_t s) {
                       for (int64_t i = s * strip; i < rows && i < (s + 1) * strip; i++) write(i);
                     }}},
             (double)rows * heads * d);
}

}  // namespace

// The remaining arguments are the new rows of every array of pages, then these arrays, then their scales if they
// have any. The results are the last two, which are written in place.
ffi::Error WritePages(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> table,
                      ffi::RemainingArgs args, ffi::RemainingRets written) {
  const size_t arrays = args.size() - written.size();
  std::vector<Written> all;
  for (size_t i = 0; i < arrays; i++) {
    auto rows = args.get<ffi::Buffer<ffi::F32>>(i);
    auto pages = written.get<ffi::AnyBuffer>(i);
    if (!rows || !pages) return !rows ? rows.error() : pages.error();
    float* scales = nullptr;
    if (written.size() > arrays) {
      auto own = written.get<ffi::Buffer<ffi::F32>>(arrays + i);
      if (!own) return own.error();
      scales = (*own)->typed_data();
    }
    all.push_back({rows->typed_data(), (char*)(*pages)->untyped_data(), scales});
  }
  write_rows(pool, all, *args.get<ffi::AnyBuffer>(0), positions, table, **written.get<ffi::AnyBuffer>(0));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JmoeWritePages, WritePages,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::F32> sinks,
                  ffi::ResultBuffer<ffi::F32> out, int64_t window, int64_t chunk) {
  const auto qd = q.dimensions(), kd = k.dimensions();
  const Problem p = {qd[0], qd[1], qd[2], qd[3], kd[0], kd[1], kd[2], table.dimensions()[1], q.typed_data(),
                     (const char*)k.untyped_data(), (const char*)v.untyped_data(), k_scales.typed_data(),
                     v_scales.typed_data(), positions.typed_data(), table.typed_data(), kept_as(k), window, chunk,
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
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk"));

}  // namespace jmoe
