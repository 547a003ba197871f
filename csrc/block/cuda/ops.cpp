// The block's operations on CUDA tensors.
#include "block/cuda/kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "block/ops.h"
#include "cuda/tensors.h"

namespace mrcn {
namespace {

std::string described(const BlockShape& s) {
  constexpr const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  std::ostringstream text;
  text << s.samples << " samples of " << s.channels << " channels of " << s.length << " pixels, "
       << dtypes[int(s.dtype)] << (s.pixels ? ", channels_last" : "");
  return text.str();
}

// Which kernels the environment asks for. It is read at every call, so that a program can change it.
struct Choice {
  bool held = false;
  int margin = 0;

  Choice() {
    if (const char* value = std::getenv("MRCN_FAST_CUDA_HELD"); value != nullptr && *value != '\0') {
      held = std::strcmp(value, "1") == 0;
      check(held || std::strcmp(value, "0") == 0, "MRCN_FAST_CUDA_HELD: got '", value, "', expected 0 or 1");
    }
    if (const char* value = std::getenv("MRCN_FAST_SM_MARGIN"); value != nullptr && *value != '\0') {
      char* end = nullptr;
      const long number = std::strtol(value, &end, 10);
      check(*end == '\0' && number >= 0 && number <= 1000, "MRCN_FAST_SM_MARGIN: got '", value,
          "', expected a number of multiprocessors from 0 to 1000");
      margin = int(number);
    }
  }
};

struct Cuda {
  static constexpr const char* tensor = "a CUDA tensor";
  static constexpr bool converts = false;
  static constexpr ParallelFor parallel = nullptr;

  static bool serves(const Tensor& t) { return is_cuda_tensor(t); }
  static int threads() { return 0; }
  static Tensor empty(
      const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
    return cuda_empty(sizes, dtype, like, channels_last);
  }
  static Tensors maps(int count, const std::vector<int64_t>& sizes, const Tensor& like, bool channels_last,
      const std::vector<const void*>&) {
    Tensors maps;
    for (int k = 0; k < count; ++k) {
      maps.push_back(cuda_empty(sizes, like.scalar_type(), like, channels_last));
    }
    return maps;
  }
  static std::vector<int64_t> statistics(const BlockShape& shape) {
    return {shape.samples, cuda::saved_row(shape)};
  }
  static void forward(BlockForward& call, const Tensor& like) {
    const Choice choice;
    const int64_t held = choice.held ? cuda::held_forward_scratch(call.shape) : 0;
    const Tensor scratch =
        cuda_empty({std::max(cuda::forward_scratch(call.shape), held)}, ScalarType::Byte, like);
    const OnDevice device(like);
    int error = 0;
    if (held == 0 || !cuda::held_forward(call, choice.margin, scratch.data_ptr(), device.stream(), &error)) {
      error = cuda::block_forward(call, scratch.data_ptr(), device.stream());
    }
    check_launch(error, "the block's forward", like, [&] { return described(call.shape); });
  }
  static void backward(BlockBackward& call, const Tensor& like) {
    const Choice choice;
    const int64_t held = choice.held ? cuda::held_backward_scratch(call.shape) : 0;
    const Tensor scratch =
        cuda_empty({std::max(cuda::backward_scratch(call.shape), held)}, ScalarType::Byte, like);
    const OnDevice device(like);
    int error = 0;
    if (held == 0 || !cuda::held_backward(call, choice.margin, scratch.data_ptr(), device.stream(), &error)) {
      error = cuda::block_backward(call, scratch.data_ptr(), device.stream());
    }
    check_launch(error, "the block's backward", like, [&] { return described(call.shape); });
  }
};

}  // namespace

MRCN_CUDA_LIBRARY(library) { Operations<Cuda>::implement(library); }

}  // namespace mrcn
