// The lookahead room's function in Python.
#include "lookahead.hpp"
#include "module.hpp"
#include "reader.hpp"

namespace py = pybind11;

namespace pyseq::lookahead {
namespace {

int bound_update(py::handle fast, py::handle slow, double alpha, int threads, int level) {
  Reader read;
  const std::vector<Tensor> x = read.list(fast), y = read.list(slow);
  if (!read.fits || x.size() != y.size()) return kUnfit;
  for (size_t i = 0; i < x.size(); ++i)
    if (!x[i].has_shape_of(y[i]) || !serves(x[i].type, y[i].type)) return kUnfit;
  const py::gil_scoped_release release;
  update(x, y, alpha, threads, level);
  return kOk;
}

}  // namespace
}  // namespace pyseq::lookahead

PYSEQ_ROOM(lookahead, m) { m.def("update", &pyseq::lookahead::bound_update); }
