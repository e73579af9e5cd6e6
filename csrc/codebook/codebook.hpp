// Nearest codes: what the kernels of all instruction set levels get and give.
#pragma once

#include <cstdint>

namespace pyseq::codebook {

// Rows (n, heads, dim), codes (heads, count, dim), contiguous; mask (n) or null. Outputs (n, heads).
template <class T> struct Search {
  const T *x, *codes;
  const uint8_t* mask;
  int64_t n, heads, count, dim;
  bool cosine;
  int64_t* indices;
  T* distance;
  int threads, level;
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

}  // namespace pyseq::codebook
