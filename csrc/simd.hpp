// Vectors of one instruction set level. Included after the level's target pragma, so everything here has internal linkage:
// an inline function shared between levels could end up compiled for a CPU that is not there.
#pragma once

#include <cstdint>
#include <cstring>
#if PYSEQ_LEVEL >= 3
#include <immintrin.h>
#endif

#define PYSEQ_INLINE static inline __attribute__((always_inline, unused))

namespace {

constexpr int kVectorBytes = PYSEQ_LEVEL == 4 ? 64 : PYSEQ_LEVEL == 3 ? 32 : 16;

template <class T> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
  static constexpr int lanes = kVectorBytes / 4;
  static constexpr int mantissa = 23, bias = 127;
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
  static constexpr int lanes = kVectorBytes / 8;
  static constexpr int mantissa = 52, bias = 1023;
};
template <class T> using Vec = typename Simd<T>::V;
template <class T> using IVec = typename Simd<T>::I;

template <class T> PYSEQ_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> PYSEQ_INLINE IVec<T> splat_int(int64_t x) { return typename Simd<T>::Int(x) - IVec<T>{}; }
template <class T> PYSEQ_INLINE Vec<T> load(const T* p) { Vec<T> v; memcpy(&v, p, sizeof v); return v; }
template <class T> PYSEQ_INLINE void store(T* p, Vec<T> v) { memcpy(p, &v, sizeof v); }

// The first `count` lanes from memory, -inf in the others.
template <class V, class In> PYSEQ_INLINE void load_some(V& v, const In* p, int count) {
  for (int l = 0; l < int(sizeof(V) / sizeof(v[0])); ++l) v[l] = l < count ? p[l] : -__builtin_inff();
}
template <class V, class Out> PYSEQ_INLINE void store_some(Out* p, V v, int count) {
  for (int l = 0; l < int(sizeof(V) / sizeof(v[0])); ++l)
    if (l < count) p[l] = Out(v[l]);
}

