// Kernels that advance a group of sequences together, tags in the vector lanes; see docs/chain.md for the recursions.
//
// A group of up to kGroupRows sequences, longest first: each step is a (rows x tags) @ (tags x tags) product in register
// tiles, then one pass over the rows. Tapes are (step, row, padded tags) and stay in the cache.
#pragma once

#include "common.hpp"

namespace {

// out (MR x NR vectors) = x (MR x tags, row stride ldx) @ panel (tags x NR vectors). There is a tag and there is a step:
// with loops that might not run the sums of these tiles would go through memory.
template <class C, int MR, int NR>
PYSEQ_INLINE void product_tile(const C* x, int64_t ldx, const C* panel, int64_t tags, C* out) {
  constexpr int L = Simd<C>::lanes;
  for (int64_t i0 = 0; i0 < tags; i0 += kSuper) {
    const int64_t i2 = i0 + kSuper < tags ? i0 + kSuper : tags;
    Vec<C> sum[MR][NR] = {};
    int64_t i = i0;
    do {
      const int64_t stop = i + kChunk < i2 ? i + kChunk : i2;
      Vec<C> part[MR][NR] = {};
      do {
        Vec<C> w[NR];
        for (int v = 0; v < NR; ++v) w[v] = load(panel + (i * NR + v) * L);
        for (int r = 0; r < MR; ++r) {
          const Vec<C> mass = splat(x[r * ldx + i]);
          for (int v = 0; v < NR; ++v) part[r][v] += mass * w[v];
        }
      } while (++i < stop);
      for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NR; ++v) sum[r][v] += part[r][v];
    } while (i < i2);
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NR; ++v) {
        C* to = out + r * ldx + v * L;
        store<C>(to, i0 == 0 ? sum[r][v] : load(to) + sum[r][v]);
      }
  }
}

// out (MR x NR vectors)[j] = max over i of x[i] + panel[i][j], in double.
template <class C, int MR, int NR>
PYSEQ_INLINE void best_tile(const C* x, int64_t ldx, const C* panel, int64_t tags, C* out) {
  constexpr int L = Simd<C>::lanes;
  Vec<C> best[MR][NR];
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NR; ++v) best[r][v] = splat(-C(__builtin_inf()));
  int64_t i = 0;
  do {
    Vec<C> w[NR];
    for (int v = 0; v < NR; ++v) w[v] = load(panel + (i * NR + v) * L);
    for (int r = 0; r < MR; ++r) {
      const Vec<C> from = splat(x[r * ldx + i]);
      for (int v = 0; v < NR; ++v) best[r][v] = max(from + w[v], best[r][v]);
    }
  } while (++i < tags);
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NR; ++v) store<C>(out + r * ldx + v * L, best[r][v]);
}

template <class C, int MR, int NR, bool Best>
static __attribute__((noinline)) void tile(const C* x, int64_t ldx, const C* panel, int64_t tags, C* out) {
  if constexpr (Best)
    best_tile<C, MR, NR>(x, ldx, panel, tags, out);
  else
    product_tile<C, MR, NR>(x, ldx, panel, tags, out);
}

// f(vectors, j) for the panels of `padded` columns that begin with column j.
template <class C, class F> PYSEQ_INLINE void for_panels(int64_t padded, F f) {
  constexpr int L = Simd<C>::lanes;
  for (int64_t j = 0; j < padded;) {
    const int64_t left = (padded - j) / L;
    const int vectors = left >= kTileVectors ? kTileVectors : PYSEQ_LEVEL == 4 && left == 2 ? 2 : 1;
    fixed<kTileVectors>(vectors, [&](auto constant) { f(constant, j); });
    j += vectors * L;
  }
}

// out (rows x padded) = x (rows x tags) @ matrix in panels, or its max-plus product; both with row stride `padded`.
template <class C, bool Best>
static void product(int rows, const C* x, int64_t padded, const C* panels, int64_t tags, C* out) {
  for_panels<C>(padded, [&](auto vectors, int64_t j) {
    for (int r = 0; r < rows; r += kTileRows)
      fixed<kTileRows>(rows - r < kTileRows ? rows - r : kTileRows, [&](auto here) {
        tile<C, here, vectors, Best>(x + r * padded, padded, panels + j * tags, tags, out + r * padded + j);
      });
  });
}

