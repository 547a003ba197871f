// What every operation does with its arguments: checks with plain messages, dtypes, memory that the kernels
// can read, and the threads to run on.
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

// The type of sums and parameters for a dtype of maps: the accumulation type.
inline ScalarType precise(Dtype dtype) {
  return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

// Whether elements lie at multiples of their size, which the kernels require. Memory that torch did not
// allocate, such as that of torch.frombuffer, may begin anywhere.
inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % uintptr_t(t.element_size()) == 0;
}

// Returns `t` itself if its memory is dense and aligned, otherwise a copy that is.
inline Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return is_aligned(t) ? t : torch::stable::clone(t);
}

inline Tensor converted(const Tensor& t, ScalarType dtype) {
  return dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// Refuses a result whose size in bytes exceeds 64 bits: a view may be expanded to any size.
inline void check_countable(const std::vector<int64_t>& sizes, int64_t element_size) {
  int64_t bytes = element_size;
  bool countable = true;
  for (const int64_t size : sizes) countable &= !__builtin_mul_overflow(bytes, size > 1 ? size : 1, &bytes);
  std::ostringstream shape;
  for (size_t d = 0; d < sizes.size() && !countable; ++d) shape << (d > 0 ? ", " : "") << sizes[d];
  check(countable, "features: a result of (", shape.str(), ") has more bytes than 64 bits count; ",
      "use smaller maps or fewer samples");
}

// Calls the function on torch's threads. An exception of any thread is thrown again here, because torch would
// print its message and only report that a call failed.
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
