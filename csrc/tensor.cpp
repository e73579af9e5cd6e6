#include "tensor.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <numeric>

namespace py = pybind11;

namespace pyseq {

namespace {

// The C exchange table of DLPack 1 (github.com/dmlc/dlpack, include/dlpack/dlpack.h), which torch has from 2.10 on:
// a stable binary interface, of which these are the parts in use.
struct DLTensor {
  char* data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *size, *stride;
  uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48);
struct Exchange {
  uint32_t major, minor;
  void* older;
  void (*allocate)(), (*own)(), (*wrap)();  // of other types
  int (*view)(PyObject*, DLTensor*);
};
constexpr int kCpu = 1;
enum Code { kInt = 0, kFloatingPoint = 2, kBrainFloat = 4, kBoolean = 6 };

struct Torch {
  py::object tensor, parameter, strided, is_neg;
  py::object types[kBool + 1];
  const Exchange* exchange = nullptr;
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
    strided = torch.attr("strided");
    is_neg = py::str("is_neg");
    const char* names[] = {nullptr, "float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"};
    for (int i = 1; i <= kBool; i++) types[i] = torch.attr(names[i]);
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found->major == 1 && found->view) exchange = found;
  }
};

const Torch& torch() {
  static const Torch* found = nullptr;  // never destroyed: Python may be gone by then
  if (!found) found = new Torch;        // whoever comes here holds the interpreter's lock
  return *found;
}

bool allowed = true;

Type type_of_code(uint8_t code, uint8_t bits, uint16_t lanes) {
  if (lanes != 1) return kOther;
  if (code == kFloatingPoint) return bits == 32 ? kFloat : bits == 64 ? kDouble : bits == 16 ? kFloat16 : kOther;
  if (code == kBrainFloat && bits == 16) return kBfloat16;
  if (code == kInt) return bits == 64 ? kInt64 : bits == 32 ? kInt32 : kOther;
  return code == kBoolean && bits == 8 ? kBool : kOther;
}

bool view_by_exchange(PyObject* object, Tensor& out) {
  DLTensor found;
  if (torch().exchange->view(object, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.device_type != kCpu || found.rank > kMaxRank) return false;
  out.data = found.data + found.byte_offset;
  out.type = type_of_code(found.code, found.bits, found.lanes);
  out.rank = found.rank;
  for (int d = 0; d < found.rank; d++) out.size[d] = found.size[d], out.stride[d] = found.stride[d];
  return true;
}

bool view_by_attributes(py::handle object, Tensor& out) {
  if (!py::isinstance(object, torch().tensor)) return false;
  try {
    if (!object.attr("is_cpu").cast<bool>() || object.attr("is_nested").cast<bool>()) return false;
    if (!py::object(object.attr("layout")).is(torch().strided)) return false;
    const py::tuple size = object.attr("shape"), stride = object.attr("stride")();
    if (size.size() > kMaxRank) return false;
    out.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>());
    const py::object type = object.attr("dtype");
    out.type = kOther;
    for (int i = 1; i <= kBool; i++)
      if (type.is(torch().types[i])) out.type = Type(i);
    out.rank = int(size.size());
    for (int d = 0; d < out.rank; d++) out.size[d] = size[d].cast<int64_t>(), out.stride[d] = stride[d].cast<int64_t>();
    return true;
  } catch (const std::exception&) {
    return false;  // Python raised, or a size is symbolic
  }
}

}  // namespace

bool Tensor::has_shape(std::initializer_list<int64_t> shape) const {
  return rank == int(shape.size()) && std::equal(shape.begin(), shape.end(), size);
}

bool Tensor::has_shape_of(const Tensor& other) const {
  return rank == other.rank && std::equal(size, size + rank, other.size);
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  bool dense = true;
  for (int d = rank; d-- > 0; expected *= size[d]) dense &= size[d] == 1 || stride[d] == expected;
  return dense || expected == 0;
}

bool Tensor::is_empty() const { return std::count(size, size + rank, 0) > 0; }

int64_t Tensor::count() const { return std::accumulate(size, size + rank, int64_t{1}, std::multiplies<int64_t>()); }

bool view(PyObject* object, Tensor& out) {
  const bool dense = has_exchange() ? view_by_exchange(object, out) : view_by_attributes(object, out);
  return dense && (out.data || out.is_empty());  // fakes, wrappers and torch's symbolic zeros have no memory
}

bool is_plain(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch().tensor.ptr() || type == torch().parameter.ptr();
}

bool is_negated(PyObject* object) {
  PyObject* answer = PyObject_CallMethodNoArgs(object, torch().is_neg.ptr());
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer != Py_False;
}

bool has_exchange() { return allowed && torch().exchange; }

void allow_exchange(bool allow) { allowed = allow; }

}  // namespace pyseq
