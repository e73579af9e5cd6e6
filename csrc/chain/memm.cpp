// Local steps, above the instruction set levels: those of one context together, by chunks, so that any number of threads
// adds up a context's gradient in the same order.
#include "memm.hpp"

#include "chain.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "segments.hpp"
#include "status.hpp"

namespace pyseq::chain {
namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
LocalRows<float> rows_at(int level, float) { return level >= 4 ? local_float_v4 : level == 3 ? local_float_v3 : local_float_v2; }
LocalRows<double> rows_at(int level, double) {
  return level >= 4 ? local_double_v4 : level == 3 ? local_double_v3 : local_double_v2;
}
AdjustSide side_at(int level) { return level >= 4 ? adjust_side_v4 : level == 3 ? adjust_side_v3 : adjust_side_v2; }
AdjustRows<float> adjust_at(int level, float) {
  return level >= 4 ? adjust_float_v4 : level == 3 ? adjust_float_v3 : adjust_float_v2;
}
AdjustRows<double> adjust_at(int level, double) {
  return level >= 4 ? adjust_double_v4 : level == 3 ? adjust_double_v3 : adjust_double_v2;
}
#else
AdjustSide side_at(int) { return adjust_side_v2; }
AdjustRows<float> adjust_at(int, float) { return adjust_float_v2; }
AdjustRows<double> adjust_at(int, double) { return adjust_double_v2; }
LocalRows<float> rows_at(int, float) { return local_float_v2; }
LocalRows<double> rows_at(int, double) { return local_double_v2; }
#endif

// Steps order[begin], .., order[end - 1] of a context; part: where their sum waits for the others, -1: it is the only one.
struct Chunk {
  int64_t context, begin, end, part;
};

}  // namespace

int neighbours(const PathArgs& a) {
  int status = kOk;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.lengths ? a.lengths[b] : a.time;
    if (length < 0 || length > a.time) status = kBadLength;
    int64_t last = -1, at = -1;  // tag and place of the live step before
    for (int64_t t = 0; t < a.time; ++t) {
      const int64_t i = b * a.time + t;
      a.label[i] = a.before[i] = a.after[i] = -1;
      if (a.mask ? !a.mask[i] : t >= length) continue;
      if ((a.tags[i] < 0 || a.tags[i] >= a.num_tags) && !status) status = kBadTag;
      a.label[i] = std::clamp<int64_t>(a.tags[i], 0, a.num_tags - 1);
      a.before[i] = last;
      if (at >= 0) a.after[at] = a.label[i];
      last = a.label[i], at = i;
    }
  }
  return status;
}

template <class T> int local_steps(const LocalArgs<T>& a) {
  const auto rows = rows_at(cpu_level(a.level), T{});
  const int64_t tags = a.tags;
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.label[i] >= 0) continue;
    a.loss[i] = 0;
    if (a.grad && !a.accumulate) std::fill_n(a.grad + i * tags, tags, T(0));
  }
  const Segments s = sorted_by_key(a.count, a.contexts + 1, [&](int64_t i) {
    return a.label[i] < 0 ? -1 : a.context[i] < 0 ? a.contexts : a.context[i];
  });
  std::vector<Chunk> chunks;
  std::vector<int64_t> tasks{0};  // chunks up to each
  int64_t parts = 0, waiting_steps = 0;
  for (int64_t c = 0; c <= a.contexts; ++c) {
    const int64_t end = s.begin[c + 1];
    if (c < a.contexts && end == s.begin[c] && a.grad_bias) std::fill_n(a.grad_bias + c * tags, tags, T(0));
    const bool many = end - s.begin[c] > kChunk && c < a.contexts;
    for (int64_t at = s.begin[c]; at < end; at += kChunk) {
      chunks.push_back({c, at, std::min(at + kChunk, end), many ? parts++ : -1});
      waiting_steps += chunks.back().end - at;
      if (waiting_steps * tags >= 4096) tasks.push_back(int64_t(chunks.size())), waiting_steps = 0;
    }
  }
  if (tasks.back() != int64_t(chunks.size())) tasks.push_back(int64_t(chunks.size()));
  std::vector<double> waiting(a.grad_bias ? parts * tags : 0);
  std::vector<char> forbidden(tasks.size());
  for_each(int64_t(tasks.size()) - 1, a.threads, [&](int64_t task) {
    std::vector<T> scratch(2 * (tags + 16));
    std::vector<double> sums(a.grad_bias ? tags : 0);
    for (int64_t c = tasks[task]; c < tasks[task + 1]; ++c) {
      const Chunk& chunk = chunks[c];
      const bool wanted = a.grad_bias && chunk.context < a.contexts;
      std::fill(sums.begin(), sums.end(), 0.0);
      const int64_t* order = s.order.data() + chunk.begin;
      if (rows(a, order, chunk.end - chunk.begin, scratch.data(), wanted ? sums.data() : nullptr)) forbidden[task] = 1;
      if (!wanted) continue;
      if (chunk.part < 0)
        std::copy(sums.begin(), sums.end(), a.grad_bias + chunk.context * tags);
      else
        std::copy(sums.begin(), sums.end(), waiting.begin() + chunk.part * tags);
    }
  });
  for (size_t c = 0; a.grad_bias && c < chunks.size();) {
    const Chunk& first = chunks[c++];
    if (first.part < 0) continue;
    double* sum = waiting.data() + first.part * tags;
    for (; c < chunks.size() && chunks[c].context == first.context; ++c)
      for (int64_t d = 0; d < tags; ++d) sum[d] += waiting[chunks[c].part * tags + d];
    std::copy_n(sum, tags, a.grad_bias + first.context * tags);
  }
  return std::count(forbidden.begin(), forbidden.end(), 1) ? int(kForbidden) : int(kOk);
}

template <class T> void adjust(AdjustArgs<T>& a, const double* g, bool forward, bool backward) {
  const int level = cpu_level(a.level);
  a.padded = (a.tags + 15) / 16 * 16, a.sides = 0;
  const Block tables(2 * a.padded * (a.tags + 1) * sizeof(double));
  double* at = static_cast<double*>(tables.get());
  for (const bool way : {true, false}) {
    if (!(way ? forward : backward)) continue;
    Side& side = a.side[a.sides++] = {g, way, at, at + a.padded, a.tags};
    side_at(level)(side, a.tags, a.padded, a.factor);
    at += a.padded * (a.tags + 1);
  }
  const int64_t together = std::max<int64_t>(1, 64 / std::max<int64_t>(a.time, 1));  // sequences
  for_each((a.batch + together - 1) / together, a.time * a.batch * a.tags < 2048 ? 1 : a.threads, [&](int64_t task) {
    const Block scratch(12 * a.padded * sizeof(double));
    std::vector<int64_t> steps(a.time);
    for (int64_t b = task * together; b < std::min(a.batch, (task + 1) * together); ++b) {
      int64_t count = 0;
      for (int64_t t = 0; t < a.time; ++t)
        if (!a.mask || a.mask[b * a.time + t]) steps[count++] = t;
      adjust_at(level, T{})(a, b, steps.data(), count, static_cast<double*>(scratch.get()));
    }
  });
}

template void adjust(AdjustArgs<float>&, const double*, bool, bool);
template void adjust(AdjustArgs<double>&, const double*, bool, bool);
template int local_steps(const LocalArgs<float>&);
template int local_steps(const LocalArgs<double>&);

}  // namespace pyseq::chain
