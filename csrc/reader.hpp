// The one way from a call's arguments to memory: every tensor that a kernel reads or writes is taken through a Reader.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "status.hpp"
#include "tensor.hpp"

namespace pyseq {

using Shape = std::initializer_list<int64_t>;

// Takes the addresses of a call's arguments; `fits` turns false at the first tensor that is not as wanted.
class Reader {
 public:
  bool fits = true;

  // Contiguous, of this type and shape.
  template <class T> T* array(pybind11::handle object, Shape shape) {
    Tensor x;
    if (!fits) return nullptr;
    fits = view(object.ptr(), x) && x.type == type_of<T> && x.has_shape(shape) && x.is_contiguous();
    return fits ? static_cast<T*>(x.data) : nullptr;
  }

  // The same, or null for None.
  template <class T> T* optional(pybind11::handle object, Shape shape) {
    return object.is_none() ? nullptr : array<T>(object, shape);
  }

  // Of this rank, elements of the last dimension side by side, any other strides; x tells sizes and strides.
  template <class T> T* rows(pybind11::handle object, int rank, Tensor& x) {
    if (!fits) return nullptr;
    fits = view(object.ptr(), x) && x.type == type_of<T> && x.rank == rank &&
           (x.stride[rank - 1] == 1 || x.size[rank - 1] == 1 || x.is_empty());
    return fits ? static_cast<T*>(x.data) : nullptr;
  }

  // A list or tuple of contiguous tensors of any shape and type.
  std::vector<Tensor> list(pybind11::handle object) {
    std::vector<Tensor> found;
    fits = fits && (pybind11::isinstance<pybind11::list>(object) || pybind11::isinstance<pybind11::tuple>(object));
    if (!fits) return found;
    for (const pybind11::handle each : object) {
      found.emplace_back();
      if (!(fits = view(each.ptr(), found.back()) && found.back().is_contiguous())) return {};
    }
    return found;
  }
};

}  // namespace pyseq
