// Threads that share out the tasks of one call. Whoever calls works too, and waits only for threads that have begun a task: one
// that the system has not scheduled costs its help and no more, where OpenMP's barriers wait for every thread (on two loaded
// cores a product took 5 ms instead of 0.3). Idle threads watch for work for a moment, then sleep.
// Each thread goes through a part of its own in order, for memory is read fastest in one stream, then takes from the ends of the others'.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace bitsmith {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

class Pool {
 public:
  // Runs task(i) for i in 0 .. count - 1, count < 2^32, on up to `threads` threads, in any order.
  template <class Task>
  void run(int64_t count, int32_t threads, const Task& task) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    // A second caller does its work by itself rather than wait.
    if (count <= 1 || threads <= 1 || !alone.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    grow(threads - 1);
    call_ = [](const void* job, int64_t i) { (*static_cast<const Task*>(job))(i); };
    job_ = &task, threads_ = threads;
    for (int64_t i = 0; i < threads; ++i) parts_[i].left.store(static_cast<uint64_t>(i * count / threads) | static_cast<uint64_t>((i + 1) * count / threads) << 32);
    open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    work(0);
    open_.store(false);
    for (int spins = 0; inside_.load() != 0; ++spins) spins < 4096 ? relax() : std::this_thread::yield();
  }

 private:
  static constexpr auto WATCH = std::chrono::microseconds(200);

  // What is left of a part: its first task, and 32 bits higher the one after its last.
  struct alignas(64) Part {
    std::atomic<uint64_t> left{0};

    // The first or the last task, or -1.
    int64_t take(bool first) {
      for (uint64_t seen = left.load();;) {
        const uint64_t from = seen & 0xffffffffu, to = seen >> 32;
        if (from >= to) return -1;
        if (left.compare_exchange_weak(seen, first ? seen + 1 : seen - (uint64_t{1} << 32))) return static_cast<int64_t>(first ? from : to - 1);
      }
    }
  };

  void work(int32_t own) {
    for (int32_t i = 0; i < threads_; ++i) {
      Part& part = parts_[static_cast<size_t>((own + i) % threads_)];
      for (int64_t task; (task = part.take(i == 0)) >= 0;) call_(job_, task);
    }
  }

  void grow(int32_t helpers) {
    if (static_cast<int32_t>(started_) < helpers) parts_.reset(new Part[static_cast<size_t>(helpers) + 1]);
    while (static_cast<int32_t>(started_) < helpers) {
      std::thread([this, index = static_cast<int32_t>(started_)] { help(index); }).detach();
      ++started_;
    }
  }

  void help(int32_t index) {
    for (uint32_t seen = 0;;) {
      const auto begun = std::chrono::steady_clock::now();
      for (int spins = 1; round_.load() == seen; ++spins) {
        relax();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() - begun > WATCH) round_.wait(seen);
      }
      seen = round_.load();
      // Entered before looking: the caller closes before it waits for those inside, so a job is open or nobody is in it.
      inside_.fetch_add(1);
      if (open_.load() && index + 1 < threads_) work(index + 1);
      inside_.fetch_sub(1);
    }
  }

  std::mutex busy_;
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> open_{false};
  std::atomic<int32_t> inside_{0}, threads_{0};
  std::unique_ptr<Part[]> parts_;
  const void* job_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  size_t started_ = 0;
};

// Never destroyed: its threads are detached and may outlive everything else.
inline Pool& pool() {
  static Pool* const found = new Pool;
  return *found;
}

}  // namespace bitsmith
