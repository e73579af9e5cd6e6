// Chains, above the instruction set levels: rows, groups, threads, and the log-domain path.
#include "chain.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <vector>

#include "cpu.hpp"

namespace pyseq {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGrain = 1 << 18;  // multiply-adds below which a second thread does not pay

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

template <class T> const ChainLevel<T>& level_of(int level);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <> const ChainLevel<float>& level_of<float>(int level) {
  return level >= 4 ? chain_float_v4 : level == 3 ? chain_float_v3 : chain_float_v2;
}
template <> const ChainLevel<double>& level_of<double>(int level) {
  return level >= 4 ? chain_double_v4 : level == 3 ? chain_double_v3 : chain_double_v2;
}
#else
template <> const ChainLevel<float>& level_of<float>(int) { return chain_float_v2; }
template <> const ChainLevel<double>& level_of<double>(int) { return chain_double_v2; }
#endif

// The largest number, 0 where there is none or it is infinite.
template <class T> double top_of(const T* x, int64_t size) {
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < size; ++i) top = x[i] > top ? x[i] : top;
  return std::isfinite(top) ? double(top) : 0.0;
}

// The live steps of every sequence, longest first, and the scores of the gold paths.
template <class T> struct Rows {
  std::vector<Row> all;
  std::unique_ptr<int32_t[]> positions;

  int read(const ChainArgs<T>& args) {
    all.reserve(args.batch);
    for (int64_t b = 0; b < args.batch; ++b) {
      Row row{b, args.time, nullptr, 0.0, false, false};
      if (args.mask) {
        const uint8_t* mask = args.mask + b * args.time;
        int64_t live = 0, first_gap = args.time;
        for (int64_t t = 0; t < args.time; ++t) live += mask[t];
        if (const void* gap = std::memchr(mask, 0, args.time)) first_gap = static_cast<const uint8_t*>(gap) - mask;
        row.length = live;
        if (first_gap != live) {
          if (!positions) positions.reset(new int32_t[args.batch * args.time]);
          int32_t* at = positions.get() + b * args.time;
          row.at = at;
          for (int64_t t = 0; t < args.time; ++t)
            if (mask[t]) *at++ = static_cast<int32_t>(t);
        }
      } else if (args.lengths) {
        row.length = args.lengths[b];
        row.lost = row.length < 0 || row.length > args.time;
        if (row.lost && args.check) return kBadLength;
        row.length = std::min(std::max<int64_t>(row.length, 0), args.time);
      }
      all.push_back(row);
    }
    const auto longer = [](const Row& x, const Row& y) { return x.length > y.length; };
    if (!std::is_sorted(all.begin(), all.end(), longer)) std::stable_sort(all.begin(), all.end(), longer);
    return kOk;
  }
};

