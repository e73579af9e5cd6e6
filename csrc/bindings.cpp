// The Python module. Kernels take tensors and return a status: kUnfit where one is not what a kernel reads or writes.
#include <pybind11/pybind11.h>

#include <cmath>
#include <string_view>

#include "chain.hpp"
#include "cpu.hpp"
#include "limits.hpp"
#include "tensor.hpp"

namespace py = pybind11;

namespace {

using py::handle;
using Shape = std::initializer_list<int64_t>;

// Takes the addresses of a call's arguments; `fits` turns false at the first tensor that is not as wanted.
class Reader {
 public:
  bool fits = true;

  // Contiguous.
  template <class T> T* array(handle object, Shape shape) {
    pyseq::Tensor x;
    if (!fits) return nullptr;
    fits = pyseq::view(object.ptr(), x) && x.type == pyseq::type_of<T> && x.has_shape(shape) && x.is_contiguous();
    return fits ? static_cast<T*>(x.data) : nullptr;
  }

  template <class T> T* optional(handle object, Shape shape) {
    return object.is_none() ? nullptr : array<T>(object, shape);
  }

  // (batch, time, tags) with any stride of batch and time.
  template <class T> T* steps(handle object, pyseq::Tensor& x) {
    if (!fits) return nullptr;
    fits = pyseq::view(object.ptr(), x) && x.type == pyseq::type_of<T> && x.rank == 3 &&
           (x.stride[2] == 1 || x.size[2] == 1 || x.is_empty());
    return fits ? static_cast<T*>(x.data) : nullptr;
  }
};

// What all chain kernels read.
struct Chain {
  handle emissions, transitions, start, end, labels, mask, lengths;
};

template <class T> void read_chain(Reader& read, const Chain& chain, pyseq::ChainArgs<T>& args) {
  pyseq::Tensor x{};
  args.emissions = read.steps<T>(chain.emissions, x);
  const auto [batch, time, tags] = x.size;
  args.stride_batch = x.stride[0], args.stride_time = x.stride[1];
  args.batch = batch, args.time = time, args.tags = tags;
  args.transitions = read.array<T>(chain.transitions, {tags, tags});
  args.start = read.optional<T>(chain.start, {tags});
  args.end = read.optional<T>(chain.end, {tags});
  args.labels = read.optional<int64_t>(chain.labels, {batch, time});
  args.mask = read.optional<uint8_t>(chain.mask, {batch, time});
  args.lengths = read.optional<int64_t>(chain.lengths, {batch});
}

// `serve` with a number of the emissions' type.
template <class F> int by_type(handle emissions, F serve) {
  pyseq::Tensor x;
  if (!pyseq::view(emissions.ptr(), x)) return pyseq::kUnfit;
  return x.type == pyseq::kDouble ? serve(double{}) : serve(float{});
}

int crf(
    handle emissions, handle transitions, handle start, handle end, handle labels, handle mask, handle lengths,
    handle weights, int kind, std::string_view reduction, bool check, handle value, handle grads, handle paths,
    int threads, int level) {
  return by_type(emissions, [&](auto type) -> int {
    using T = decltype(type);
    pyseq::ChainArgs<T> args{};
    Reader read;
    read_chain<T>(read, {emissions, transitions, start, end, labels, mask, lengths}, args);
    const int64_t batch = args.batch, time = args.time, tags = args.tags;
    args.weights = read.optional<T>(weights, {batch});
    args.kind = kind;
    read.fits &= kind == pyseq::kPartition || ((kind == pyseq::kNll || kind == pyseq::kScore) && !labels.is_none());
    args.reduction = reduction == "none" ? pyseq::kNone : reduction == "sum" ? pyseq::kSum : pyseq::kMean;
    read.fits &= args.reduction != pyseq::kMean || reduction == "mean";
    args.check = check;
    args.value = args.reduction == pyseq::kNone ? read.array<T>(value, {batch}) : read.array<T>(value, {});
    if (!grads.is_none()) {
      const auto four = grads.cast<py::list>();
      pyseq::Tensor x{};
      args.grad_emissions = read.steps<T>(four[0], x);
      read.fits = read.fits && x.has_shape({batch, time, tags});
      args.grad_stride_batch = x.stride[0], args.grad_stride_time = x.stride[1];
      args.grad_transitions = read.array<T>(four[1], {tags, tags});
      args.grad_start = read.array<T>(four[2], {tags});
      args.grad_end = read.array<T>(four[3], {tags});
    }
    args.paths = read.optional<int32_t>(paths, {batch});
    args.threads = threads;
    args.level = level;
    if (!read.fits) return pyseq::kUnfit;
    const py::gil_scoped_release release;
    return pyseq::chain_crf(args);
  });
}

int viterbi(
    handle emissions, handle transitions, handle start, handle end, handle labels, handle mask, handle lengths,
    bool check, handle scores, handle path, int threads, int level) {
  return by_type(emissions, [&](auto type) -> int {
    using T = decltype(type);
    pyseq::ChainArgs<T> args{};
    Reader read;
    read_chain<T>(read, {emissions, transitions, start, end, labels, mask, lengths}, args);
    args.check = check;
    args.value = read.array<T>(scores, {args.batch});
    args.best_path = read.array<int64_t>(path, {args.batch, args.time});
    args.threads = threads;
    args.level = level;
    if (!read.fits) return pyseq::kUnfit;
    const py::gil_scoped_release release;
    return pyseq::chain_viterbi(args);
  });
}

// Whether the checks of ops have nothing to say of plain tensors and nothing to convert.
bool chain_fits(
    handle emissions, handle transitions, handle start, handle end, handle labels, handle mask, handle lengths,
    bool labelled) {
  pyseq::Tensor lead;
  if (!pyseq::is_plain(emissions.ptr()) || !pyseq::view(emissions.ptr(), lead)) return false;
  if (lead.rank != 3 || lead.size[2] == 0 || pyseq::is_negated(emissions.ptr())) return false;
  const bool single = lead.type == pyseq::kFloat || lead.type == pyseq::kFloat16 || lead.type == pyseq::kBfloat16;
  if (!single && lead.type != pyseq::kDouble) return false;
  const pyseq::Type sums = single ? pyseq::kFloat : pyseq::kDouble;
  const auto [batch, time, tags] = lead.size;
  const auto fits = [sums](handle object, pyseq::Type type, Shape shape) {
    pyseq::Tensor x;
    return pyseq::is_plain(object.ptr()) && pyseq::view(object.ptr(), x) && x.type == type && x.has_shape(shape) &&
           (type != sums || !pyseq::is_negated(object.ptr()));
  };
  return fits(transitions, sums, {tags, tags}) && (start.is_none() || fits(start, sums, {tags})) &&
         (end.is_none() || fits(end, sums, {tags})) &&
         (labelled ? fits(labels, pyseq::kInt64, {batch, time}) : labels.is_none()) &&
         (mask.is_none() || (lengths.is_none() && fits(mask, pyseq::kBool, {batch, time}))) &&
         (lengths.is_none() || fits(lengths, pyseq::kInt64, {batch}));
}

template <class T> py::object shared_number_in(const pyseq::Tensor& x) {
  const T* at = static_cast<const T*>(x.data);
  const int64_t count = x.rank == 0 ? 1 : x.size[0], stride = x.rank == 0 ? 0 : x.stride[0];
  for (int64_t i = 1; i < count && stride != 0; ++i)
    if (at[i * stride] != at[0]) return py::none();
  return count && std::isfinite(at[0]) ? py::object(py::float_(at[0])) : py::none();
}

// The finite number that all elements of a scalar or a vector are; None where there is none.
py::object shared_number(handle object) {
  pyseq::Tensor x;
  if (!pyseq::view(object.ptr(), x) || x.rank > 1 || pyseq::is_negated(object.ptr())) return py::none();
  return x.type == pyseq::kFloat ? shared_number_in<float>(x) : x.type == pyseq::kDouble ? shared_number_in<double>(x) : py::none();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyseq. They check the tensors they would read and write: use pyseq.ops instead.";
  m.def("crf", &crf);
  m.def("viterbi", &viterbi);
  m.def("chain_fits", &chain_fits);
  m.def("shared_number", &shared_number);
  m.def("has_exchange", &pyseq::has_exchange, "Whether tensors are read through DLPack's C exchange table.");
  m.def("allow_exchange", &pyseq::allow_exchange, "False reads them through their attributes, as before torch 2.10.");
  m.def("cpu_level", &pyseq::cpu_level, py::arg("wanted") = 0, "Instruction set level in use: 4, 3 or 2.");
  m.def("fma_peak", &pyseq::fma_peak, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "float32 multiply-adds per second");
  m.def("copy_bandwidth", &pyseq::copy_bandwidth, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(), "bytes read and written per second by a copy");
}
