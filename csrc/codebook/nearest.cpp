#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "codebook.hpp"
#include "cpu.hpp"
#include "parallel.hpp"
#include "sums.hpp"

namespace pyseq::codebook {

extern const Level<float> float_v2;
extern const Level<double> double_v2;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const Level<float> float_v3, float_v4;
extern const Level<double> double_v3, double_v4;
template <> const Level<float>& level_of(int level) { return level == 4 ? float_v4 : level == 3 ? float_v3 : float_v2; }
template <> const Level<double>& level_of(int level) { return level == 4 ? double_v4 : level == 3 ? double_v3 : double_v2; }
#else
template <> const Level<float>& level_of(int) { return float_v2; }
template <> const Level<double>& level_of(int) { return double_v2; }
#endif

namespace {

constexpr int64_t kBlock = 96;  // rows a thread takes at once: a multiple of every level's tile

template <class T> bool finite(const T* x, int64_t dim) {
  return sum_of<T>(dim, [=](int64_t d) { return x[d] * 0; }) == 0;  // NaN of NaN and of infinities
}

template <class T> double apart(const T* a, const T* b, int64_t dim) {
  return sum_of<double>(dim, [=](int64_t d) { return (double(a[d]) - double(b[d])) * (double(a[d]) - double(b[d])); });
}

// One head's codes, packed, and whether any of them may win.
template <class T> class Codes {
 public:
  Codes(const Search<T>& s, const T* codes, int lanes, int threads) : s_(s), codes_(codes), usable_(s.count) {
    const int64_t dim = s.dim;
    panels_ = (s.count + lanes - 1) / lanes;
    pack_ = Block(sizeof(T) * panels_ * lanes * std::max<int64_t>(dim, 1));
    bias_ = Block(sizeof(T) * panels_ * lanes);
    center_.assign(dim, 0);
    std::vector<double> center(dim, 0.0);
    for (int64_t k = 0; k < s.count; ++k) {
      usable_[k] = finite(codes + k * dim, dim);
      any_ += usable_[k];
      if (!s.cosine && usable_[k])
        for (int64_t d = 0; d < dim; ++d) center[d] += double(codes[k * dim + d]);
    }
    for (int64_t d = 0; d < dim; ++d) center_[d] = any_ ? T(center[d] / double(any_)) : T(0);
    T *pack = static_cast<T*>(pack_.get()), *bias = static_cast<T*>(bias_.get());
    for_each(panels_, s.count * dim < 1 << 16 ? 1 : threads, [&](int64_t p) {
      std::vector<T> moved(dim);
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t k = p * lanes + l;
        const bool there = k < s.count && usable_[k];
        T* to = pack + p * lanes * dim + l;
        const T* from = codes + k * dim;
        const double length = there && s.cosine ? std::sqrt(dot(from, from, dim)) : 1.0;
        const T scale = T(length > 0 ? 1 / length : 1);
        for (int64_t d = 0; d < dim; ++d) moved[d] = there ? (from[d] - center_[d]) * scale : T(0);
        for (int64_t d = 0; d < dim; ++d) to[d * lanes] = moved[d];
        const double half = s.cosine ? 0.0 : dot(moved.data(), moved.data(), dim) / 2;
        bias[p * lanes + l] = there ? T(half) : std::numeric_limits<T>::infinity();
      }
    });
  }

  Packed<T> packed() const {
    return {static_cast<const T*>(pack_.get()), static_cast<const T*>(bias_.get()), center_.data(), panels_, s_.dim};
  }

  bool any() const { return any_ > 0; }

  // In float64, for a finite row whose scores are too large for T.
  int64_t slowly(const T* x) const {
    double least = std::numeric_limits<double>::infinity();
    int64_t found = -1;
    for (int64_t k = 0; k < s_.count; ++k) {
      if (!usable_[k]) continue;
      const T* c = codes_ + k * s_.dim;
      const double length = std::max(std::sqrt(dot(c, c, s_.dim)), 1e-300);
      const double score = s_.cosine ? -dot(x, c, s_.dim) / length : apart(x, c, s_.dim);
      if (score < least || found < 0) least = score, found = k;
    }
    return found;
  }

 private:
  const Search<T>& s_;
  const T* codes_;
  std::vector<uint8_t> usable_;
  Block pack_, bias_;
  std::vector<T> center_;
  int64_t panels_ = 0, any_ = 0;
};

template <class T> T measured(const Search<T>& s, const T* x, const T* code) {
  if (s.cosine && !s.total) {
    const double lengths = std::sqrt(dot(x, x, s.dim)) * std::sqrt(dot(code, code, s.dim));
    return T(lengths > 0 ? dot(x, code, s.dim) / lengths : 0);
  }
  return T(apart(x, code, s.dim));
}

}  // namespace

template <class T> void nearest(const Search<T>& s) {
  const Level<T>& level = level_of<T>(cpu_level(s.level));
  const int64_t dim = s.dim, blocks = (s.n + kBlock - 1) / kBlock;
  const double work = double(s.n) * double(s.count) * double(dim + 8);
  const int threads = work < 1 << 20 ? 1 : int(std::min<int64_t>(s.threads, blocks));
  for (int64_t h = 0; h < s.heads; ++h) {
    const T* codes = s.codes + h * s.count * dim;
    const Codes<T> head(s, codes, level.lanes, s.threads);
    const Packed<T> packed = head.packed();
    for_each(blocks, threads, [&](int64_t block) {
      const int64_t begin = block * kBlock, rows = std::min(kBlock, s.n - begin);
      const int64_t padded = (rows + level.tile_rows - 1) / level.tile_rows * level.tile_rows;
      std::vector<T> moved(padded * dim);
      T score[kBlock];
      int64_t index[kBlock];
      bool good[kBlock];
      for (int64_t r = 0; r < rows; ++r) {
        const T* x = s.x + ((begin + r) * s.heads + h) * dim;
        good[r] = head.any() && (!s.mask || s.mask[begin + r]) && finite(x, dim);
        for (int64_t d = 0; d < dim; ++d) moved[r * dim + d] = good[r] ? x[d] - packed.center[d] : T(0);
      }
      level.best(packed, moved.data(), int(padded), score, index);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (begin + r) * s.heads + h;
        const T* x = s.x + at * dim;
        if (good[r] && !(index[r] >= 0 && std::abs(score[r]) < std::numeric_limits<T>::infinity())) index[r] = head.slowly(x);
        s.indices[at] = good[r] ? index[r] : -1;
        s.distance[at] = good[r] ? measured(s, x, codes + index[r] * dim) : std::numeric_limits<T>::quiet_NaN();
        if (!s.quantized) continue;
        if (good[r])
          std::copy_n(codes + index[r] * dim, dim, s.quantized + at * dim);
        else
          std::fill_n(s.quantized + at * dim, dim, T(0));
      }
    });
  }
  if (s.total) *s.total = sum_of<double>(s.n * s.heads, [&](int64_t i) { return s.indices[i] < 0 ? 0.0 : double(s.distance[i]); });
}

template void nearest(const Search<float>&);
template void nearest(const Search<double>&);

}  // namespace pyseq::codebook
