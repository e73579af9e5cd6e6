// The lazy_adam room's function in Python.
#include "lazy_adam.hpp"
#include "module.hpp"
#include "reader.hpp"

namespace py = pybind11;
using py::handle;

namespace pyseq::lazy_adam {
namespace {

bool is(const Tensor& x, Type type, std::initializer_list<int64_t> shape) { return x.type == type && x.has_shape(shape); }

int bound_update(handle params, handle exp_avg, handle exp_avg_sq, handle max_exp_avg_sq, handle last, handle touches,
                 handle indices, handle values, handle steps, handle seeds, handle hyper, bool decay, bool row_bias,
                 bool maximize, bool dense, int threads, int level) {
  Reader read;
  const std::vector<Tensor> p = read.list(params), m = read.list(exp_avg), v = read.list(exp_avg_sq),
                            most = read.list(max_exp_avg_sq), l = read.list(last), n = read.list(touches),
                            i = read.list(indices), g = read.list(values), t = read.list(steps), s = read.list(seeds);
  const double* h = read.array<double>(hyper, {5});
  const size_t count = p.size();
  if (!read.fits || m.size() != count || v.size() != count || g.size() != count || t.size() != count) return kUnfit;
  for (const auto* some : {&most, &l, &n, &s})
    if (!some->empty() && some->size() != count) return kUnfit;
  if (i.size() != (dense ? 0 : count) || (decay && l.size() != count) || (row_bias && n.size() != count)) return kUnfit;
  std::vector<Table> tables;
  for (size_t k = 0; k < count; ++k) {
    Table x{};
    if (p[k].rank != 2 || g[k].rank != 2 || !serves(p[k].type, m[k].type, g[k].type)) return kUnfit;
    x.type = p[k].type, x.average = m[k].type, x.value = g[k].type;
    x.rows = p[k].size[0], x.dim = p[k].size[1], x.count = g[k].size[0];
    if (g[k].size[1] != x.dim || (dense && x.count != x.rows)) return kUnfit;
    for (const auto* average : {&m, &v, &most})
      if (!average->empty() && !is((*average)[k], x.average, {x.rows, x.dim})) return kUnfit;
    for (const auto* counter : {&l, &n})
      if (!counter->empty() && !is((*counter)[k], kInt32, {x.rows})) return kUnfit;
    if (!dense && !is(i[k], kInt64, {x.count})) return kUnfit;
    const bool half = x.type == kBfloat16 || x.average == kBfloat16;
    if (!is(t[k], kFloat, {}) || (half && s.empty()) || (!s.empty() && !is(s[k], kInt64, {}))) return kUnfit;
    x.param = p[k].data, x.exp_avg = m[k].data, x.exp_avg_sq = v[k].data;
    x.max_exp_avg_sq = most.empty() ? nullptr : most[k].data;
    x.last = l.empty() ? nullptr : static_cast<int32_t*>(l[k].data);
    x.touches = n.empty() ? nullptr : static_cast<int32_t*>(n[k].data);
    x.indices = dense ? nullptr : static_cast<const int64_t*>(i[k].data);
    x.values = g[k].data;
    x.step = int64_t(*static_cast<const float*>(t[k].data));
    x.seed = s.empty() ? 0 : *static_cast<const int64_t*>(s[k].data);
    tables.push_back(x);
  }
  const Options options{h[0], h[1], h[2], h[3], h[4], decay, row_bias, maximize, dense, threads, level};
  const py::gil_scoped_release release;
  return update(tables, options);
}

}  // namespace
}  // namespace pyseq::lazy_adam

PYSEQ_ROOM(lazy_adam, m) { m.def("update", &pyseq::lazy_adam::bound_update); }
