// The error of an allocation that failed.
#pragma once

#include <cstdint>

namespace mrcn {

// Throws a std::runtime_error that names the bytes. Defined once, outside of what is compiled for each
// instruction set.
[[noreturn]] void no_memory(int64_t bytes);

}  // namespace mrcn