template <class T> struct Chain {
  const ChainArgs<T>& args;

  const T* emission(const Row& row, int64_t k) const {
    return args.emissions + row.index * args.stride_batch + row.step(k) * args.stride_time;
  }
  T* gradient(const Row& row, int64_t t) const {
    return args.grad_emissions + row.index * args.grad_stride_batch + t * args.grad_stride_time;
  }
  int64_t label(const Row& row, int64_t k) const {
    const int64_t y = args.labels[row.index * args.time + row.step(k)];
    return std::min(std::max<int64_t>(y, 0), args.tags - 1);
  }
  double transition(int64_t i, int64_t j) const { return args.transitions[i * args.tags + j]; }
  double start(int64_t j) const { return args.start ? double(args.start[j]) : 0.0; }
  double end(int64_t j) const { return args.end ? double(args.end[j]) : 0.0; }

  void read_gold(Row& row) const {
    double score = 0;
    for (int64_t k = 0, before = 0; k < row.length; ++k) {
      const int64_t y = label(row, k);
      row.lost |= y != args.labels[row.index * args.time + row.step(k)];
      score += double(emission(row, k)[y]) + (k ? transition(before, y) : start(y));
      before = y;
    }
    row.score = row.length ? score + end(label(row, row.length - 1)) : 0.0;
    if (row.score == kInf) row.score = kNaN;
  }

  void clear_absent(const Row& row) const {
    for (int64_t t = 0, k = 0; t < args.time;) {
      if (k < row.length && row.step(k) == t) {
        t = row.at ? t + 1 : row.length;
        k = row.at ? k + 1 : row.length;
        continue;
      }
      const int64_t next = k < row.length ? row.step(k) : args.time;
      if (args.grad_stride_time == args.tags)
        std::memset(gradient(row, t), 0, (next - t) * args.tags * sizeof(T));
      else
        for (int64_t s = t; s < next; ++s) std::memset(gradient(row, s), 0, args.tags * sizeof(T));
      t = next;
    }
  }

  // Sequences that need no sweep: lost and empty ones, forbidden gold paths, and all of a plain score.
  void settle(Row& row) const {
    const bool forbidden = args.kind != kPartition && row.score == -kInf;
    row.done = row.lost || row.length == 0 || args.kind == kScore || forbidden;
    if (!row.done) return;
    args.value[row.index] = T(row.lost ? kNaN : args.kind == kScore ? row.score : forbidden ? kInf : 0.0);
    if (args.grads())
      for (int64_t k = 0; k < row.length; ++k) std::fill_n(gradient(row, row.step(k)), args.tags, T(row.lost ? kNaN : 0.0));
    if (args.grads() && !forbidden && !row.lost)
      for (int64_t k = 0; k < row.length; ++k) gradient(row, row.step(k))[label(row, k)] = T(args.weight(row));
  }

  // Add `factor` times the gold path's counts; `padded` is the row stride of `counts`.
  void add_gold(const Row& row, double factor, double* counts, int64_t padded, double* first, double* last) const {
    for (int64_t k = 1; k < row.length; ++k) counts[label(row, k - 1) * padded + label(row, k)] += factor;
    first[label(row, 0)] += factor;
    last[label(row, row.length - 1)] += factor;
  }

  // Forward-backward in the log domain, the maximum taken for each destination: nothing underflows. Scores count from the
  // largest of their kind, every step from its own, and probabilities are divided by their sum, so that neither the size
  // of the scores nor a step that only huge scores cross shows in a posterior.
  void sweep_in_logs(const Row& row, double* counts, double* first, double* last) const {
    const int64_t n = row.length, tags = args.tags;
    const double top = top_of(args.transitions, tags * tags), start_top = args.start ? top_of(args.start, tags) : 0.0,
                 end_top = args.end ? top_of(args.end, tags) : 0.0;
    std::vector<double> alpha(n * tags), beta(tags), before(tags), terms(tags);
    double offset = 0;
    for (int64_t k = 0; k < n; ++k) {
      double* now = &alpha[k * tags];
      const T* f = emission(row, k);
      const double f_top = top_of(f, tags);
      for (int64_t j = 0; j < tags; ++j) {
        double from = start(j) - start_top;
        if (k) {
          for (int64_t i = 0; i < tags; ++i) terms[i] = now[i - tags] + (transition(i, j) - top);
          from = log_sum(terms);
        }
        now[j] = from + (double(f[j]) - f_top);
      }
      offset += f_top + (k ? top : start_top) + bring_to_zero(now, tags);
    }
    for (int64_t j = 0; j < tags; ++j) terms[j] = alpha[(n - 1) * tags + j] + (end(j) - end_top);
    const double log_z = offset + end_top + log_sum(terms), nll = log_z - row.score;
    args.value[row.index] = T(args.kind == kPartition ? log_z : nll < 0 ? 0.0 : nll);
    if (!args.grads()) return;
    const bool none = log_z == -kInf;
    const double w = args.weight(row);
    for (int64_t j = 0; j < tags; ++j) beta[j] = end(j) - end_top;
    for (int64_t k = n - 1; k >= 0; --k) {
      T* g = gradient(row, row.step(k));
      for (int64_t j = 0; j < tags; ++j) terms[j] = alpha[k * tags + j] + beta[j];
      to_probabilities(terms);
      for (int64_t j = 0; j < tags; ++j) {
        const double share = none ? 0.0 : w * terms[j];
        g[j] = T(share - (args.kind == kNll && label(row, k) == j ? w : 0.0));
        if (k == 0) first[j] += share;
        if (k == n - 1) last[j] += share;
      }
      if (k == 0 || none) continue;
      const T* f = emission(row, k);
      const double f_top = top_of(f, tags);
      const auto leave = [&](int64_t i) {
        for (int64_t j = 0; j < tags; ++j) terms[j] = (transition(i, j) - top) + (double(f[j]) - f_top) + beta[j];
      };
      std::vector<double> shares(&alpha[(k - 1) * tags], &alpha[k * tags]);
      for (int64_t i = 0; i < tags; ++i) {
        leave(i);
        shares[i] += before[i] = log_sum(terms);
      }
      to_probabilities(shares);
      for (int64_t i = 0; i < tags; ++i) {
        if (shares[i] == 0) continue;
        leave(i);
        to_probabilities(terms);
        for (int64_t j = 0; j < tags; ++j) counts[i * tags + j] += w * shares[i] * terms[j];
      }
      bring_to_zero(before.data(), tags);
      beta.swap(before);
    }
    if (args.kind == kNll) add_gold(row, -w, counts, tags, first, last);
  }

  // Subtracts the largest and returns it; 0 where there is none.
  static double bring_to_zero(double* x, int64_t size) {
    const double top = top_of(x, size);
    for (int64_t j = 0; j < size; ++j) x[j] -= top;
    return top;
  }
  // exp(x) over its sum; zeros where every x is -inf.
  static void to_probabilities(std::vector<double>& x) {
    bring_to_zero(x.data(), x.size());
    double total = 0;
    for (double& v : x) total += v = std::exp(v);
    for (double& v : x) v = total == 0 ? 0.0 : v / total;
  }
  static double log_sum(const std::vector<double>& terms) {
    double top = -kInf;
    for (const double x : terms) top = x > top || x != x ? x : top;
    if (top == -kInf || top != top) return top;
    double total = 0;
    for (const double x : terms) total += std::exp(x - top);
    return top + std::log(total);
  }
};

