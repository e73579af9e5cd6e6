// Entropy of one row, for the instruction set level that the including file sets; after kernel.hpp.
#pragma once

#include "entropy.hpp"

namespace {

using pyseq::chain::EntropyTables;

constexpr double kLeastShare = -708;  // log of what counts as 0: subnormal numbers would be slow

// log(1 + x) for finite x >= 0: fdlibm's polynomial for the rounded sum, and what the rounding took.
PYSEQ_INLINE Vec<double> log1p(Vec<double> x) {
  typedef typename Simd<double>::U U;
  const Vec<double> u = 1.0 + x;
  const U n = ((U)u - 0x3fe6a09e667f3bcd) >> 52;  // u / 2^n in [sqrt 1/2, sqrt 2)
  const Vec<double> whole = (Vec<double>)(n + (U)splat(6755399441055744.0)) - 6755399441055744.0;
  const Vec<double> f = (Vec<double>)((U)u - (n << 52)) - 1.0, half = 0.5 * f * f, s = f / (2.0 + f), z = s * s;
  const double c[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
                      2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01};
  Vec<double> r = splat(c[0]);
  for (int i = 1; i < 7; ++i) r = r * z + c[i];
  const Vec<double> low = whole * 1.90821492927058770002e-10 + (x - (u - 1.0)) / u;
  return whole * 6.93147180369123816490e-01 - ((half - (s * (half + r * z) + low)) - f);
}

// exp(x), and x brought to where that is not 0.
PYSEQ_INLINE Vec<double> share(Vec<double>& x) {
  const IVec<double> there = x > kLeastShare;
  Vec<double> p;
  IVec<double> n;
  x = there ? x : splat(kLeastShare);
  exp_split(x, p, n);
  return there ? scale_by_power(p, n) : Vec<double>{};
}

// A step on the tape. By tag: the log sum of the paths to it, counted from the largest, and its exponential; the log sum over
// its predecessors, 0 where there are none; what makes a predecessor's weight a share of them, the first 0 where only logs
// can tell the shares of some tag; the entropy of the paths to it; and its likeliest predecessor, -1 where there is none.
struct EntropyStep {
  double *alpha, *weights, *sums, *scale, *entropy;
  int64_t* likeliest;
};

constexpr double kLeastWeight = 1e-200;  // of the likeliest predecessor, beside which others may have underflowed

// Of vectors of destinations: log of all they have before them, and of one predecessor; -inf where an edge is forbidden.
PYSEQ_INLINE Vec<double> score(double alpha, const double* edge) {
  const Vec<double> x = alpha + load(edge);
  return x > 0.1 * pyseq::chain::kImpossible ? x : splat(-__builtin_inf());
}

// What is left of a vector of destinations when its choices are known.
PYSEQ_INLINE void chosen(
    const EntropyStep& now, int64_t j, Vec<double> top, Vec<double> rest, Vec<double> mixed, Vec<double> scale, IVec<double> at) {
  const Vec<double> more = log1p(rest);
  store<double>(now.sums + j, top + more);
  store<double>(now.scale + j, scale / (1.0 + rest));
  store<double>(now.entropy + j, mixed / (1.0 + rest) + more);
  memcpy(now.likeliest + j, &at, sizeof at);
}

static void choose_by_logs(
    int64_t j, const double* edges, const EntropyTables& t, const EntropyStep& before, const EntropyStep& now) {
  Vec<double> top = splat(-__builtin_inf()), rest = {}, mixed = {};
  IVec<double> at = IVec<double>{} - 1;
  for (int64_t i = 0; i < t.tags; ++i) {
    const Vec<double> x = score(before.alpha[i], edges + i * t.padded + j);
    const IVec<double> better = x > top;
    top = better ? x : top;
    at = better ? IVec<double>{} + i : at;
  }
  top = at < 0 ? Vec<double>{} : top;
  for (int64_t i = 0; i < t.tags; ++i) {
    Vec<double> x = score(before.alpha[i], edges + i * t.padded + j) - top;
    const Vec<double> e = share(x);
    rest += at == i ? Vec<double>{} : e;
    mixed += e * (before.entropy[i] - x);
  }
  chosen(now, j, top, rest, mixed, Vec<double>{}, at);
}

// All of a step but alpha, from the one before. -log q of the likeliest predecessor is log1p of what the others have beside
// it, so that small entropies keep their digits. bases: H(i) - alpha(i) of the predecessors.
static void choose(
    int64_t row, int64_t width, const EntropyTables& t, const EntropyStep& before, const double* bases, const EntropyStep& now) {
  constexpr int L = Simd<double>::lanes;
  const double *edges = t.edges + row * t.padded, *weights = t.weights + row * t.padded;
  bool slow = false;
  even_tiles<4>(width / L, [&](auto vectors, int64_t begin) {
    Vec<double> most[vectors] = {}, rest[vectors] = {}, mixed[vectors] = {}, top[vectors], scale[vectors];
    IVec<double> at[vectors] = {}, low = {};
    for (int64_t i = 0; i < t.tags; ++i)
      for (int v = 0; v < vectors; ++v) {
        const Vec<double> w = before.weights[i] * load(weights + i * t.padded + (begin + v) * L);
        at[v] = w > most[v] ? IVec<double>{} + i : at[v];
        most[v] = max(most[v], w);
      }
    for (int v = 0; v < vectors; ++v) {
      low |= (IVec<double>)(most[v] < kLeastWeight);
      scale[v] = 1.0 / most[v];
      for (int l = 0; l < L; ++l) top[v][l] = before.alpha[at[v][l]] + edges[at[v][l] * t.padded + (begin + v) * L + l];
    }
    if (any(low)) {
      slow = true;
      for (int v = 0; v < vectors; ++v) choose_by_logs((begin + v) * L, edges, t, before, now);
      return;
    }
    for (int64_t i = 0; i < t.tags; ++i)
      for (int v = 0; v < vectors; ++v) {
        const int64_t place = i * t.padded + (begin + v) * L;
        const Vec<double> e = before.weights[i] * load(weights + place) * scale[v];
        rest[v] += at[v] == i ? Vec<double>{} : e;
        mixed[v] += e * (at[v] == i ? splat(before.entropy[i]) : bases[i] - (load(edges + place) - top[v]));
      }
    for (int v = 0; v < vectors; ++v) chosen(now, (begin + v) * L, top[v], rest[v], mixed[v], scale[v], at[v]);
  });
  if (slow) now.scale[0] = 0;
}

// The adjoints of a step, of alpha and of the entropies, to those of the step before; their parts go to counts. By q (c - H)
// with c = H(i) - log q, where that of the likeliest predecessor is what those of the others lack to 0.
struct Adjoints {
  double *alpha, *entropy;
};
template <bool LOGS>
static void return_to(
    int64_t row, int64_t width, const EntropyTables& t, const EntropyStep& before, const double* bases, const EntropyStep& now,
    const Adjoints& of, const Adjoints& to, double* parts, double* counts) {
  constexpr int L = Simd<double>::lanes;
  const double *edges = t.edges + row * t.padded, *weights = t.weights + row * t.padded;
  counts += row * t.padded;
  memset(parts, 0, 2 * t.tags * L * sizeof(double));  // of both adjoints, by source
  even_tiles<2>(width / L, [&](auto vectors, int64_t begin) {
    Vec<double> adjoint[vectors], mass[vectors], scale[vectors], sums[vectors], entropy[vectors], others[vectors] = {};
    IVec<double> at[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = (begin + v) * L;
      adjoint[v] = load(of.alpha + j), mass[v] = load(of.entropy + j), scale[v] = load(now.scale + j);
      sums[v] = load(now.sums + j), entropy[v] = load(now.entropy + j);
      memcpy(&at[v], now.likeliest + j, sizeof at[v]);
    }
    for (int64_t i = 0; i < t.tags; ++i) {
      Vec<double> by_alpha = load(parts + 2 * i * L), by_entropy = load(parts + (2 * i + 1) * L);
      for (int v = 0; v < vectors; ++v) {
        const int64_t place = i * t.padded + (begin + v) * L;
        Vec<double> q, c;
        if (LOGS) {
          Vec<double> x = score(before.alpha[i], edges + place) - sums[v];
          q = share(x);
          c = before.entropy[i] - x - entropy[v];
        } else {
          q = before.weights[i] * load(weights + place) * scale[v];
          c = bases[i] - (load(edges + place) - sums[v]) - entropy[v];
        }
        const Vec<double> part = at[v] == i ? Vec<double>{} : q * c, whole = q * adjoint[v] + mass[v] * part;
        others[v] += part;
        store<double>(counts + place, load(counts + place) + whole);
        by_alpha += whole;
        by_entropy += mass[v] * q;
      }
      store<double>(parts + 2 * i * L, by_alpha);
      store<double>(parts + (2 * i + 1) * L, by_entropy);
    }
    for (int v = 0; v < vectors; ++v)
      for (int l = 0; l < L; ++l) {
        if (at[v][l] < 0) continue;
        const double left = mass[v][l] * others[v][l];
        parts[2 * at[v][l] * L] -= left, counts[at[v][l] * t.padded + (begin + v) * L + l] -= left;
      }
  });
  for (int64_t i = 0; i < t.tags; ++i) {
    to.alpha[i] = sum_lanes(load(parts + 2 * i * L));
    to.entropy[i] = sum_lanes(load(parts + (2 * i + 1) * L));
  }
}

template <class T>
static double entropy_row(const ChainArgs<T>& args, const EntropyTables& t, const Row& row, double* scratch, double* counts) {
  constexpr int L = Simd<double>::lanes;
  const int64_t n = row.length, padded = t.padded;
  const double inf = __builtin_inf();
  const auto step = [&](int64_t k) {
    double* at = scratch + k * pyseq::chain::kEntropyTape * padded;
    return EntropyStep{at, at + padded, at + 2 * padded, at + 3 * padded, at + 4 * padded, (int64_t*)(at + 5 * padded)};
  };
  double *rest = step(n + 1).alpha, *bases = rest;
  const auto based = [&](const EntropyStep& before, double* to) {  // H(i) - alpha(i), where i has a share
    for (int64_t i = 0; i < t.tags; ++i) to[i] = before.weights[i] > 0 ? before.entropy[i] - before.alpha[i] : 0.0;
  };
  memset(step(0).entropy, 0, padded * sizeof(double));
  for (int64_t k = 0; k < n; ++k) {
    const T* f = args.emissions + row.index * args.stride_batch + row.step(k) * args.stride_time;
    const EntropyStep now = step(k);
    if (k) based(step(k - 1), bases), choose(0, padded, t, step(k - 1), bases, now);
    Vec<double> top = splat(-inf);
    for (int64_t j = 0; j < padded; j += L) {
      Vec<double> x;
      load_some(x, f + j, int(t.tags - j < L ? (t.tags > j ? t.tags - j : 0) : L));
      IVec<double> at = {};
      if (k) memcpy(&at, now.likeliest + j, sizeof at);
      x += k ? load(now.sums + j) : load(t.start + j);
      x = at < 0 ? splat(-inf) : x;
      store<double>(now.alpha + j, x);
      top = max(top, x);
    }
    const double shift = max_lane(top) > -inf ? max_lane(top) : 0.0;
    for (int64_t j = 0; j < padded; j += L) {
      Vec<double> x = load(now.alpha + j) - shift;
      store<double>(now.alpha + j, x);
      store<double>(now.weights + j, share(x));
    }
  }
  based(step(n - 1), bases);
  choose(t.tags, pyseq::chain::kBehind, t, step(n - 1), bases, step(n));
  const bool feasible = step(n).likeliest[0] >= 0;
  if (counts) {
    Adjoints of{rest, rest + padded}, to{rest + 2 * padded, rest + 3 * padded};
    bases = rest + 4 * padded;
    memset(rest, 0, 4 * padded * sizeof(double));
    of.entropy[0] = feasible ? args.weight(row) : 0.0;
    for (int64_t k = n; k > 0; --k) {
      based(step(k - 1), bases);
      const auto back = step(k).scale[0] > 0 ? return_to<false> : return_to<true>;
      const int64_t first = k == n ? t.tags : 0, width = k == n ? pyseq::chain::kBehind : padded;
      back(first, width, t, step(k - 1), bases, step(k), of, to, rest + 5 * padded, counts);
      T* g = args.grad_emissions + row.index * args.grad_stride_batch + row.step(k - 1) * args.grad_stride_time;
      for (int64_t j = 0; j < t.tags; ++j) g[j] = T(to.alpha[j]);
      const Adjoints done = of;
      of = to, to = done;
    }
    for (int64_t j = 0; j < t.tags; ++j) counts[2 * t.tags * padded + j] += of.alpha[j];
  }
  return feasible ? step(n).entropy[0] : 0.0;
}

}  // namespace

#define PYSEQ_ENTROPY_LEVEL(suffix)                                                \
  namespace pyseq::chain {                                                         \
  extern const EntropyRow<float> entropy_float_##suffix = entropy_row<float>;     \
  extern const EntropyRow<double> entropy_double_##suffix = entropy_row<double>; \
  }
