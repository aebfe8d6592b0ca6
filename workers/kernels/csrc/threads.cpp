#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace xy {
namespace {

// Turns of looking for work before sleeping: longer than the pauses between the phases of a forward
// pass, too short to be noticed by a thread that waits for this core.
constexpr int kSpins = 1000;

using Clock = std::chrono::steady_clock;

// A helper is late when the caller waits for it longer than kLate and than kTasksLate tasks take:
// something else runs on its core. The caller then works alone for kPause times as long as it
// waited, which bounds what late helpers can cost to about a ninth of the time.
constexpr auto kLate = std::chrono::microseconds(200);
constexpr int kTasksLate = 4, kPause = 8;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int num_tasks, Task task, void* context) {
    if (num_tasks <= 1 || helpers_.empty() || !busy_.try_lock())
      return run_alone(num_tasks, task, context);
    std::lock_guard lock(busy_, std::adopt_lock);
    const auto start = Clock::now();
    if (start < pause_end_) return run_alone(num_tasks, task, context);
    task_ = task, context_ = context, num_tasks_ = num_tasks;
    unfinished_.store(num_tasks, std::memory_order_relaxed);
    // This release store publishes the fields set above.
    waiting_.store(static_cast<uint32_t>(num_tasks), std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    epoch_.notify_all();
    const int done = work();
    for (int spin = 0; spin < kSpins; ++spin) {
      if (unfinished_.load(std::memory_order_acquire) == 0) return;
      relax();
    }
    const auto waiting_since = Clock::now();
    // A sleeping caller leaves its core to a helper that has a task but no core.
    for (int left; (left = unfinished_.load(std::memory_order_acquire)) != 0;)
      unfinished_.wait(left, std::memory_order_acquire);
    const auto end = Clock::now();
    const auto waited = end - waiting_since, of_task = (waiting_since - start) / (done + 1);
    if (waited > kLate && waited > kTasksLate * of_task) pause_end_ = end + kPause * waited;
  }

  void resize(int num_threads) {
    std::lock_guard lock(busy_);
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& helper : helpers_) helper.join();
    helpers_.clear();
    stop_.store(false);
    while (size() < num_threads) helpers_.emplace_back([this] { help(); });
  }

  int size() const { return static_cast<int>(helpers_.size()) + 1; }

  // A forked child has none of the threads and must neither join nor wait for them.
  void forget() {
    for (auto& helper : helpers_) helper.detach();
    helpers_.clear();
    waiting_.store(0);  // tasks of the parent, if the fork came in the middle of a phase
    new (&busy_) std::mutex;
  }

 private:
  static void run_alone(int num_tasks, Task task, void* context) {
    for (int i = 0; i < num_tasks; ++i) task(context, i);
  }

  // Take tasks until none is left, and count them. While a task is unfinished its phase is not
  // over, so the fields that `run` published still hold and may be read after the task is taken.
  int work() {
    int done = 0;
    uint32_t waiting = waiting_.load(std::memory_order_acquire);
    while (waiting != 0) {
      if (!waiting_.compare_exchange_weak(waiting, waiting - 1, std::memory_order_acquire))
        continue;
      task_(context_, num_tasks_ - static_cast<int>(waiting));
      ++done;
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
      waiting = waiting_.load(std::memory_order_acquire);
    }
    return done;
  }

  void help() {
    for (;;) {
      const int epoch = epoch_.load(std::memory_order_seq_cst);
      if (stop_.load()) return;
      work();
      int spin = 0;
      while (spin < kSpins && epoch_.load(std::memory_order_acquire) == epoch) ++spin, relax();
      if (spin == kSpins) epoch_.wait(epoch);
    }
  }

  std::mutex busy_;
  std::vector<std::thread> helpers_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int num_tasks_ = 0;
  Clock::time_point pause_end_;                    // the caller works alone until then
  alignas(64) std::atomic<uint32_t> waiting_ = 0;  // tasks that no thread has taken
  alignas(64) std::atomic<int> unfinished_ = 0;    // tasks that are not finished
  alignas(64) std::atomic<int> epoch_ = 0;         // what idle helpers watch
  std::atomic<bool> stop_ = false;
};

// Never destroyed: helpers may outlive the destructors at the end of the process.
Pool& pool() {
  static Pool* const the_pool = [] {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
    return made;
  }();
  return *the_pool;
}

class Buffer {
 public:
  ~Buffer() { std::free(data_); }

  float* at_least(size_t num_floats) {
    if (size_ < num_floats) {
      std::free(data_);
      size_ = (num_floats + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) std::abort();  // no caller could go on without it
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

void parallel(int num_tasks, Task task, void* context) { pool().run(num_tasks, task, context); }

void set_num_threads(int num_threads) { pool().resize(num_threads); }

int num_threads() { return pool().size(); }

float* task_scratch(size_t num_floats) {
  thread_local Buffer buffer;
  return buffer.at_least(num_floats);
}

float* caller_scratch(size_t num_floats) {
  thread_local Buffer buffer;
  return buffer.at_least(num_floats);
}

}  // namespace xy
