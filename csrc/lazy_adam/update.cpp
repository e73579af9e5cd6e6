#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu.hpp"
#include "half.hpp"
#include "lazy_adam.hpp"
#include "segments.hpp"
#include "status.hpp"

namespace pyseq::lazy_adam {
namespace {

constexpr int64_t kTogether = 64;  // rows a thread takes at once
constexpr int64_t kAhead = 16;     // rows ahead that are fetched
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

// Of one row with the gradient g.
template <class P, class A, class G, class T>
[[gnu::always_inline]] inline void step(const Table& t, int64_t id, const G* g, const Row<T>& r) {
  P* w = static_cast<P*>(t.param) + id * t.dim;
  A *m = static_cast<A*>(t.exp_avg) + id * t.dim, *v = static_cast<A*>(t.exp_avg_sq) + id * t.dim;
  const Bits b0(t, 0), b1(t, 1), b2(t, 2), b3(t, 3);
  if (t.max_exp_avg_sq) {
    A* most = static_cast<A*>(t.max_exp_avg_sq) + id * t.dim;
#pragma GCC ivdep
    for (int64_t d = 0; d < t.dim; ++d) {
      const T x = T(widen(g[d])), mm = r.fade1 * T(widen(m[d])) + r.take1 * x;
      const T vv = r.fade2 * T(widen(v[d])) + r.take2 * (x * x), before = T(widen(most[d])), top = before > vv ? before : vv;
      put(mm, m[d], b1, r.first + d), put(vv, v[d], b2, r.first + d), put(top, most[d], b3, r.first + d);
      put(T(widen(w[d])) * r.keep - r.rate * mm / (std::sqrt(top) * r.root + r.eps), w[d], b0, r.first + d);
    }
    return;
  }
#pragma GCC ivdep
  for (int64_t d = 0; d < t.dim; ++d) {
    const T x = T(widen(g[d])), mm = r.fade1 * T(widen(m[d])) + r.take1 * x;
    const T vv = r.fade2 * T(widen(v[d])) + r.take2 * (x * x);
    put(mm, m[d], b1, r.first + d), put(vv, v[d], b2, r.first + d);
    put(T(widen(w[d])) * r.keep - r.rate * mm / (std::sqrt(vv) * r.root + r.eps), w[d], b0, r.first + d);
  }
}

template <class P> using Wide = decltype(widen(P{}));

// Rows seen in order, each with the positions of its gradients: position order[begin[s]], .., of row id[s].
struct Seen {
  std::vector<int64_t> order, begin, id;
};

// False where an index is no row's.
bool sort_rows(const Table& t, Seen& seen) {
  constexpr int digit = 11, most = 3;  // bits; digits of a row
  std::vector<uint64_t> keys(t.count), other(t.count);
  std::vector<int64_t> counts(most << digit);
  uint64_t last = 0;
  for (int64_t i = 0; i < t.count; ++i) {
    const uint64_t row = uint64_t(t.indices[i]);
    if (row >= uint64_t(t.rows)) return false;
    keys[i] = row << 32 | uint64_t(i);
    last = std::max(last, row);
    for (int k = 0; k < most; ++k) ++counts[k << digit | (row >> k * digit & ((1 << digit) - 1))];
  }
  for (int k = 0; k < most && last >> k * digit; ++k) {
    int64_t* at = counts.data() + (k << digit);
    for (int64_t i = 0, sum = 0; i < 1 << digit; ++i) sum += std::exchange(at[i], sum);
    for (const uint64_t key : keys) other[at[key >> (32 + k * digit) & ((1 << digit) - 1)]++] = key;
    keys.swap(other);
  }
  seen.order.resize(t.count), seen.begin.reserve(t.count + 1), seen.id.reserve(t.count);
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

// Some rows of one table, by one thread.
template <class P, class A, class G> class Worker {
 public:
  using T = Wide<P>;

  Worker(const Table& t, const Call& call) : t_(t), call_(call), sum_(t.dim), part_(t.dim), wide_(t.dim) {
    const Options& o = call.o;
    row_.take1 = T(o.maximize ? o.beta1 - 1 : 1 - o.beta1), row_.take2 = T(1 - o.beta2);
    row_.keep = T(1 - o.lr * o.weight_decay), row_.eps = T(o.eps);
  }

  [[gnu::always_inline]] void run(const Seen& seen, int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      if (s + kAhead < int64_t(seen.id.size())) fetch(seen.id[s + kAhead], seen.order[seen.begin[s + kAhead]]);
      const int64_t count = seen.begin[s + 1] - seen.begin[s], *from = seen.order.data() + seen.begin[s];
      if (count == 1) {
        one(seen.id[s], values() + *from * t_.dim);
      } else {
        add_up(from, count, values(), t_.dim, sum_.data(), part_.data());
        for (int64_t d = 0; d < t_.dim; ++d) wide_[d] = T(sum_[d]);
        one(seen.id[s], wide_.data());
      }
    }
  }

  // Of dense gradients; rows of zeros are not seen.
  [[gnu::always_inline]] void run_dense(int64_t first, int64_t last) {
    for (int64_t id = first; id < last; ++id) {
      const G* g = values() + id * t_.dim;
      int any = 0;
      for (int64_t d = 0; d < t_.dim; ++d) any |= widen(g[d]) != 0;
      if (any) one(id, g);
    }
  }

 private:
  const G* values() const { return static_cast<const G*>(t_.values); }

  // Into the second cache: more of them are on their way at once than into the first.
  [[gnu::always_inline]] void fetch(int64_t id, int64_t position) const {
    const auto lines = [&](const void* p, size_t bytes) {
      for (size_t at = 0; at < std::min<size_t>(bytes, 512); at += 64)
        __builtin_prefetch(static_cast<const char*>(p) + at, 0, 2);
    };
    lines(static_cast<const P*>(t_.param) + id * t_.dim, t_.dim * sizeof(P));
    lines(static_cast<const A*>(t_.exp_avg) + id * t_.dim, t_.dim * sizeof(A));
    lines(static_cast<const A*>(t_.exp_avg_sq) + id * t_.dim, t_.dim * sizeof(A));
    lines(values() + position * t_.dim, t_.dim * sizeof(G));
  }

  template <class X> [[gnu::always_inline]] void one(int64_t id, const X* g) {
    const T inf = std::numeric_limits<T>::infinity();
    int odd = 0;
    for (int64_t d = 0; d < t_.dim; ++d) odd |= !(std::abs(T(widen(g[d]))) < inf);
    if (odd) return;  // a gradient that is no number
    const Options& o = call_.o;
    const int64_t since = o.decay ? t_.step - t_.last[id] : 1, age = o.row_bias ? t_.touches[id] + 1 : t_.step;
    if (since != since_) since_ = since, row_.fade1 = T(call_.power1(since)), row_.fade2 = T(call_.power2(since));
    if (age != age_) {
      age_ = age, row_.rate = T(o.lr / (1 - call_.power1(age)));
      row_.root = T(1 / std::sqrt(1 - call_.power2(age)));
    }
    row_.first = uint64_t(id) * uint64_t(t_.dim);
    step<P, A>(t_, id, g, row_);
    if (t_.last) t_.last[id] = int32_t(t_.step);
    if (t_.touches) ++t_.touches[id];
  }

  const Table& t_;
  const Call& call_;
  std::vector<double> sum_, part_;
  std::vector<T> wide_;
  Row<T> row_;
  int64_t since_ = -1, age_ = -1;  // of row_
};

template <class P, class A, class G>
[[gnu::always_inline]] inline void run(const Table& t, const Call& call, const Seen* seen, int64_t first, int64_t last) {
  Worker<P, A, G> worker(t, call);
  if (seen)
    worker.run(*seen, first, last);
  else
    worker.run_dense(first, last);
}

using Run = void (*)(const Table&, const Call&, const Seen*, int64_t, int64_t);

template <class P, class A, class G> void run_v2(const Table& t, const Call& c, const Seen* s, int64_t first, int64_t last) {
  run<P, A, G>(t, c, s, first, last);
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <class P, class A, class G>
__attribute__((target("avx2,fma"))) void run_v3(const Table& t, const Call& c, const Seen* s, int64_t first, int64_t last) {
  run<P, A, G>(t, c, s, first, last);
}
template <class P, class A, class G>
__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512"))) void run_v4(
    const Table& t, const Call& c, const Seen* s, int64_t first, int64_t last) {
  run<P, A, G>(t, c, s, first, last);
}
#else
#define run_v3 run_v2
#define run_v4 run_v2
#endif

template <class P, class A, class G> Run at(int level) {
  return level >= 4 ? run_v4<P, A, G> : level == 3 ? run_v3<P, A, G> : run_v2<P, A, G>;
}

// Null where there is none.
Run runner(Type type, Type average, Type value, int level) {
  if (type == kFloat && average == kFloat && value == kFloat) return at<float, float, float>(level);
  if (type == kDouble && average == kDouble && value == kDouble) return at<double, double, double>(level);
  if (type == kFloat && average == kBfloat16 && value == kFloat) return at<float, Bfloat16, float>(level);
  if (type != kBfloat16) return nullptr;
  if (average == kFloat && value == kFloat) return at<Bfloat16, float, float>(level);
  if (average == kFloat && value == kBfloat16) return at<Bfloat16, float, Bfloat16>(level);
  if (average == kBfloat16 && value == kFloat) return at<Bfloat16, Bfloat16, float>(level);
  if (average == kBfloat16 && value == kBfloat16) return at<Bfloat16, Bfloat16, Bfloat16>(level);
  return nullptr;
}

}  // namespace

bool serves(Type type, Type average, Type value) { return runner(type, average, value, 0) != nullptr; }

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
    runner(t.type, t.average, t.value, call.level)(t, call, options.dense ? nullptr : &seen[k], first, last);
  });
  return kOk;
}

}  // namespace pyseq::lazy_adam
