// Work over XLA's own threads, in phases of independent items; and scratch memory that is kept.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace jmoe {

const Isa& isa();  // the best set of this processor, or the one forced by a test

struct Phase {
  int64_t items;
  std::function<void(int64_t)> run;
};

// Phases run one after the other, the items of one on any thread. A worker that arrives late finds every
// phase taken and leaves, so nobody waits for a thread that never came; the state outlives it.
class Job {
 public:
  explicit Job(std::vector<Phase> phases) : phases_(std::move(phases)), marks_(phases_.size()) {}

  void work() {
    for (size_t p = 0; p < phases_.size(); p++) {
      Mark& mark = marks_[p];
      for (int64_t i; (i = mark.next.fetch_add(1, std::memory_order_relaxed)) < phases_[p].items;) {
        phases_[p].run(i);
        mark.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; mark.done.load(std::memory_order_acquire) < phases_[p].items; spins++)
        if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  struct Mark {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  std::vector<Phase> phases_;
  std::vector<Mark> marks_;
};

// Runs the phases over the pool; on the calling thread alone where the work is small (waking another
// thread takes longer than some ten thousand cycles).
inline void run_phases(xla::ffi::ThreadPool& pool, std::vector<Phase> phases, double cycles) {
  constexpr double WORTH_WAKING = 60e3;
  const int64_t threads = cycles < WORTH_WAKING ? 1 : pool.num_threads();
  if (threads <= 1) {
    for (Phase& phase : phases)
      for (int64_t i = 0; i < phase.items; i++) phase.run(i);
    return;
  }
  auto job = std::make_shared<Job>(std::move(phases));
  for (int64_t i = 1; i < threads; i++) pool.Schedule([job] { job->work(); });
  job->work();
}

// Memory of the calling thread, 64-byte aligned, kept between calls; contents are not.
class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = bytes;
      if (!data_) throw std::bad_alloc();
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace jmoe
