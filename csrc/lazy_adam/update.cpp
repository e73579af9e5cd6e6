#include <algorithm>
#include <cmath>

#include "cpu.hpp"
#include "half.hpp"
#include "lazy_adam.hpp"
#include "segments.hpp"
#include "status.hpp"

namespace pyseq::lazy_adam {
namespace {

constexpr int64_t kTogether = 64;  // rows a thread takes at once
constexpr int64_t kAhead = 8;      // rows ahead that are fetched
constexpr int kPowers = 256;       // powers of beta that are looked up

// 32 random bits for an element; as in the reference.
struct Bits {
  uint32_t key, high;
  static uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = (x ^ x >> 15) * 0x735A2D97u;
    return x ^ x >> 15;
  }
  Bits(const Table& t, uint32_t number)
      : key(uint32_t(t.seed) ^ uint32_t(t.step) * 0x9E3779B9u ^ number * 0x85EBCA6Bu), high(uint32_t(uint64_t(t.seed) >> 32)) {}
  uint32_t operator()(uint64_t element) const {
    return mixed(mixed(uint32_t(element) ^ key) ^ uint32_t(element >> 32) * 0xC2B2AE35u ^ high);
  }
};

inline void put(float x, float& to, const Bits&, uint64_t) { to = x; }
inline void put(double x, double& to, const Bits&, uint64_t) { to = x; }
// Up or down with the odds of where x lies between both; nothing finite becomes infinite.
inline void put(float x, Bfloat16& to, const Bits& bits, uint64_t element) {
  const uint32_t whole = bits_as<uint32_t>(x), moved = whole + (bits(element) & 0xffff);
  const uint32_t size = whole & 0x7fffffff;
  const bool stays = size >= 0x7f800000 || (moved & 0x7f800000) == 0x7f800000;
  to.bits = uint16_t((stays ? whole : moved) >> 16 | (size > 0x7f800000 ? 64 : 0));
}

// What all elements of a row share.
template <class T> struct Row {
  T fade1, fade2, take1, take2, keep, rate, root, eps;
  uint64_t first;  // number of its first element
};

template <class P, class A, class T>
[[gnu::always_inline]] inline void step(
    const Table& t, int64_t id, const T* g, const Row<T>& r, const Bits& b0, const Bits& b1, const Bits& b2, const Bits& b3) {
  P* w = static_cast<P*>(t.param) + id * t.dim;
  A *m = static_cast<A*>(t.exp_avg) + id * t.dim, *v = static_cast<A*>(t.exp_avg_sq) + id * t.dim;
  A* most = t.max_exp_avg_sq ? static_cast<A*>(t.max_exp_avg_sq) + id * t.dim : nullptr;
  if (most) {
#pragma GCC ivdep
    for (int64_t d = 0; d < t.dim; ++d) {
      const T mm = r.fade1 * T(widen(m[d])) + r.take1 * g[d], vv = r.fade2 * T(widen(v[d])) + r.take2 * (g[d] * g[d]);
      const T before = T(widen(most[d])), top = before > vv ? before : vv;
      put(mm, m[d], b1, r.first + d), put(vv, v[d], b2, r.first + d), put(top, most[d], b3, r.first + d);
      put(T(widen(w[d])) * r.keep - r.rate * mm / (std::sqrt(top) * r.root + r.eps), w[d], b0, r.first + d);
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t d = 0; d < t.dim; ++d) {
    const T mm = r.fade1 * T(widen(m[d])) + r.take1 * g[d], vv = r.fade2 * T(widen(v[d])) + r.take2 * (g[d] * g[d]);
    put(mm, m[d], b1, r.first + d), put(vv, v[d], b2, r.first + d);
    put(T(widen(w[d])) * r.keep - r.rate * mm / (std::sqrt(vv) * r.root + r.eps), w[d], b0, r.first + d);
  }
}

template <class P> using Wide = decltype(widen(P{}));

template <class P, class A> void step_v2(const Table& t, int64_t id, const void* g, const Row<Wide<P>>& r) {
  step<P, A>(t, id, static_cast<const Wide<P>*>(g), r, Bits(t, 0), Bits(t, 1), Bits(t, 2), Bits(t, 3));
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <class P, class A>
__attribute__((target("avx2,fma"))) void step_v3(const Table& t, int64_t id, const void* g, const Row<Wide<P>>& r) {
  step<P, A>(t, id, static_cast<const Wide<P>*>(g), r, Bits(t, 0), Bits(t, 1), Bits(t, 2), Bits(t, 3));
}
template <class P, class A>
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512"))) void step_v4(
    const Table& t, int64_t id, const void* g, const Row<Wide<P>>& r) {
  step<P, A>(t, id, static_cast<const Wide<P>*>(g), r, Bits(t, 0), Bits(t, 1), Bits(t, 2), Bits(t, 3));
}
#else
#define step_v3 step_v2
#define step_v4 step_v2
#endif

// Rows seen in order, each with the positions of its gradients: position order[begin[s]], .., of row id[s].
struct Seen {
  std::vector<int64_t> order, begin, id;
};

// False where an index is no row's.
bool sort_rows(const Table& t, Seen& seen) {
  std::vector<uint64_t> keys(t.count), other(t.count);
  uint64_t most = 0;
  for (int64_t i = 0; i < t.count; ++i) {
    if (t.indices[i] < 0 || t.indices[i] >= t.rows) return false;
    keys[i] = uint64_t(t.indices[i]) << 32 | uint64_t(i);
    most = std::max(most, uint64_t(t.indices[i]));
  }
  for (int shift = 32; shift < 64 && most >> (shift - 32); shift += 11) {
    int64_t starts[2049] = {};
    for (const uint64_t key : keys) ++starts[(key >> shift & 2047) + 1];
    for (int i = 0; i < 2048; ++i) starts[i + 1] += starts[i];
    for (const uint64_t key : keys) other[starts[key >> shift & 2047]++] = key;
    keys.swap(other);
  }
  seen.order.resize(t.count);
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t id = int64_t(keys[i] >> 32);
    seen.order[i] = int64_t(keys[i] & 0xffffffff);
    if (!i || id != seen.id.back()) seen.begin.push_back(i), seen.id.push_back(id);
  }
  seen.begin.push_back(t.count);
  return true;
}

class Powers {
 public:
  explicit Powers(double beta) : beta_(beta) {
    double power = 1;
    for (double& p : powers_) p = power, power *= beta;
  }
  double operator()(int64_t n) const { return n < kPowers ? powers_[n] : std::pow(beta_, double(n)); }

