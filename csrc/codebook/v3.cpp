#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,bmi,bmi2")
#define PYSEQ_LEVEL 3
#include "kernel.hpp"
PYSEQ_CODEBOOK_LEVEL(v3)
#endif
