// The block's operations on CPU tensors.
#include "block/ops.h"
#include "cpu/isa.h"
#include "cpu/output_memory.h"

namespace mrcn {
namespace {

// Larger outputs are evicted from the caches before they are read.
constexpr int64_t stream_bytes = int64_t(16) << 20;

// Whether `maps` outputs of this size are written by stores that bypass the caches. For rows of pixels it
// requires that each row starts at a whole vector.
bool streams(const BlockShape& s, int maps, const Tensor& like) {
  const int64_t size = like.element_size();
  const bool aligned = !s.pixels || s.channels * size % 64 == 0;
  return aligned && maps * s.samples * s.channels * s.length * size >= stream_bytes;
}

struct Cpu {
  static constexpr const char* tensor = "a CPU tensor";
  static constexpr bool converts = true;
  static constexpr ParallelFor parallel = pool;

  static bool serves(const Tensor& t) { return t.is_cpu(); }
  static int threads() { return int(torch::stable::get_num_threads()); }
  static Tensor empty(
      const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
    return make_output(sizes, dtype, like, channels_last);
  }
  static Tensors maps(int count, const std::vector<int64_t>& sizes, const Tensor& like, bool channels_last,
      std::vector<const void*> beside) {
    return make_maps(count, sizes, like, channels_last, std::move(beside));
  }
  static std::vector<int64_t> statistics(const BlockShape& shape) {
    return {sets_of(shape.mode).inputs, shape.samples, shape.channels, 2};
  }
  static void forward(BlockForward& call, const Tensor& like) {
    call.stream = streams(call.shape, sets_of(call.shape.mode).all(), like);
    kernels(call.shape.dtype).block_forward(call);
  }
  static void backward(BlockBackward& call, const Tensor& like) {
    call.stream = streams(call.shape, sets_of(call.shape.mode).inputs, like);
    kernels(call.shape.dtype).block_backward(call);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mrcn_fast, CPU, library) { Operations<Cpu>::implement(library); }

}  // namespace mrcn