// counts[i0 .. i0 + MI)[j0 .. NR vectors) += a^T w over `steps` tape rows.
template <class C, int MI, int NR>
static __attribute__((noinline)) void count_tile(const C* a, const C* w, int64_t steps, int64_t padded, double* counts) {
  constexpr int L = Simd<C>::lanes;
  Vec<C> sum[MI][NR] = {};
  int64_t c = 0;
  do {
    Vec<C> later[NR];
    for (int v = 0; v < NR; ++v) later[v] = load(w + v * L);
    for (int i = 0; i < MI; ++i) {
      const Vec<C> mass = splat(a[i]);
      for (int v = 0; v < NR; ++v) sum[i][v] += mass * later[v];
    }
    a += padded;
    w += padded;
  } while (++c < steps);
  for (int i = 0; i < MI; ++i)
    for (int v = 0; v < NR; ++v)
      for (int l = 0; l < L; ++l) counts[i * padded + v * L + l] += sum[i][v][l];
}

// counts (tags x padded) += a^T w, blocked so that a slice of w stays in the first-level cache.
template <class C>
static void add_counts(const C* a, const C* w, int64_t steps, int64_t tags, int64_t padded, double* counts) {
  constexpr int64_t block = 96;
  for (int64_t c = 0; c < steps; c += block, a += block * padded, w += block * padded) {
    const int64_t size = c + block < steps ? block : steps - c;
    for_panels<C>(padded, [&](auto vectors, int64_t j) {
      even_tiles<kTileRows>(tags, [&](auto here, int64_t i) {
        count_tile<C, here, vectors>(a + i, w + j, size, padded, counts + i * padded + j);
      });
    });
  }
}

struct StepState {
  int64_t power;    // sum of the shifts
  int64_t suspect;  // last step at which a possible state held 0 and may have hidden too much
  int64_t hidden;   // log2 of what a possible state that holds 0 may hide
  bool flagged;     // a state lost digits, or a score is NaN, +inf or out of range
};

