// Memory and loops of the code above the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <optional>

namespace pyseq {

struct OutOfMemory : std::bad_alloc {
  const char* what() const noexcept override { return "no memory for a kernel's scratch; use smaller batches"; }
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
// Memory that starts on a cache line. By malloc: aligned_alloc splits blocks and takes longer than all of a small sweep.
class Block {
 public:
  explicit Block(size_t bytes = 0) : held_(bytes ? std::malloc(bytes + 63) : nullptr) {
    if (bytes && !held_) throw OutOfMemory();
  }
  void* get() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) & ~uintptr_t{63}); }

 private:
  std::unique_ptr<void, Free> held_;
};

// Keeps the first exception of a parallel region, which none may leave, to throw it behind.
class Failure {
 public:
  // Whether f ran through.
  template <class F> bool guard(F f) {
    try {
      f();
      return true;
    } catch (...) {
#pragma omp critical(pyseq_failure)
      if (!first_) first_ = std::current_exception();
      return false;
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// f(0), .., f(count - 1), in no order; without OpenMP on one thread, where entering it costs as much as a short sequence.
template <class F> void for_each(int64_t count, int threads, F f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  Failure failure;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < count; ++i) failure.guard([&] { f(i); });
  failure.rethrow();
}

// worker.run(i) on some worker's thread, then worker.add(i) in the order of i, whatever the threads.
template <class W, class... A> void in_order(int64_t count, int threads, A&... shared) {
  if (threads <= 1) {
    W worker(shared...);
    for (int64_t i = 0; i < count; ++i) worker.run(i), worker.add(i);
    return;
  }
  Failure failure;
#pragma omp parallel num_threads(threads)
  {
    std::optional<W> worker;
    failure.guard([&] { worker.emplace(shared...); });
#pragma omp for ordered schedule(static, 1)
    for (int64_t i = 0; i < count; ++i) {
      const bool ran = worker && failure.guard([&] { worker->run(i); });
#pragma omp ordered
      if (ran) failure.guard([&] { worker->add(i); });
    }
  }
  failure.rethrow();
}

}  // namespace pyseq
