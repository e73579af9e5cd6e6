#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512cd,avx2,fma,bmi,bmi2")
#define PYSEQ_LEVEL 4
#include "adjust_kernel.hpp"
#include "kernel.hpp"
#include "entropy_kernel.hpp"
#include "memm_kernel.hpp"
#include "sample_kernel.hpp"
PYSEQ_ADJUST_LEVEL(v4)
PYSEQ_CHAIN_LEVEL(v4)
PYSEQ_ENTROPY_LEVEL(v4)
PYSEQ_MEMM_LEVEL(v4)
PYSEQ_SAMPLE_LEVEL(v4)
#endif
