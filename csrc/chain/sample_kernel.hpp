// Samples of one row, for the instruction set level that the including file sets; after kernel.hpp.
#pragma once

#include "sample.hpp"

namespace {

using pyseq::chain::kGolden;
using pyseq::chain::kTogether;
using pyseq::chain::SampleTables;

constexpr double kLeast = 1e-200;                    // a state below it may have lost digits to underflow
constexpr double kLeastLog = -700, kNoticed = -600;  // log of what a state that holds 0 may hide, and of what matters

// The sums over predecessors a[0], .., a[i] for each i and destination, (tags, padded), or the whole ones alone.
template <bool ALL> PYSEQ_INLINE void sums_from(const double* a, const SampleTables& t, double* sums) {
  constexpr int L = Simd<double>::lanes;
  even_tiles<4>(t.padded / L, [&](auto vectors, int64_t begin) {
    Vec<double> sum[vectors] = {};
    for (int64_t i = 0; i < t.tags; ++i)
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = i * t.padded + (begin + v) * L;
        sum[v] += a[i] * load(t.edges + at);
        if (ALL) store<double>(sums + at, sum[v]);
      }
    for (int v = 0; !ALL && v < vectors; ++v) store<double>(sums + (begin + v) * L, sum[v]);
  });
}

// States a (length, padded), each step's times a factor of its own. False where one has lost digits, or a score is NaN or
// +inf. What a step is scaled by is multiplied with the next one's exponentials, not to be waited for.
template <class T>
static bool filter(const ChainArgs<T>& args, const SampleTables& t, const Row& row, double* a, double* sums, uint8_t* reached) {
  constexpr int L = Simd<double>::lanes;
  const double inf = __builtin_inf();
  double hidden = -inf, scale = 1;
  int64_t suspect = -1;
  for (int64_t k = 0; k < row.length; ++k) {
    const T* f = args.emissions + row.index * args.stride_batch + row.step(k) * args.stride_time;
    double *now = a + k * t.padded, shift, most;
    if (k) sums_from<false>(now - t.padded, t, sums);
    for (bool reachable : {false, true}) {  // whose scores count
      Vec<double> top = splat(-inf), largest = {};
      IVec<double> bad = {};
      for (int64_t j = 0; j < t.padded; j += L) {
        Vec<double> x;
        load_some(x, f + j, int(t.tags - j < L ? (t.tags > j ? t.tags - j : 0) : L));
        if (k == 0) x += load(t.start + j);
        bad |= ~(IVec<double>)(x < inf);
        store<double>(now + j, x);
        top = max(top, reachable && k ? (load(sums + j) > 0.0 ? x : splat(-inf)) : x);
      }
      shift = max_lane(top);
      if (any(bad) || !(shift > -inf)) return false;
      for (int64_t j = 0; j < t.padded; j += L) {
        Vec<double> x = load(now + j) - shift, p;
        IVec<double> n;
        x = x <= 0.0 ? x : splat(-inf);
        exp_split(max(x, splat(kLeastLog)), p, n);  // subnormal numbers would be slow
        x = x > kLeastLog ? scale_by_power(p, n) * scale : Vec<double>{};
        if (k) x *= load(sums + j);
        store<double>(now + j, x);
        largest = max(largest, x);
      }
      most = max_lane(largest);
      if (most >= 1e-100) break;
    }
    if (!(most >= kLeast)) return false;
    const double drop = __builtin_log(most);
    if (most < 1e-100) {
      for (int64_t j = 0; j < t.padded; j += L) store<double>(now + j, load(now + j) * (1 / most));
      most = 1;
    }
    IVec<double> low = {};
    for (int64_t j = 0; j < t.padded; j += L) low |= (IVec<double>)(load(now + j) + load(t.pad + j) < kLeast * most);
    const double before = (hidden > kLeastLog ? hidden : kLeastLog) + __builtin_log(double(t.tags));
    hidden = -inf;
    for (int64_t j = 0; any(low) && j < t.tags; ++j) {
      if (now[j] >= kLeast * most) continue;
      if (now[j] > 0) return false;
      const double mass = k ? sums[j] * scale : 1.0, score = double(f[j]) + (k ? 0.0 : t.start[j]);
      const double most_hidden = score - shift - drop + (mass > 0 ? __builtin_log(mass) : before);
      hidden = most_hidden > hidden ? most_hidden : hidden;
    }
    if (hidden > kNoticed) suspect = k;
    scale = 1 / most;
  }
  return !underflowed(args, row, a, t.padded, 1, suspect, reached);
}

// Tags of all steps, (length, wide), into the paths.
template <class Tag>
static void write_paths(const Row& row, const Tag* tags, int64_t wide, int64_t count, int64_t time, int64_t* paths) {
  const int64_t n = row.length;
  const int32_t* at = row.at;
  for (int64_t s = 0; s < count; ++s, ++tags, paths += time) {
    int64_t k = 0;
    for (; !at && k + 8 <= n; k += 8)
      for (int64_t i = 0; i < 8; ++i) paths[k + i] = tags[(k + i) * wide];
    for (; k < n; ++k) paths[at ? at[k] : k] = tags[k * wide];
  }
}