#if PYSEQ_LEVEL == 4
PYSEQ_INLINE unsigned first_lanes(int count) { return count >= 16 ? 0xffffu : (1u << count) - 1; }
PYSEQ_INLINE void load_some(Vec<float>& v, const float* p, int count) {
  v = (Vec<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), first_lanes(count), p);
}
PYSEQ_INLINE void load_some(Vec<double>& v, const double* p, int count) {
  v = (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(-__builtin_inf()), first_lanes(count), p);
}
PYSEQ_INLINE void load_some(Vec<double>& v, const float* p, int count) {
  v = (Vec<double>)_mm512_cvtps_pd(_mm256_mask_loadu_ps(_mm256_set1_ps(-__builtin_inff()), first_lanes(count), p));
}
PYSEQ_INLINE void store_some(float* p, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)v);
}
PYSEQ_INLINE void store_some(double* p, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(p, first_lanes(count), (__m512d)v);
}
PYSEQ_INLINE void store_some(float* p, Vec<double> v, int count) {
  _mm256_mask_storeu_ps(p, first_lanes(count), _mm512_cvtpd_ps((__m512d)v));
}
PYSEQ_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
PYSEQ_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm512_max_pd((__m512d)a, (__m512d)b); }
PYSEQ_INLINE bool any(IVec<float> m) { return _mm512_test_epi32_mask((__m512i)m, (__m512i)m); }
PYSEQ_INLINE bool any(IVec<double> m) { return _mm512_test_epi64_mask((__m512i)m, (__m512i)m); }
PYSEQ_INLINE float max_lane(Vec<float> v) { return _mm512_reduce_max_ps((__m512)v); }
PYSEQ_INLINE double max_lane(Vec<double> v) { return _mm512_reduce_max_pd((__m512d)v); }
PYSEQ_INLINE int32_t max_lane(IVec<float> v) { return _mm512_reduce_max_epi32((__m512i)v); }
PYSEQ_INLINE int64_t max_lane(IVec<double> v) { return _mm512_reduce_max_epi64((__m512i)v); }
PYSEQ_INLINE float sum_lanes(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
PYSEQ_INLINE double sum_lanes(Vec<double> v) { return _mm512_reduce_add_pd((__m512d)v); }
#else
#if PYSEQ_LEVEL == 3
alignas(32) const int32_t kLanes32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
PYSEQ_INLINE __m256i first_lanes(int count) {
  return _mm256_loadu_si256((const __m256i*)(kLanes32 + 8 - (count < 8 ? count : 8)));
}
PYSEQ_INLINE void load_some(Vec<float>& v, const float* p, int count) {
  if (count >= 8) return void(v = load(p));
  const __m256i m = first_lanes(count);
  v = (Vec<float>)_mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
}
PYSEQ_INLINE void load_some(Vec<double>& v, const float* p, int count) {
  if (count >= 4) return void(v = (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(p)));
  for (int l = 0; l < 4; ++l) v[l] = l < count ? p[l] : -__builtin_inff();
}
PYSEQ_INLINE void store_some(float* p, Vec<float> v, int count) {  // a masked store is microcode on AMD before Zen 4
  if (count >= 8) return store<float>(p, v);
  __m128 x = _mm256_castps256_ps128((__m256)v);
  if (count & 4) _mm_storeu_ps(p, x), p += 4, x = _mm256_extractf128_ps((__m256)v, 1);
  if (count & 2) _mm_storel_pi((__m64*)p, x), p += 2, x = _mm_movehl_ps(x, x);
  if (count & 1) _mm_store_ss(p, x);
}
PYSEQ_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
PYSEQ_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b); }
PYSEQ_INLINE bool any(IVec<float> m) { return _mm256_movemask_ps((__m256)m); }
PYSEQ_INLINE bool any(IVec<double> m) { return _mm256_movemask_pd((__m256d)m); }
PYSEQ_INLINE int32_t max_lane(IVec<float> v) {
  const __m128i x = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i y = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
PYSEQ_INLINE double max_lane(Vec<double> v) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
PYSEQ_INLINE float sum_lanes(Vec<float> v) {
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
#else
template <class V> PYSEQ_INLINE V max(V a, V b) { return a > b ? a : b; }
template <class I> PYSEQ_INLINE bool any(I m) {
  bool found = false;
  for (unsigned l = 0; l < sizeof(I) / sizeof(m[0]); ++l) found |= m[l] != 0;
  return found;
}
#endif
template <class V> PYSEQ_INLINE auto max_lane(V v) {
  auto top = v[0];
  for (unsigned l = 1; l < sizeof(V) / sizeof(v[0]); ++l) top = v[l] > top ? v[l] : top;
  return top;
}
template <class V> PYSEQ_INLINE auto sum_lanes(V v) {
  auto half = v[0];
  for (unsigned l = 1; l < sizeof(V) / sizeof(v[0]); ++l) half += v[l];
  return half;
}
#endif

// exp(x) = p * 2^n with n an integer and p in [0.70, 1.42]: rint by a magic constant, Cody-Waite reduction, Taylor or
// minimax polynomial. |x| must be below kExpRange. Relative error of p below 2 * 2^-24 (float), 2 * 2^-53 (double).
template <class C> constexpr C kExpRange = 0;
template <> constexpr float kExpRange<float> = 1024.0f;
template <> constexpr double kExpRange<double> = 524288.0;

PYSEQ_INLINE void exp_split(Vec<float> x, Vec<float>& p, IVec<float>& n) {
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  n = (IVec<float>)shifted - (IVec<float>)splat(12582912.0f);
  const Vec<float> whole = shifted - 12582912.0f;
  const Vec<float> r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec<float> q = r * 1.9875691500e-4f + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  p = q * (r * r) + r + 1.0f;
}
PYSEQ_INLINE void exp_split(Vec<double> x, Vec<double>& p, IVec<double>& n) {
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  n = (IVec<double>)shifted - (IVec<double>)splat(6755399441055744.0);
  const Vec<double> whole = shifted - 6755399441055744.0;
  const Vec<double> r = (x - whole * 6.93147180369123816490e-01) - whole * 1.90821492927058770002e-10;
  const double c[] = {1.6059043836821613e-10, 2.08767569878681e-09,  2.505210838544172e-08, 2.755731922398589e-07,
                      2.7557319223985893e-06, 2.48015873015873e-05,  1.984126984126984e-04, 1.388888888888889e-03,
                      8.333333333333333e-03,  4.1666666666666664e-02, 1.6666666666666666e-01, 0.5};
  Vec<double> q = splat(c[0]);
  for (int i = 1; i < 12; ++i) q = q * r + c[i];
  p = q * (r * r) + r + 1.0;
}

// Of normal numbers above 0: 2^n m with m in [0.7, 1.42), log m = 2 artanh((m - 1) / (m + 1)). Relative error below
// 4 * 2^-53, near 1 too.
PYSEQ_INLINE Vec<double> log_of(Vec<double> x) {
  const IVec<double> n = ((IVec<double>)x - 0x3fe6a09e667f3bcd) >> 52;  // the bits of sqrt(1/2)
  const Vec<double> f = (Vec<double>)((IVec<double>)x - (n << 52)) - 1.0, s = f / (f + 2.0), z = s * s;
  const Vec<double> whole = (Vec<double>)(n + (IVec<double>)splat(6755399441055744.0)) - 6755399441055744.0;
  Vec<double> q = splat(1.0 / 23);
  for (int k = 21; k > 1; k -= 2) q = q * z + 1.0 / k;
  return whole * 6.93147180369123816490e-01 + (f - s * (f - 2.0 * z * q) + whole * 1.90821492927058770002e-10);
}

// x * 2^n for x >= 0, anything from 0 to that where it is below the normal numbers; the result must not overflow.
#if PYSEQ_LEVEL == 4
PYSEQ_INLINE Vec<float> scale_by_power(Vec<float> x, IVec<float> n) {
  return (Vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)x, _mm512_cvtepi32_ps((__m512i)n));
}
PYSEQ_INLINE Vec<double> scale_by_power(Vec<double> x, IVec<double> n) {
  return (Vec<double>)_mm512_maskz_scalef_pd(0xff, (__m512d)x, _mm512_cvtepi64_pd((__m512i)n));
}
#else
template <class C> PYSEQ_INLINE Vec<C> scaled(Vec<C> x, IVec<C> n) {
  typedef typename Simd<C>::U U;  // lanes that are not chosen may overflow
  constexpr int mantissa = Simd<C>::mantissa;
  return ((IVec<C>)x >> mantissa) + n > 0 ? (Vec<C>)((U)x + ((U)n << mantissa)) : Vec<C>{};
}
PYSEQ_INLINE Vec<float> scale_by_power(Vec<float> x, IVec<float> n) { return scaled<float>(x, n); }
PYSEQ_INLINE Vec<double> scale_by_power(Vec<double> x, IVec<double> n) { return scaled<double>(x, n); }
#endif

}  // namespace
