// Adam for the rows of tables that a step has seen.
#pragma once

#include <vector>

#include "tensor.hpp"

namespace pyseq::lazy_adam {

enum { kBadRow = 1 };  // status: an index is no row's, and nothing was touched

// As in kernels/lazy_adam: params and averages (rows, dim); counters (rows) or null; values (count, dim).
struct Table {
  Type type, average, value;
  void *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;
  int32_t *last, *touches;
  const int64_t* indices;  // not looked at where gradients are dense
  const void* values;
  int64_t rows, dim, count;
  int64_t step, seed;
};

struct Options {
  double lr, beta1, beta2, eps, weight_decay;
  bool decay, row_bias, maximize, dense;
  int threads, level;
};

bool serves(Type type, Type average, Type value);

int update(const std::vector<Table>& tables, const Options& options);

}  // namespace pyseq::lazy_adam