 private:
  double beta_, powers_[kPowers];
};

// What is the same for all tables of a call.
struct Call {
  const Options& o;
  Powers power1, power2;
  int level;
};

// All rows of one table, by threads that take kTogether of them at once.
template <class P, class A, class G> class Worker {
 public:
  using T = Wide<P>;

  Worker(const Table& t, const Call& call) : t_(t), call_(call), sum_(t.dim), wide_(t.dim), part_(t.dim) {
    step_ = call.level >= 4 ? step_v4<P, A> : call.level == 3 ? step_v3<P, A> : step_v2<P, A>;
  }

  void run(const Seen& seen, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      if (s + kAhead < last) fetch(seen.id[s + kAhead], seen.order[seen.begin[s + kAhead]]);
      const int64_t count = seen.begin[s + 1] - seen.begin[s];
      const int64_t* from = seen.order.data() + seen.begin[s];
      if (count > 1) add_up(from, count, values(), t_.dim, sum_.data(), part_.data());
      one(seen.id[s], count > 1 ? nullptr : values() + *from * t_.dim);
    }
  }

  // Of dense gradients; rows of zeros are not seen.
  void run_dense(int64_t first, int64_t last) {
    for (int64_t id = first; id < last; ++id) {
      const G* g = values() + id * t_.dim;
      bool any = false;
      for (int64_t d = 0; d < t_.dim; ++d) any |= widen(g[d]) != 0;
      if (any) one(id, g);
    }
  }

 private:
  const G* values() const { return static_cast<const G*>(t_.values); }

  void fetch(int64_t id, int64_t position) const {
    const auto lines = [&](const void* p, size_t bytes) {
      for (size_t at = 0; at < std::min<size_t>(bytes, 512); at += 64) __builtin_prefetch(static_cast<const char*>(p) + at);
    };
    lines(static_cast<const P*>(t_.param) + id * t_.dim, t_.dim * sizeof(P));
    lines(static_cast<const A*>(t_.exp_avg) + id * t_.dim, t_.dim * sizeof(A));
    lines(static_cast<const A*>(t_.exp_avg_sq) + id * t_.dim, t_.dim * sizeof(A));
    lines(values() + position * t_.dim, t_.dim * sizeof(G));
  }

