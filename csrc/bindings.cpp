// The Python module: what all rooms share, then a submodule for each room. Kernels take tensors and return a status.
#include <pybind11/stl.h>

#include <vector>

#include "cpu.hpp"
#include "limits.hpp"
#include "module.hpp"
#include "reader.hpp"
#include "signature.hpp"

namespace py = pybind11;

namespace {

// What a kernel would see: (type, shape, strides) of a tensor, the number of elements of each one in a list; else None.
py::object seen(py::handle object) {
  static const char* types[] = {"other", "float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"};
  if (py::isinstance<py::list>(object)) {
    pyseq::Reader read;
    py::list counts;
    for (const pyseq::Tensor& x : read.list(object)) counts.append(py::make_tuple(types[x.type], x.count()));
    return read.fits ? py::object(counts) : py::none();
  }
  pyseq::Tensor x;
  if (!pyseq::view(object.ptr(), x)) return py::none();
  const auto numbers = [&](const int64_t* at) { return py::tuple(py::cast(std::vector<int64_t>(at, at + x.rank))); };
  return py::make_tuple(types[x.type], numbers(x.size), numbers(x.stride));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyseq. They check the tensors they would read and write: use pyseq.ops instead.";
  m.def("seen", &seen, "What a kernel would see of a tensor or a list of them; None where it could not read it.");
  m.def("has_exchange", &pyseq::has_exchange, "Whether tensors are read through DLPack's C exchange table.");
  m.def("allow_exchange", &pyseq::allow_exchange, "False reads them through their attributes, as before torch 2.10.");
  m.def("cpu_level", &pyseq::cpu_level, py::arg("wanted") = 0, "Instruction set level in use: 4, 3 or 2.");
  m.def("fma_peak", &pyseq::fma_peak, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "float32 multiply-adds per second");
  m.def("copy_bandwidth", &pyseq::copy_bandwidth, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(), "bytes read and written per second by a copy");
  py::enum_<pyseq::Kind>(m, "Kind")
      .value("scores", pyseq::Kind::scores)
      .value("sums", pyseq::Kind::sums)
      .value("integers", pyseq::Kind::integers)
      .value("booleans", pyseq::Kind::booleans);
  py::class_<pyseq::Signature>(m, "Signature", "Whether a call's tensors are as an op declares them.")
      .def(py::init<>())
      .def("add", &pyseq::Signature::add, py::arg("kind"), py::arg("sizes"), py::arg("filled"), py::arg("optional"))
      .def("fits", &pyseq::Signature::fits);
  for (const pyseq::Room* room = pyseq::Room::first(); room; room = room->next) {
    py::module_ inner = m.def_submodule(room->name);
    room->bind(inner);
  }
}
