// The only file that knows Python: addresses and sizes in, status out. Callers check and keep the tensors alive.
#include <pybind11/pybind11.h>

#include "chain.hpp"
#include "cpu.hpp"
#include "limits.hpp"

namespace py = pybind11;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

template <class T>
int crf(
    uintptr_t emissions, int64_t stride_batch, int64_t stride_time, int64_t batch, int64_t time, int64_t tags,
    uintptr_t transitions, uintptr_t start, uintptr_t end, uintptr_t labels, uintptr_t mask, uintptr_t lengths,
    uintptr_t weights, int kind, int reduction, bool check, uintptr_t value, uintptr_t grad_emissions, int64_t grad_stride_batch,
    int64_t grad_stride_time, uintptr_t grad_transitions, uintptr_t grad_start, uintptr_t grad_end, uintptr_t paths,
    int threads, int level) {
  const pyseq::ChainArgs<T> args{
      at<T>(emissions), stride_batch, stride_time, batch, time, tags, at<T>(transitions), at<T>(start), at<T>(end),
      at<int64_t>(labels), at<uint8_t>(mask), at<int64_t>(lengths), at<T>(weights), kind, reduction, check, at<T>(value),
      at<T>(grad_emissions), grad_stride_batch, grad_stride_time, at<T>(grad_transitions), at<T>(grad_start),
      at<T>(grad_end), at<int32_t>(paths), nullptr, threads, level};
  py::gil_scoped_release release;
  return pyseq::chain_crf(args);
}

template <class T>
int viterbi(
    uintptr_t emissions, int64_t stride_batch, int64_t stride_time, int64_t batch, int64_t time, int64_t tags,
    uintptr_t transitions, uintptr_t start, uintptr_t end, uintptr_t mask, uintptr_t lengths, bool check,
    uintptr_t scores, uintptr_t path, int threads, int level) {
  pyseq::ChainArgs<T> args{};
  args.emissions = at<T>(emissions);
  args.stride_batch = stride_batch;
  args.stride_time = stride_time;
  args.batch = batch;
  args.time = time;
  args.tags = tags;
  args.transitions = at<T>(transitions);
  args.start = at<T>(start);
  args.end = at<T>(end);
  args.mask = at<uint8_t>(mask);
  args.lengths = at<int64_t>(lengths);
  args.check = check;
  args.value = at<T>(scores);
  args.best_path = at<int64_t>(path);
  args.threads = threads;
  args.level = level;
  py::gil_scoped_release release;
  return pyseq::chain_viterbi(args);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyseq. Raw addresses: use pyseq.ops instead.";
  m.def("crf_float", &crf<float>);
  m.def("crf_double", &crf<double>);
  m.def("viterbi_float", &viterbi<float>);
  m.def("viterbi_double", &viterbi<double>);
  m.def("cpu_level", &pyseq::cpu_level, py::arg("wanted") = 0, "Instruction set level in use: 4, 3 or 2.");
  m.def("fma_peak", &pyseq::fma_peak, py::arg("threads"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
        "float32 multiply-adds per second");
  m.def("copy_bandwidth", &pyseq::copy_bandwidth, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(), "bytes read and written per second by a copy");
}
