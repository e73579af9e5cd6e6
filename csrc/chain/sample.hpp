// Samples of tag paths: scores filtered forward once, then all samples drawn backward from them.
#pragma once

#include "chain.hpp"

namespace pyseq::chain {

// The numbers of a sample's steps are a function of (seed, row, sample, step): SplitMix64 (Steele, Lea and Flood 2014).
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
static inline __attribute__((always_inline)) uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}
// The state of item `index` below `state`: a row below the seed, a sample below a row, a step below a sample.
static inline __attribute__((always_inline)) uint64_t below(uint64_t state, int64_t index) {
  return mix(state + uint64_t(index + 1) * kGolden);
}
// Of a step's state, in [0, 1).
static inline __attribute__((always_inline)) double uniform(uint64_t state) { return double(state >> 12) * 0x1p-52; }

// Paths (batch, count, time).
template <class T> int chain_sample(const ChainArgs<T>& args, uint64_t seed, int64_t count, int64_t* paths);

// Transitions as exp(g - max g), by source (tags, padded); start scores and exp(end - max end), padded with zeros; and what
// is 1 in the padding.
struct SampleTables {
  int64_t tags, padded;
  const double *edges, *start, *end, *pad;
};

constexpr int64_t kTogether = 8;  // samples are rounded up to

// A row's samples in the scaled domain; false where that has lost digits, and nothing is written then.
template <class T>
using SampleRow = bool (*)(
    const ChainArgs<T>&, const SampleTables&, const Row&, uint64_t state, int64_t count, void* scratch, int64_t* paths);

extern const SampleRow<float> sample_float_v2, sample_float_v3, sample_float_v4;
extern const SampleRow<double> sample_double_v2, sample_double_v3, sample_double_v4;

}  // namespace pyseq::chain