// Columns of the panel that starts where `left` padded columns remain; kernels walk panels by the same rule.
int64_t panel_width(int64_t left, int lanes, int panel) {
  if (panel == 0) return left;
  return left >= panel * lanes ? panel * lanes : panel == 3 && left == 2 * lanes ? 2 * lanes : lanes;
}

// exp of the parameters, less their maxima, laid out for one kernel. Not usable where one is NaN or +inf.
template <class T, class C> struct Tables {
  ChainTables<C> view;
  Block block;
  C* weights;  // exp(transitions - top), (tags, tags)
  bool usable = true;

  Tables(const ChainArgs<T>& args, const ChainSweep<T, C>& kernel, int threads) {
    const int64_t tags = args.tags, padded = (tags + kernel.lanes - 1) / kernel.lanes * kernel.lanes;
    const int64_t panel = kernel.panel ? kernel.panel * kernel.lanes : padded, size = padded * (2 * tags + 2);
    block = Block(sizeof(C) * (size + tags * tags));
    C* forward = static_cast<C*>(block.get());
    C *backward = forward + tags * padded, *start = backward + tags * padded, *end = start + padded;
    weights = end + padded;
    view = {tags, padded, forward, backward, start, end, 0, 0, 0, nullptr, nullptr};
    view.top = top_of(args.transitions, tags * tags);
    view.start_top = args.start ? top_of(args.start, tags) : 0.0;
    view.end_top = args.end ? top_of(args.end, tags) : 0.0;
    std::memset(forward, 0, sizeof(C) * size);
    std::fill_n(start, tags, C(1));
    std::fill_n(end, tags, C(1));
    usable &= !args.start || kernel.exponentials(args.start, tags, view.start_top, start);
    usable &= !args.end || kernel.exponentials(args.end, tags, view.end_top, end);
    std::atomic<bool> good{true};
    if (tags < 64) threads = 1;
    for_each(tags, threads, [&](int64_t i) {
      if (!kernel.exponentials(args.transitions + i * tags, tags, view.top, weights + i * tags)) good = false;
    });
    for_each((padded + panel - 1) / panel, threads, [&](int64_t k) {
      for (int64_t j0 = k * panel; j0 < std::min((k + 1) * panel, padded);) {
        const int64_t step = panel_width(padded - j0, kernel.lanes, kernel.panel), stop = std::min(j0 + step, tags);
        for (int64_t i = 0; i < tags; ++i)
          for (int64_t j = j0; j < stop; ++j) {
            forward[j0 * tags + i * step + j - j0] = weights[i * tags + j];
            backward[j0 * tags + i * step + j - j0] = weights[j * tags + i];
          }
        j0 += step;
      }
    });
    usable &= good;
  }
};

