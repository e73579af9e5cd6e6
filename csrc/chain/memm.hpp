// Steps of a maximum-entropy Markov model: the cross entropy of scores + bias of a context, a step at a time.
#pragma once

#include <cstdint>

namespace pyseq::chain {

// scores (count, tags), bias (contexts, tags), contiguous. Step i has the logits scores[i] + bias[context[i]], times
// `factor`; without a context, -1, scores[i] alone. A label of -1: no step, nothing of it is read. weight (tags) or null.
// loss (count): times scale (count). grad (count, tags): written, or added to; grad_bias (contexts, tags): written, and may
// be bias itself where every context has one step; both null for no gradients. A
// label whose logit is -inf has the loss +inf, and no gradient.
template <class T> struct LocalArgs {
  const T *scores, *bias;
  const int64_t *context, *label;
  const T *weight, *scale;
  int64_t count, contexts, tags;
  double factor, smoothing;
  bool accumulate;
  double* loss;
  T *grad, *grad_bias;
  int threads, level;
};

// Labels (batch, time) of the live steps, and of those before and after each; -1 where there is none. What is out of range
// is answered as a status, and brought into it.
struct PathArgs {
  const int64_t* tags;
  const uint8_t* mask;
  const int64_t* lengths;
  int64_t batch, time, num_tags;
  int64_t *label, *before, *after;
};

int neighbours(const PathArgs& args);
template <class T> int local_steps(const LocalArgs<T>& args);

// Of some steps of one context; scratch (twice tags, and two vectors more); sums (tags) are added to, or null. Answers
// whether a label is forbidden.
template <class T>
using LocalRows = bool (*)(const LocalArgs<T>&, const int64_t* order, int64_t count, T* scratch, double* sums);
extern const LocalRows<float> local_float_v2, local_float_v3, local_float_v4;
extern const LocalRows<double> local_double_v2, local_double_v3, local_double_v4;

// One direction of a model: transitions g (tags, tags), and of each context c the largest score over tags j and the
// exponentials (tags, padded) of the rest. Without transitions all scores are 0.
struct Side {
  const double* g;
  bool forward;
  double *most, *exponentials;
  int64_t tags;
  double score(int64_t j, int64_t c) const { return !g ? 0.0 : forward ? g[c * tags + j] : g[j * tags + c]; }
};

// Emissions (batch, time, tags) and a mask, or null. out: adjusted emissions, as pyseq/ops/_memm.py has them, 0 at absent
// steps.
template <class T> struct AdjustArgs {
  const T* emissions;
  const uint8_t* mask;
  int64_t batch, time, tags, padded;
  Side side[2];
  int sides;
  double factor;
  double* out;
  int threads, level;
};

template <class T> void adjust(AdjustArgs<T>& args, const double* g, bool forward, bool backward);

using AdjustSide = void (*)(Side&, int64_t tags, int64_t padded, double factor);
template <class T>
using AdjustRows = void (*)(const AdjustArgs<T>&, int64_t b, const int64_t* steps, int64_t count, double* scratch);
extern const AdjustSide adjust_side_v2, adjust_side_v3, adjust_side_v4;
extern const AdjustRows<float> adjust_float_v2, adjust_float_v3, adjust_float_v4;
extern const AdjustRows<double> adjust_double_v2, adjust_double_v3, adjust_double_v4;

}  // namespace pyseq::chain
