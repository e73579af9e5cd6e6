// The physical limits a CPU kernel is measured against.
#pragma once

namespace pyseq {

// float32 multiply-adds per second that `threads` threads sustain together, measured for `seconds`.
double fma_peak(int threads, double seconds);

// Bytes read plus written per second by `threads` threads copying between buffers well past the last-level cache,
// measured for `seconds` and for at least one pass.
double copy_bandwidth(int threads, double seconds);

}  // namespace pyseq
