// One pass over pairs of tensors: slow moves to slow + alpha (fast - slow), and fast is set to it.
#pragma once

#include <vector>

#include "tensor.hpp"

namespace pyseq::lookahead {

// Whether there is a kernel for these types: equal ones, or float32 for slow beside half precision.
bool serves(Type fast, Type slow);

// Pairs of contiguous tensors of equal shapes and such types. The same numbers for any number of threads.
void update(const std::vector<Tensor>& fast, const std::vector<Tensor>& slow, double alpha, int threads, int level);

}  // namespace pyseq::lookahead
