#include "signature.hpp"

namespace pyseq {

bool Signature::fits(pybind11::handle given) const {
  constexpr int kMaxSizes = 16;
  int64_t size[kMaxSizes];
  bool known[kMaxSizes] = {};
  Type sums = kOther;
  if (!PyTuple_Check(given.ptr()) || size_t(PyTuple_GET_SIZE(given.ptr())) != arguments_.size()) return false;
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const Argument& wanted = arguments_[i];
    PyObject* object = PyTuple_GET_ITEM(given.ptr(), i);
    if (object == Py_None) {
      if (!wanted.optional) return false;
      continue;
    }
    Tensor x;
    if (!is_plain(object) || !view(object, x) || x.rank != int(wanted.sizes.size())) return false;
    if (wanted.kind == Kind::scores) {
      if (x.type != kFloat && x.type != kDouble && x.type != kFloat16 && x.type != kBfloat16) return false;
      sums = x.type == kDouble ? kDouble : kFloat;
    } else if (x.type != (wanted.kind == Kind::sums ? sums : wanted.kind == Kind::integers ? kInt64 : kBool)) {
      return false;
    }
    if (wanted.kind <= Kind::sums && is_negated(object)) return false;
    for (int d = 0; d < x.rank; ++d) {
      const int name = wanted.sizes[d];
      if (name >= kMaxSizes) return false;
      if (known[name] && size[name] != x.size[d]) return false;
      size[name] = x.size[d], known[name] = true;
    }
    for (const int name : wanted.filled)
      if (size[name] == 0) return false;
  }
  return true;
}

}  // namespace pyseq
