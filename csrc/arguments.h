// From torch's tensors to pointers: checks with plain messages, dtypes, layouts, outputs, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "block/params.h"

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

// Whether elements lie at multiples of their size, as the kernels read them. Memory that others allocated,
// such as a file's that torch.frombuffer looks at, may begin anywhere.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % uintptr_t(t.element_size()) == 0;
}

// The tensor in dense, aligned memory: itself, or a copy.
inline Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t) ? t : torch::stable::clone(t);
}

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// Refuses a result whose bytes 64 bits can't count: views may be expanded to any size.
inline void check_countable(const std::vector<int64_t>& sizes, int64_t element_size) {
  int64_t bytes = element_size;
  bool countable = true;
  for (const int64_t size : sizes) countable &= !__builtin_mul_overflow(bytes, size > 1 ? size : 1, &bytes);
  std::ostringstream shape;
  for (size_t d = 0; d < sizes.size() && !countable; ++d) shape << (d > 0 ? ", " : "") << sizes[d];
  check(countable, "features: a result of (", shape.str(), ") has more bytes than 64 bits count; ",
      "use smaller maps or fewer samples");
}

// Calls the function on torch's threads. What it throws in one of them is thrown here: torch would only say
// that a call failed, and print the rest.
inline void pool(int64_t count, int64_t grain, RangeFunction function, void* context) {
  std::exception_ptr failure;
  std::mutex failing;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      function(begin, end, context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failing);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mrcn
