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
  int threads;
};

// The codes of one head as kernels read them: in panels of `lanes` codes, element by element, less the center.
template <class T> struct Packed {
  const T *panels, *bias, *center;  // (panels, dim, lanes); half the squared length, infinity where a code never wins; (dim)
  int64_t panel_count, dim;
};

// The least score and its code for each of `rows` rows (rows, dim), a multiple of `tile_rows`; -1 where none is finite.
template <class T> struct Level {
  int lanes, tile_rows;
  void (*best)(const Packed<T>& codes, const T* rows, int count, T* score, int64_t* index);
};
template <class T> const Level<T>& level_of(int level);

template <class T> void nearest(const Search<T>& search);
template <class T> int statistics(const Statistics<T>& chosen);
template <class T> void gradient(const Pull<T>& pull);

}  // namespace pyseq::codebook
