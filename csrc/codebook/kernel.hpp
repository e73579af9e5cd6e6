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

}  // namespace

#define PYSEQ_CODEBOOK_LEVEL(suffix)                                                                                     \
  namespace pyseq::codebook {                                                                                            \
  extern const Level<float> float_##suffix = {2 * Simd<float>::lanes, kTileRows, best_codes<float>};                     \
  extern const Level<double> double_##suffix = {2 * Simd<double>::lanes, kTileRows, best_codes<double>};                 \
  }
