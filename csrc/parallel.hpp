// Memory and loops of the code above the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pyseq {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
// Memory that starts on a cache line. By malloc: aligned_alloc splits blocks and takes longer than all of a small sweep.
class Block {
 public:
  explicit Block(size_t bytes = 0) : held_(bytes ? std::malloc(bytes + 63) : nullptr) {}
  void* get() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) & ~uintptr_t{63}); }

 private:
  std::unique_ptr<void, Free> held_;
};

// f(0), .., f(count - 1), in no order; without OpenMP on one thread, where entering it costs as much as a short sequence.
template <class F> void for_each(int64_t count, int threads, F f) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

// worker.run(i) on some worker's thread, then worker.add(i) in the order of i, whatever the threads.
template <class W, class... A> void in_order(int64_t count, int threads, A&... shared) {
  if (threads <= 1) {
    W worker(shared...);
    for (int64_t i = 0; i < count; ++i) worker.run(i), worker.add(i);
  } else {
#pragma omp parallel num_threads(threads)
    {
      W worker(shared...);
#pragma omp for ordered schedule(static, 1)
      for (int64_t i = 0; i < count; ++i) {
        worker.run(i);
#pragma omp ordered
        worker.add(i);
      }
    }
  }
}

}  // namespace pyseq
