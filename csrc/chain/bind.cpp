// The chain room's functions in Python. They take a call's tensors and answer a status.
#include <string_view>

#include "chain.hpp"
#include "entropy.hpp"
#include "memm.hpp"
#include "module.hpp"
#include "reader.hpp"
#include "sample.hpp"

namespace py = pybind11;

namespace pyseq::chain {
namespace {

using py::handle;

// What all chain kernels read.
struct Inputs {
  handle emissions, transitions, start, end, tags, mask, lengths, weights;
};

template <class T> void read_chain(Reader& read, const Inputs& chain, ChainArgs<T>& args) {
  Tensor x{};
  args.emissions = read.rows<T>(chain.emissions, 3, x);
  args.batch = x.size[0], args.time = x.size[1], args.tags = x.size[2];
  args.stride_batch = x.stride[0], args.stride_time = x.stride[1];
  args.transitions = read.array<T>(chain.transitions, {args.tags, args.tags});
  args.start = read.optional<T>(chain.start, {args.tags});
  args.end = read.optional<T>(chain.end, {args.tags});
  args.labels = read.optional<int64_t>(chain.tags, {args.batch, args.time});
  args.mask = read.optional<uint8_t>(chain.mask, {args.batch, args.time});
  args.lengths = read.optional<int64_t>(chain.lengths, {args.batch});
  args.weights = read.optional<T>(chain.weights, {args.batch});
}

// What kernels write where gradients are wanted; all None where they are not.
struct Gradients {
  handle emissions, transitions, start, end;
};

template <class T> void read_gradients(Reader& read, const Gradients& grads, ChainArgs<T>& args) {
  if (grads.transitions.is_none()) return;
  Tensor x{};
  args.grad_emissions = read.rows<T>(grads.emissions, 3, x);
  read.fits = read.fits && x.has_shape({args.batch, args.time, args.tags});
  args.grad_stride_batch = x.stride[0], args.grad_stride_time = x.stride[1];
  args.grad_transitions = read.array<T>(grads.transitions, {args.tags, args.tags});
  args.grad_start = read.array<T>(grads.start, {args.tags});
  args.grad_end = read.array<T>(grads.end, {args.tags});
}

// Runs `kernel`, in the emissions' type, on what all kernels read and what `take` reads, without the interpreter's lock.
template <class Take, class Kernel>
int call(const Inputs& chain, bool check, int threads, int level, Take take, Kernel kernel) {
  const auto typed = [&](auto type) -> int {
    ChainArgs<decltype(type)> args{};
    Reader read;
    read_chain(read, chain, args);
    args.check = check, args.threads = threads, args.level = level;
    take(read, args, type);
    if (!read.fits) return kUnfit;
    const py::gil_scoped_release release;
    return kernel(args);
  };
  Tensor x;
  if (!view(chain.emissions.ptr(), x)) return kUnfit;
  return x.type == kDouble ? typed(double{}) : typed(float{});
}

int crf(
    handle emissions, handle transitions, handle start, handle end, handle tags, handle mask, handle lengths,
    handle weights, int kind, std::string_view reduction, bool check, handle value, handle grad_emissions,
    handle grad_transitions, handle grad_start, handle grad_end, handle paths, int threads, int level) {
  const auto take = [&](Reader& read, auto& args, auto type) {
    using T = decltype(type);
    args.kind = kind;
    read.fits &= kind == kPartition || ((kind == kNll || kind == kScore) && !tags.is_none());
    args.reduction = reduction == "none" ? kNone : reduction == "sum" ? kSum : kMean;
    read.fits &= args.reduction != kMean || reduction == "mean";
    args.value = args.reduction == kNone ? read.array<T>(value, {args.batch}) : read.array<T>(value, {});
    read_gradients(read, {grad_emissions, grad_transitions, grad_start, grad_end}, args);
    args.paths = read.optional<int32_t>(paths, {args.batch});
  };
  const Inputs chain{emissions, transitions, start, end, tags, mask, lengths, weights};
  return call(chain, check, threads, level, take, [](const auto& args) { return chain_crf(args); });
}

int viterbi(
    handle emissions, handle transitions, handle start, handle end, handle tags, handle mask, handle lengths,
    handle weights, bool check, handle scores, handle path, int threads, int level) {
  const auto take = [&](Reader& read, auto& args, auto type) {
    args.value = read.array<decltype(type)>(scores, {args.batch});
    args.best_path = read.array<int64_t>(path, {args.batch, args.time});
  };
  const Inputs chain{emissions, transitions, start, end, tags, mask, lengths, weights};
  return call(chain, check, threads, level, take, [](const auto& args) { return chain_viterbi(args); });
}

int n_best(
    handle emissions, handle transitions, handle start, handle end, handle tags, handle mask, handle lengths,
    handle weights, bool check, handle scores, handle paths, int threads, int level) {
  Tensor x{};
  if (!view(scores.ptr(), x) || x.rank != 2) return kUnfit;
  const int64_t count = x.size[1];
  void* best = nullptr;
  int64_t* path = nullptr;
  const auto take = [&](Reader& read, auto& args, auto type) {
    best = read.array<decltype(type)>(scores, {args.batch, count});
    path = read.array<int64_t>(paths, {args.batch, count, args.time});
  };
  const Inputs chain{emissions, transitions, start, end, tags, mask, lengths, weights};
  return call(chain, check, threads, level, take, [&](const auto& args) {
    return chain_n_best(args, count, static_cast<decltype(args.value)>(best), path);
  });
}

int sample(
    handle emissions, handle transitions, handle start, handle end, handle mask, handle lengths, handle seed, bool check,
    handle paths, int threads, int level) {
  Tensor x{};
  if (!view(paths.ptr(), x) || x.rank != 3) return kUnfit;
  const int64_t count = x.size[1];
  const int64_t* number = nullptr;
  int64_t* path = nullptr;
  const auto take = [&](Reader& read, auto& args, auto) {
    path = read.array<int64_t>(paths, {args.batch, count, args.time});
    number = read.array<int64_t>(seed, {1});
  };
  const Inputs chain{emissions, transitions, start, end, py::none(), mask, lengths, py::none()};
  return call(chain, check, threads, level, take, [&](const auto& args) {
    return chain_sample(args, static_cast<uint64_t>(*number), count, path);
  });
}

int entropy(
    handle emissions, handle transitions, handle start, handle end, handle tags, handle mask, handle lengths,
    handle weights, bool check, handle value, handle grad_emissions, handle grad_transitions, handle grad_start,
    handle grad_end, int threads, int level) {
  const auto take = [&](Reader& read, auto& args, auto type) {
    args.value = read.array<decltype(type)>(value, {args.batch});
    read_gradients(read, {grad_emissions, grad_transitions, grad_start, grad_end}, args);
  };
  const Inputs chain{emissions, transitions, start, end, tags, mask, lengths, weights};
  return call(chain, check, threads, level, take, [](const auto& args) { return chain_entropy(args); });
}

// Of a maximum-entropy Markov model.
int bound_neighbours(
    handle tags, handle mask, handle lengths, int64_t num_tags, handle label, handle before, handle after) {
  Reader read;
  Tensor x{};
  PathArgs a{};
  a.tags = read.rows<int64_t>(tags, 2, x), a.batch = x.size[0], a.time = x.size[1], a.num_tags = num_tags;
  if (!read.fits || !x.is_contiguous() || num_tags < 1) return kUnfit;
  a.mask = read.optional<uint8_t>(mask, {a.batch, a.time}), a.lengths = read.optional<int64_t>(lengths, {a.batch});
  a.label = read.array<int64_t>(label, {a.batch, a.time}), a.before = read.array<int64_t>(before, {a.batch, a.time});
  a.after = read.array<int64_t>(after, {a.batch, a.time});
  return read.fits ? neighbours(a) : kUnfit;
}

int bound_local_steps(
    handle scores, handle bias, handle context, handle label, handle scale, handle weight, double factor, double smoothing,
    bool accumulate, handle loss, handle grad, handle grad_bias, int threads, int level) {
  const auto typed = [&](auto type) -> int {
    using T = decltype(type);
    LocalArgs<T> a{};
    Reader read;
    Tensor x{}, by{};
    a.scores = read.rows<T>(scores, 2, x), a.count = x.size[0], a.tags = x.size[1];
    a.bias = read.rows<T>(bias, 2, by), a.contexts = by.size[0];
    read.fits = read.fits && x.is_contiguous() && by.is_contiguous() && by.size[1] == a.tags;
    a.context = read.array<int64_t>(context, {a.count}), a.label = read.array<int64_t>(label, {a.count});
    a.scale = read.array<T>(scale, {a.count}), a.weight = read.optional<T>(weight, {a.tags});
    a.loss = read.array<double>(loss, {a.count});
    a.grad = read.optional<T>(grad, {a.count, a.tags});
    a.grad_bias = read.optional<T>(grad_bias, {a.contexts, a.tags});
    if (!read.fits || grad.is_none() != grad_bias.is_none()) return kUnfit;
    for (int64_t i = 0; i < a.count; ++i)
      if (a.label[i] >= a.tags || a.context[i] >= a.contexts) return kUnfit;
    a.factor = factor, a.smoothing = smoothing, a.accumulate = accumulate, a.threads = threads, a.level = level;
    const py::gil_scoped_release release;
    return local_steps(a);
  };
  Tensor x;
  if (!view(scores.ptr(), x)) return kUnfit;
  return x.type == kDouble ? typed(double{}) : typed(float{});
}

int bound_adjust(
    handle emissions, handle transitions, handle mask, bool forward, bool backward, double factor, handle out, int threads,
    int level) {
  const auto typed = [&](auto type) -> int {
    using T = decltype(type);
    AdjustArgs<T> a{};
    Reader read;
    Tensor x{};
    a.emissions = read.rows<T>(emissions, 3, x), a.batch = x.size[0], a.time = x.size[1], a.tags = x.size[2];
    if (!read.fits || !x.is_contiguous()) return kUnfit;
    const double* g = read.array<double>(transitions, {a.tags, a.tags});
    a.mask = read.optional<uint8_t>(mask, {a.batch, a.time});
    a.out = read.array<double>(out, {a.batch, a.time, a.tags});
    if (!read.fits) return kUnfit;
    a.factor = factor, a.threads = threads, a.level = level;
    const py::gil_scoped_release release;
    adjust(a, g, forward, backward);
    return kOk;
  };
  Tensor x;
  if (!view(emissions.ptr(), x)) return kUnfit;
  return x.type == kDouble ? typed(double{}) : typed(float{});
}

}  // namespace
}  // namespace pyseq::chain

PYSEQ_ROOM(chain, m) {
  m.def("crf", &pyseq::chain::crf);
  m.def("viterbi", &pyseq::chain::viterbi);
  m.def("n_best", &pyseq::chain::n_best);
  m.def("sample", &pyseq::chain::sample);
  m.def("entropy", &pyseq::chain::entropy);
  m.def("neighbours", &pyseq::chain::bound_neighbours);
  m.def("local_steps", &pyseq::chain::bound_local_steps);
  m.def("adjust", &pyseq::chain::bound_adjust);
}
