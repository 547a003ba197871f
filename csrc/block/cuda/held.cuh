// What the kernels share that hold a sample in shared memory: how a sample is divided, the lines that a
// thread holds, and the barrier of the blocks of a sample.
//
// A group of blocks holds a sample. Each block copies its part of every map into shared memory, sums it, and
// publishes its sums. After one barrier of the group, each block writes its part of the results from shared
// memory. So every map is read once. All blocks of a launch run at the same time (`launch_together`), and so
// a block may wait for others. Only integers are added atomically, and the order of every sum depends on C,
// L, the type and the layout, neither on the GPU nor on the batch size nor on the mode.
//
// A thread reads and writes the same lines: it copies them, sums them and uses them without a barrier.
#pragma once

#include "block/cuda/schedule.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// f(T{}) for the types of maps that are held: all but float64.
template <class F>
inline void with_held_element(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(f16{});
}

// --- how a sample is divided --------------------------------------------------------------------------

// The part of a block: all pixels of some channels (planes), or a range of pixels of some channels.
struct Hold {
  int group;  // blocks per sample; 0 where it can't be held
  Channels channels;
  int ranges;
  int64_t places;  // per range: lines of a plane, or pixels
  int slots;       // lines per thread and map
};

// A block's shared memory has at most `lines` lines per thread for two maps, and a group at most `group`
// blocks. The first size leaves room for two blocks per multiprocessor: with 256 threads it is 74 KB. The
// second is 147 KB, for samples of which the first would need too many blocks.
struct HoldSize {
  int lines, group;
};
constexpr HoldSize hold_sizes[] = {{18, 16}, {36, 32}};
constexpr int most_lines = 36;
// Channels of a block: of planes, a warp holds one line at least of each of its channels in both maps.
constexpr int most_held_channels = most<int>(most_lines / 2 * block_warps, most_channels);
// The hidden layers of all gates of a sample are in the shared memory of each block.
constexpr int most_hidden = 256;

template <class T>
inline Hold hold_in(const BlockShape& shape, int parts) {
  Hold h;
  if (shape.pixels) {
    const int64_t lines = least<int64_t>(divided(shape.channels, width<T>), most_across);
    const int across = least(power_of_two(lines), warp_lanes), each = across * width<T>;
    h.channels = {across, each, int(divided(shape.channels, each))};
    h.places = divided(shape.length, parts);
    h.ranges = int(divided(shape.length, h.places));
    h.slots = int(divided(h.places, block_threads / across));
  } else {
    const int64_t each = divided(shape.channels, parts);
    h.channels = {1, int(each), int(divided(shape.channels, each))};
    h.places = divided(shape.length, width<T>);
    h.ranges = 1;
    h.slots = int(least<int64_t>(divided(each, block_warps) * divided(h.places, warp_lanes), most_lines));
  }
  h.group = h.channels.blocks * h.ranges;
  return h;
}

// The smallest group that holds two maps of a sample. One map is divided in the same way, so that all modes
// give the same bits.
template <class T>
inline Hold hold_of(const BlockShape& shape) {
  const bool fits = shape.gate != Gate::cbam_channel && hidden(shape) <= most_hidden;
  for (const HoldSize& size : hold_sizes) {
    for (int parts = 1; parts <= size.group && fits; parts *= 2) {
      const Hold h = hold_in<T>(shape, parts);
      if (2 * h.slots <= size.lines && h.group <= size.group) return h;
    }
  }
  return {};
}

// How many blocks a launch has, so that they can run at the same time with `margin` multiprocessors left
// free; 0 where there is no place for one group. Groups take turns with the samples, each the same number of
// times.
inline int blocks_together(
    const Capacity& capacity, const Hold& hold, int shared, int margin, int64_t samples) {
  if (shared > capacity.shared_per_block) return 0;
  const int each = least(capacity.blocks, capacity.shared / (shared + capacity.reserved));
  const int64_t groups = most(capacity.processors - margin, 0) * int64_t(each) / hold.group;
  if (groups == 0) return 0;
  const int64_t turns = divided(samples, groups);
  return int(divided(samples, turns)) * hold.group;
}

// --- a block's part -----------------------------------------------------------------------------------

// Which part of a sample this block holds.
struct Held {
  int rank;          // among the blocks of the group
  int64_t channels;  // block of channels
  int range;
  int64_t begin, end;  // places

  MRCN_DEVICE Held(const Hold& hold, int64_t all_places)
      : rank(int(blockIdx.x) % hold.group),
        channels(rank % hold.channels.blocks),
        range(rank / hold.channels.blocks),
        begin(range * hold.places),
        end(least(begin + hold.places, all_places)) {}
};

// Calls f(share, at, slot) for each line of the thread; `slot` counts them.
template <class T, bool pixels, class A, class F>
MRCN_DEVICE void over_lines(const Common<A>& a, const Hold& hold, const Held& held, const F& f) {
  int slot = 0;
  over_shares<T, pixels>(a, hold.channels, held.channels, [&](const Share<T, pixels>& share) {
    for (int64_t at = held.begin + share.place; at < held.end; at += share.step) {
      if (share.c < a.C) f(share, at, slot++);
    }
  });
}

// Where the thread holds the line of map m.
template <int maps>
MRCN_DEVICE Line* held_line(Line* lines, int slot, int m) {
  return lines + int64_t(slot * maps + m) * block_threads + threadIdx.x;
}

// Begins to copy a line to where the thread holds it. A line that is not whole or not aligned is copied at
// once.
template <class T>
MRCN_DEVICE void request(Line* to, const T* from, int filled, bool wide) {
  if (wide && filled == width<T>) {
    copy_async(to, reinterpret_cast<const Line*>(from));
  } else {
    *to = fetch<Reuse::never>(from, filled, false);
  }
}

// --- the barrier of a group ---------------------------------------------------------------------------

// Returns once all blocks of the group have called it for the sample. What they wrote before is then seen by
// all threads of the block.
MRCN_DEVICE void meet(int* arrivals, int group) {
  __syncthreads();
  if (threadIdx.x == 0) {
    add_acquire_release(arrivals, 1);
    while (load_relaxed(arrivals) < group) pause();
    load_acquire(arrivals);
  }
  __syncthreads();
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
