// Linear chains: forward-backward and Viterbi for batches of sequences. Pure functions on pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "status.hpp"

namespace pyseq::chain {

enum Kind { kPartition = 0, kNll = 1, kScore = 2 };
enum { kBadTag = 1, kBadLength = 2, kForbidden = 3 };  // beside kOk
enum Reduction { kNone = 0, kSum = 1, kMean = 2 };

// The live steps of one sequence.
struct Row {
  int64_t index;       // in the batch
  int64_t length;      // live steps
  const int32_t* at;   // their positions; null means 0 .. length - 1
  double score;        // of the gold path
  bool done;           // value and gradients are already written
  bool lost;           // a label or the length is out of range and nobody may raise: NaN is the answer
  __attribute__((always_inline)) int64_t step(int64_t k) const { return at ? at[k] : k; }
};

// What served a row: the scaled domain in float or in double, or logs in double; and whether in a vector lane of its own.
enum Path : int32_t { kFast = 0, kWide = 1, kLog = 2, kInLanes = 4 };

// Emissions (batch, time, tags) with unit stride over tags; parameters contiguous; T is float or double.
// Null start and end mean zeros, null mask and lengths all live, null gradient of the transitions no gradients wanted.
// Gradients are those of the reduction, or without one of the sum weighted by `weights`, null for ones.
template <class T> struct ChainArgs {
  const T* emissions;
  int64_t stride_batch, stride_time;
  int64_t batch, time, tags;
  const T *transitions, *start, *end;
  const int64_t* labels;
  const uint8_t* mask;
  const int64_t* lengths;
  const T* weights;
  int kind;
  int reduction;
  bool check;
  T* value;  // (batch), or one number where there is a reduction
  T* grad_emissions;
  int64_t grad_stride_batch, grad_stride_time;
  T *grad_transitions, *grad_start, *grad_end;
  int32_t* paths;
  int64_t* best_path;  // Viterbi: (batch, time) contiguous
  int threads;
  int level;
  __attribute__((always_inline)) bool grads() const { return grad_transitions; }  // the others may be empty
  __attribute__((always_inline)) double weight(const Row& row) const {
    return weights ? double(weights[row.index]) : reduction == kMean ? 1.0 / double(batch) : 1.0;
  }
};

template <class T> int chain_crf(const ChainArgs<T>& args);
template <class T> int chain_viterbi(const ChainArgs<T>& args);
// The `count` best: scores (batch, count), paths (batch, count, time).
template <class T> int chain_n_best(const ChainArgs<T>& args, int64_t count, T* scores, int64_t* paths);

constexpr int kGroupRows = 8;  // rows that share a sweep with tags in the lanes
constexpr int kLaneTags = 24;  // most tags with one row in each lane
constexpr int kDecodeStride = 16;  // of the transitions where such rows are decoded
constexpr int kMaxRows = 16;   // lanes of the widest vector

// What all groups of a call share, in the compute type C of a tier. A panel is some columns of a matrix, row by row.
template <class C> struct ChainTables {
  int64_t tags, padded;
  const C *forward, *backward;  // exp(transitions - top) and its transpose, in panels
  const C *start, *end;         // exp(start - start_top), exp(end - end_top), padded with zeros
  double top, start_top, end_top;
  const double* raw_forward;  // Viterbi: transitions in panels; null otherwise
  const double* raw_into;     // Viterbi: transitions by destination (tags, padded); in lanes by source (tags, kDecodeStride)
};

// One group's outcome. counts (tags, padded) and the two boundary sums (padded) are written, not added to.
struct GroupResult {
  bool flagged[kMaxRows];  // the row is done, or must be done again in a wider tier; nothing of it is in the sums
  double *counts, *first, *last;
};

// A forward-backward kernel: what it pads tags to, the vectors in a panel (0: all tags), and the rows in a group.
// exponentials: out = exp(x - top); false where x is NaN or above top.
template <class T, class C> struct ChainSweep {
  int lanes, panel, rows;
  bool (*exponentials)(const T* x, int64_t size, double top, C* out);
  size_t (*scratch_bytes)(int64_t rows, int64_t time, int64_t padded, size_t element, bool grads);
  void (*run)(const ChainArgs<T>&, const ChainTables<C>&, const Row*, int rows, void* scratch, GroupResult&);
};
template <class T>
using ChainDecode = void (*)(const ChainArgs<T>&, const ChainTables<double>&, const Row*, int rows, void* scratch);

// Kernels of one instruction set level, in T and in double, and the most tags with which one row in each lane is faster.
template <class T> struct ChainLevel {
  int lane_tags, lane_decode_tags;
  ChainSweep<T, T> rows;
  ChainSweep<T, double> rows_wide;
  ChainSweep<T, T> lanes;
  ChainSweep<T, double> lanes_wide;
  ChainDecode<T> rows_decode, lanes_decode;
};

extern const ChainLevel<float> chain_float_v2, chain_float_v3, chain_float_v4;
extern const ChainLevel<double> chain_double_v2, chain_double_v3, chain_double_v4;

}  // namespace pyseq::chain
