// Half precision as bits.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyseq {
namespace {  // compiled anew in every file, for its instruction set

// Conversions round to nearest, ties to even, and keep infinities and NaN.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From> inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = bits_as<float>(rest) * 0x1p112f;  // subnormal ones come out right, too
  const uint32_t number = (x.bits & 0x7c00) == 0x7c00 ? rest | 0x7f800000 : bits_as<uint32_t>(scaled);
  return bits_as<float>(sign | number);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, Bfloat16& out) {
  const uint32_t bits = bits_as<uint32_t>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);
}
inline void narrow(float x, Float16& out) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00;
  } else if (size >= 0x477ff000) {  // rounds to 2^16 or beyond
    half = 0x7c00;
  } else if (size < 0x38800000) {  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
    half = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000;
  } else {
    half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

}  // namespace
}  // namespace pyseq