// One step of one row: a = dot * exp(f) and u = exp(f), both divided by 2^shift, where shift brings the largest a into
// [1, 2). `dot` is the product with the step before and may be `a` itself. NV is the number of vectors, 0 if not fixed.
// Returns false, having left `dot` as it was, if the row's zeros and infinities want `Every`.
template <class C, class In, int NV, bool Every>
PYSEQ_INLINE bool step_row(
    const In* f, const C* dot, int64_t k, int64_t tags, int64_t padded, IVec<C> real, C* a, C* u, IVec<C>* exponents,
    StepState& state) {
  constexpr int L = Simd<C>::lanes;
  typedef typename Simd<C>::Int Int;
  const int64_t vectors = NV ? NV : padded / L;
  const Vec<C> range = splat(kExpRange<C>), tiny = splat(kTiny<C>);
  const IVec<C> none = IVec<C>{} - Int(1 << 22), sign = (IVec<C>)splat(-C(0));
  IVec<C> top = none, bad = {}, hiding = none, farthest = {}, least_held = (IVec<C>)tiny;
  Vec<C> p[NV ? NV : 1], mass[NV ? NV : 1];
  IVec<C> n[NV ? NV : 1];
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t at = NV ? v : 0;
    const bool last = v + 1 == vectors;
    Vec<C> x;
    load_some(x, f + v * L, int(tags - v * L < L ? tags - v * L : L));
    const Vec<C> before = load(dot + v * L);
    if constexpr (Every) {
      const IVec<C> low = (IVec<C>)(x <= range), high = (IVec<C>)(x >= -range), fine = low & high;
      const IVec<C> sunk = ~high & (IVec<C>)(x > -C(__builtin_inf()));  // finite, but 0 beside any score in range
      const IVec<C> possible = last ? fine & real : fine, held = (IVec<C>)(before > C(0));
      bad |= ~low | (possible & held & (IVec<C>)(before < tiny));
      exp_split(fine ? x : Vec<C>{}, p[at], n[at]);
      const IVec<C> unheld =
          sunk ? IVec<C>{} - Int(kExpRange<C> * 1.4426) + (Simd<C>::bias + 4) : possible & ~held ? n[at] : none;
      hiding = unheld > hiding ? unheld : hiding;
      n[at] = fine & held ? n[at] : none;  // a = u = 0: no path goes there
    } else {
      const IVec<C> held = last ? (real ? (IVec<C>)before : (IVec<C>)tiny) : (IVec<C>)before;
      if (last) x = real ? x : Vec<C>{};
      const IVec<C> far = (IVec<C>)x & ~sign;  // bits of floats >= 0, NaN above all, are in their order
      farthest = far > farthest ? far : farthest;
      least_held = held < least_held ? held : least_held;
      exp_split(x, p[at], n[at]);
      if (last) n[at] = real ? n[at] : none;
    }
    mass[at] = before * p[at];
    const IVec<C> exponent = ((IVec<C>)mass[at] >> Simd<C>::mantissa) + n[at];
    top = exponent > top ? exponent : top;
    if (!NV) store<C>(u + v * L, p[at]), exponents[v] = n[at];
  }
  if (!Every && any((IVec<C>)(farthest > (IVec<C>)range) | (IVec<C>)(least_held < (IVec<C>)tiny))) return false;
  const int64_t largest = max_lane(top), shift = largest < -(1 << 21) ? 0 : largest - Simd<C>::bias;
  const IVec<C> base = IVec<C>{} + Int(shift);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t at = NV ? v : 0;
    if (!NV) p[at] = load(u + v * L), mass[at] = load(dot + v * L) * p[at], n[at] = exponents[v];
    store<C>(a + v * L, scale_by_power(mass[at], n[at] - base));
    store<C>(u + v * L, scale_by_power(p[at], n[at] - base));
  }
  state.power += shift;
  state.flagged |= Every && any(bad);
  if (Every && any((IVec<C>)(hiding > none))) {
    constexpr int least = 2 - Simd<C>::bias;
    state.hidden = (state.hidden > least ? state.hidden : least) + max_lane(hiding) - shift + (65 - __builtin_clzll(tags));
    state.suspect = state.hidden > kHidden<C> || largest < -(1 << 21) ? k : state.suspect;
  } else {
    state.hidden = -(1 << 22);
  }
  return true;
}
template <class C, class In>
PYSEQ_INLINE void step_row_of(
    const In* f, const C* dot, int64_t k, int64_t tags, int64_t padded, IVec<C> real, C* a, C* u, IVec<C>* exponents,
    StepState& state) {
  bool plain;
  switch (padded / Simd<C>::lanes) {
    case 1: plain = step_row<C, In, 1, false>(f, dot, k, tags, padded, real, a, u, exponents, state); break;
    case 2: plain = step_row<C, In, 2, false>(f, dot, k, tags, padded, real, a, u, exponents, state); break;
    case 4: plain = step_row<C, In, 4, false>(f, dot, k, tags, padded, real, a, u, exponents, state); break;
    default: plain = step_row<C, In, 0, false>(f, dot, k, tags, padded, real, a, u, exponents, state);
  }
  if (!plain) step_row<C, In, 0, true>(f, dot, k, tags, padded, real, a, u, exponents, state);
}

template <class C> static size_t scratch_elements(int64_t rows, int64_t time, int64_t padded, bool grads) {
  return rows * padded * (time + (grads ? time : 1)) + (rows + 2) * padded;
}
static size_t rows_scratch_bytes(int64_t rows, int64_t time, int64_t padded, size_t element, bool grads) {
  return element * scratch_elements<float>(rows, time, padded, grads) + 2 * padded + 64;
}