PYSEQ_INLINE Vec<double> uniforms(const uint64_t* states, int64_t step) {
  typename Simd<double>::U z;
  memcpy(&z, states, sizeof z);
  z += uint64_t(step + 1) * kGolden;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z = z ^ (z >> 31);
  return (Vec<double>)((z >> 12) | 0x3ff0000000000000) - 1.0;  // bits of a number in [1, 2)
}

#if PYSEQ_LEVEL >= 3
// The tags before those of N vectors of samples, of at most 16: how many sums of predecessors are not above a share of all.
template <int N>
PYSEQ_INLINE void draw(const uint64_t* states, int64_t step, const double* sums, int64_t tags, int64_t* tag) {
  constexpr int L = Simd<double>::lanes;
  Vec<double> share[N];
  IVec<double> from[N], to[N] = {};
  for (int v = 0; v < N; ++v) {
    memcpy(&from[v], tag + v * L, sizeof from[v]);
    share[v] = uniforms(states + v * L, step) * look_up(sums + (tags - 1) * 16, from[v]);
  }
  for (int64_t i = 0; i < tags - 1; ++i)
    for (int v = 0; v < N; ++v) to[v] = look_up(sums + i * 16, from[v]) <= share[v] ? to[v] + 1 : to[v];
  for (int v = 0; v < N; ++v) memcpy(tag + v * L, &to[v], sizeof to[v]);
}
#endif

template <class Tag, class T>
static bool sample_row_as(
    const ChainArgs<T>& args, const SampleTables& t, const Row& row, uint64_t state, int64_t count, void* scratch, int64_t* paths) {
  constexpr int L = Simd<double>::lanes;
  const int64_t n = row.length, tags = t.tags, padded = t.padded, wide = (count + kTogether - 1) / kTogether * kTogether;
  double* a = (double*)scratch;
  double *sums = a + n * padded, *totals = sums + (tags - 1) * padded;
  uint64_t* states = (uint64_t*)(sums + tags * padded);
  int64_t* tag = (int64_t*)states + wide;
  Tag* found = (Tag*)(tag + wide);
  if (!filter(args, t, row, a, sums, (uint8_t*)(found + n * wide))) return false;
  double whole = 0;
  for (int64_t i = 0; i < tags; ++i) sums[i] = whole += a[(n - 1) * padded + i] * t.end[i];
  if (!(whole >= kLeast)) return false;
  for (int64_t s = 0; s < wide; ++s) {
    states[s] = pyseq::chain::below(state, s);
    const double x = pyseq::chain::uniform(pyseq::chain::below(states[s], n - 1)) * whole;
    tag[s] = 0;
    for (int64_t i = 0; i < tags - 1; ++i) tag[s] += sums[i] <= x;
  }
  for (int64_t k = n - 1;; --k) {
    for (int64_t s = 0; s < wide; ++s) found[k * wide + s] = Tag(tag[s]);
    if (k == 0) break;
    sums_from<true>(a + (k - 1) * padded, t, sums);
#if PYSEQ_LEVEL >= 3
    if (padded == 16) {
      int64_t s = 0;
      for (; s + 4 * L <= wide; s += 4 * L) draw<4>(states + s, k - 1, sums, tags, tag + s);
      for (; s < wide; s += L) draw<1>(states + s, k - 1, sums, tags, tag + s);
      continue;
    }
#endif
    for (int64_t s = 0; s < wide; s += L) {
      const Vec<double> u = uniforms(states + s, k - 1);
      for (int l = 0; l < L; ++l) {
        const double *column = sums + tag[s + l], x = u[l] * totals[tag[s + l]];
        int64_t low = 0, high = tags - 1;  // the first of the sums above x
        while (low < high) {
          const int64_t middle = (low + high) / 2;
          column[middle * padded] <= x ? low = middle + 1 : high = middle;
        }
        tag[s + l] = low;
      }
    }
  }
  write_paths(row, found, wide, count, args.time, paths);
  return true;
}

template <class T>
static bool sample_row(
    const ChainArgs<T>& args, const SampleTables& t, const Row& row, uint64_t state, int64_t count, void* scratch, int64_t* paths) {
  const auto sample = t.tags <= 256 ? sample_row_as<uint8_t, T> : sample_row_as<int32_t, T>;
  return sample(args, t, row, state, count, scratch, paths);
}

}  // namespace

#define PYSEQ_SAMPLE_LEVEL(suffix)                                               \
  namespace pyseq::chain {                                                       \
  extern const SampleRow<float> sample_float_##suffix = sample_row<float>;     \
  extern const SampleRow<double> sample_double_##suffix = sample_row<double>; \
  }
