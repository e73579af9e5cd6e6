// Samples, above the instruction set levels: tables, rows, and those that only logs can serve.
#include "sample.hpp"

#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "sequence.hpp"

namespace pyseq::chain {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds below which a second thread does not pay

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
SampleRow<float> row_at(int level, float) { return level >= 4 ? sample_float_v4 : level == 3 ? sample_float_v3 : sample_float_v2; }
SampleRow<double> row_at(int level, double) {
  return level >= 4 ? sample_double_v4 : level == 3 ? sample_double_v3 : sample_double_v2;
}
#else
SampleRow<float> row_at(int, float) { return sample_float_v2; }
SampleRow<double> row_at(int, double) { return sample_double_v2; }
#endif

// A row's samples in the log domain; none where no path is feasible.
template <class T>
void sample_in_logs(const Chain<T>& chain, const Row& row, uint64_t state, int64_t count, int64_t* paths) {
  const int64_t n = row.length, tags = chain.args.tags;
  const std::vector<uint8_t> crossing = chain.crossed(row);
  const auto on = [&](int64_t k, int64_t j) { return crossing[k * tags + j] != 0; };
  std::vector<double> alpha(n * tags, -kInf), terms(tags), sums(tags * tags);
  for (int64_t k = 0; k < n; ++k) {
    double* now = &alpha[k * tags];
    for (int64_t j = 0; j < tags; ++j) {
      if (!on(k, j)) continue;
      for (int64_t i = 0; k && i < tags; ++i) terms[i] = now[i - tags] + chain.transition(i, j);
      now[j] = (k ? Chain<T>::log_sum(terms) : chain.start(j)) + double(chain.emission(row, k)[j]);
    }
    Chain<T>::bring_to_zero(now, tags);
  }
  std::vector<int64_t> tag(count, 0), known(tags, n + 1);  // known: the step whose sums over predecessors are there
  for (int64_t k = n; k > 0; --k) {  // n: behind the last step
    for (int64_t s = 0; s < count; ++s) {
      const int64_t j = tag[s];
      double* sum = &sums[j * tags];
      if (known[j] != k) {
        known[j] = k;
        for (int64_t i = 0; i < tags; ++i)
          terms[i] = on(k - 1, i) ? alpha[(k - 1) * tags + i] + (k == n ? chain.end(i) : chain.transition(i, j)) : -kInf;
        Chain<T>::bring_to_zero(terms.data(), tags);
        for (int64_t i = 0; i < tags; ++i) sum[i] = (i ? sum[i - 1] : 0.0) + std::exp(terms[i]);
        if (!(sum[tags - 1] > 0)) return;
      }
      const double x = uniform(below(below(state, s), k - 1)) * sum[tags - 1];
      tag[s] = std::upper_bound(sum, sum + tags - 1, x) - sum;
      paths[s * chain.args.time + row.step(k - 1)] = tag[s];
    }
  }
}

}  // namespace

template <class T> int chain_sample(const ChainArgs<T>& args, uint64_t seed, int64_t count, int64_t* paths) {
  Rows<T> rows;
  if (const int status = rows.read(args)) return status;
  const Chain<T> chain{args};
  const int64_t tags = args.tags, padded = tags <= 16 ? 16 : (tags + 7) / 8 * 8;
  std::vector<double> tables(padded * (tags + 3));
  double *edges = tables.data(), *start = edges + tags * padded, *end = start + padded, *pad = end + padded;
  const double top = top_of(args.transitions, tags * tags), end_top = args.end ? top_of(args.end, tags) : 0.0;
  bool joined = true, ended = true;  // no transition, or end score, is NaN or +inf
  for (int64_t i = 0; i < tags; ++i) {
    for (int64_t j = 0; j < tags; ++j) {
      edges[i * padded + j] = std::exp(chain.transition(i, j) - top);
      joined &= edges[i * padded + j] <= 1;
    }
    start[i] = chain.start(i);
    end[i] = std::exp(chain.end(i) - end_top);
    ended &= end[i] <= 1;
  }
  std::fill(pad + tags, pad + padded, 1.0);
  const SampleTables view{tags, padded, edges, start, end, pad};
  const auto sample = row_at(cpu_level(args.level), T{});
  const int64_t wide = (count + kTogether - 1) / kTogether * kTogether, size = rows.all.size();
  const int threads = args.batch * args.time * (tags * (tags + 16) + 16 * count) < kGrain ? 1 : args.threads;
  Failure failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Block scratch;
    size_t held = 0;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < size; ++r) failure.guard([&] {
        const Row& row = rows.all[r];
        int64_t* to = paths + row.index * count * args.time;
        const bool none = row.lost || row.length == 0, whole = none || row.at;
        for (int64_t s = 0; s < count && (whole || row.length < args.time); ++s)
          std::fill(to + s * args.time + (whole ? 0 : row.length), to + (s + 1) * args.time, -1);
        if (none) return;
        const uint64_t state = below(seed, row.index);
        if (ended && (joined || row.length == 1)) {
          const size_t bytes = sizeof(double) * ((row.length + tags) * padded + 2 * wide) + row.length * wide * (tags <= 256 ? 1 : 4) + 2 * tags;
          if (bytes > held) scratch = Block(bytes), held = bytes;
          if (sample(args, view, row, state, count, scratch.get(), to)) return;
        }
        std::fill_n(to, count * args.time, -1);
        if (chain.scored(row)) sample_in_logs(chain, row, state, count, to);
      });
  }
  failure.rethrow();
  return kOk;
}

template int chain_sample(const ChainArgs<float>&, uint64_t, int64_t, int64_t*);
template int chain_sample(const ChainArgs<double>&, uint64_t, int64_t, int64_t*);

}  // namespace pyseq::chain
