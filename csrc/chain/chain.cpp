// Chains, above the instruction set levels: tables, groups of rows and the tiers that serve them.
#include "chain.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <optional>
#include <vector>

#include "cpu.hpp"
#include "n_best.hpp"
#include "parallel.hpp"
#include "sequence.hpp"

namespace pyseq::chain {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds below which a second thread does not pay

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
    if (bytes > held_) scratch_ = Block(bytes), held_ = bytes;
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

// Decode rows with one kernel, whose panels are `panel` vectors of `lanes` (0: all tags). Each thread makes a `then`, called
// with the rows of a group, their best scores, the stride of steps, and that of rows, 1 where each has a lane.
template <class T, class Make>
void decode(
    const ChainArgs<T>& args, ChainDecode<T> kernel, const Row* rows, int64_t count, int size, int lanes, int panel, Make make) {
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
  Failure failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Block scratch;
    size_t held = 0;
    std::optional<decltype(make())> then;
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; ++g) failure.guard([&] {
        const Row* group = rows + g * size;
        const int here = static_cast<int>(std::min<int64_t>(size, count - g * size));
        const int64_t across = panel ? here * padded : tags * size;  // scores of a step
        const size_t bytes = sizeof(double) * across * (group[0].length + 1);
        if (bytes > held) scratch = Block(bytes), held = bytes;
        kernel(args, tables, group, here, scratch.get());
        if (!then) then.emplace(make());
        (*then)(group, here, static_cast<const double*>(scratch.get()), across, panel ? padded : 1);
      });
  }
  failure.rethrow();
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

namespace {

// Value and best path of every row; make: see decode.
template <class T, class Make> int decode_all(const ChainArgs<T>& args, Make make) {
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
  const auto& plain = level.rows_wide;
  decode<T>(args, level.lanes_decode, rows.all.data(), some, level.lanes_wide.rows, 1, 0, make);
  decode<T>(args, level.rows_decode, rows.all.data() + some, rest, group_rows(rest), plain.lanes, plain.panel, make);
  return kOk;
}

}  // namespace

template <class T> int chain_viterbi(const ChainArgs<T>& args) {
  return decode_all(args, [] { return [](const Row*, int, const double*, int64_t, int64_t) {}; });
}

template <class T> int chain_n_best(const ChainArgs<T>& given, int64_t count, T* scores, int64_t* paths) {
  ChainArgs<T> args = given;
  std::vector<T> best(args.batch);
  std::vector<int64_t> path(args.batch * args.time);
  args.value = best.data(), args.best_path = path.data();
  std::fill_n(scores, args.batch * count, T(-kInf));
  std::fill_n(paths, args.batch * count * args.time, int64_t{-1});
  const std::vector<double> into = by_destination(args);
  const auto make = [&] {
    return [&, next = BestPaths<T>(args, into), copy = std::vector<double>()](
               const Row* group, int rows, const double* delta, int64_t step, int64_t stride) mutable {
      const int64_t size = group[0].length * args.tags, lanes = step / args.tags;
      if (stride == 1) {
        copy.resize(lanes * size);
        for (int64_t x = 0; x < size; ++x)
          for (int64_t r = 0; r < lanes; ++r) copy[r * size + x] = delta[x * lanes + r];
        delta = copy.data(), step = args.tags, stride = size;
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t b = group[r].index;
        if (path[b * args.time + group[r].step(0)] < 0) continue;  // there is none
        std::copy_n(path.data() + b * args.time, args.time, paths + b * count * args.time);
        next.run(group[r], delta + r * stride, step, count, scores + b * count, paths + b * count * args.time);
      }
    };
  };
  if (const int status = decode_all(args, make)) return status;
  for (int64_t b = 0; b < args.batch; ++b) {
    if (best[b] != best[b]) std::fill_n(scores + b * count, count, T(kNaN));
    if (best[b] == 0 && scores[b * count] == T(-kInf)) scores[b * count] = 0;  // the empty path
  }
  return kOk;
}

template int chain_crf<float>(const ChainArgs<float>&);
template int chain_crf<double>(const ChainArgs<double>&);
template int chain_viterbi<float>(const ChainArgs<float>&);
template int chain_viterbi<double>(const ChainArgs<double>&);
template int chain_n_best<float>(const ChainArgs<float>&, int64_t, float*, int64_t*);
template int chain_n_best<double>(const ChainArgs<double>&, int64_t, double*, int64_t*);

}  // namespace pyseq::chain