// Rows that share a sweep with tags in the lanes: more of them reuse the tables better, fewer keep more threads busy. Like
// all grouping a function of the batch alone, so that sums do not depend on the threads.
int group_rows(int64_t rows) { return rows >= 16 ? kGroupRows : rows >= 8 ? 4 : rows >= 4 ? 2 : 1; }

// How many of the rows, longest first, are done with one in each lane: none where there are many tags, and no last group
// so empty that the tapes of absent rows would outgrow three times the emissions.
int64_t rows_in_lanes(int64_t rows, int64_t tags, int64_t most_tags, int64_t lanes) {
  if (tags > most_tags) return 0;
  const int64_t full = rows / lanes * lanes;
  return 8 * (full + lanes) <= 11 * rows ? rows : full;
}

int threads_for(const Row* rows, int64_t count, int64_t tags, int threads) {
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) work += rows[i].done ? 0 : rows[i].length * tags * (tags + 16);
  return work < kGrain ? 1 : threads;
}

// What the groups of one tier and kernel need and give.
template <class T, class C> struct Sweep {
  const Chain<T>& chain;
  const ChainSweep<T, C>& kernel;
  const Tables<T, C>& tables;
  const Row* rows;
  int64_t count;
  int size;
  int32_t path;
  double *counts, *first, *last;
  std::vector<Row>& left;  // takes the rows that it could not do
};

template <class T, class C> class SweepWorker {
 public:
  explicit SweepWorker(const Sweep<T, C>& sweep) : s_(sweep) {
    if (!grads_) return;
    sums_ = Block(sizeof(double) * padded_ * (tags_ + 2));
    out_.counts = static_cast<double*>(sums_.get());
    out_.first = out_.counts + tags_ * padded_;
    out_.last = out_.first + padded_;
  }

  void run(int64_t g) {
    const Row* group = s_.rows + g * s_.size;
    const int here = rows_of(g);
    const size_t bytes = s_.kernel.scratch_bytes(here, group[0].length, padded_, sizeof(C), grads_);
    if (bytes > held_) scratch_ = Block(held_ = bytes);
    s_.kernel.run(args_, s_.tables.view, group, here, scratch_.get(), out_);
    if (grads_)
      for (int64_t i = 0; i < tags_; ++i)
        for (int64_t j = 0; j < tags_; ++j) out_.counts[i * padded_ + j] *= s_.tables.weights[i * tags_ + j];
    for (int r = 0; r < here; ++r) {
      if (out_.flagged[r]) continue;
      if (args_.paths) args_.paths[group[r].index] = s_.path;
      if (grads_ && args_.kind == kNll)
        s_.chain.add_gold(group[r], -args_.weight(group[r]), out_.counts, padded_, out_.first, out_.last);
    }
  }

  void add(int64_t g) {
    for (int r = 0; r < rows_of(g); ++r)
      if (out_.flagged[r] && !s_.rows[g * s_.size + r].done) s_.left.push_back(s_.rows[g * s_.size + r]);
    if (!grads_) return;
    for (int64_t i = 0; i < tags_; ++i)
      for (int64_t j = 0; j < tags_; ++j) s_.counts[i * tags_ + j] += out_.counts[i * padded_ + j];
    for (int64_t j = 0; j < tags_; ++j) {
      s_.first[j] += out_.first[j];
      s_.last[j] += out_.last[j];
    }
  }

 private:
  int rows_of(int64_t g) const { return static_cast<int>(std::min<int64_t>(s_.size, s_.count - g * s_.size)); }

  const Sweep<T, C>& s_;
  const ChainArgs<T>& args_ = s_.chain.args;
  const int64_t tags_ = args_.tags, padded_ = s_.tables.view.padded;
  const bool grads_ = args_.grads();
  Block scratch_, sums_;
  size_t held_ = 0;
  GroupResult out_;
};

