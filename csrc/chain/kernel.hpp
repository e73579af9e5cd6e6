// All kernels of the chain room, for the instruction set level that the including file sets.
#pragma once

#include "lanes.hpp"
#include "rows.hpp"

#if PYSEQ_LEVEL == 4
#define PYSEQ_LANES 24, 12
#define PYSEQ_LANES_DECODE(T) lanes_best_paths<T>
#elif PYSEQ_LEVEL == 3
#define PYSEQ_LANES 12, 12
#define PYSEQ_LANES_DECODE(T) lanes_best_paths<T>
#else
#define PYSEQ_LANES 12, 0
#define PYSEQ_LANES_DECODE(T) nullptr
#endif
#define PYSEQ_CHAIN_LEVEL(suffix)                                                                                         \
  namespace pyseq::chain {                                                                                                \
  template <class T, class C>                                                                                             \
  constexpr ChainSweep<T, C> chain_rows_##suffix = {                                                                      \
      Simd<C>::lanes, kTileVectors, kGroupRows, exponentials<T, C>, rows_scratch_bytes, rows_forward_backward<T, C>};     \
  template <class T, class C>                                                                                             \
  constexpr ChainSweep<T, C> chain_lanes_##suffix = {                                                                     \
      1, 0, Simd<C>::lanes, exponentials<T, C>, lanes_scratch_bytes, lanes_forward_backward<T, C>};                       \
  extern const ChainLevel<float> chain_float_##suffix = {                                                                 \
      PYSEQ_LANES, chain_rows_##suffix<float, float>, chain_rows_##suffix<float, double>,                                 \
      chain_lanes_##suffix<float, float>, chain_lanes_##suffix<float, double>, rows_best_paths<float>,                    \
      PYSEQ_LANES_DECODE(float)};                                                                                         \
  extern const ChainLevel<double> chain_double_##suffix = {                                                               \
      PYSEQ_LANES, chain_rows_##suffix<double, double>, chain_rows_##suffix<double, double>,                              \
      chain_lanes_##suffix<double, double>, chain_lanes_##suffix<double, double>, rows_best_paths<double>,                \
      PYSEQ_LANES_DECODE(double)};                                                                                        \
  }
