// Whether a call's tensors are as an op declares them, so that nothing is left to check or to convert in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "tensor.hpp"

namespace pyseq {

// What pyseq/ops/_check.py says of an argument. sizes: a number for each named size, the same wherever it stands;
// filled: those that must not be 0.
enum class Kind { scores, sums, integers, booleans };  // of any float type; of the type of their sums; int64; bool
struct Argument {
  Kind kind;
  std::vector<int> sizes, filled;
  bool optional;
};

class Signature {
 public:
  void add(Kind kind, std::vector<int> sizes, std::vector<int> filled, bool optional) {
    arguments_.push_back({kind, std::move(sizes), std::move(filled), optional});
  }

  // given: a tuple. Plain dense tensors of the CPU with memory of their own, of the declared types and shapes; None where it may be.
  bool fits(pybind11::handle given) const;

 private:
  std::vector<Argument> arguments_;
};

}  // namespace pyseq
