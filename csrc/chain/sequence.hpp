// One sequence at a time: its live steps, its gold path, and the log domain that serves any scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "chain.hpp"

namespace pyseq::chain {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

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
        for (int64_t t = 0; t < args.time; ++t) live += mask[t] != 0;  // torch takes any byte
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

  // Whether everything that the row reads is a score, which NaN and +inf are not.
  bool scored(const Row& row) const {
    const auto all = [](const T* x, int64_t size) {
      bool good = true;
      for (int64_t i = 0; x && i < size; ++i) good &= x[i] < std::numeric_limits<T>::infinity();
      return good;
    };
    bool good = all(args.start, args.tags) && all(args.end, args.tags);
    good = good && (row.length < 2 || all(args.transitions, args.tags * args.tags));
    for (int64_t k = 0; good && k < row.length; ++k) good = all(emission(row, k), args.tags);
    return good;
  }

  // Whether some feasible path goes through each tag of each step, (length, tags). Scores of the others count nowhere.
  std::vector<uint8_t> crossed(const Row& row) const {
    const int64_t n = row.length, tags = args.tags;
    std::vector<uint8_t> on(n * tags);
    const auto leads = [&](int64_t k, int64_t i, int64_t j) { return on[k * tags + i] && transition(i, j) > -kInf; };
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 0; j < tags; ++j) {
        bool possible = k == 0 && start(j) > -kInf;
        for (int64_t i = 0; k && i < tags && !possible; ++i) possible = leads(k - 1, i, j);
        on[k * tags + j] = possible && double(emission(row, k)[j]) > -kInf;
      }
    for (int64_t k = n - 1; k >= 0; --k)
      for (int64_t i = 0; i < tags; ++i) {
        if (!on[k * tags + i]) continue;
        bool possible = k == n - 1 && end(i) > -kInf;
        for (int64_t j = 0; k < n - 1 && j < tags && !possible; ++j) possible = on[(k + 1) * tags + j] && leads(k, i, j);
        on[k * tags + i] = possible;
      }
    return on;
  }

  // Forward-backward in the log domain, the maximum taken for each destination: nothing underflows. Scores count from the
  // largest of their kind on a feasible path, every step from its own, and probabilities are divided by their sum, so that
  // neither the size of the scores nor a step that only huge scores cross shows in a posterior.
  void sweep_in_logs(const Row& row, double* counts, double* first, double* last) const {
    const int64_t n = row.length, tags = args.tags;
    if (!scored(row)) {
      args.value[row.index] = T(kNaN);
      if (!args.grads()) return;
      for (int64_t k = 0; k < n; ++k) std::fill_n(gradient(row, row.step(k)), tags, T(kNaN));
      if (n > 1) std::fill_n(counts, tags * tags, kNaN);
      std::fill_n(first, tags, kNaN);
      std::fill_n(last, tags, kNaN);
      return;
    }
    const std::vector<uint8_t> crossing = crossed(row);
    const auto on = [&](int64_t k, int64_t j) { return crossing[k * tags + j] != 0; };
    const auto top_at = [&](int64_t k) {  // the largest score of step k, and below on the way into it, n for the end
      double top = -kInf;
      for (int64_t j = 0; j < tags; ++j)
        if (on(k, j)) top = std::max(top, double(emission(row, k)[j]));
      return top > -kInf ? top : 0.0;
    };
    const auto top_into = [&](int64_t k) {
      double top = -kInf;
      for (int64_t j = 0; j < tags; ++j) {
        if (k == 0 && on(0, j)) top = std::max(top, start(j));
        if (k == n && on(n - 1, j)) top = std::max(top, end(j));
        for (int64_t i = 0; 0 < k && k < n && on(k, j) && i < tags; ++i)
          if (on(k - 1, i)) top = std::max(top, transition(i, j));
      }
      return top > -kInf ? top : 0.0;
    };
    std::vector<double> alpha(n * tags), beta(tags), before(tags), terms(tags), shares;
    const double end_top = top_into(n);
    double offset = 0;
    for (int64_t k = 0; k < n; ++k) {
      double* now = &alpha[k * tags];
      const T* f = emission(row, k);
      const double f_top = top_at(k), top = top_into(k);
      for (int64_t j = 0; j < tags; ++j) {
        now[j] = -kInf;
        if (!on(k, j)) continue;
        double from = start(j) - top;
        if (k) {
          for (int64_t i = 0; i < tags; ++i) terms[i] = on(k - 1, i) ? now[i - tags] + (transition(i, j) - top) : -kInf;
          from = log_sum(terms);
        }
        now[j] = from + (double(f[j]) - f_top);
      }
      offset += f_top + top + bring_to_zero(now, tags);
    }
    for (int64_t j = 0; j < tags; ++j) beta[j] = on(n - 1, j) ? end(j) - end_top : -kInf;
    for (int64_t j = 0; j < tags; ++j) terms[j] = alpha[(n - 1) * tags + j] + beta[j];
    const double log_z = offset + end_top + log_sum(terms), nll = log_z - row.score;
    args.value[row.index] = T(args.kind == kPartition ? log_z : nll < 0 ? 0.0 : nll);
    if (!args.grads()) return;
    const bool none = log_z == -kInf;
    const double w = args.weight(row);
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
      const double f_top = top_at(k), top = top_into(k);
      const auto leave = [&](int64_t i) {
        for (int64_t j = 0; j < tags; ++j)
          terms[j] = on(k, j) ? (transition(i, j) - top) + (double(f[j]) - f_top) + beta[j] : -kInf;
      };
      shares.assign(tags, 0);
      for (int64_t i = 0; i < tags; ++i) {
        before[i] = shares[i] = -kInf;
        if (!on(k - 1, i)) continue;
        leave(i);
        before[i] = log_sum(terms);
        shares[i] = alpha[(k - 1) * tags + i] + before[i];
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

}  // namespace pyseq::chain
