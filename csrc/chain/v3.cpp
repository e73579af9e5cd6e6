#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,bmi,bmi2")
#define PYSEQ_LEVEL 3
#include "adjust_kernel.hpp"
#include "kernel.hpp"
#include "entropy_kernel.hpp"
#include "memm_kernel.hpp"
#include "sample_kernel.hpp"
PYSEQ_ADJUST_LEVEL(v3)
PYSEQ_CHAIN_LEVEL(v3)
PYSEQ_ENTROPY_LEVEL(v3)
PYSEQ_MEMM_LEVEL(v3)
PYSEQ_SAMPLE_LEVEL(v3)
#endif
