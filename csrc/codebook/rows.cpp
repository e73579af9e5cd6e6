// What rows do to their codes, and what comes back to them.
#include <algorithm>
#include <cmath>

#include "codebook.hpp"
#include "cpu.hpp"
#include "segments.hpp"
#include "status.hpp"

namespace pyseq::codebook {

namespace {
constexpr int64_t kBlock = 256;       // rows a thread takes at once
constexpr double kParallel = 1e-6;    // as in kernels/codebook
constexpr int64_t kAlone = 1 << 15;   // elements that one thread has done before others have started
}  // namespace

template <class T> int statistics(const Statistics<T>& s) {
  const int64_t rows = s.n * s.heads;
  bool sound = true;
  const Segments segments = sorted_by_key(rows, s.heads * s.count, [&](int64_t i) {
    const int64_t k = s.indices[i];
    sound = sound && k >= -1 && k < s.count;
    return k < 0 || k >= s.count ? -1 : (s.heads == 1 ? 0 : i % s.heads) * s.count + k;
  });
  for (int64_t k = 0; k < s.heads * s.count; ++k) s.counts[k] = segments.begin[k + 1] - segments.begin[k];
  if (s.sums) sum_segments(segments, s.x, s.dim, s.sums, rows * s.dim < kAlone ? 1 : s.threads);
  return sound ? kOk : kBadIndex;
}

template <class T> void gradient(const Pull<T>& p) {
  const int64_t rows = p.n * p.heads, dim = p.dim;
  const T scale = *p.scale;
  const auto dot = level_of<T>(cpu_level(p.level)).dot;
  for_each((rows + kBlock - 1) / kBlock, rows * dim < kAlone ? 1 : p.threads, [&](int64_t block) {
    const int64_t last = std::min((block + 1) * kBlock, rows);
    for (int64_t i = block * kBlock; i < last; ++i) {
      T* out = p.gradient + i * dim;
      const int64_t k = p.indices[i];
      if (k < 0 || k >= p.count) {
        std::fill_n(out, dim, T(0));
        continue;
      }
      const T *x = p.x + i * dim, *c = p.codes + ((p.heads == 1 ? 0 : i % p.heads) * p.count + k) * dim;
      if (!p.upstream) {
        for (int64_t d = 0; d < dim; ++d) out[d] = scale * (x[d] - c[d]);
        continue;
      }
      const T* g = p.upstream + i * dim;
      if (p.rotation) {
        const double xx = dot(x, x, dim), cc = dot(c, c, dim), lengths = std::sqrt(xx) * std::sqrt(cc);
        const double apart = lengths > 0 ? 2 + 2 * dot(x, c, dim) / lengths : 0;
        if (apart > kParallel) {
          // r (g - 2 s (s.g) / s.s + 2 e (q.g)), e and q the unit vectors, s their sum, r the ratio of the lengths
          const double e = 1 / std::sqrt(xx), q = 1 / std::sqrt(cc), r = e / q;
          const double eg = e * dot(x, g, dim), qg = q * dot(c, g, dim), sum = 2 * (eg + qg) / apart;
          const T all = T(r), of_x = T(r * e * (2 * qg - sum)), of_c = T(-r * q * sum);
          for (int64_t d = 0; d < dim; ++d) out[d] = all * g[d] + of_x * x[d] + of_c * c[d] + scale * (x[d] - c[d]);
          continue;
        }
      }
      for (int64_t d = 0; d < dim; ++d) out[d] = g[d] + scale * (x[d] - c[d]);
    }
  });
}

template int statistics(const Statistics<float>&);
template int statistics(const Statistics<double>&);
template void gradient(const Pull<float>&);
template void gradient(const Pull<double>&);

}  // namespace pyseq::codebook
