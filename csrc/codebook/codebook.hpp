// Nearest codes: what the kernels of all instruction set levels get and give.
#pragma once

#include <cstdint>

namespace pyseq::codebook {

enum { kBadIndex = 1 };  // status: an index below -1 or no code's

// Rows (n, heads, dim), codes (heads, count, dim), contiguous; mask (n) or null. Outputs (n, heads), and if not null the
// chosen codes (n, heads, dim), and the sum of all distances, which then are squared distances for cosines too.
template <class T> struct Search {
  const T *x, *codes;
  const uint8_t* mask;
  int64_t n, heads, count, dim;
  bool cosine;
  int64_t* indices;
  T *distance, *quantized;
  double* total;
  int threads, level;
};

// Rows (n, heads, dim) that have chosen indices (n, heads). Outputs (heads, count) and, if not null, (heads, count, dim).
template <class T> struct Statistics {
  const T* x;
  const int64_t* indices;
  int64_t n, heads, count, dim;
  int64_t* counts;
  T* sums;
  int threads;
};

// What reaches rows from upstream (null: nothing) and from their distance to their codes, `scale` times.
template <class T> struct Pull {
  const T *x, *codes, *scale, *upstream;
  const int64_t* indices;
  int64_t n, heads, count, dim;
  bool rotation;
  T* gradient;
  int threads, level;
};

// The codes of one head as kernels read them: in panels of `lanes` codes, element by element, less the center.
template <class T> struct Packed {
  const T *panels, *bias, *center;  // (panels, dim, lanes); half the squared length, infinity where a code never wins; (dim)
  int64_t panel_count, dim;
};

// What is compiled for one instruction set level. Sums are in float64.
template <class T> struct Level {
  int lanes, tile_rows;
  // The least score and its code for each of `count` rows (count, dim), a multiple of tile_rows; -1: none is finite.
  void (*best)(const Packed<T>& codes, const T* rows, int count, T* score, int64_t* index);
  bool (*finite)(const T* x, int64_t dim);
  double (*dot)(const T* x, const T* y, int64_t dim);
  double (*apart)(const T* x, const T* y, int64_t dim);  // squared distance
  void (*add)(const T* x, int64_t dim, double* sum);
  // A panel of codes less the center, times their scales, and half their squared lengths; zeros for null.
  void (*pack)(const T* const* codes, const T* scale, const T* center, int64_t dim, T* panel, double* half);
};
template <class T> const Level<T>& level_of(int level);

template <class T> void nearest(const Search<T>& search);
template <class T> int statistics(const Statistics<T>& chosen);
template <class T> void gradient(const Pull<T>& pull);

}  // namespace pyseq::codebook
