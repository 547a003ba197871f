// Prints how the kernels of held.cuh divide a sample on a GPU: for each line "channels pixels bytes layout"
// of the input (layout 1 is channels_last), the blocks of a group and the bytes of shared memory of a block
// that holds two maps.
#include <cstdio>

#include "block/cuda/held.cuh"

namespace mrcn::MRCN_ISA {
namespace {

template <class T>
Hold of(const BlockShape& shape) {
  return hold_of<T>(shape);
}

void print(int64_t channels, int64_t pixels, int bytes, bool channels_last) {
  BlockShape shape{};
  shape.gate = Gate::se;
  shape.pixels = channels_last;
  shape.channels = channels;
  shape.length = pixels;
  const Hold hold = bytes == 4 ? of<float>(shape) : of<bf16>(shape);
  std::printf("%d %d\n", hold.group, 2 * hold.slots * block_threads * int(sizeof(Line)));
}

}  // namespace
}  // namespace mrcn::MRCN_ISA

int main() {
  long channels, pixels;
  int bytes, layout;
  while (std::scanf("%ld %ld %d %d", &channels, &pixels, &bytes, &layout) == 4) {
    mrcn::MRCN_ISA::print(channels, pixels, bytes, layout == 1);
  }
}
