// Kernels with one sequence in each vector lane, for few tags; see docs/chain.md for the recursions.
//
// A step is arithmetic on `tags` vectors and nothing crosses lanes; emissions and gradients are transposed on the way.
// Tapes are (step, tags, lanes) and stay in the cache. The longest sequence comes first.
#pragma once

#include "common.hpp"

namespace {

using pyseq::chain::kDecodeStride;
using pyseq::chain::kLaneTags;

constexpr int kLaneTile = PYSEQ_LEVEL == 4 ? 16 : 12;  // vectors of sums held in registers
constexpr int64_t kCountSteps = 8, kCountFlush = 96;  // steps to a block of counts, and to their move into double

// a's lanes l & S take b's lanes l - S, and b's others a's lanes l + S: one stage of a transposition.
template <class C, int S> PYSEQ_INLINE void exchange(Vec<C>& a, Vec<C>& b) {
  constexpr int L = Simd<C>::lanes;
#if defined(__clang__)
  const Vec<C> x = a, y = b;
  for (int l = 0; l < L; ++l) a[l] = l & S ? y[l - S] : x[l], b[l] = l & S ? y[l] : x[l + S];
#else
  IVec<C> upper = {}, lower = {};
  for (int l = 0; l < L; ++l) upper[l] = l & S ? L + l - S : l, lower[l] = l & S ? L + l : l + S;
  const Vec<C> x = a;
  a = __builtin_shuffle(x, b, upper);
  b = __builtin_shuffle(x, b, lower);
#endif
}
template <class C, int S> PYSEQ_INLINE void transpose(Vec<C>* v) {
  for (int r = 0; r < Simd<C>::lanes; ++r)
    if (!(r & S)) exchange<C, S>(v[r], v[r + S]);
  if constexpr (S > 1) transpose<C, S / 2>(v);
}

// Addresses of one step of every lane. Lanes that are not at work stand where they were put.
template <class T, int L> struct Cursor {
  T* at[L];
  int64_t move[L] = {};
  const Row* group;
  T* data;
  int64_t stride_batch, stride_time;
  bool gaps = false;  // a row has its positions in a list

  Cursor(T* data, int64_t stride_batch, int64_t stride_time, const Row* group, int rows, T* idle)
      : group(group), data(data), stride_batch(stride_batch), stride_time(stride_time) {
    for (int r = 0; r < L; ++r) at[r] = idle;
    for (int r = 0; r < rows; ++r) gaps |= group[r].at != nullptr;
  }
  void put(int r, int64_t k, int64_t direction) {
    at[r] = data + group[r].index * stride_batch + group[r].step(k) * stride_time;
    move[r] = direction * stride_time;
  }
  void leave(int r, T* idle) { at[r] = idle, move[r] = 0; }
  void go(int active, int64_t k, int64_t direction) {  // to step k, from the one before in this direction
    for (int r = 0; r < L; ++r) at[r] += move[r];
    for (int r = 0; gaps && r < active; ++r) put(r, k, direction);
  }
};

// x (tags vectors) = one step of every lane.
template <class C, class T> PYSEQ_INLINE void load_lanes(const T* const* from, int64_t tags, Vec<C>* x) {
  constexpr int L = Simd<C>::lanes;
  for (int64_t j = 0; j < tags; j += L) {
    const int count = int(tags - j < L ? tags - j : L);
    if (count == 1) {  // nothing to transpose: 9 tags in lanes of 8 are common
      for (int l = 0; l < L; ++l) x[j][l] = C(from[l][j]);
      continue;
    }
    Vec<C> v[L];
    for (int l = 0; l < L; ++l) load_some(v[l], from[l] + j, count);
    transpose<C, L / 2>(v);
    for (int i = 0; i < L; ++i)
      if (i < count) x[j + i] = v[i];
  }
}
// The first `rows` lanes of x (tags vectors) to their addresses.
template <class C, class T> PYSEQ_INLINE void store_lanes(T* const* to, int rows, int64_t tags, const Vec<C>* x) {
  constexpr int L = Simd<C>::lanes;
  for (int64_t j = 0; j < tags; j += L) {
    const int count = int(tags - j < L ? tags - j : L);
    if (count == 1) {
      for (int l = 0; l < L; ++l)
        if (l < rows) to[l][j] = T(x[j][l]);
      continue;
    }
    Vec<C> v[L];
    for (int i = 0; i < L; ++i) v[i] = i < count ? x[j + i] : Vec<C>{};
    transpose<C, L / 2>(v);
    for (int l = 0; l < L; ++l)
      if (l < rows) store_some(to[l] + j, v[l], count);
  }
}

// out (N vectors)[j] = sum over i of x[i] * matrix[i][j], or max of x[i] + matrix[i][j].
template <class C, int N, bool Best>
static __attribute__((noinline)) void lanes_tile(const Vec<C>* x, const C* matrix, int64_t tags, Vec<C>* out) {
  Vec<C> sum[N];
  for (int v = 0; v < N; ++v) sum[v] = Best ? splat(-C(__builtin_inf())) : Vec<C>{};
  int64_t i = 0;
  do {  // at least one tag: with a loop that might not run the sums would go through memory
    const Vec<C> from = x[i];
    for (int v = 0; v < N; ++v) {
      if constexpr (Best)
        sum[v] = max(from + splat(matrix[v]), sum[v]);
      else
        sum[v] += from * splat(matrix[v]);
    }
    matrix += tags;
  } while (++i < tags);
  for (int v = 0; v < N; ++v) out[v] = sum[v];
}
template <class C, bool Best>
static void lanes_product(const Vec<C>* x, const C* matrix, int64_t tags, Vec<C>* out) {
  even_tiles<kLaneTile>(tags, [&](auto size, int64_t j) { lanes_tile<C, size, Best>(x, matrix + j, tags, out + j); });
}

// counts (tags, N of tags vectors) += a[i] * w[j], summed over `steps` >= 1 steps; lanes apart.
template <class C, int N>
static __attribute__((noinline)) void lanes_count(
    const Vec<C>* a, const Vec<C>* w, int64_t steps, int64_t tags, Vec<C>* counts) {
  for (int64_t i = 0; i < tags; ++i, counts += tags) {
    Vec<C> sum[N];
    for (int v = 0; v < N; ++v) sum[v] = counts[v];
    int64_t s = 0;
    do {
      const Vec<C> mass = a[s * tags + i];
      for (int v = 0; v < N; ++v) sum[v] += mass * w[s * tags + v];
    } while (++s < steps);
    for (int v = 0; v < N; ++v) counts[v] = sum[v];
  }
}
template <class C>
static void lanes_add_counts(const Vec<C>* a, const Vec<C>* w, int64_t steps, int64_t tags, Vec<C>* counts) {
  if (steps == 0) return;
  even_tiles<kLaneTile>(tags, [&](auto size, int64_t j) { lanes_count<C, size>(a, w + j, steps, tags, counts + j); });
}

// The certificates of every lane, as masks and numbers.
template <class C> struct LanesState {
  IVec<C> power;    // sum of the shifts since it was last collected
  IVec<C> suspect;  // last step at which a possible state held 0 and may have hidden too much, -1 for none
  IVec<C> hidden;   // log2 of what a possible state that holds 0 may hide
  IVec<C> flagged;  // a state lost digits, or a score is NaN, +inf or out of range
};

// Emissions of one step and their exponentials p * 2^n. `odd` marks lanes in which a score is out of range.
template <class C> struct LanesStep {
  Vec<C> f[kLaneTags], p[kLaneTags];
  IVec<C> n[kLaneTags], odd;
};
template <class C> PYSEQ_INLINE void exponentiate(LanesStep<C>& step, int64_t tags) {
  const IVec<C> range = (IVec<C>)splat(kExpRange<C>), sign = (IVec<C>)splat(-C(0));
  IVec<C> farthest = range;  // bits of floats >= 0, NaN above all, are in their order
  for (int64_t j = 0; j < tags; ++j) {
    const IVec<C> far = (IVec<C>)step.f[j] & ~sign;
    farthest = far > farthest ? far : farthest;
    exp_split(step.f[j], step.p[j], step.n[j]);
  }
  step.odd = (IVec<C>)(farthest != range);
}

// One step of every lane: a = dot * exp(f) and u = exp(f), both divided by 2^shift, where shift brings the largest a into
// [1, 2). `dot` may be `a`. Returns false, having written nothing, if a lane's zeros and infinities want `Every`.
template <class C, bool Every>
PYSEQ_INLINE bool step_lanes(
    const LanesStep<C>& in, const Vec<C>* dot, IVec<C> active, int64_t k, int64_t tags, Vec<C>* a, Vec<C>* u,
    LanesState<C>& state) {
  typedef typename Simd<C>::Int Int;
  const Vec<C> range = splat(kExpRange<C>), tiny = splat(kTiny<C>);
  const IVec<C> none = IVec<C>{} - Int(1 << 22), bias = IVec<C>{} + Int(Simd<C>::bias);
  Vec<C> mass[kLaneTags], p[kLaneTags];
  IVec<C> n[kLaneTags], top = none, odd = {}, hiding = none, least_held = (IVec<C>)tiny;
  for (int64_t j = 0; j < tags; ++j) {
    const Vec<C> x = in.f[j], before = dot[j];
    if constexpr (Every) {
      const IVec<C> low = (IVec<C>)(x <= range), high = (IVec<C>)(x >= -range), fine = low & high;
      const IVec<C> sunk = ~high & (IVec<C>)(x > -C(__builtin_inf()));  // finite, but 0 beside any score in range
      const IVec<C> held = (IVec<C>)(before > C(0)), live = fine & held;
      odd |= ~low | (live & (IVec<C>)(before < tiny));
      const IVec<C> unheld =
          sunk ? IVec<C>{} - Int(kExpRange<C> * 1.4426) + (Simd<C>::bias + 4) : fine & ~held ? in.n[j] : none;
      hiding = unheld > hiding ? unheld : hiding;
      p[j] = live ? in.p[j] : splat(C(1));
      n[j] = live ? in.n[j] : none;  // a = u = 0: no path goes there
      mass[j] = live ? before * p[j] : Vec<C>{};
    } else {
      const IVec<C> held = (IVec<C>)before;
      least_held = held < least_held ? held : least_held;
      mass[j] = before * in.p[j];
    }
    const IVec<C> exponent = ((IVec<C>)mass[j] >> Simd<C>::mantissa) + (Every ? n : in.n)[j];
    top = exponent > top ? exponent : top;
  }
  if (!Every && any((in.odd | (IVec<C>)(least_held != (IVec<C>)tiny)) & active)) return false;
  const IVec<C> dead = (IVec<C>)(top < -Int(1 << 21)), shift = (dead ? IVec<C>{} : top - bias) & active;
  state.flagged |= odd & active;
  for (int64_t j = 0; j < tags; ++j) {
    const IVec<C> power = (Every ? n : in.n)[j] - shift;
    a[j] = (Vec<C>)((IVec<C>)scale_by_power(mass[j], power) & active);
    u[j] = scale_by_power((Every ? p : in.p)[j], power);
  }
  state.power += shift;
  const IVec<C> fresh = IVec<C>{} - Int(1 << 22);
  if constexpr (Every) {
    const IVec<C> least = IVec<C>{} + Int(2 - Simd<C>::bias), some = (IVec<C>)(hiding > none);
    const IVec<C> grown = (state.hidden > least ? state.hidden : least) + hiding - shift + Int(65 - __builtin_clzll(tags));
    state.hidden = some ? grown : fresh;
    state.suspect = active & some & ((IVec<C>)(grown > Int(kHidden<C>)) | dead) ? IVec<C>{} + Int(k) : state.suspect;
  } else {
    state.hidden = fresh;
  }
  return true;
}

static size_t lanes_scratch_bytes(int64_t, int64_t time, int64_t tags, size_t element, bool grads) {
  const int64_t lanes = kVectorBytes / element, counts = grads ? tags * tags : 0;
  return kVectorBytes * (tags * (time + (grads ? time : 1) + 2) + counts) + sizeof(double) * lanes * counts + 2 * tags + 64;
}

template <class T, class C>
static void lanes_forward_backward(
    const ChainArgs<T>& args, const ChainTables<C>& tables, const Row* group, int rows, void* scratch, GroupResult& out) {
  typedef typename Simd<C>::Int Int;
  constexpr int L = Simd<C>::lanes;
  const int64_t tags = tables.tags, longest = group[0].length;
  const bool grads = args.grads();

  Vec<C>* a = (Vec<C>*)scratch;               // (longest, tags)
  Vec<C>* u = a + longest * tags;             // likewise, or one step where no gradient is wanted
  Vec<C>* b = u + (grads ? longest : 1) * tags;
  Vec<C>* marginals = b + tags;               // (tags)
  Vec<C>* counts = marginals + tags;          // (tags, tags), lanes apart
  double* totals = (double*)(counts + (grads ? tags * tags : 0));  // (tags, tags, lanes)
  uint8_t* reached = (uint8_t*)(totals + (grads ? tags * tags * L : 0));

  const T zeros[kLaneTags] = {};
  Cursor<const T, L> from(args.emissions, args.stride_batch, args.stride_time, group, rows, zeros);
  IVec<C> length = {};
  for (int r = 0; r < rows; ++r) length[r] = Int(group[r].length), from.put(r, 0, 1);

  LanesState<C> state = {{}, IVec<C>{} - 1, IVec<C>{} - Int(1 << 22), {}};
  int64_t power[L] = {};
  int active = rows;
  LanesStep<C> in;
  for (int64_t k = 0; k < longest; ++k) {
    while (group[active - 1].length <= k) from.leave(--active, zeros);
    if (k) from.go(active, k, 1);
    load_lanes<C>(from.at, tags, in.f);
    exponentiate<C>(in, tags);
    Vec<C>*now = a + k * tags, *step = u + (grads ? k * tags : 0);
    if (k)
      lanes_product<C, false>(now - tags, tables.forward, tags, now);
    else
      for (int64_t j = 0; j < tags; ++j) now[j] = splat(tables.start[j]);
    const IVec<C> live = (IVec<C>)(length > Int(k));
    if (!step_lanes<C, false>(in, now, live, k, tags, now, step, state))
      step_lanes<C, true>(in, now, live, k, tags, now, step, state);
    if (k % (1 << 20) == (1 << 20) - 1 || k == longest - 1) {
      for (int r = 0; r < rows; ++r) power[r] += state.power[r];
      state.power = IVec<C>{};
    }
  }

  double log_z[L];
  IVec<C> served = {};  // lanes whose gradients are to be written
  Vec<C> weight = {};
  for (int r = 0; r < rows; ++r) {
    const Row& row = group[r];
    weight[r] = C(args.weight(row));
    const C* tape = (const C*)a + r;
    out.flagged[r] = row.done || state.flagged[r];
    if (state.suspect[r] >= 0) out.flagged[r] |= underflowed<T, C>(args, row, tape, tags * L, L, state.suspect[r], reached);
    log_z[r] = close_row(args, tables, row, tape + (row.length - 1) * tags * L, L, power[r], out.flagged[r]);
    served[r] = out.flagged[r] || log_z[r] == -__builtin_inf() ? 0 : -1;
  }

  if (grads) {
    for (int64_t x = 0; x < tags * tags; ++x) counts[x] = Vec<C>{};
    for (int64_t x = 0; x < tags * tags * L; ++x) totals[x] = 0;
    for (int64_t j = 0; j < tags; ++j) b[j] = Vec<C>{};
    Cursor<T, L> to(args.grad_emissions, args.grad_stride_batch, args.grad_stride_time, group, rows, nullptr);
    active = 0;
    int64_t counted = longest;  // steps from here on are in the counts
    for (int64_t k = longest - 1; k >= 0; --k) {
      to.go(active, k, -1);
      if (active < rows && group[active].length > k) {  // rows that end here
        const IVec<C> ends = (IVec<C>)(length == Int(k + 1));
        for (int64_t j = 0; j < tags; ++j) b[j] = ends ? splat(tables.end[j]) : b[j];
        for (; active < rows && group[active].length > k; ++active) to.put(active, k, -1);
      }
      Vec<C>*now = a + k * tags, *step = u + k * tags;
      Vec<C> whole = {};
      for (int64_t j = 0; j < tags; ++j) whole += now[j] * b[j];  // 1 but at a row's end, and b is kept so by dividing by it
      const IVec<C> sound = served & (IVec<C>)(length > Int(k));
      const Vec<C> mean = sound ? splat(C(1)) / whole : Vec<C>{}, share = mean * weight;
      for (int64_t j = 0; j < tags; ++j) {
        marginals[j] = sound ? now[j] * b[j] * share : Vec<C>{};
        step[j] = sound ? step[j] * (b[j] * mean) : Vec<C>{};
      }
      store_lanes<C>(to.at, active, tags, marginals);  // a flagged row's are done again
      if (k) lanes_product<C, false>(step, tables.backward, tags, b);
      if (k == 0 || (longest - k) % kCountSteps == 0) {
        const int64_t begin = k ? k : 1;
        lanes_add_counts<C>(a + (begin - 1) * tags, u + begin * tags, counted - begin, tags, counts);
        counted = begin;
      }
      if (k == 0 || (longest - k) % kCountFlush == 0)
        for (int64_t x = 0; x < tags * tags; ++x) {
          const Vec<C> sum = counts[x];
          for (int l = 0; l < L; ++l) totals[x * L + l] += double(sum[l]);
          counts[x] = Vec<C>{};
        }
    }
    double factor[L] = {};
    for (int r = 0; r < rows; ++r) factor[r] = served[r] ? args.weight(group[r]) : 0.0;
    for (int64_t x = 0; x < tags * tags; ++x) {
      double sum = 0;
      for (int l = 0; l < L; ++l) sum += factor[l] != 0.0 ? factor[l] * totals[x * L + l] : 0.0;
      out.counts[x] = sum;
    }
    for (int64_t j = 0; j < tags; ++j) out.first[j] = out.last[j] = 0;
  }

  for (int r = 0; r < rows; ++r)
    if (!out.flagged[r]) write_row<T>(args, group[r], log_z[r], double(weight[r]), out);
}

#if PYSEQ_LEVEL >= 3
// row[index] of every lane, among 16.
PYSEQ_INLINE Vec<double> look_up(const double* row, IVec<double> index) {
#if PYSEQ_LEVEL == 4
  return (Vec<double>)_mm512_permutex2var_pd(_mm512_loadu_pd(row), (__m512i)index, _mm512_loadu_pd(row + 8));
#else
  return (Vec<double>)_mm256_i64gather_pd(row, (__m256i)index, 8);
#endif
}

// Best paths in double: scores of a step are kept for the way back, which finds each predecessor again.
template <class T>
static void lanes_best_paths(const ChainArgs<T>& args, const ChainTables<double>& tables, const Row* group, int rows, void* scratch) {
  constexpr int L = Simd<double>::lanes;
  const int64_t tags = tables.tags, longest = group[0].length;
  Vec<double>*delta = (Vec<double>*)scratch, *f = delta + longest * tags;  // (longest, tags), (tags)
  const T zeros[kLaneTags] = {};
  Cursor<const T, L> from(args.emissions, args.stride_batch, args.stride_time, group, rows, zeros);
  IVec<double> poisoned = {}, length = {};
  for (int r = 0; r < rows; ++r) length[r] = group[r].length, from.put(r, 0, 1);
  int active = rows;
  for (int64_t k = 0; k < longest; ++k) {
    while (group[active - 1].length <= k) from.leave(--active, zeros);
    if (k) from.go(active, k, 1);
    load_lanes<double>(from.at, tags, f);
    Vec<double>* now = delta + k * tags;
    if (k) lanes_product<double, true>(now - tags, tables.raw_forward, tags, now);
    IVec<double> nan = {};
    for (int64_t j = 0; j < tags; ++j) {
      now[j] = f[j] + (k ? now[j] : splat(tables.start[j]));
      nan |= ~(IVec<double>)(now[j] < __builtin_inf());
    }
    poisoned |= nan & (IVec<double>)(length > k);
  }
  IVec<double> tag = {};
  for (int r = 0; r < rows; ++r) {
    const double* last = (const double*)(delta + (group[r].length - 1) * tags) + r;
    double best = -__builtin_inf();
    tag[r] = -1;
    for (int64_t j = 0; j < tags; ++j) {
      const double there = last[j * L] + tables.end[j];
      if (!(there < __builtin_inf())) poisoned[r] = -1;
      if (there > best) best = there, tag[r] = j;
    }
    if (group[r].length > 1 && tables.top != tables.top) poisoned[r] = -1;
    args.value[group[r].index] = T(poisoned[r] ? __builtin_nan("") : best);
    if (poisoned[r]) tag[r] = -1;
  }
  active = 0;
  for (int64_t k = longest - 1; k >= 0; --k) {
    while (active < rows && group[active].length > k) ++active;
    for (int r = 0; r < active; ++r) args.best_path[group[r].index * args.time + group[r].step(k)] = tag[r];
    if (k == 0) break;
    const Vec<double>* before = delta + (k - 1) * tags;
    const IVec<double> going = (IVec<double>)(length > k) & (IVec<double>)(tag >= 0), to = going ? tag : IVec<double>{};
    Vec<double> best = splat(-__builtin_inf());
    IVec<double> previous = {};
    for (int64_t i = 0; i < tags; ++i) {
      const Vec<double> there = before[i] + look_up(tables.raw_into + i * kDecodeStride, to);
      previous = (IVec<double>)(there > best) ? IVec<double>{} + i : previous;
      best = max(there, best);
    }
    tag = going ? previous : tag;
  }
}
#endif

}  // namespace
