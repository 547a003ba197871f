#include "cuda/tensors.h"

#if !defined(MRCN_CUDA_ON_HOST)
#include <dlfcn.h>
#endif

#include "block/cuda/kernels.h"

namespace mrcn {
namespace {

#if !defined(MRCN_CUDA_ON_HOST)
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// Looked up at run time, because only a torch with CUDA has libtorch_cuda.so. torch has loaded it.
CurrentStream find_current_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = torch_cuda != nullptr ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  check(found != nullptr, "backend 'cuda': this torch has no CUDA (libtorch_cuda.so is not loaded)");
  return reinterpret_cast<CurrentStream>(found);
}
#endif

}  // namespace

Tensor cuda_empty(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const size_t n = sizes.size();
  std::vector<int64_t> strides(n);
  int64_t stride = 1;
  const auto next = [&](size_t d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  };
  if (channels_last) {
    for (size_t d : {1, 3, 2, 0}) next(d);
  } else {
    for (size_t d = n; d-- > 0;) next(d);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(n), sizes.data(), strides.data(), number, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

OnDevice::OnDevice(const Tensor& like) : index_(like.get_device_index()) {
#if !defined(MRCN_CUDA_ON_HOST)
  if (torch::stable::accelerator::getCurrentDeviceIndex() != index_) guard_.emplace(index_);
#endif
}

void* OnDevice::stream() const {
#if defined(MRCN_CUDA_ON_HOST)
  return nullptr;
#else
  static const CurrentStream current = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(index_, &stream));
  return stream;
#endif
}

void launch_failed(int error, const char* kernel, const Tensor& like, const std::string& shape) {
  throw std::runtime_error(std::string(kernel) + " on device " + std::to_string(like.get_device_index()) +
                           " for " + shape + ": " + cuda::launch_error(error));
}

}  // namespace mrcn
