// Entropy of the paths of linear chains, and its gradients.
#pragma once

#include "chain.hpp"

namespace pyseq::chain {

// Values (batch), and where wanted the gradients of their sum weighted by `weights`.
template <class T> int chain_entropy(const ChainArgs<T>& args);

// Edges by source, (2 * tags, padded): transitions, and the end scores as edges to a first tag, kBehind alike; kImpossible in
// place of -inf. weights: their exponentials, counted from the largest of a destination, 0 of forbidden ones. The padding
// holds edges of score 0. start (padded).
struct EntropyTables {
  int64_t tags, padded;
  const double *edges, *weights, *start;
};

constexpr double kImpossible = -1e300;  // what is finite times a weight of 0 is 0
constexpr int64_t kBehind = 8;         // tags behind the end: a vector
constexpr int64_t kEntropyTape = 6, kEntropyRows = 5 + 2 * 8;  // numbers per tag: of a step, and beside the steps

// Entropy of a row that holds scores alone. counts (2 * tags + 1, padded), or null: takes the gradients of the edges, and of
// the start in its last row. Scratch: padded * (kEntropyTape * (length + 1) + kEntropyRows) doubles.
template <class T>
using EntropyRow = double (*)(const ChainArgs<T>&, const EntropyTables&, const Row&, double* scratch, double* counts);

extern const EntropyRow<float> entropy_float_v2, entropy_float_v3, entropy_float_v4;
extern const EntropyRow<double> entropy_double_v2, entropy_double_v3, entropy_double_v4;

}  // namespace pyseq::chain