  // g: null where the gradient is in sum_.
  void one(int64_t id, const G* g) {
    const T sign = call_.o.maximize ? T(-1) : T(1);
    T check = 0;
    for (int64_t d = 0; d < t_.dim; ++d) {
      wide_[d] = sign * (g ? T(widen(g[d])) : T(sum_[d]));
      check += wide_[d] * 0;
    }
    if (check != 0) return;  // a gradient that is no number
    const Options& o = call_.o;
    const int64_t since = o.decay ? t_.step - t_.last[id] : 1, age = o.row_bias ? t_.touches[id] + 1 : t_.step;
    const double root = std::sqrt(1 - call_.power2(age)), rate = o.lr / (1 - call_.power1(age));
    const Row<T> row{T(call_.power1(since)), T(call_.power2(since)), T(1 - o.beta1), T(1 - o.beta2),
                     T(1 - o.lr * o.weight_decay), T(rate), T(1 / root), T(o.eps), uint64_t(id) * uint64_t(t_.dim)};
    step_(t_, id, wide_.data(), row);
    if (t_.last) t_.last[id] = int32_t(t_.step);
    if (t_.touches) ++t_.touches[id];
  }

  const Table& t_;
  const Call& call_;
  std::vector<double> sum_;
  std::vector<T> wide_;
  std::vector<double> part_;
  void (*step_)(const Table&, int64_t, const void*, const Row<T>&);
};

using Run = void (*)(const Table&, const Call&, const Seen*, int64_t, int64_t);

template <class P, class A, class G> void run(const Table& t, const Call& call, const Seen* seen, int64_t first, int64_t last) {
  Worker<P, A, G> worker(t, call);
  if (seen)
    worker.run(*seen, first, last);
  else
    worker.run_dense(first, last);
}

// Null where there is none.
Run runner(Type type, Type average, Type value) {
  if (type == kFloat && average == kFloat && value == kFloat) return run<float, float, float>;
  if (type == kDouble && average == kDouble && value == kDouble) return run<double, double, double>;
  if (type == kFloat && average == kBfloat16 && value == kFloat) return run<float, Bfloat16, float>;
  if (type != kBfloat16) return nullptr;
  if (average == kFloat && value == kFloat) return run<Bfloat16, float, float>;
  if (average == kFloat && value == kBfloat16) return run<Bfloat16, float, Bfloat16>;
  if (average == kBfloat16 && value == kFloat) return run<Bfloat16, Bfloat16, float>;
  if (average == kBfloat16 && value == kBfloat16) return run<Bfloat16, Bfloat16, Bfloat16>;
  return nullptr;
}

}  // namespace

bool serves(Type type, Type average, Type value) { return runner(type, average, value) != nullptr; }

int update(const std::vector<Table>& tables, const Options& options) {
  const Call call{options, Powers(options.beta1), Powers(options.beta2), cpu_level(options.level)};
  std::vector<Seen> seen(tables.size());
  std::vector<uint8_t> sound(tables.size(), 1);
  int64_t elements = 0;
  for (const Table& t : tables) elements += t.count * (t.dim + 8);
  const int threads = elements < 1 << 15 ? 1 : options.threads;
  const int sorters = int(std::min<int64_t>(threads, int64_t(tables.size())));
  for_each(int64_t(tables.size()), sorters, [&](int64_t k) {
    if (!options.dense) sound[k] = sort_rows(tables[k], seen[k]);
  });
  if (std::count(sound.begin(), sound.end(), 0)) return kBadRow;
  std::vector<int64_t> ends;  // blocks of rows up to and with each table
  int64_t blocks = 0;
  const auto rows = [&](size_t k) { return options.dense ? tables[k].rows : int64_t(seen[k].id.size()); };
  for (size_t k = 0; k < tables.size(); ++k) ends.push_back(blocks += (rows(k) + kTogether - 1) / kTogether);
  for_each(blocks, threads, [&](int64_t block) {
    const size_t k = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin();
    const Table& t = tables[k];
    const int64_t first = (block - (k ? ends[k - 1] : 0)) * kTogether, last = std::min(first + kTogether, rows(k));
    runner(t.type, t.average, t.value)(t, call, options.dense ? nullptr : &seen[k], first, last);
  });
  return kOk;
}

}  // namespace pyseq::lazy_adam
