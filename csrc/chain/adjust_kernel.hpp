// Adjusted emissions of a maximum-entropy Markov model, for the instruction set level that the including file sets.
#pragma once

#include "memm.hpp"
#include "simd.hpp"

namespace {

using pyseq::chain::AdjustArgs;
using pyseq::chain::Side;
using D = double;
constexpr int kDoubles = Simd<D>::lanes, kSteps = 4;  // steps at a time

// exp x, 0 where that is below the normal numbers.
static inline Vec<D> exp_of(Vec<D> x) {
  Vec<D> p;
  IVec<D> n;
  const IVec<D> there = x > -708.0;
  exp_split(there ? x : splat(0.0), p, n);
  p = there ? scale_by_power(p, n) : Vec<D>{};
  return x == x ? p : x;
}

static void adjust_side(Side& side, int64_t tags, int64_t padded, double factor) {
  const double inf = __builtin_inf();
  for (int64_t c = 0; c < padded; ++c) side.most[c] = -inf;
  for (int64_t j = 0; j < tags; ++j)
    for (int64_t c = 0; c < tags; ++c) {
      const double x = side.score(j, c);
      side.most[c] = x > side.most[c] ? x : side.most[c];
    }
  for (int64_t j = 0; j < tags; ++j)
    for (int64_t c = 0; c < padded; c += kDoubles) {
      alignas(64) double x[kDoubles];
      for (int64_t k = 0; k < kDoubles; ++k) {
        const bool inside = c + k < tags && side.most[c + k] > -inf;
        x[k] = inside ? factor * (side.score(j, c + k) - side.most[c + k]) : -inf;
      }
      store<D>(side.exponentials + j * padded + c, exp_of(load(x)));
    }
  for (int64_t c = 0; c < tags; ++c) side.most[c] *= factor;
}

// The log sum over tags j of exp factor (f[j] + score(j, c)), whatever they are; +inf in place of -inf.
static double exact_normaliser(const Side& side, const double* f, int64_t tags, int64_t c, double factor) {
  const double inf = __builtin_inf();
  double top = -inf, total = 0;
  for (int64_t j = 0; j < tags; ++j) {
    const double x = factor * (f[j] + side.score(j, c));
    top = x > top ? x : top;
  }
  const double least = top == -inf || top == inf ? 0.0 : top;
  for (int64_t j = 0; j < tags; ++j) total += __builtin_exp(factor * (f[j] + side.score(j, c)) - least);
  return total == 0 ? inf : __builtin_log(total) + least;
}

// Normalisers (count, padded) of up to kSteps steps, of each context; f: their emissions, e: the exponentials of these.
static void normalisers(
    const Side& side, const double* f, const double* e, const double* tops, int count, int64_t tags, int64_t padded,
    double factor, double* out) {
  for (int64_t c = 0; c < padded; c += 2 * kDoubles) {
    Vec<D> total[kSteps][2] = {};
    for (int64_t j = 0; j < tags; ++j) {
      const double* row = side.exponentials + j * padded + c;
      const Vec<D> left = load(row), right = load(row + kDoubles);
      for (int r = 0; r < kSteps; ++r) total[r][0] += e[r * padded + j] * left, total[r][1] += e[r * padded + j] * right;
    }
    for (int r = 0; r < count; ++r)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = c + half * kDoubles;
        const IVec<D> fine = total[r][half] > 1e-250;  // else a term that is lost may matter
        store<D>(out + r * padded + at, log_of(fine ? total[r][half] : splat(1.0)) + tops[r] + load(side.most + at));
        for (int k = 0; any(~fine) && k < kDoubles && at + k < tags; ++k)
          if (!(total[r][half][k] > 1e-250)) out[r * padded + at + k] = exact_normaliser(side, f + r * padded, tags, at + k, factor);
      }
  }
}

// A sequence. scratch: 3 kSteps rows of padded.
template <class T> static void adjust_rows(const AdjustArgs<T>& a, int64_t b, const int64_t* steps, int64_t count, double* scratch) {
  const int64_t tags = a.tags, padded = a.padded;
  const double h = a.factor, share = a.sides == 2 ? 0.5 : 1.0;
  double *f = scratch, *e = f + kSteps * padded, *found = e + kSteps * padded;
  double* out = a.out + b * a.time * tags;
  memset(out, 0, a.time * tags * sizeof(double));
  memset(e, 0, kSteps * padded * sizeof(double));
  const T* emissions = a.emissions + b * a.time * tags;
  const auto is_end = [&](const Side& side, int64_t k) { return side.forward ? k == 0 : k == count - 1; };
  for (int64_t k = 0; k < count; ++k)
    for (int s = 0; s < a.sides; ++s) {
      const double by = is_end(a.side[s], k) ? share : share * h;
      for (int64_t d = 0; d < tags; ++d) out[steps[k] * tags + d] += by * double(emissions[steps[k] * tags + d]);
    }
  double tops[kSteps];
  for (int64_t begin = 0; begin < count; begin += kSteps) {
    const int some = int(count - begin < kSteps ? count - begin : kSteps);
    for (int r = 0; r < some; ++r) {
      double top = -__builtin_inf();
      for (int64_t d = 0; d < tags; ++d) {
        f[r * padded + d] = double(emissions[steps[begin + r] * tags + d]);
        top = f[r * padded + d] > top ? f[r * padded + d] : top;
      }
      for (int64_t d = tags; d < padded; ++d) f[r * padded + d] = -__builtin_inf();
      const double least = top < -1e300 || top > 1e300 ? 0.0 : top;
      for (int64_t d = 0; d < padded; d += kDoubles)
        store<D>(e + r * padded + d, exp_of((load(f + r * padded + d) - least) * h));
      tops[r] = h * least;
    }
    for (int s = 0; s < a.sides; ++s) {
      const Side& side = a.side[s];
      normalisers(side, f, e, tops, some, tags, padded, h, found);
      for (int r = 0; r < some; ++r) {
        const int64_t k = begin + r;
        if (is_end(side, k)) {
          const Side none{nullptr, false, nullptr, nullptr, 0};
          const double alone = exact_normaliser(none, f + r * padded, tags, 0, 1.0);
          for (int64_t d = 0; d < tags; ++d) out[steps[k] * tags + d] -= share * alone;
        } else {
          double* to = out + steps[side.forward ? k - 1 : k + 1] * tags;
          for (int64_t d = 0; d < tags; ++d) to[d] -= share * found[r * padded + d];
        }
      }
    }
  }
}

}  // namespace

#define PYSEQ_ADJUST_LEVEL(suffix)                                                \
  namespace pyseq::chain {                                                        \
  extern const AdjustSide adjust_side_##suffix = adjust_side;                     \
  extern const AdjustRows<float> adjust_float_##suffix = adjust_rows<float>;      \
  extern const AdjustRows<double> adjust_double_##suffix = adjust_rows<double>;   \
  }
