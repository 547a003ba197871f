// The thread pool as the kernels see it: a plain function, so that files that are compiled once per
// instruction set include no header of torch.
#pragma once

#include <cstdint>

namespace mrcn {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, int64_t grain, RangeFunction function, void* context);

}  // namespace mrcn
