#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "codebook.hpp"
#include "cpu.hpp"
#include "parallel.hpp"

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

constexpr int kMostLanes = 32;
constexpr int64_t kBlock = 96;  // rows a thread takes at once: a multiple of every level's tile

// One head's codes, packed, and whether any of them may win.
template <class T> class Codes {
 public:
  Codes(const Search<T>& s, const Level<T>& level, const T* codes) : s_(s), level_(level), codes_(codes), usable_(s.count) {
    const int64_t dim = s.dim, lanes = level.lanes;
    panels_ = (s.count + lanes - 1) / lanes;
    pack_ = Block(sizeof(T) * panels_ * lanes * std::max<int64_t>(dim, 1));
    bias_ = Block(sizeof(T) * panels_ * lanes);
    center_.assign(dim, 0);
    std::vector<double> center(dim, 0.0);
    for (int64_t k = 0; k < s.count; ++k) {
      usable_[k] = level.finite(codes + k * dim, dim);
      any_ += usable_[k];
      if (!s.cosine && usable_[k]) level.add(codes + k * dim, dim, center.data());
    }
    for (int64_t d = 0; d < dim; ++d) center_[d] = any_ ? T(center[d] / double(any_)) : T(0);
    T *pack = static_cast<T*>(pack_.get()), *bias = static_cast<T*>(bias_.get());
    for_each(panels_, s.count * dim < 1 << 16 ? 1 : s.threads, [&](int64_t p) {
      const T* from[kMostLanes];
      T scale[kMostLanes];
      double half[kMostLanes];
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t k = p * lanes + l;
        from[l] = k < s.count && usable_[k] ? codes + k * dim : nullptr;
        const double length = from[l] && s.cosine ? std::sqrt(level.dot(from[l], from[l], dim)) : 1.0;
        scale[l] = T(length > 0 ? 1 / length : 1);
      }
      level.pack(from, scale, center_.data(), dim, pack + p * lanes * dim, half);
      for (int64_t l = 0; l < lanes; ++l)
        bias[p * lanes + l] = !from[l] ? std::numeric_limits<T>::infinity() : s.cosine ? T(0) : T(half[l]);
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
      const double length = std::max(std::sqrt(level_.dot(c, c, s_.dim)), 1e-300);
      const double score = s_.cosine ? -level_.dot(x, c, s_.dim) / length : level_.apart(x, c, s_.dim);
      if (score < least || found < 0) least = score, found = k;
    }
    return found;
  }

 private:
  const Search<T>& s_;
  const Level<T>& level_;
  const T* codes_;
  std::vector<uint8_t> usable_;
  Block pack_, bias_;
  std::vector<T> center_;
  int64_t panels_ = 0, any_ = 0;
};

template <class T> T measured(const Search<T>& s, const Level<T>& level, const T* x, const T* code) {
  if (!s.cosine || s.total) return T(level.apart(x, code, s.dim));
  const double lengths = std::sqrt(level.dot(x, x, s.dim)) * std::sqrt(level.dot(code, code, s.dim));
  return T(lengths > 0 ? level.dot(x, code, s.dim) / lengths : 0);
}

// In the order of rows, four at a time.
template <class T> double total_of(const Search<T>& s) {
  const int64_t rows = s.n * s.heads;
  double parts[4] = {};
  for (int64_t i = 0; i < rows; ++i) parts[i % 4] += s.indices[i] < 0 ? 0.0 : double(s.distance[i]);
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

}  // namespace

template <class T> void nearest(const Search<T>& s) {
  const Level<T>& level = level_of<T>(cpu_level(s.level));
  const int64_t dim = s.dim, blocks = (s.n + kBlock - 1) / kBlock;
  const double work = double(s.n) * double(s.count) * double(dim + 8);
  const int threads = work < 1 << 20 ? 1 : int(std::min<int64_t>(s.threads, blocks));
  for (int64_t h = 0; h < s.heads; ++h) {
    const T* codes = s.codes + h * s.count * dim;
    const Codes<T> head(s, level, codes);
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
        good[r] = head.any() && (!s.mask || s.mask[begin + r]) && level.finite(x, dim);
        for (int64_t d = 0; d < dim; ++d) moved[r * dim + d] = good[r] ? x[d] - packed.center[d] : T(0);
      }
      level.best(packed, moved.data(), int(padded), score, index);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (begin + r) * s.heads + h;
        const T* x = s.x + at * dim;
        if (good[r] && !(index[r] >= 0 && std::abs(score[r]) < std::numeric_limits<T>::infinity())) index[r] = head.slowly(x);
        s.indices[at] = good[r] ? index[r] : -1;
        s.distance[at] = good[r] ? measured(s, level, x, codes + index[r] * dim) : std::numeric_limits<T>::quiet_NaN();
        if (!s.quantized) continue;
        if (good[r])
          std::copy_n(codes + index[r] * dim, dim, s.quantized + at * dim);
        else
          std::fill_n(s.quantized + at * dim, dim, T(0));
      }
    });
  }
  if (s.total) *s.total = total_of(s);
}

template void nearest(const Search<float>&);
template void nearest(const Search<double>&);

}  // namespace pyseq::codebook
