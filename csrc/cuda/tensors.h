// Tensors on a GPU, made ready for launches: allocation, device and stream.
//
// Built with MRCN_CUDA_ON_HOST for tests/cuda_on_host: then the tensors are the processor's.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

// Where the operations are registered.
#if defined(MRCN_CUDA_ON_HOST)
#define MRCN_CUDA_NAMESPACE mrcn_fast_cuda_on_host
#define MRCN_CUDA_KEY CPU
#else
#define MRCN_CUDA_NAMESPACE mrcn_fast
#define MRCN_CUDA_KEY CUDA
#endif
#define MRCN_CUDA_LIBRARY_OF(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
#define MRCN_CUDA_LIBRARY(library) MRCN_CUDA_LIBRARY_OF(MRCN_CUDA_NAMESPACE, MRCN_CUDA_KEY, library)

namespace mrcn {

inline bool is_cuda_tensor(const Tensor& t) {
#if defined(MRCN_CUDA_ON_HOST)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// torch.Tensor with uninitialized memory on the device of `like`, at a fraction of the time that torch.empty
// takes through the dispatcher.
Tensor cuda_empty(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last = false);

// Makes the device of `like` the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like);
  // torch's current stream there.
  void* stream() const;

 private:
  int index_;
#if !defined(MRCN_CUDA_ON_HOST)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

[[noreturn]] void launch_failed(int error, const char* kernel, const Tensor& like, const std::string& shape);

// An error that names kernel, shape() and device where `error`, a launch's result, is not 0.
template <class Shape>
inline void check_launch(int error, const char* kernel, const Tensor& like, const Shape& shape) {
  if (error != 0) launch_failed(error, kernel, like, shape());
}

}  // namespace mrcn
