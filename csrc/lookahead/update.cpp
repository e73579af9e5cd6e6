#include <algorithm>

#include "cpu.hpp"
#include "half.hpp"
#include "lookahead.hpp"
#include "parallel.hpp"

namespace pyseq::lookahead {
namespace {

template <class F, class S>
[[gnu::always_inline]] inline void lerp(F* fast, S* slow, int64_t n, double alpha) {
  using T = decltype(widen(S{}));
  const T weight = T(alpha), rest = T(1 - alpha);
  const auto run = [&](auto mix) {
    for (int64_t i = 0; i < n; ++i) {
      S moved;
      narrow(mix(T(widen(fast[i])), T(widen(slow[i]))), moved);
      slow[i] = moved;
      narrow(widen(moved), fast[i]);
    }
  };
  if (alpha < 0.5) run([=](T x, T y) { return y + weight * (x - y); });
  else run([=](T x, T y) { return x - (x - y) * rest; });  // exact at 1
}

template <class F, class S> void lerp_v2(void* fast, void* slow, int64_t n, double alpha) {
  lerp(static_cast<F*>(fast), static_cast<S*>(slow), n, alpha);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
template <class F, class S>
__attribute__((target("avx2"))) void lerp_v3(void* fast, void* slow, int64_t n, double alpha) {
  lerp(static_cast<F*>(fast), static_cast<S*>(slow), n, alpha);
}
#else
#define lerp_v3 lerp_v2
#endif

using Kernel = void (*)(void*, void*, int64_t, double);
template <class F, class S> Kernel of(int level) { return level >= 3 ? lerp_v3<F, S> : lerp_v2<F, S>; }

// Null where there is none.
Kernel kernel(Type fast, Type slow, int level) {
  if (fast == kFloat && slow == kFloat) return of<float, float>(level);
  if (fast == kDouble && slow == kDouble) return of<double, double>(level);
  if (fast == kBfloat16 && slow == kFloat) return of<Bfloat16, float>(level);
  if (fast == kBfloat16 && slow == kBfloat16) return of<Bfloat16, Bfloat16>(level);
  if (fast == kFloat16 && slow == kFloat) return of<Float16, float>(level);
  if (fast == kFloat16 && slow == kFloat16) return of<Float16, Float16>(level);
  return nullptr;
}

size_t bytes(Type type) { return type == kDouble ? 8 : type == kFloat ? 4 : 2; }

constexpr int64_t kUnit = 1 << 15;  // elements that a thread takes at once

}  // namespace

bool serves(Type fast, Type slow) { return kernel(fast, slow, 2) != nullptr; }

void update(const std::vector<Tensor>& fast, const std::vector<Tensor>& slow, double alpha, int threads, int level) {
  level = cpu_level(level);
  std::vector<int64_t> ends;  // elements up to and with each pair
  int64_t total = 0;
  for (const Tensor& x : fast) ends.push_back(total += x.count());
  const int64_t units = (total + kUnit - 1) / kUnit;
  for_each(units, int(std::min<int64_t>(threads, units)), [&](int64_t unit) {
    const int64_t stop = std::min(total, (unit + 1) * kUnit);
    int64_t at = unit * kUnit;
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin(); at < stop; ++i) {
      const int64_t first = i ? at - ends[i - 1] : at, n = std::min(stop, ends[i]) - at;
      const Type x = fast[i].type, y = slow[i].type;
      kernel(x, y, level)(static_cast<char*>(fast[i].data) + first * bytes(x),
                          static_cast<char*>(slow[i].data) + first * bytes(y), n, alpha);
      at += n;
    }
  });
}

}  // namespace pyseq::lookahead
