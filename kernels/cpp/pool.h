// Threads that share out the tasks of one call. Whoever calls works too, and waits only for threads that have begun a task: one
// that the system has not scheduled costs its help and no more, where OpenMP's barriers wait for every thread (on two loaded
// cores a product took 5 ms instead of 0.3). Idle threads watch for work for a moment, then sleep.
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
  // Runs task(i) for i in 0 .. count - 1 on up to `threads` threads, in any order.
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
    job_ = &task, count_ = count, helpers_ = threads - 1;
    next_.store(0);
    open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    work();
    open_.store(false);
    for (int spins = 0; inside_.load() != 0; ++spins) spins < 4096 ? relax() : std::this_thread::yield();
  }

 private:
  static constexpr auto WATCH = std::chrono::microseconds(200);

  void work() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) call_(job_, i);
  }

  void grow(int32_t helpers) {
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
      if (open_.load() && index < helpers_) work();
      inside_.fetch_sub(1);
    }
  }

  std::mutex busy_;
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> open_{false};
  std::atomic<int32_t> inside_{0}, helpers_{0};
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0;
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