// Sweep the rows of one tier with one kernel; appends those it could not do.
template <class C, class T>
void sweep(
    const Chain<T>& chain, const ChainSweep<T, C>& kernel, const Row* rows, int64_t count, int size, int32_t path, double* counts,
    double* first, double* last, std::vector<Row>& left) {
  if (count == 0) return;
  const int threads = threads_for(rows, count, chain.args.tags, chain.args.threads);
  const Tables<T, C> tables(chain.args, kernel, threads);
  if (!tables.usable) {
    std::copy_if(rows, rows + count, std::back_inserter(left), [](const Row& row) { return !row.done; });
    return;
  }
  const int64_t groups = (count + size - 1) / size;
  const Sweep<T, C> all{chain, kernel, tables, rows, count, size, path, counts, first, last, left};
  in_order<SweepWorker<T, C>>(groups, static_cast<int>(std::min<int64_t>(threads, groups)), all);
}

// The rows of one tier; returns those it could not do.
template <class C, class T>
std::vector<Row> serve(
    const Chain<T>& chain, int lane_tags, const ChainSweep<T, C>& lanes, const ChainSweep<T, C>& plain,
    const std::vector<Row>& rows, int32_t path, double* counts, double* first, double* last) {
  std::vector<Row> left;
  const int64_t count = rows.size(), some = rows_in_lanes(count, chain.args.tags, lane_tags, lanes.rows);
  sweep<C>(chain, lanes, rows.data(), some, lanes.rows, path | kInLanes, counts, first, last, left);
  sweep<C>(chain, plain, rows.data() + some, count - some, group_rows(count - some), path, counts, first, last, left);
  return left;
}

// Decode rows with one kernel, whose panels are `panel` vectors of `lanes` (0: all tags).
template <class T>
void decode(const ChainArgs<T>& args, ChainDecode<T> kernel, const Row* rows, int64_t count, int size, int lanes, int panel) {
  if (count == 0) return;
  const int64_t tags = args.tags, padded = (tags + lanes - 1) / lanes * lanes, beside = panel ? padded : kDecodeStride;
  const Block block(sizeof(double) * ((padded + beside) * tags + 2 * padded));
  double* forward = static_cast<double*>(block.get());
  double *into = forward + tags * padded, *start = into + tags * beside, *end = start + padded;
  std::fill(forward, start, -kInf);
  std::fill_n(start, 2 * padded, 0.0);
  bool nan = false;
  for (int64_t j0 = 0; j0 < padded;) {
    const int64_t step = panel_width(padded - j0, lanes, panel);
    for (int64_t i = 0; i < tags; ++i)
      for (int64_t j = j0; j < std::min(j0 + step, tags); ++j) {
        const double g = args.transitions[i * tags + j];
        nan |= !(g < kInf);
        forward[j0 * tags + i * step + j - j0] = g;
        into[panel ? j * beside + i : i * beside + j] = g;
      }
    j0 += step;
  }
  for (int64_t j = 0; j < tags; ++j) {
    start[j] = args.start ? double(args.start[j]) : 0.0;
    end[j] = args.end ? double(args.end[j]) : 0.0;
  }
  const double top = nan ? kNaN : 0.0;
  const ChainTables<double> tables{tags, padded, nullptr, nullptr, start, end, top, 0, 0, forward, into};
  const int64_t groups = (count + size - 1) / size;
  const int threads = static_cast<int>(std::min<int64_t>(threads_for(rows, count, tags, args.threads), groups));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Block scratch;
    size_t held = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; ++g) {
      const Row* group = rows + g * size;
      const int here = static_cast<int>(std::min<int64_t>(size, count - g * size));
      const int64_t across = panel ? here * padded : tags * size;  // scores of a step
      const size_t bytes = sizeof(double) * across * (group[0].length + 1);
      if (bytes > held) scratch = Block(held = bytes);
      kernel(args, tables, group, here, scratch.get());
    }
  }
}

// The rows that only logs can serve, one at a time.
template <class T> class LogWorker {
 public:
  LogWorker(const Chain<T>& chain, const std::vector<Row>& rows, std::vector<double>& sums)
      : chain_(chain), rows_(rows), sums_(sums), own_(sums.size()) {}

  void run(int64_t i) {
    const int64_t tags = chain_.args.tags;
    std::fill(own_.begin(), own_.end(), 0.0);
    chain_.sweep_in_logs(rows_[i], own_.data(), own_.data() + tags * tags, own_.data() + tags * (tags + 1));
    if (chain_.args.paths) chain_.args.paths[rows_[i].index] = kLog;
  }
  void add(int64_t) {
    for (size_t x = 0; x < own_.size(); ++x) sums_[x] += own_[x];
  }

 private:
  const Chain<T>& chain_;
  const std::vector<Row>& rows_;
  std::vector<double>&sums_, own_;
};

}  // namespace

