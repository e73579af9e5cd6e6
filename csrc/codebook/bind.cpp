// The codebook room's functions in Python.
#include "codebook.hpp"
#include "module.hpp"
#include "reader.hpp"

namespace py = pybind11;
using py::handle;

namespace pyseq::codebook {
namespace {

// Rows (n, heads, dim) of a problem that has fields of these names.
template <class T, class P> void read_rows(Reader& read, handle x, P& p) {
  Tensor rows{};
  p.x = read.rows<T>(x, 3, rows);
  read.fits = read.fits && rows.is_contiguous();
  if (read.fits) p.n = rows.size[0], p.heads = rows.size[1], p.dim = rows.size[2];
}

template <class T, class P> void read_codes(Reader& read, handle codebook, P& p) {
  Tensor codes{};
  p.codes = read.rows<T>(codebook, 3, codes);
  if (!read.fits) return;
  p.count = codes.size[1];
  read.fits = codes.has_shape({p.heads, p.count, p.dim}) && codes.is_contiguous() && p.count > 0 && p.count <= INT32_MAX - 64;
}

template <class T>
int search(handle x, handle codebook, handle mask, bool cosine, handle indices, handle distance, handle quantized,
           handle total, int threads, int level) {
  Reader read;
  Search<T> s{};
  read_rows<T>(read, x, s);
  read_codes<T>(read, codebook, s);
  s.mask = read.optional<uint8_t>(mask, {s.n});
  s.indices = read.array<int64_t>(indices, {s.n, s.heads});
  s.distance = read.array<T>(distance, {s.n, s.heads});
  s.quantized = read.optional<T>(quantized, {s.n, s.heads, s.dim});
  s.total = read.optional<double>(total, {1});
  if (!read.fits) return kUnfit;
  s.cosine = cosine, s.threads = threads, s.level = level;
  const py::gil_scoped_release release;
  nearest(s);
  return kOk;
}

template <class T> int count_and_sum(handle x, handle indices, handle counts, handle sums, int threads) {
  Reader read;
  Statistics<T> s{};
  read_rows<T>(read, x, s);
  s.indices = read.array<int64_t>(indices, {s.n, s.heads});
  Tensor found{};
  s.counts = read.rows<int64_t>(counts, 2, found);
  if (!read.fits || !found.is_contiguous() || found.size[0] != s.heads) return kUnfit;
  s.count = found.size[1];
  s.sums = read.optional<T>(sums, {s.heads, s.count, s.dim});
  if (!read.fits) return kUnfit;
  s.threads = threads;
  const py::gil_scoped_release release;
  return statistics(s);
}

template <class T>
int pull(handle x, handle codebook, handle indices, handle scale, handle upstream, bool rotation, handle gradient, int threads,
         int level) {
  Reader read;
  Pull<T> p{};
  read_rows<T>(read, x, p);
  read_codes<T>(read, codebook, p);
  p.indices = read.array<int64_t>(indices, {p.n, p.heads});
  p.scale = read.array<T>(scale, {1});
  p.upstream = read.optional<T>(upstream, {p.n, p.heads, p.dim});
  p.gradient = read.array<T>(gradient, {p.n, p.heads, p.dim});
  if (!read.fits) return kUnfit;
  p.rotation = rotation, p.threads = threads, p.level = level;
  const py::gil_scoped_release release;
  codebook::gradient(p);
  return kOk;
}

bool is_double(handle x) {
  Tensor rows;
  return view(x.ptr(), rows) && rows.type == kDouble;
}

// The function for the rows' type, the first argument's.
template <class... A> auto by_type(int (*f32)(handle, A...), int (*f64)(handle, A...)) {
  return [=](handle x, A... rest) { return (is_double(x) ? f64 : f32)(x, rest...); };
}

}  // namespace
}  // namespace pyseq::codebook

PYSEQ_ROOM(codebook, m) {
  using namespace pyseq::codebook;
  m.def("nearest", by_type(search<float>, search<double>));
  m.def("statistics", by_type(count_and_sum<float>, count_and_sum<double>));
  m.def("gradient", by_type(pull<float>, pull<double>));
}
