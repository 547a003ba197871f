// What the operations for CUDA need of torch: allocation, device and stream, and errors of launches.
//
// For tests/cuda_on_host it is compiled with MRCN_CUDA_ON_HOST. Then the tensors are CPU tensors.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

// The namespace and the dispatch key under which the operations are registered.
#if defined(MRCN_CUDA_ON_HOST)
#define MRCN_CUDA_NAMESPACE mrcn_fast_cuda_on_host
#define MRCN_CUDA_KEY CPU
#else
#define MRCN_CUDA_NAMESPACE mrcn_fast
#define MRCN_CUDA_KEY CUDA
#endif
#define MRCN_CUDA_LIBRARY_OF(name, key, library) STABLE_TORCH_LIBRARY_IMPL(name, key, library)
#define MRCN_CUDA_LIBRARY(library) MRCN_CUDA_LIBRARY_OF(MRCN_CUDA_NAMESPACE, MRCN_CUDA_KEY, library)
// The same for operations without tensors, which torch does not give to a device's key.
#define MRCN_CUDA_SETTINGS(library) \
  MRCN_CUDA_LIBRARY_OF(MRCN_CUDA_NAMESPACE, CompositeExplicitAutograd, library)

namespace mrcn {

inline bool is_cuda_tensor(const Tensor& t) {
#if defined(MRCN_CUDA_ON_HOST)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// A tensor with uninitialized memory on the device of `like`, in a fraction of the time that torch.empty
// takes through the dispatcher.
Tensor cuda_empty(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last = false);

// Makes the device of `like` the current device for the lifetime of the object.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& like);
  // torch's current stream on that device.
  void* stream() const;

 private:
  int index_;
#if !defined(MRCN_CUDA_ON_HOST)
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

[[noreturn]] void launch_failed(int error, const char* kernel, const Tensor& like, const std::string& shape);

// Throws an error that names the kernel, the device and shape(), unless `error`, the result of a launch, is
// 0.
template <class Shape>
inline void check_launch(int error, const char* kernel, const Tensor& like, const Shape& shape) {
  if (error != 0) launch_failed(error, kernel, like, shape());
}

}  // namespace mrcn