template <class T, class C>
static void rows_forward_backward(
    const ChainArgs<T>& args, const ChainTables<C>& tables, const Row* group, int rows, void* scratch, GroupResult& out) {
  constexpr int L = Simd<C>::lanes;
  const int64_t tags = tables.tags, padded = tables.padded, stride = rows * padded;
  const int64_t longest = group[0].length;
  const bool grads = args.grads();
  IVec<C> real;  // lanes of a row's last vector that are tags
  for (int l = 0; l < L; ++l) real[l] = padded - L + l < tags ? -1 : 0;

  C* a = (C*)scratch;                          // (longest, rows, padded)
  C* u = a + longest * stride;                 // likewise, or one step where no gradient is wanted
  C* b = u + (grads ? longest : 1) * stride;   // (rows, padded)
  IVec<C>* exponents = (IVec<C>*)(b + stride);
  uint8_t* reached = (uint8_t*)(exponents + 2 * padded / L);

  StepState state[kGroupRows];
  double log_z[kGroupRows];
  C weight[kGroupRows];
  for (int r = 0; r < rows; ++r) {
    state[r] = {0, -1, -(1 << 22), false};
    weight[r] = C(args.weight(group[r]));
  }

  int active = rows;
  for (int64_t k = 0; k < longest; ++k) {
    while (group[active - 1].length <= k) --active;
    C *now = a + k * stride, *step = u + (grads ? k * stride : 0);
    if (k) product<C, false>(active, now - stride, padded, tables.forward, tags, now);
    for (int r = 0; r < active; ++r) {
      C *ar = now + r * padded, *ur = step + r * padded;
      const T* f = args.emissions + group[r].index * args.stride_batch + group[r].step(k) * args.stride_time;
      const C* dot = k ? ar : tables.start;
      step_row_of<C>(f, dot, k, tags, padded, real, ar, ur, exponents, state[r]);
    }
  }

  bool served[kGroupRows];  // rows whose gradients are to be written
  for (int r = 0; r < rows; ++r) {
    const Row& row = group[r];
    const C* last = a + (row.length - 1) * stride + r * padded;
    out.flagged[r] = row.done || state[r].flagged ||
                     (state[r].suspect >= 0 && underflowed<T, C>(args, row, a + r * padded, stride, 1, state[r].suspect, reached));
    log_z[r] = close_row(args, tables, row, last, 1, state[r].power, out.flagged[r]);
    served[r] = !out.flagged[r] && log_z[r] != -__builtin_inf();
  }

  if (grads) {
    for (int64_t x = 0; x < rows * padded; x += L) store<C>(b + x, Vec<C>{});
    active = 0;
    for (int64_t k = longest - 1; k >= 0; --k) {
      C *now = a + k * stride, *step = u + k * stride;
      while (active < rows && group[active].length > k) {  // this row ends here
        memcpy(b + active * padded, tables.end, padded * sizeof(C));
        ++active;
      }
      for (int r = 0; r < rows; ++r) {
        C *ar = now + r * padded, *ur = step + r * padded, *br = b + r * padded;
        if (r >= active || !served[r]) {
          for (int64_t j = 0; j < padded; j += L) store<C>(ur + j, Vec<C>{}), store<C>(ar + j, Vec<C>{});
          continue;
        }
        Vec<C> overlap = {};
        for (int64_t j = 0; j < padded; j += L) overlap += load(ar + j) * load(br + j);
        const C whole = sum_lanes(overlap);  // 1 but at the row's end, and b is kept so by dividing by it
        const C share = C(1) / whole;
        const Vec<C> mean = splat(share), scaled = splat(share * weight[r]);
        T* g = args.grad_emissions + group[r].index * args.grad_stride_batch + group[r].step(k) * args.grad_stride_time;
        for (int64_t j = 0; j < padded; j += L) {
          const Vec<C> beta = load(br + j);
          store<C>(ur + j, load(ur + j) * beta * mean);
          store_some(g + j, load(ar + j) * beta * scaled, int(tags - j < L ? tags - j : L));
        }
      }
      if (k) product<C, false>(active, step, padded, tables.backward, tags, b);
    }

    for (int64_t x = 0; x < tags * padded; ++x) out.counts[x] = 0;
    for (int64_t x = 0; x < padded; ++x) out.first[x] = out.last[x] = 0;
    for (int r = 0; r < rows; ++r) {
      if (!args.weights || !served[r]) continue;
      const Vec<C> factor = splat(weight[r]);
      for (int64_t k = 1; k < group[r].length; ++k) {
        C* ur = u + k * stride + r * padded;
        for (int64_t j = 0; j < padded; j += L) store<C>(ur + j, load(ur + j) * factor);
      }
    }
    add_counts<C>(a, u + stride, (longest - 1) * rows, tags, padded, out.counts);
    if (!args.weights && weight[0] != C(1))  // all alike
      for (int64_t x = 0; x < tags * padded; ++x) out.counts[x] *= args.weight(group[0]);
  }

  for (int r = 0; r < rows; ++r)
    if (!out.flagged[r]) write_row<T>(args, group[r], log_z[r], weight[r], out);
}

