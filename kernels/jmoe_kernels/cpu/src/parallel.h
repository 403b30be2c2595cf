// Work over XLA's own threads, in phases of independent items; and scratch memory that outlives a call.
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

// Phases run one after another, and the items of one phase run on any thread. A thread begins with neighbouring
// items of its own, as neighbouring weights stream fastest, and then helps other threads. A worker that arrives
// late finds every item taken and leaves, so nobody waits for a thread that never came; the state outlives it.
class Job {
 public:
  Job(std::vector<Phase> phases, int64_t threads)
      : threads_(threads), phases_(std::move(phases)), next_(phases_.size() * threads), done_(phases_.size()) {}

  void work() {
    const int64_t me = arrived_.at.fetch_add(1, std::memory_order_relaxed);
    for (size_t p = 0; p < phases_.size(); p++) {
      for (int64_t k = 0; k < threads_; k++) run_part(p, (me + k) % threads_);
      for (int spins = 0; done_[p].at.load(std::memory_order_acquire) < phases_[p].items; spins++)
        if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  struct Counter {
    alignas(64) std::atomic<int64_t> at{0};
  };

  void run_part(size_t p, int64_t part) {
    const int64_t items = phases_[p].items, first = items * part / threads_, end = items * (part + 1) / threads_;
    Counter& next = next_[p * threads_ + part];
    for (int64_t i; (i = first + next.at.fetch_add(1, std::memory_order_relaxed)) < end;) {
      phases_[p].run(i);
      done_[p].at.fetch_add(1, std::memory_order_release);
    }
  }

  int64_t threads_;
  std::vector<Phase> phases_;
  std::vector<Counter> next_, done_;
  Counter arrived_;
};

// Runs the phases over the pool, or on the calling thread alone if the work is small (waking another thread
// takes longer than some ten thousand cycles).
inline void run_phases(xla::ffi::ThreadPool& pool, std::vector<Phase> phases, double cycles) {
  constexpr double WORTH_WAKING = 60e3;
  const int64_t threads = cycles < WORTH_WAKING ? 1 : pool.num_threads();
  if (threads <= 1) {
    for (Phase& phase : phases)
      for (int64_t i = 0; i < phase.items; i++) phase.run(i);
    return;
  }
  auto job = std::make_shared<Job>(std::move(phases), threads);
  for (int64_t i = 1; i < threads; i++) pool.Schedule([job] { job->work(); });
  job->work();
}

// Memory of the calling thread, 64-byte aligned. It is kept between calls; its contents are not.
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
