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

}  // namespace pyseq::chain
