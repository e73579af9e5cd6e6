// What a kernel answers its launcher. Positive numbers are a room's own, for values that are out of range.
#pragma once

namespace pyseq {

enum Status { kUnfit = -1, kOk = 0 };  // kUnfit: a tensor is not as the kernel reads or writes it; nothing was touched

}  // namespace pyseq
