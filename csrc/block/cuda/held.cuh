// What the kernels that hold a sample in shared memory have in common: how a sample is divided, the lines
// that a thread holds, and the barrier of the blocks of a sample.
//
// A group of blocks holds a sample. Each block copies its part of every map into shared memory, sums it, and
// publishes its sums. After one barrier of the group, each block writes its part of the results from shared
// memory. So every map is read once. All blocks of a launch run at the same time (`launch_together`), and so
// a block may wait for others. Only integers are added atomically, and the order of every sum depends on C,
// L, the type and the layout, but not on the GPU, the batch size or the mode.
//
// A thread reads and writes the same lines: it copies them, sums them and uses them without a barrier.
#pragma once

#include "block/cuda/schedule.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// f(T{}) for the types of maps that are held: all but float64. As in `with_element`, a build may have one
// type.
template <class F>
inline void with_held_element([[maybe_unused]] Dtype dtype, const F& f) {
#if defined(MRCN_ELEMENT)
  f(MRCN_ELEMENT{});
#else
  if (dtype == Dtype::f32) f(float{});
  if (dtype == Dtype::bf16) f(bf16{});
  if (dtype == Dtype::f16) f(f16{});
#endif
}

// --- how a sample is divided --------------------------------------------------------------------------

// The part of a block: a range of the pixels of some channels.
struct Hold {
  int group;  // blocks per sample; 0 where it can't be held
  Channels channels;
  int ranges;
  int64_t places;  // per range: lines of a plane, or pixels
  int slots;       // lines per thread and map
};

// A thread holds at most `slots` lines of each map, and a group has at most `group` blocks.
struct HoldSize {
  int slots, group;
};
constexpr int most_slots = 18;
// The most channels of a block whose threads have so many slots: of planes, a warp holds one line at least of
// each of its channels.
template <bool pixels>
constexpr int channels_of_slots(int slots) {
  return pixels ? most_channels : most<int>(slots * block_warps, most_channels);
}
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
    // Planes are cut into ranges only where a warp would otherwise have no channel.
    const int64_t each = most<int64_t>(divided(shape.channels, parts), block_warps);
    const int64_t lines = divided(shape.length, width<T>), blocks = divided(shape.channels, each);
    h.channels = {1, int(each), int(blocks)};
    h.places = divided(lines, most<int64_t>(parts / blocks, 1));
    h.ranges = int(divided(lines, h.places));
    const int64_t slots = divided(each, block_warps) * divided(h.places, warp_lanes);
    h.slots = int(least<int64_t>(slots, most_slots + 1));
  }
  h.group = h.channels.blocks * h.ranges;
  return h;
}

// The smallest group with the first of the sizes that holds a sample.
template <class T, int n>
inline Hold hold_of(const BlockShape& shape, const HoldSize (&sizes)[n]) {
  const bool fits = shape.gate != Gate::cbam_channel && hidden(shape) <= most_hidden;
  for (const HoldSize& size : sizes) {
    for (int parts = 1; parts <= size.group && fits; parts *= 2) {
      const Hold h = hold_in<T>(shape, parts);
      if (h.slots <= size.slots && h.group <= size.group) return h;
    }
  }
  return {};
}

// The forward holds at most two maps. One map is divided in the same way, so that all modes give the same
// bits. With 256 threads, the first size takes 74 KB for two maps and leaves room for two blocks per
// multiprocessor. The second size takes 147 KB, for samples that would need too many blocks of the first.
template <class T>
inline Hold forward_hold(const BlockShape& shape) {
  constexpr HoldSize sizes[] = {{9, 16}, {most_slots, 32}};
  return hold_of<T>(shape, sizes);
}

// How many lines of each map that is only streamed are under way.
constexpr int stream_depth = 4;

// What the backward holds. The maps are the inputs, then the gradients of the sets. Of 16-bit types all are
// held. Of float32, the gradients are combined as they arrive to one map per input: the sum of all that a
// pixel's gradients add to the gradient of that pixel. It takes the place of a gradient, and the gradients
// without such a place are streamed through a few lines.
template <class T, class P>
struct HeldMaps {
  static constexpr bool combined = sizeof(T) == 4;
  static constexpr int all = P::inputs + P::sets;
  static constexpr int held = combined ? 2 * P::inputs : all;
  static constexpr int streamed = all - held;
};

