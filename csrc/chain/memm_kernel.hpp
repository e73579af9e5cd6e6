// Local steps for the instruction set level that the including file sets.
#pragma once

#include "memm.hpp"
#include "simd.hpp"

namespace {

using pyseq::chain::LocalArgs;

template <class T>
static void local_rows(const LocalArgs<T>& a, const int64_t* order, int64_t count, T* scratch, double* sums) {
  constexpr int L = Simd<T>::lanes;
  constexpr int64_t kTogether = 64 * L;  // exponentials that are added up in T
  const T inf = __builtin_inff(), least = sizeof(T) == 4 ? T(-87) : T(-708);  // below it exponentials are 0, never subnormal
  T* part = scratch + a.tags + L;  // of the sums, of up to kPart steps
  constexpr int kPart = 16;
  int waiting = 0;
  const auto flush = [&] {
    for (int64_t d = 0; sums && d < a.tags; ++d) sums[d] += double(part[d]), part[d] = 0;
    waiting = 0;
  };
  memset(part, 0, (a.tags + L) * sizeof(T));
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = order[k], y = a.label[i], tags = a.tags;
    const T *f = a.scores + i * tags, *b = a.context[i] < 0 ? nullptr : a.bias + a.context[i] * tags;
    const T h = b ? T(a.factor) : T(1);
    T* g = a.grad ? a.grad + i * tags : nullptr;
    const double scale = double(a.scale[i]), gold = a.weight ? double(a.weight[y]) : 1.0;
    a.loss[i] = 0;
    if (scale == 0) {
      if (g && !a.accumulate) memset(g, 0, tags * sizeof(T));
      continue;
    }
    if ((b ? f[y] + b[y] : f[y]) == -inf) {  // forbidden, whatever the others are
      a.loss[i] = inf;
      if (g && !a.accumulate) memset(g, 0, tags * sizeof(T));
      continue;
    }
    Vec<T> top = splat(-inf);
    IVec<T> bad = {};
    for (int64_t d = 0; d < tags; d += L) {
      const int some = int(tags - d < L ? tags - d : L);
      Vec<T> x, e;
      load_some(x, f + d, some);
      if (b) load_some(e, b + d, some), x = (x + e) * h;
      bad |= ~(IVec<T>)(x < inf);
      top = max(top, x);
      store<T>(scratch + d, x);
    }
    if (any(bad)) {
      a.loss[i] = __builtin_nan("");
      for (int64_t d = 0; g && d < tags; ++d) g[d] = T(a.loss[i]);
      for (int64_t d = 0; sums && d < tags; ++d) sums[d] = a.loss[i];
      continue;
    }
    const T most = max_lane(top), right = scratch[y];
    double finite = 0, weights = 0, dot = 0;  // of the tags that smoothing spreads over
    for (int64_t d = 0; a.smoothing > 0 && d < tags; ++d) {
      if (!(scratch[d] > -inf)) continue;
      const double w = a.weight ? double(a.weight[d]) : 1.0;
      finite += 1, weights += w, dot += w * (double(scratch[d]) - double(most));
    }
    double total = 0;
    for (int64_t begin = 0; begin < tags; begin += kTogether) {
      Vec<T> part = {};
      for (int64_t d = begin; d < begin + kTogether && d < tags; d += L) {
        Vec<T> v = load(scratch + d) - most, p;
        IVec<T> n;
        const IVec<T> there = v > least;
        exp_split(there ? v : splat(T(0)), p, n);
        v = there ? scale_by_power(p, n) : Vec<T>{};
        part += v;
        store<T>(scratch + d, v);
      }
      total += double(sum_lanes(part));
    }
    const double log_total = __builtin_log(total), each = finite > 0 ? a.smoothing / finite : 0.0;
    const double share = (1 - a.smoothing) * gold;
    a.loss[i] = scale * (share * (log_total - (double(right) - double(most))) + each * (weights * log_total - dot));
    if (!g) continue;
    const T of_exp = T(h * scale * (share + each * weights) / total), of_gold = T(h * scale * share);
    for (int64_t d = 0; d < tags; d += L) store<T>(scratch + d, load(scratch + d) * of_exp);
    scratch[y] -= of_gold;
    for (int64_t d = 0; each > 0 && d < tags; ++d)
      if ((b ? f[d] + b[d] : f[d]) > -inf) scratch[d] -= T(h * scale * each * (a.weight ? double(a.weight[d]) : 1.0));
    for (int64_t d = 0; d < tags; d += L) {
      const int some = int(tags - d < L ? tags - d : L);
      Vec<T> x = load(scratch + d);
      if (sums) store<T>(part + d, load(part + d) + x);
      if (a.accumulate) {
        Vec<T> before;
        load_some(before, g + d, some);
        x += before;
      }
      store_some(g + d, x, some);
    }
    if (sums && ++waiting == kPart) flush();
  }
  flush();
}

}  // namespace

#define PYSEQ_MEMM_LEVEL(suffix)                                              \
  namespace pyseq::chain {                                                    \
  extern const LocalRows<float> local_float_##suffix = local_rows<float>;     \
  extern const LocalRows<double> local_double_##suffix = local_rows<double>; \
  }
