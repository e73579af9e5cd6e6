// Sums of rows that share a key, the same for any number of threads: rows are sorted by key, stable, and each key's are
// added up in float64 by chunks of a fixed size, then the chunks in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "half.hpp"
#include "parallel.hpp"

namespace pyseq {

constexpr int64_t kChunk = 512;

// Items in the order of their keys; those of key k are order[begin[k]], .., order[begin[k + 1] - 1].
struct Segments {
  std::vector<int64_t> order, begin;
};

// Items whose key is not in [0, keys) are left out.
template <class F> Segments sorted_by_key(int64_t items, int64_t keys, F key) {
  Segments s;
  s.begin.assign(keys + 2, 0);  // begin[k + 1] is where the next item of key k goes
  for (int64_t i = 0; i < items; ++i)
    if (const int64_t k = key(i); k >= 0 && k < keys) ++s.begin[k + 2];
  for (int64_t k = 0; k < keys; ++k) s.begin[k + 2] += s.begin[k + 1];
  s.order.resize(s.begin[keys + 1]);
  for (int64_t i = 0; i < items; ++i)
    if (const int64_t k = key(i); k >= 0 && k < keys) s.order[s.begin[k + 1]++] = i;
  s.begin.pop_back();
  return s;
}

// The sum of some rows (items, dim) in float64, by chunks of kChunk, then the chunks; part: scratch (dim).
template <class T> void add_up(const int64_t* items, int64_t count, const T* rows, int64_t dim, double* total, double* part) {
  std::fill(total, total + dim, 0.0);
  for (int64_t at = 0; at < count; at += kChunk) {
    std::fill(part, part + dim, 0.0);
    for (int64_t i = at; i < std::min(at + kChunk, count); ++i)
      for (int64_t d = 0; d < dim; ++d) part[d] += double(widen(rows[items[i] * dim + d]));
    for (int64_t d = 0; d < dim; ++d) total[d] += part[d];
  }
}

// sums (keys, dim) of rows (items, dim).
template <class T> void sum_segments(const Segments& s, const T* rows, int64_t dim, T* sums, int threads) {
  constexpr int64_t kAhead = 6, kLine = 64 / sizeof(T);
  struct Chunk {
    int64_t key, begin, end, part;  // part: where its sum waits for the others of its key; -1: it is the only one
  };
  std::vector<Chunk> chunks;
  const int64_t keys = int64_t(s.begin.size()) - 1;
  int64_t parts = 0;
  for (int64_t k = 0; k < keys; ++k) {
    const bool many = s.begin[k + 1] - s.begin[k] > kChunk;
    int64_t at = s.begin[k];
    do {
      const int64_t end = std::min(at + kChunk, s.begin[k + 1]);
      chunks.push_back({k, at, end, many ? parts++ : -1});
      at = end;
    } while (at < s.begin[k + 1]);
  }
  std::vector<double> waiting(parts * dim);
  constexpr int64_t together = 16;  // chunks a thread takes at once
  for_each((int64_t(chunks.size()) + together - 1) / together, threads, [&](int64_t block) {
    std::vector<double> sum(dim);
    const int64_t last = std::min((block + 1) * together, int64_t(chunks.size()));
    for (int64_t c = block * together; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const T* row = rows + s.order[i] * dim;
        if (i + kAhead < int64_t(s.order.size())) {  // rows lie anywhere: no hardware foresees them
          const T* next = rows + s.order[i + kAhead] * dim;
          for (int64_t d = 0; d < std::min<int64_t>(dim, 8 * kLine); d += kLine) __builtin_prefetch(next + d);
        }
        for (int64_t d = 0; d < dim; ++d) sum[d] += double(row[d]);
      }
      if (chunk.part < 0)
        std::copy(sum.begin(), sum.end(), sums + chunk.key * dim);
      else
        std::copy(sum.begin(), sum.end(), waiting.begin() + chunk.part * dim);
    }
  });
  for (size_t c = 0; c < chunks.size();) {
    const int64_t key = chunks[c].key, first = chunks[c].part;
    int64_t count = 0;
    while (c < chunks.size() && chunks[c].key == key) ++c, ++count;
    if (first < 0) continue;
    for (int64_t part = first + 1; part < first + count; ++part)
      for (int64_t d = 0; d < dim; ++d) waiting[first * dim + d] += waiting[part * dim + d];
    std::copy_n(waiting.begin() + first * dim, dim, sums + key * dim);
  }
}

}  // namespace pyseq
