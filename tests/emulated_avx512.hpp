// The AVX-512 intrinsics of csrc/simd.hpp and csrc/chain_lanes.hpp as loops over vectors, so that their kernels can be
// tested on a CPU without them; see test_native_builds.py.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace emulated {

typedef float F8 __attribute__((vector_size(32), may_alias));
typedef float F16 __attribute__((vector_size(64), may_alias));
typedef double D8 __attribute__((vector_size(64), may_alias));
typedef int32_t I16 __attribute__((vector_size(64), may_alias));
typedef int64_t L8 __attribute__((vector_size(64), may_alias));
#define EMULATED static inline __attribute__((always_inline, unused))

template <class V> constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
template <class V, class T> EMULATED V set1(T x) { return x - V{}; }
template <class V, class T> EMULATED V load(V otherwise, unsigned mask, const T* p) {
  for (int l = 0; l < lanes<V>; ++l)
    if (mask >> l & 1) otherwise[l] = p[l];
  return otherwise;
}
template <class V, class T> EMULATED void store(T* p, unsigned mask, V v) {
  for (int l = 0; l < lanes<V>; ++l)
    if (mask >> l & 1) p[l] = v[l];
}
template <class To, class V> EMULATED To convert(V v) {
  To out;
  for (int l = 0; l < lanes<V>; ++l) out[l] = v[l];
  return out;
}
template <class V> EMULATED V max(V a, V b) { return a > b ? a : b; }
template <class V> EMULATED bool test(V a) {
  bool found = false;
  for (int l = 0; l < lanes<V>; ++l) found |= a[l] != 0;
  return found;
}
template <class V> EMULATED auto reduce_max(V v) {
  auto top = v[0];
  for (int l = 1; l < lanes<V>; ++l) top = v[l] > top ? v[l] : top;
  return top;
}
template <class V> EMULATED auto reduce_add(V v) {
  auto sum = v[0];
  for (int l = 1; l < lanes<V>; ++l) sum += v[l];
  return sum;
}
template <class V> EMULATED V scalef(V x, V n) {
  for (int l = 0; l < lanes<V>; ++l) x[l] = std::ldexp(double(x[l]), int(std::fmax(-5000, std::fmin(5000, n[l]))));
  return x;
}
EMULATED D8 permute(D8 a, L8 index, D8 b) {
  D8 out;
  for (int l = 0; l < 8; ++l) out[l] = index[l] & 8 ? b[index[l] & 7] : a[index[l] & 7];
  return out;
}

}  // namespace emulated

#define _mm512_set1_ps(x) (__m512)emulated::set1<emulated::F16>(x)
#define _mm512_set1_pd(x) (__m512d)emulated::set1<emulated::D8>(x)
#define _mm512_loadu_pd(p) (__m512d)emulated::load(emulated::D8{}, 255, p)
#define _mm512_mask_loadu_ps(v, m, p) (__m512)emulated::load((emulated::F16)(v), m, p)
#define _mm512_mask_loadu_pd(v, m, p) (__m512d)emulated::load((emulated::D8)(v), m, p)
#define _mm256_mask_loadu_ps(v, m, p) (__m256)emulated::load((emulated::F8)(v), m, p)
#define _mm512_mask_storeu_ps(p, m, v) emulated::store(p, m, (emulated::F16)(v))
#define _mm512_mask_storeu_pd(p, m, v) emulated::store(p, m, (emulated::D8)(v))
#define _mm256_mask_storeu_ps(p, m, v) emulated::store(p, m, (emulated::F8)(v))
#define _mm512_cvtps_pd(x) (__m512d)emulated::convert<emulated::D8>((emulated::F8)(x))
#define _mm512_cvtpd_ps(x) (__m256)emulated::convert<emulated::F8>((emulated::D8)(x))
#define _mm512_cvtepi32_ps(x) (__m512)emulated::convert<emulated::F16>((emulated::I16)(x))
#define _mm512_cvtepi64_pd(x) (__m512d)emulated::convert<emulated::D8>((emulated::L8)(x))
#define _mm512_max_ps(a, b) (__m512)emulated::max((emulated::F16)(a), (emulated::F16)(b))
#define _mm512_max_pd(a, b) (__m512d)emulated::max((emulated::D8)(a), (emulated::D8)(b))
#define _mm512_test_epi32_mask(a, b) emulated::test((emulated::I16)(a) & (emulated::I16)(b))
#define _mm512_test_epi64_mask(a, b) emulated::test((emulated::L8)(a) & (emulated::L8)(b))
#define _mm512_reduce_max_ps(v) emulated::reduce_max((emulated::F16)(v))
#define _mm512_reduce_max_pd(v) emulated::reduce_max((emulated::D8)(v))
#define _mm512_reduce_max_epi32(v) emulated::reduce_max((emulated::I16)(v))
#define _mm512_reduce_max_epi64(v) emulated::reduce_max((emulated::L8)(v))
#define _mm512_reduce_add_ps(v) emulated::reduce_add((emulated::F16)(v))
#define _mm512_reduce_add_pd(v) emulated::reduce_add((emulated::D8)(v))
#define _mm512_maskz_scalef_ps(m, x, n) (__m512)emulated::scalef((emulated::F16)(x), (emulated::F16)(n))
#define _mm512_maskz_scalef_pd(m, x, n) (__m512d)emulated::scalef((emulated::D8)(x), (emulated::D8)(n))
#define _mm512_permutex2var_pd(a, i, b) \
  (__m512d)emulated::permute((emulated::D8)(a), (emulated::L8)(i), (emulated::D8)(b))
