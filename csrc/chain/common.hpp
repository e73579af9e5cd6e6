// What the kernels of one instruction set level share: the certificates of docs/chain.md and the last words on a row.
#pragma once

#include <initializer_list>

#include "chain.hpp"
#include "simd.hpp"

namespace {

using pyseq::chain::ChainArgs;
using pyseq::chain::ChainTables;
using pyseq::chain::GroupResult;
using pyseq::chain::kGroupRows;
using pyseq::chain::Row;

constexpr int kTileRows = PYSEQ_LEVEL == 4 ? 8 : 4;     // rows x vectors of a register tile
constexpr int kTileVectors = PYSEQ_LEVEL == 4 ? 3 : 2;

// A sum over predecessors below kTiny, where the largest predecessor is about 1, may have lost digits to underflow.
template <class C> constexpr C kTiny = 0;
template <> constexpr float kTiny<float> = 0x1p-70f;
template <> constexpr double kTiny<double> = 0x1p-900;
// A state that holds 0 hides at most 2^(2 - bias); while that stays below 2^kHidden no other state can notice.
template <class C> constexpr int kHidden = 0;
template <> constexpr int kHidden<float> = -110;
template <> constexpr int kHidden<double> = -970;

template <int N> struct Constant {
  constexpr operator int() const { return N; }
};
// f(size) with a `size` of 1 to N that is known when compiling.
template <int N, class F> PYSEQ_INLINE void fixed(int64_t size, F f) {
  if constexpr (N > 0) {
    if (size == N) return f(Constant<N>{});
    fixed<N - 1>(size, f);
  }
}
// f(size, begin) for even tiles of `count`, of at most N: a lone one would wait for its own sums.
template <int N, class F> PYSEQ_INLINE void even_tiles(int64_t count, F f) {
  const int64_t tiles = (count + N - 1) / N;
  for (int64_t t = 0, begin = 0, size; t < tiles; ++t, begin += size) {
    size = (count - begin + tiles - t - 1) / (tiles - t);
    fixed<N>(size, [&](auto constant) { f(constant, begin); });
  }
}

// Sums are taken over kChunk terms, then kSuper / kChunk chunks, then the rest: fewer roundings in a row.
constexpr int64_t kChunk = 12, kSuper = 96;

template <class T, class C> static bool exponentials(const T* x, int64_t size, double top, C* out) {
  constexpr int L = Simd<double>::lanes;
  IVec<double> bad = {};
  for (int64_t i = 0; i < size; i += L) {
    const int count = int(size - i < L ? size - i : L);
    Vec<double> v, p;
    IVec<double> n;
    load_some(v, x + i, count);
    v -= top;
    bad |= ~(IVec<double>)(v <= 0.0);
    exp_split(v > -2000.0 ? v : splat(-2000.0), p, n);  // 0, also of -inf
    store_some(out + i, scale_by_power(p, n), count);
  }
  return !any(bad);
}

// Whether a state that some path reaches holds 0 at a step up to `last`, as only unreachable states should. The tape a
// has a stride over steps and one over tags; reached holds 2 * tags bytes.
template <class T, class C>
static bool underflowed(
    const ChainArgs<T>& args, const Row& row, const C* a, int64_t step, int64_t across, int64_t last, uint8_t* reached) {
  const int64_t tags = args.tags;
  uint8_t* before = reached + tags;
  for (int64_t k = 0; k <= last; ++k) {
    const T* f = args.emissions + row.index * args.stride_batch + row.step(k) * args.stride_time;
    const T forbidden = -__builtin_inf();
    for (int64_t j = 0; j < tags; ++j) reached[j] = k == 0 && !(args.start && args.start[j] == forbidden);
    bool all = k == 0;
    for (int64_t i = 0; i < tags && !all; ++i) {
      if (!before[i]) continue;
      all = true;
      for (int64_t j = 0; j < tags; ++j) all &= reached[j] |= args.transitions[i * tags + j] != forbidden;
    }
    for (int64_t j = 0; j < tags; ++j) {
      reached[j] &= f[j] != forbidden;
      if (reached[j] && !(a[k * step + j * across] > 0)) return true;
    }
    memcpy(before, reached, tags);
  }
  return false;
}

// The largest score of a path's first step, or log sum of the paths to a last one, `offset` less the logs of `last`. Between
// them there may be larger ones, so it is a lower bound of their size.
template <class T, class C>
static double partial_size(const ChainArgs<T>& args, const Row& row, const C* last, int64_t across, double offset) {
  const T* f = args.emissions + row.index * args.stride_batch + row.step(0) * args.stride_time;
  double size = 0;
  for (int64_t j = 0; j < args.tags; ++j) {
    const double score = __builtin_fabs(double(f[j]) + (args.start ? double(args.start[j]) : 0.0));
    if (score > size && score < __builtin_inf()) size = score;
    const double sum = last[j * across] > 0 ? __builtin_fabs(offset + __builtin_log(double(last[j * across]))) : 0.0;
    if (sum > size) size = sum;
  }
  return size;
}

// log Z of a row whose last step holds `last`, -inf where no path is feasible, and whether to do the row again.
template <class T, class C>
static double close_row(
    const ChainArgs<T>& args, const ChainTables<C>& tables, const Row& row, const C* last, int64_t across, int64_t power,
    bool& flagged) {
  double total = 0, mass = 0;
  for (int64_t j = 0; j < tables.tags; ++j) {
    mass += double(last[j * across]);
    total += double(last[j * across]) * double(tables.end[j]);
  }
  if (mass == 0) return -__builtin_inf();
  const double scales = power * 0.69314718055994530942, tops = (row.length - 1) * tables.top;
  const double log_z = scales + __builtin_log(total) + tops + tables.start_top + tables.end_top;
  flagged |= !(total >= double(kTiny<C>));
  // Worst-case rounding of the sweep against what the contract allows, both in units of 2^-24.
  const int64_t tags = tables.tags, inner = tags < kChunk ? tags : kChunk, middle = (tags < kSuper ? tags : kSuper) / kChunk;
  const double unit = sizeof(C) < sizeof(double) ? 1.0 : 0x1p-29, size = __builtin_fabs(log_z);
  double roundings = unit * double(row.length) * double(inner + middle + tags / kSuper + 4);
  // and, in float64, of what is added to the scores of unlikely tags here and taken from them in the tables
  for (const double added : {scales, tops, tables.start_top, tables.end_top}) roundings += 0x1p-27 * __builtin_fabs(added);
  if (!(roundings <= 7.0 * size))
    flagged |= sizeof(C) < sizeof(double) ||
               !(roundings <= 7.0 * partial_size(args, row, last, across, scales + tops + tables.start_top));
  return log_z;
}

// Value of a row and, where its marginals are in the gradient already, what else belongs there.
template <class T>
static void write_row(const ChainArgs<T>& args, const Row& row, double log_z, double weight, GroupResult& out) {
  const double value = args.kind == pyseq::chain::kNll ? log_z - row.score : log_z;
  args.value[row.index] = T(args.kind == pyseq::chain::kNll && value < 0 ? 0.0 : value);
  if (!args.grads()) return;
  T* g = args.grad_emissions + row.index * args.grad_stride_batch;
  if (log_z == -__builtin_inf()) {
    for (int64_t k = 0; k < row.length; ++k) memset(g + row.step(k) * args.grad_stride_time, 0, args.tags * sizeof(T));
    return;
  }
  const int64_t first = row.step(0) * args.grad_stride_time, last = row.step(row.length - 1) * args.grad_stride_time;
  for (int64_t j = 0; j < args.tags; ++j) {
    out.first[j] += double(g[first + j]);
    out.last[j] += double(g[last + j]);
  }
  if (args.kind != pyseq::chain::kNll) return;
  const int64_t* labels = args.labels + row.index * args.time;
  for (int64_t k = 0; k < row.length; ++k) {
    const int64_t y = labels[row.step(k)];
    g[row.step(k) * args.grad_stride_time + (y < 0 ? 0 : y < args.tags ? y : args.tags - 1)] -= T(weight);
  }
}

}  // namespace