// Best paths in double: scores of a step are kept for the way back, which finds each predecessor again.
template <class T>
static void rows_best_paths(const ChainArgs<T>& args, const ChainTables<double>& tables, const Row* group, int rows, void* scratch) {
  constexpr int L = Simd<double>::lanes;
  const int64_t tags = tables.tags, padded = tables.padded, stride = rows * padded, longest = group[0].length;
  double* delta = (double*)scratch;  // (longest, rows, padded)
  const Vec<double> forbidden = splat(-__builtin_inf());
  bool poisoned[kGroupRows] = {};
  int active = rows;
  for (int64_t k = 0; k < longest; ++k) {
    while (group[active - 1].length <= k) --active;
    double* now = delta + k * stride;
    if (k) product<double, true>(active, now - stride, padded, tables.raw_forward, tags, now);
    for (int r = 0; r < active; ++r) {
      const T* f = args.emissions + group[r].index * args.stride_batch + group[r].step(k) * args.stride_time;
      double* dr = now + r * padded;
      IVec<double> nan = {};
      for (int64_t j = 0; j < padded; j += L) {
        Vec<double> x;
        load_some(x, f + j, int(tags - j < L ? tags - j : L));
        const Vec<double> best = x + (k ? load(dr + j) : load(tables.start + j));
        nan |= ~(IVec<double>)(best < __builtin_inf());
        store<double>(dr + j, best);
      }
      poisoned[r] |= any(nan);
    }
  }
  int64_t tag[kGroupRows];
  for (int r = 0; r < rows; ++r) {
    double* last = delta + (group[r].length - 1) * stride + r * padded;
    double best = -__builtin_inf();
    tag[r] = -1;
    for (int64_t j = 0; j < tags; ++j) {
      const double there = last[j] + tables.end[j];
      poisoned[r] |= !(there < __builtin_inf());
      if (there > best) best = there, tag[r] = j;
    }
    poisoned[r] |= group[r].length > 1 && tables.top != tables.top;
    args.value[group[r].index] = T(poisoned[r] ? __builtin_nan("") : best);
    if (poisoned[r]) tag[r] = -1;
  }
  active = 0;
  for (int64_t k = longest - 1; k >= 0; --k) {
    while (active < rows && group[active].length > k) ++active;
    for (int r = 0; r < active; ++r) {
      args.best_path[group[r].index * args.time + group[r].step(k)] = tag[r];
      if (k == 0 || tag[r] < 0) continue;
      const double *from = delta + (k - 1) * stride + r * padded, *into = tables.raw_into + tag[r] * padded;
      Vec<double> top = forbidden;
      for (int64_t i = 0; i < padded; i += L) top = max(load(from + i) + load(into + i), top);
      const double best = max_lane(top);
      int64_t i = 0;
      while (i < tags - 1 && from[i] + into[i] != best) ++i;
      tag[r] = i;
    }
  }
}

}  // namespace
