// From torch's tensors to pointers: checks with plain messages, dtypes, layouts, outputs, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "block/block.h"

namespace mrcn {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw std::runtime_error(
          std::string(name) + ": got an unknown dtype, expected float32, float64, bfloat16 or float16");
  }
}

// What sums and parameters of a dtype are held in.
inline ScalarType precise(Dtype dtype) {
  return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  const bool known = t.scalar_type() == dtype;
  if (known && t.is_contiguous()) return t;  // a call through the dispatcher less
  return torch::stable::contiguous(known ? t : torch::stable::to(t, dtype));
}

// torch.Tensor with uninitialized memory; large ones ask the kernel for huge pages, because the first touch
// of small ones costs more than the block does (csrc/common/memory.cpp).
Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last);

// As many of them, of `like`'s dtype, for maps that are written while those at `beside` are read: large ones
// lie apart from these and from one another in their pages, and take the memory of some that were freed.
std::vector<Tensor> make_maps(int count, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last, std::vector<const void*> beside);

// Gives back to the system what freed maps have left for the next ones.
void release_memory();

inline void pool(int64_t count, int64_t grain, RangeFunction function, void* context) {
  torch::stable::parallel_for(
      0, count, grain, [=](int64_t begin, int64_t end) { function(begin, end, context); });
}

}  // namespace mrcn
