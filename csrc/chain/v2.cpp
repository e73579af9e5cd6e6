// The baseline of the platform, whatever it is.
#define PYSEQ_LEVEL 2
#include "adjust_kernel.hpp"
#include "kernel.hpp"
#include "entropy_kernel.hpp"
#include "memm_kernel.hpp"
#include "sample_kernel.hpp"
PYSEQ_ADJUST_LEVEL(v2)
PYSEQ_CHAIN_LEVEL(v2)
PYSEQ_ENTROPY_LEVEL(v2)
PYSEQ_MEMM_LEVEL(v2)
PYSEQ_SAMPLE_LEVEL(v2)