template <class T> int chain_crf(const ChainArgs<T>& given) {
  ChainArgs<T> args = given;
  std::vector<T> values(given.reduction == kNone ? 0 : given.batch);
  if (given.reduction != kNone) args.value = values.data();
  Rows<T> rows;
  if (const int status = rows.read(args)) return status;
  const Chain<T> chain{args};
  const int64_t tags = args.tags;
  const ChainLevel<T>& level = level_of<T>(cpu_level(args.level));
  std::atomic<bool> bad{false};
  for_each(rows.all.size(), threads_for(rows.all.data(), rows.all.size(), tags, args.threads), [&](int64_t i) {
    Row& row = rows.all[i];
    if (args.kind != kPartition) chain.read_gold(row);
    if (row.lost && args.check) bad = true;
    if (args.grads()) chain.clear_absent(row);
    chain.settle(row);
  });
  if (bad) return kBadTag;

  std::vector<double> sums(args.grads() ? tags * (tags + 2) : 0);
  double *counts = sums.data(), *first = counts + tags * tags, *last = first + tags;
  std::vector<Row> todo;  // with those that are done, so that neighbours are grouped alike whatever the scores
  for (const Row& row : rows.all) {
    if (args.kind != kScore && row.length > 0) todo.push_back(row);
    if (row.lost)
      std::fill(sums.begin(), sums.end(), kNaN);
    else if (args.kind == kScore && args.grads() && row.length && row.score != -kInf)
      chain.add_gold(row, args.weight(row), counts, tags, first, last);
    if (args.paths) args.paths[row.index] = kFast;
  }
  todo = serve<T>(chain, level.lane_tags, level.lanes, level.rows, todo, kFast, counts, first, last);
  if (sizeof(T) == 4) todo = serve<double>(chain, level.lane_tags, level.lanes_wide, level.rows_wide, todo, kWide, counts, first, last);
  if (!todo.empty()) in_order<LogWorker<T>>(todo.size(), todo.size() > 1 ? args.threads : 1, chain, todo, sums);
  for (Row& row : rows.all)
    if (row.lost) chain.settle(row);  // its gradient has been overwritten with zeros
  if (args.grads()) {
    for (int64_t x = 0; x < tags * tags; ++x) args.grad_transitions[x] = T(counts[x]);
    for (int64_t j = 0; j < tags; ++j) {
      args.grad_start[j] = T(first[j]);
      args.grad_end[j] = T(last[j]);
    }
  }
  if (given.reduction != kNone) {
    double total = 0;
    for (const T value : values) total += double(value);
    *given.value = T(given.reduction == kMean ? total / double(given.batch) : total);
  }
  return kOk;
}

template <class T> int chain_viterbi(const ChainArgs<T>& args) {
  Rows<T> rows;
  if (const int status = rows.read(args)) return status;
  const ChainLevel<T>& level = level_of<T>(cpu_level(args.level));
  std::fill_n(args.best_path, args.batch * args.time, int64_t{-1});
  const auto settled = [&](const Row& row) {
    if (row.lost || row.length == 0) args.value[row.index] = T(row.lost ? kNaN : 0.0);
    return row.lost || row.length == 0;
  };
  rows.all.erase(std::remove_if(rows.all.begin(), rows.all.end(), settled), rows.all.end());
  const int64_t count = rows.all.size(), some = rows_in_lanes(count, args.tags, level.lane_decode_tags, level.lanes_wide.rows);
  const int64_t rest = count - some;
  decode<T>(args, level.lanes_decode, rows.all.data(), some, level.lanes_wide.rows, 1, 0);
  decode<T>(args, level.rows_decode, rows.all.data() + some, rest, group_rows(rest), level.rows_wide.lanes, level.rows_wide.panel);
  return kOk;
}

template int chain_crf<float>(const ChainArgs<float>&);
template int chain_crf<double>(const ChainArgs<double>&);
template int chain_viterbi<float>(const ChainArgs<float>&);
template int chain_viterbi<double>(const ChainArgs<double>&);

}  // namespace pyseq
