// The n best paths of one sequence, from the scores that Viterbi's recursion leaves. Every path is the best one with some
// steps at which it enters a tag from another predecessor than the best; each such detour costs what it is worse by there.
// So the next best path is one of those before it with one more detour, at an earlier step than the others it makes.
#pragma once

#include <algorithm>
#include <vector>

#include "sequence.hpp"

namespace pyseq::chain {

// Transitions by destination and, in a last row, the end scores: (tags + 1, tags).
template <class T> std::vector<double> by_destination(const ChainArgs<T>& args) {
  const int64_t tags = args.tags;
  std::vector<double> into((tags + 1) * tags);
  for (int64_t i = 0; i < tags; ++i) {
    for (int64_t j = 0; j < tags; ++j) into[j * tags + i] = args.transitions[i * tags + j];
    into[tags * tags + i] = args.end ? double(args.end[i]) : 0.0;
  }
  return into;
}

template <class T> class BestPaths {
 public:
  BestPaths(const ChainArgs<T>& args, const std::vector<double>& into) : chain_{args}, tags_(args.tags), into_(into.data()) {}

  // delta[k * step + j]: best score of the paths to tag j at step k, none NaN. paths (count, time): the first is given and
  // feasible; the others, and scores (count), are filled as far as there are paths.
  void run(const Row& row, const double* delta, int64_t step, int64_t count, T* scores, int64_t* paths) {
    row_ = &row, delta_ = delta, step_ = step;
    const int64_t n = row.length, time = chain_.args.time;
    detours_.clear();
    found_.clear();
    found_.push_back({into_[tags_ * tags_ + at(paths, n - 1)] + delta[(n - 1) * step + at(paths, n - 1)], 0});
    near_.clear();
    for (int64_t k = n; k > 0 && count > 1; --k)
      if (look(paths, k, 0, 0.0, count - 1)) near_.push_back(k);
    for (int64_t c = 1; c < count && !detours_.empty(); ++c) {
      const Detour d = detours_.front();
      detours_.erase(detours_.begin());
      int64_t* path = paths + c * time;
      std::copy_n(paths + d.parent * time, time, path);
      const int64_t met = take(d, paths, path), most = count - 1 - c;
      found_.push_back({score(d, path), c});
      if (int64_t(detours_.size()) > most) detours_.resize(most);
      if (most == 0) break;
      for (int64_t k = d.step - 1; k > met; --k) look(path, k, c, d.loss, most);
      for (const int64_t k : near_)
        if (k <= met) look(path, k, c, d.loss, most);
    }
    // sums along the paths may round to another order
    std::stable_sort(found_.begin(), found_.end(), [](const Found& x, const Found& y) { return x.score > y.score; });
    for (size_t c = 0; c < found_.size(); ++c) scores[c] = T(found_[c].score);
    if (std::is_sorted(found_.begin(), found_.end(), [](const Found& x, const Found& y) { return x.at < y.at; })) return;
    order_.assign(paths, paths + found_.size() * time);
    for (size_t c = 0; c < found_.size(); ++c) std::copy_n(order_.data() + found_[c].at * time, time, paths + c * time);
  }

 private:
  struct Detour {
    double loss;  // of the whole path
    int64_t parent;
    int64_t step, tag;  // the step is entered from this tag; behind the last step is the end
  };
  struct Found {
    double score;
    int64_t at;
  };

  int64_t& at(int64_t* path, int64_t k) const { return path[row_->step(k)]; }
  const double* into(int64_t* path, int64_t k) const { return into_ + (k == row_->length ? tags_ : at(path, k)) * tags_; }

  // Takes into the cheapest `most` detours those that a path may make into a step. Whether one may ever be among them: what
  // is too dear for the best path stays so for all that share this part of it.
  bool look(int64_t* path, int64_t k, int64_t parent, double loss, int64_t most) {
    const double *before = delta_ + (k - 1) * step_, *g = into(path, k);
    const int64_t tag = at(path, k - 1);
    const double best = before[tag] + g[tag];
    const double room = int64_t(detours_.size()) < most ? kInf : detours_.back().loss - loss;
    int64_t close = 0;
    for (int64_t i = 0; i < tags_; ++i) close += best - (before[i] + g[i]) < room;
    if (close < 2) return false;  // it is the path itself
    for (int64_t i = 0; i < tags_; ++i) {
      const Detour d{loss + (best - (before[i] + g[i])), parent, k, i};
      if (i == tag || d.loss == kInf) continue;
      if (int64_t(detours_.size()) == most) {
        if (d.loss >= detours_.back().loss) continue;
        detours_.pop_back();
      }
      const auto cheaper = [](const Detour& x, const Detour& y) { return x.loss < y.loss; };
      detours_.insert(std::upper_bound(detours_.begin(), detours_.end(), d, cheaper), d);
    }
    return true;
  }

  // Makes a detour in a copy of the path it leaves; returns the step from which, backwards, it is one with the best path.
  int64_t take(const Detour& d, int64_t* best_path, int64_t* path) const {
    int64_t k = d.step - 1;
    at(path, k) = d.tag;
    for (; k > 0 && at(path, k) != at(best_path, k); --k) {
      const double *before = delta_ + (k - 1) * step_, *g = into(path, k);
      int64_t tag = 0;
      for (int64_t i = 1; i < tags_; ++i) tag = before[i] + g[i] > before[tag] + g[tag] ? i : tag;
      at(path, k - 1) = tag;
    }
    for (int64_t j = k; j > 0 && at(path, j - 1) != at(best_path, j - 1); --j) at(path, j - 1) = at(best_path, j - 1);
    return k;
  }

  double score(const Detour& d, int64_t* path) const {
    double score = delta_[(d.step - 1) * step_ + d.tag];
    for (int64_t k = d.step; k <= row_->length; ++k) {
      score += into(path, k)[at(path, k - 1)];
      if (k < row_->length) score += double(chain_.emission(*row_, k)[at(path, k)]);
    }
    return score;
  }

  Chain<T> chain_;
  const int64_t tags_;
  const double* into_;
  const Row* row_ = nullptr;
  const double* delta_ = nullptr;
  int64_t step_ = 0;
  std::vector<Detour> detours_;
  std::vector<Found> found_;
  std::vector<int64_t> near_, order_;  // near_: steps of the best path with detours that were taken into account
};

}  // namespace pyseq::chain
