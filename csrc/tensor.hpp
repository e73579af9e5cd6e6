// Torch's tensors without torch's headers: their address, type, sizes and strides.
#pragma once

#include <Python.h>

#include <cstdint>
#include <initializer_list>

namespace pyseq {

enum Type { kOther, kFloat16, kBfloat16, kFloat, kDouble, kInt32, kInt64, kBool };

template <class T> constexpr Type type_of = kOther;
template <> inline constexpr Type type_of<float> = kFloat;
template <> inline constexpr Type type_of<double> = kDouble;
template <> inline constexpr Type type_of<int64_t> = kInt64;
template <> inline constexpr Type type_of<int32_t> = kInt32;
template <> inline constexpr Type type_of<uint8_t> = kBool;

constexpr int kMaxRank = 8;

// Strides count elements.
struct Tensor {
  void* data;
  Type type;
  int rank;
  int64_t size[kMaxRank], stride[kMaxRank];
  bool has_shape(std::initializer_list<int64_t> shape) const;
  bool has_shape_of(const Tensor& other) const;
  bool is_contiguous() const;
  bool is_empty() const;
  int64_t count() const;  // of elements
};

// Fills `out` for a dense tensor of at most kMaxRank dimensions with memory of its own, the CPU's; false for anything
// else, without a Python exception. The view holds as long as the object does.
bool view(PyObject* object, Tensor& out);

// Whether the object's type is torch.Tensor or torch.nn.Parameter itself and no subclass.
bool is_plain(PyObject* object);

// Whether memory holds the negatives of a tensor's elements: torch puts off the sign of a conjugate's imaginary part.
bool is_negated(PyObject* object);

// Whether views come through the exchange table, a tenth of a microsecond each, rather than Python's attributes.
bool has_exchange();
void allow_exchange(bool allowed);

}  // namespace pyseq
