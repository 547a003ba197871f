// The kernels of each compiled instruction set, and the choice of the best one that this CPU supports.
#pragma once

#include <string>
#include <vector>

#include "block/params.h"
#include "cqc/params.h"

namespace mrcn {

struct Kernels {
  const char* isa;
  void (*block_forward)(const BlockForward&);
  void (*block_backward)(const BlockBackward&);
  void (*cqc_forward)(const CqcForward&);
  void (*cqc_backward)(const CqcBackward&);
};

// The kernels of the best instruction set that this CPU supports, or of MRCN_FAST_ISA. Chosen once.
const Kernels& kernels();
// The kernels for a dtype: an extension for bf16 (avx512bf16) is compiled for bf16 alone, and all other
// dtypes use the instruction set that it extends.
const Kernels& kernels(Dtype dtype);

// The compiled instruction sets, slowest first.
std::vector<std::string> carried_isas();

}  // namespace mrcn