// The most lines that a thread has in all: with 256 threads, a block's lines take 216 KB of the 227 KB of an
// H100. All modes are divided as `pair`.
constexpr int most_backward_lines = 54;
template <class T>
constexpr int most_backward_slots = [] {
  using Maps = HeldMaps<T, Pattern<Mode::pair>>;
  return (most_backward_lines - Maps::streamed * stream_depth) / Maps::held;
}();
template <class T>
inline Hold backward_hold(const BlockShape& shape) {
  constexpr HoldSize sizes[] = {{most_backward_slots<T>, 64}};
  return hold_of<T>(shape, sizes);
}
// How many lines of maps the shared memory has for each thread.
template <class T, class P>
inline int backward_lines(const Hold& hold) {
  using Maps = HeldMaps<T, P>;
  return hold.slots * Maps::held + stream_depth * Maps::streamed;
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

// The place in shared memory where the thread holds its line number `slot` of map m.
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

// --- coefficients -------------------------------------------------------------------------------------

// Reads the coefficients of four channels from `channel` on, a multiple of four.
template <class A, int slots, class Shared>
MRCN_DEVICE void read_four(const Shared& shared, int channel, A (&k)[slots][4]) {
  static_assert(4 * sizeof(A) == sizeof(Line));
  unroll<slots>([&](auto slot) {
    const Line four = *reinterpret_cast<const Line*>(&shared.k[slot.v][channel]);
    std::memcpy(k[slot.v], &four, sizeof(four));
  });
}

// Calls f(j, coefficients) for each element j of a line. `k` has the coefficients of a plane; those of pixels
// are read here.
template <class T, bool pixels, class A, int slots, class Shared, class F>
MRCN_DEVICE void over_elements(
    const Share<T, pixels>& share, const A (&k)[slots], const Shared& shared, const F& f) {
  unroll<width<T> / 4>([&](auto quarter) {
    A four[slots][4];
    if constexpr (pixels) read_four(shared, share.channel + 4 * quarter.v, four);
    unroll<4>([&](auto e) {
      A own[slots];
      unroll<slots>([&](auto slot) { own[slot.v] = pixels ? four[slot.v][e.v] : k[slot.v]; });
      f(constant<4 * quarter.v + e.v>{}, own);
    });
  });
}

// --- barriers -----------------------------------------------------------------------------------------

// Counts this block at the counter. Blocks that wait for the count see what it wrote before.
MRCN_DEVICE void arrive(int* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) add_acquire_release(arrivals, 1);
}

// Returns once all blocks of the group have called it for the sample. What they wrote before is then seen by
// all threads of the block.
MRCN_DEVICE void meet(int* arrivals, int group) {
  arrive(arrivals);
  wait_for(arrivals, group);
}

// --- launches -----------------------------------------------------------------------------------------

// Calls f(element, Pattern, whether channels are contiguous) for a type that is held; otherwise returns
// false.
template <class F>
inline bool with_held_kernel(const BlockShape& shape, const F& f) {
  bool ran = false;
  with_held_element(shape.dtype, [&](auto element) {
    with_pattern(shape.mode, [&](auto pattern) {
      using Made = typename decltype(pattern)::Made;
      ran = shape.pixels ? f(element, Made{}, std::true_type{}) : f(element, Made{}, std::false_type{});
    });
  });
  return ran;
}

// The bytes of a call's scratch memory, with row(hold) numbers for a sample; 0 where it can't be held.
template <class F>
inline int64_t held_scratch_bytes(const BlockShape& shape, const Hold& hold, const F& row) {
  if (hold.group == 0) return 0;
  return counter_bytes(shape.samples) + shape.samples * row(shape, hold) * int64_t(sizeof(float));
}

// Launches a kernel that holds samples. Returns whether it could run; `error` is then 0 or CUDA's error code.
template <auto* kernel, class Arguments>
inline bool launch_held(const Arguments& arguments, int64_t samples, int shared, int margin, void* scratch,
    void* stream, int* error) {
  Capacity capacity{};
  if (*error = capacity_of<kernel>(&capacity); *error != 0) return true;
  const int blocks = blocks_together(capacity, arguments.hold, shared, margin, samples);
  if (blocks == 0) return false;
  if (*error = clear(scratch, counter_bytes(samples), stream); *error != 0) return true;
  *error = launch_together<kernel>(arguments, blocks, shared, stream);
  return !is_refused(*error);
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
