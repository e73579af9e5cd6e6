// The codebook room's functions in Python.
#include "codebook.hpp"
#include "module.hpp"
#include "reader.hpp"

namespace py = pybind11;

namespace pyseq::codebook {
namespace {

template <class T>
int search(py::handle x, py::handle codebook, py::handle mask, bool cosine, py::handle indices, py::handle distance,
           int threads, int level) {
  Reader read;
  Tensor rows{}, codes{};
  Search<T> s{};
  s.x = read.rows<T>(x, 3, rows), s.codes = read.rows<T>(codebook, 3, codes);
  if (!read.fits || !rows.is_contiguous() || !codes.is_contiguous()) return kUnfit;
  s.n = rows.size[0], s.heads = rows.size[1], s.dim = rows.size[2], s.count = codes.size[1];
  if (codes.size[0] != s.heads || codes.size[2] != s.dim || s.count < 1 || s.count > INT32_MAX - 64) return kUnfit;
  s.mask = read.optional<uint8_t>(mask, {s.n});
  s.indices = read.array<int64_t>(indices, {s.n, s.heads});
  s.distance = read.array<T>(distance, {s.n, s.heads});
  if (!read.fits) return kUnfit;
  s.cosine = cosine, s.threads = threads, s.level = level;
  const py::gil_scoped_release release;
  nearest(s);
  return kOk;
}

int bound_nearest(py::handle x, py::handle codebook, py::handle mask, bool cosine, py::handle indices, py::handle distance,
                  int threads, int level) {
  Tensor rows;
  if (!view(x.ptr(), rows)) return kUnfit;
  return (rows.type == kDouble ? search<double> : search<float>)(x, codebook, mask, cosine, indices, distance, threads, level);
}

}  // namespace
}  // namespace pyseq::codebook

PYSEQ_ROOM(codebook, m) { m.def("nearest", &pyseq::codebook::bound_nearest); }
