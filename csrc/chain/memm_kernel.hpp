// Local steps for the instruction set level that the including file sets.
#pragma once

#include "memm.hpp"
#include "simd.hpp"

namespace {

using pyseq::chain::LocalArgs;

// Losses whose logs wait, to be taken a vector at a time.
struct Waiting {
  static constexpr int kMost = 64;
  double total[kMost], factor[kMost], *loss[kMost];
  int count = 0;

  void flush() {
    constexpr int L = Simd<double>::lanes;
    for (int k = count; k % L; ++k) total[k] = 1;
    for (int k = 0; k < count; k += L) store<double>(total + k, log_of(load(total + k)));
    for (int k = 0; k < count; ++k) *loss[k] += factor[k] * total[k];
    count = 0;
  }
};

// V: vectors of a row, which stay in registers; 0: any number of them, in scratch. Whether a label is forbidden.
template <class T, int V>
static bool local_rows_of(const LocalArgs<T>& a, const int64_t* order, int64_t count, T* scratch, double* sums) {
  constexpr int L = Simd<T>::lanes, kInT = 64;  // vectors of exponentials that are added up in T
  constexpr int kPart = 16;                      // steps whose gradients are
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
  const T inf = __builtin_inff(), least = sizeof(T) == 4 ? T(-87) : T(-708);  // below it exponentials are 0, never subnormal
  const int64_t tags = a.tags, vectors = V ? V : (tags + L - 1) / L;
  Vec<T> own[V ? V : 1], held[V ? V : 1] = {};  // a row, and the sum of some
  T* part = scratch + vectors * L;
  const auto get = [&](int64_t k) { return V ? own[V ? k : 0] : load(scratch + k * L); };
  const auto put = [&](int64_t k, Vec<T> v) { V ? void(own[V ? k : 0] = v) : store<T>(scratch + k * L, v); };
  IVec<T> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  Waiting waiting;
  int in_part = 0;
  bool forbidden = false;
  const auto flush = [&] {
    for (int64_t k = 0; V && k < vectors; ++k) store<T>(part + k * L, held[k]), held[k] = Vec<T>{};
    for (int64_t d = 0; d < tags; ++d) sums[d] += double(part[d]), part[d] = 0;
    in_part = 0;
  };
  memset(part, 0, vectors * L * sizeof(T));
  for (int64_t at = 0; at < count; ++at) {
    const int64_t i = order[at], y = a.label[i];
    if (at + kAhead < count) {  // rows lie anywhere: no hardware foresees them
      const int64_t next = order[at + kAhead] * tags;
      for (int64_t d = 0; d < tags && d < 8 * kLine; d += kLine) {
        __builtin_prefetch(a.scores + next + d);
        if (a.grad) __builtin_prefetch(a.grad + next + d, 1);
      }
    }
    const T *f = a.scores + i * tags, *b = a.context[i] < 0 ? nullptr : a.bias + a.context[i] * tags;
    const T h = b ? T(a.factor) : T(1), label = b ? (f[y] + b[y]) * h : f[y];
    T* g = a.grad ? a.grad + i * tags : nullptr;
    const double scale = double(a.scale[i]), gold = a.weight ? double(a.weight[y]) : 1.0;
    a.loss[i] = scale == 0 || label != -inf ? 0 : double(inf);
    if (scale == 0 || label == -inf) {  // forbidden, whatever the others are
      forbidden = forbidden || scale != 0;
      if (g && !a.accumulate) memset(g, 0, tags * sizeof(T));
      continue;
    }
    Vec<T> top = splat(-inf);
    IVec<T> bad = {};
    for (int64_t k = 0; k < vectors; ++k) {
      const int some = int(tags - k * L < L ? tags - k * L : L);
      Vec<T> x, e;
      load_some(x, f + k * L, some);
      if (b) load_some(e, b + k * L, some), x = (x + e) * h;
      bad |= ~(IVec<T>)(x < inf);
      top = max(top, x);
      put(k, x);
    }
    if (any(bad)) {
      a.loss[i] = __builtin_nan("");
      for (int64_t d = 0; g && d < tags; ++d) g[d] = T(a.loss[i]);
      for (int64_t d = 0; sums && d < tags; ++d) sums[d] = a.loss[i];
      continue;
    }
    const T most = max_lane(top);
    double finite = 0, weights = 0, dot = 0;  // of the tags that smoothing spreads over
    for (int64_t d = 0; a.smoothing > 0 && d < tags; ++d) {
      const T x = b ? (f[d] + b[d]) * h : f[d];
      if (!(x > -inf)) continue;
      const double w = a.weight ? double(a.weight[d]) : 1.0;
      finite += 1, weights += w, dot += w * (double(x) - double(most));
    }
    double total = 0;
    for (int64_t begin = 0; begin < vectors; begin += kInT) {
      Vec<T> sum = {};
      for (int64_t k = begin; k < begin + kInT && k < vectors; ++k) {
        Vec<T> v = get(k) - most, p;
        IVec<T> n;
        const IVec<T> there = v > least;
        exp_split(there ? v : splat(T(0)), p, n);
        v = there ? scale_by_power(p, n) : Vec<T>{};
        sum += v;
        put(k, v);
      }
      total += double(sum_lanes(sum));
    }
    const double each = finite > 0 ? a.smoothing / finite : 0.0, share = (1 - a.smoothing) * gold;
    a.loss[i] = scale * (share * (double(most) - double(label)) - each * dot);
    waiting.total[waiting.count] = total, waiting.loss[waiting.count] = a.loss + i;
    waiting.factor[waiting.count] = scale * (share + each * weights);
    if (++waiting.count == Waiting::kMost) waiting.flush();
    if (!g) continue;
    const T of_exp = T(h * scale * (share + each * weights) / total), of_gold = T(h * scale * share);
    for (int64_t k = 0; k < vectors; ++k) {
      const int some = int(tags - k * L < L ? tags - k * L : L);
      Vec<T> x = get(k) * of_exp;
      x = lane == splat_int<T>(y - k * L) ? x - of_gold : x;
      if (each > 0) {
        Vec<T> score, e;
        load_some(score, f + k * L, some);
        if (b) load_some(e, b + k * L, some), score += e;
        Vec<T> w = splat(T(1));
        if (a.weight) load_some(w, a.weight + k * L, some);
        x = score > -inf ? x - w * T(h * scale * each) : x;
      }
      if (sums) V ? void(held[V ? k : 0] += x) : store<T>(part + k * L, load(part + k * L) + x);
      if (a.accumulate) {
        Vec<T> before;
        load_some(before, g + k * L, some);
        x += before;
      }
      store_some(g + k * L, x, some);
    }
    if (sums && ++in_part == kPart) flush();
  }
  if (sums) flush();
  waiting.flush();
  return forbidden;
}

template <class T>
static bool local_rows(const LocalArgs<T>& a, const int64_t* order, int64_t count, T* scratch, double* sums) {
  switch ((a.tags + Simd<T>::lanes - 1) / Simd<T>::lanes) {
    case 1: return local_rows_of<T, 1>(a, order, count, scratch, sums);
    case 2: return local_rows_of<T, 2>(a, order, count, scratch, sums);
    case 3: return local_rows_of<T, 3>(a, order, count, scratch, sums);
    case 4: return local_rows_of<T, 4>(a, order, count, scratch, sums);
    default: return local_rows_of<T, 0>(a, order, count, scratch, sums);
  }
}

}  // namespace

#define PYSEQ_MEMM_LEVEL(suffix)                                              \
  namespace pyseq::chain {                                                    \
  extern const LocalRows<float> local_float_##suffix = local_rows<float>;     \
  extern const LocalRows<double> local_double_##suffix = local_rows<double>; \
  }
