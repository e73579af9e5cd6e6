// Sums over the elements of a row.
#pragma once

#include <cstdint>

namespace pyseq::codebook {

// The sum of term(d), eight at a time in an order of its own, for a chain of additions would take longer than the search.
template <class S, class F> S sum_of(int64_t dim, F term) {
  S parts[8] = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8)
    for (int i = 0; i < 8; ++i) parts[i] += term(d + i);
  for (int i = 0; d < dim; ++d, ++i) parts[i] += term(d);
  return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}

template <class T> double dot(const T* a, const T* b, int64_t dim) {
  return sum_of<double>(dim, [=](int64_t d) { return double(a[d]) * double(b[d]); });
}

}  // namespace pyseq::codebook
