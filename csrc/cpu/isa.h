// Which of the instruction sets that the library carries runs here.
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

// The kernels of the best instruction set this processor has, or of MRCN_FAST_ISA; chosen once.
const Kernels& kernels();
// Those that take such elements: an instruction set that adds to another what concerns bf16 has them alone.
const Kernels& kernels(Dtype dtype);

// The instruction sets in the library, worst first.
std::vector<std::string> carried_isas();

}  // namespace mrcn
