// Prints how the kernels of held.cuh divide a sample on a GPU: for each line "channels pixels bytes layout"
// of the input (layout 1 is channels_last), the blocks of a group and the bytes of lines in a block's shared
// memory, of a pair's forward and of its backward.
#include <cstdio>

#include "block/cuda/held.cuh"

namespace mrcn::MRCN_ISA {
namespace {

constexpr int line_bytes = block_threads * int(sizeof(Line));

template <class T>
void print_of(const BlockShape& shape) {
  const Hold forward = forward_hold<T>(shape), backward = backward_hold<T>(shape);
  const int lines = backward.group == 0 ? 0 : backward_lines<T, Pattern<Mode::pair>>(backward);
  std::printf(
      "%d %d %d %d\n", forward.group, 2 * forward.slots * line_bytes, backward.group, lines * line_bytes);
}

void print(int64_t channels, int64_t pixels, int bytes, bool channels_last) {
  BlockShape shape{};
  shape.gate = Gate::se;
  shape.pixels = channels_last;
  shape.channels = channels;
  shape.length = pixels;
  bytes == 4 ? print_of<float>(shape) : print_of<bf16>(shape);
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
