// Instruction set levels: 4 is AVX-512 (F, DQ, VL, BW, CD), 3 is AVX2 with FMA, 2 the platform's baseline.
#pragma once

namespace pyseq {

// The best level this CPU has, or `wanted` (2 to 4) where that is lower; 0 asks for the best.
int cpu_level(int wanted = 0);

}  // namespace pyseq
