// The baseline of the platform, whatever it is.
#define PYSEQ_LEVEL 2
#include "kernel.hpp"
PYSEQ_CODEBOOK_LEVEL(v2)
