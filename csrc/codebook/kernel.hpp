// The search of the codebook room for one instruction set level. Scores are bias - row . code: every product of a row
// with every code of a panel stays in registers, and of each lane the best so far.
#pragma once

#include "codebook.hpp"
#include "simd.hpp"

namespace {

using pyseq::codebook::Packed;

constexpr int kTileRows = PYSEQ_LEVEL == 4 ? 12 : 6;  // with two vectors of codes: 24 or 12 sums in registers
constexpr int kBlockRows = 96;                        // that walk over all panels together

template <class T> struct Best {
  Vec<T> score;
  IVec<T> code;
};

template <class T> PYSEQ_INLINE void keep(Best<T>& best, Vec<T> score, IVec<T> code) {
  const IVec<T> less = score < best.score;
  best.score = less ? score : best.score;
  best.code = less ? code : best.code;
}

// Not inlined: what its caller holds would take registers from the sums.
template <class T>
__attribute__((noinline)) static void tile(
    const T* x, int64_t dim, const T* panel, const T* bias, int64_t first, Best<T>* best) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> a[kTileRows], b[kTileRows];
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) a[r] = load<T>(bias), b[r] = load<T>(bias + lanes);
  for (int64_t d = 0; d < dim; ++d) {
    const Vec<T> p = load<T>(panel + 2 * lanes * d), q = load<T>(panel + 2 * lanes * d + lanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> value = splat<T>(x[r * dim + d]);
      a[r] -= value * p, b[r] -= value * q;
    }
  }
  IVec<T> code;
  for (int l = 0; l < lanes; ++l) code[l] = typename Simd<T>::Int(first + l);
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) keep<T>(best[r], a[r], code), keep<T>(best[r], b[r], code + lanes);
}

template <class T> void best_codes(const Packed<T>& codes, const T* rows, int count, T* score, int64_t* index) {
  constexpr int lanes = Simd<T>::lanes;
  Best<T> best[kBlockRows];
  for (int r = 0; r < count; ++r) best[r] = {splat<T>(T(__builtin_inf())), IVec<T>{} - 1};
  for (int64_t p = 0; p < codes.panel_count; ++p) {
    const T* panel = codes.panels + p * 2 * lanes * codes.dim;
    for (int r = 0; r < count; r += kTileRows)
      tile<T>(rows + r * codes.dim, codes.dim, panel, codes.bias + p * 2 * lanes, p * 2 * lanes, best + r);
  }
  for (int r = 0; r < count; ++r) {
    score[r] = best[r].score[0], index[r] = best[r].code[0];
    for (int l = 1; l < lanes; ++l) {
      const T s = best[r].score[l];
      const int64_t k = best[r].code[l];
      if (s < score[r] || (s == score[r] && k >= 0 && k < index[r])) score[r] = s, index[r] = k;
    }
  }
}

// Sums of eight terms at a time in an order of its own: a chain of additions would take longer than the search.
template <class S, class F> PYSEQ_INLINE S sum_of(int64_t dim, F term) {
  S parts[8] = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8)
    for (int i = 0; i < 8; ++i) parts[i] += term(d + i);
  for (int i = 0; d < dim; ++d, ++i) parts[i] += term(d);
  return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

template <class T> bool finite(const T* x, int64_t dim) {
  return sum_of<T>(dim, [=](int64_t d) { return x[d] * 0; }) == 0;  // NaN of NaN and of infinities
}

template <class T> double dot(const T* x, const T* y, int64_t dim) {
  return sum_of<double>(dim, [=](int64_t d) { return double(x[d]) * double(y[d]); });
}

template <class T> double apart(const T* x, const T* y, int64_t dim) {
  return sum_of<double>(dim, [=](int64_t d) { return (double(x[d]) - double(y[d])) * (double(x[d]) - double(y[d])); });
}

template <class T> void add(const T* x, int64_t dim, double* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += double(x[d]);
}

// Lanes of two vectors in turn, from lane `first` on.
template <class T, int first> PYSEQ_INLINE Vec<T> interleaved(Vec<T> a, Vec<T> b) {
  constexpr int lanes = Simd<T>::lanes;
  IVec<T> from{};
  for (int l = 0; l < lanes; ++l) from[l] = l / 2 + first + l % 2 * lanes;
  return __builtin_shuffle(a, b, from);
}

template <class T> PYSEQ_INLINE void transpose(Vec<T>* rows) {
  constexpr int lanes = Simd<T>::lanes;
  for (int step = 1; step < lanes; step *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleaved<T, 0>(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = interleaved<T, lanes / 2>(rows[i], rows[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

template <class T> void pack(const T* const* codes, const T* scale, const T* center, int64_t dim, T* panel, double* half) {
  constexpr int lanes = Simd<T>::lanes;
  for (int side = 0; side < 2; ++side) {
    const T* const* from = codes + side * lanes;
    T* to = panel + side * lanes;
    double* sum = half + side * lanes;
    for (int l = 0; l < lanes; ++l) sum[l] = 0;
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) {
      Vec<T> rows[lanes];
      for (int l = 0; l < lanes; ++l)
        rows[l] = from[l] ? (load<T>(from[l] + d) - load<T>(center + d)) * splat<T>(scale[side * lanes + l]) : Vec<T>{};
      transpose<T>(rows);
      for (int i = 0; i < lanes; ++i) store<T>(to + (d + i) * 2 * lanes, rows[i]);
    }
    for (; d < dim; ++d)
      for (int l = 0; l < lanes; ++l) to[d * 2 * lanes + l] = from[l] ? (from[l][d] - center[d]) * scale[side * lanes + l] : T(0);
    for (d = 0; d < dim; ++d)
      for (int l = 0; l < lanes; ++l) sum[l] += double(to[d * 2 * lanes + l]) * double(to[d * 2 * lanes + l]);
    for (int l = 0; l < lanes; ++l) sum[l] /= 2;
  }
}

template <class T> constexpr pyseq::codebook::Level<T> kLevel = {
    2 * Simd<T>::lanes, kTileRows, best_codes<T>, finite<T>, dot<T>, apart<T>, add<T>, pack<T>};

}  // namespace

#define PYSEQ_CODEBOOK_LEVEL(suffix)                              \
  namespace pyseq::codebook {                                     \
  extern const Level<float> float_##suffix = kLevel<float>;       \
  extern const Level<double> double_##suffix = kLevel<double>;    \
  }
