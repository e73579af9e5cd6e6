// Entropy, above the instruction set levels: tables, rows, and sums of gradients that no number of threads changes.
#include "entropy.hpp"

#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "sequence.hpp"

namespace pyseq::chain {
namespace {

constexpr int64_t kGrain = 1 << 15;  // exponentials below which a second thread does not pay

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
EntropyRow<float> row_at(int level, float) { return level >= 4 ? entropy_float_v4 : level == 3 ? entropy_float_v3 : entropy_float_v2; }
EntropyRow<double> row_at(int level, double) {
  return level >= 4 ? entropy_double_v4 : level == 3 ? entropy_double_v3 : entropy_double_v2;
}
#else
EntropyRow<float> row_at(int, float) { return entropy_float_v2; }
EntropyRow<double> row_at(int, double) { return entropy_double_v2; }
#endif

template <class T> struct Sweep {
  const Chain<T>& chain;
  const EntropyTables& tables;
  const std::vector<Row>& rows;
  EntropyRow<T> kernel;
  std::vector<double>& counts;  // empty: no gradients are wanted
};

// kGroupRows rows at a time.
template <class T> class Worker {
 public:
  explicit Worker(const Sweep<T>& sweep)
      : s_(sweep), size_(sweep.counts.size()), sums_(sizeof(double) * size_), own_(static_cast<double*>(sums_.get())) {}

  void run(int64_t g) {
    const ChainArgs<T>& args = s_.chain.args;
    const int64_t begin = g * kGroupRows, end = std::min<int64_t>(begin + kGroupRows, s_.rows.size());
    std::fill_n(own_, size_, 0.0);
    for (int64_t r = begin; r < end; ++r) {
      const Row& row = s_.rows[r];
      if (size_) s_.chain.clear_absent(row);
      const bool lost = row.lost || !s_.chain.scored(row);
      args.value[row.index] = T(lost ? kNaN : 0.0);
      if (lost && size_) lose(row);
      if (lost || row.length == 0) continue;
      const size_t bytes = sizeof(double) * s_.tables.padded * (kEntropyTape * (row.length + 1) + kEntropyRows);
      if (bytes > held_) scratch_ = Block(bytes), held_ = bytes;
      double* counts = size_ ? own_ : nullptr;
      args.value[row.index] = T(s_.kernel(args, s_.tables, row, static_cast<double*>(scratch_.get()), counts));
    }
  }
  void add(int64_t) {
    for (size_t x = 0; x < size_; ++x) s_.counts[x] += own_[x];
  }

 private:
  void lose(const Row& row) {
    const int64_t joined = s_.tables.tags * s_.tables.padded;
    for (int64_t k = 0; k < row.length; ++k) std::fill_n(s_.chain.gradient(row, row.step(k)), s_.tables.tags, T(kNaN));
    std::fill(own_ + (row.length > 1 || row.lost ? 0 : joined), own_ + size_, kNaN);
  }

  const Sweep<T>& s_;
  size_t size_, held_ = 0;
  Block sums_, scratch_;
  double* own_;
};

}  // namespace

template <class T> int chain_entropy(const ChainArgs<T>& args) {
  Rows<T> rows;
  if (const int status = rows.read(args)) return status;
  const Chain<T> chain{args};
  const int64_t tags = args.tags, padded = (tags + 7) / 8 * 8;
  const int64_t size = 2 * tags * padded;
  const Block tables(sizeof(double) * (2 * size + padded));
  std::vector<double> counts(args.grads() ? size + padded : 0);
  double *edges = static_cast<double*>(tables.get()), *weights = edges + size, *start = weights + size;
  std::fill(edges, start + padded, 0.0);
  const auto fill = [&](int64_t row, int64_t j, auto score) {
    double top = kImpossible;
    for (int64_t i = 0; i < tags; ++i) {
      double& edge = edges[(row + i) * padded + j];
      edge = std::max(score(i), kImpossible);
      top = std::max(top, edge);
    }
    for (int64_t i = 0; i < tags; ++i) {
      const double edge = edges[(row + i) * padded + j];
      weights[(row + i) * padded + j] = edge > kImpossible ? std::exp(edge - top) : 0.0;
    }
  };
  for (int64_t j = 0; j < padded; ++j) {
    fill(0, j, [&](int64_t i) { return j < tags ? chain.transition(i, j) : 0.0; });
    if (j < kBehind) fill(tags, j, [&](int64_t i) { return chain.end(i); });
    if (j < tags) start[j] = chain.start(j);
  }
  const EntropyTables view{tags, padded, edges, weights, start};
  const Sweep<T> sweep{chain, view, rows.all, row_at(cpu_level(args.level), T{}), counts};
  const int64_t groups = (args.batch + kGroupRows - 1) / kGroupRows;
  const bool small = args.batch * args.time * tags * padded < kGrain;
  in_order<Worker<T>>(groups, small ? 1 : static_cast<int>(std::min<int64_t>(args.threads, groups)), sweep);
  for (int64_t i = 0; i < tags && args.grads(); ++i) {
    for (int64_t j = 0; j < tags; ++j) args.grad_transitions[i * tags + j] = T(counts[i * padded + j]);
    args.grad_end[i] = T(counts[(tags + i) * padded]);
    args.grad_start[i] = T(counts[size + i]);
  }
  return kOk;
}

template int chain_entropy(const ChainArgs<float>&);
template int chain_entropy(const ChainArgs<double>&);

}  // namespace pyseq::chain
