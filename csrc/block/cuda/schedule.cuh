// What the forward and the backward of the block share on a GPU: how the work is divided into work items and
// scheduled, planes, and gates.
//
// A call is one kernel launch. Its thread blocks take work items in the order of a ticket counter. A first
// item reads the pixels of a block of channels of one sample and reduces them. The last of a sample's first
// items to finish computes the gates and a table of the coefficients of all channels. A second item waits for
// that, reads the pixels again (from L2, as long as few samples are under way) and writes the results. There
// is no deadlock: a block waits only for tickets before its own, which are held by blocks that run, so that
// with any number of blocks and in any order some block makes progress. Only integers are added atomically,
// and the order of every sum depends on the shape alone, without the batch size.
#pragma once

#include <cmath>
#include <type_traits>

#include "block/coefficients.h"
#include "block/cuda/kernels.h"
#include "block/params.h"
#include "cuda/runtime.h"
#include "elements.h"

namespace mrcn::MRCN_ISA {
namespace {

// How many elements a `Line` has.
template <class T>
constexpr int width = int(sizeof(Line) / sizeof(T));
// How many channels a line belongs to: the pixels of one plane, or the channels of one pixel.
template <class T, bool pixels>
constexpr int seen = pixels ? width<T> : 1;

// --- how the work is cut ------------------------------------------------------------------------------

constexpr int most_channels = 64;  // per work item
constexpr int most_across = 8;     // lanes that share the channels of a pixel
constexpr int most_blocks = 32;    // blocks of channels, within the other limits: all are summed at the end
constexpr int steps_per_item = 4;  // places per thread of a second item, approximately

// The most partial results that the warps leave in shared memory.
template <class T>
constexpr int most_parts = most<int>(most_channels, block_warps* least(most_across, warp_lanes) * width<T>);

// How the channels are divided into blocks, one per work item.
struct Channels {
  int across;  // lanes that share the channels of a pixel; 1 for planes
  int each;    // channels per block
  int blocks;
};

// How a sample is divided. A place is a line of a plane, or a pixel.
struct Cut {
  Channels first, second;  // of the first and of the second items
  int64_t places;          // lines per plane, or pixels
  int64_t chunk;           // places per second item
  int64_t chunks;
};

inline int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline int power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Depends neither on the batch size nor on the mode, so that a sample gives the same bits in any batch.
template <class T>
inline Cut cut(const BlockShape& shape) {
  Cut c;
  const auto pixels_of = [&](int64_t across) -> Channels {
    const int lanes = least(power_of_two(across), least(most_across, warp_lanes)), each = lanes * width<T>;
    return {lanes, each, int(divided(shape.channels, each))};
  };
  int64_t abreast;  // threads of a second item that take different places
  if (shape.pixels) {
    const int64_t lines = divided(shape.channels, width<T>);
    // A first item reads all pixels of its channels. With the 32 bytes of a sector from each pixel there are
    // enough of them; a second item has some of the pixels, and takes the 128 bytes of a cache line from
    // each.
    c.first = pixels_of(most<int64_t>(least<int64_t>(lines, 2), divided(lines, most_blocks)));
    c.second = pixels_of(least<int64_t>(lines, most_across));
    c.places = shape.length;
    abreast = block_threads / c.second.across;
  } else {
    const int64_t planes_per_warp = divided(shape.channels, int64_t(most_blocks) * block_warps);
    const int each = block_warps * int(least<int64_t>(planes_per_warp, most_channels / block_warps));
    c.first = c.second = {1, each, int(divided(shape.channels, each))};
    c.places = divided(shape.length, width<T>);
    abreast = warp_lanes;
  }
  c.chunks = divided(c.places, steps_per_item * abreast);
  c.chunk = divided(divided(c.places, c.chunks), abreast) * abreast;
  c.chunks = divided(c.places, c.chunk);
  return c;
}

// A parameter, or its gradient: numbers of the accumulation type or of the type of the maps. The kernels
// convert them, because converting them before the launch takes longer than the launch.
template <class A>
struct Numbers {
  void* data;
  Dtype dtype;
  int64_t first;

  MRCN_DEVICE Numbers from(int64_t n) const { return {data, dtype, first + n}; }
  MRCN_DEVICE A operator[](int64_t n) const {
    return in_dtype([&](auto* numbers) { return A(get(numbers + first + n)); });
  }
  MRCN_DEVICE void set(int64_t n, A value) const {
    in_dtype([&](auto* numbers) {
      put(numbers + first + n, value);
      return A(0);
    });
  }

 private:
  template <class F>
  MRCN_DEVICE A in_dtype(const F& f) const {
    if constexpr (sizeof(A) < 8) {
      if (dtype == Dtype::bf16) return f(static_cast<bf16*>(data));
      if (dtype == Dtype::f16) return f(static_cast<f16*>(data));
    }
    return f(static_cast<A*>(data));
  }
};

inline int branches(const BlockShape& shape) { return shape.gate == Gate::cbam_channel ? 2 : 1; }
// The width of the hidden layer of one gate, or 0.
inline int64_t hidden(const BlockShape& shape) { return shape.gate == Gate::eca ? 0 : shape.hidden; }

// --- the arguments of both kernels --------------------------------------------------------------------

template <class A>
struct Common {
  int64_t N, C, L;
  int R;  // width of the gates' hidden layer, or of ECA's convolution
  Gate gate;
  bool to_input;
  bool wide;  // every line of every map starts at a multiple of 16 bytes
  Cut cut;
  int firsts, seconds;  // work items per sample
  int64_t ahead;        // how many samples the first items are ahead of the second items
  int64_t tickets;
  Numbers<A> gamma, beta, parameters[4];
  A* saved;    // rows of saved_row numbers
  A* scratch;  // rows of scratch_row numbers
  int64_t saved_row, scratch_row;
  // `Given` as bits.
  unsigned given_sets, given_gates, given_inputs;
  // The ticket; how many samples have written what the gradients of the parameters need; and for each sample
  // how many of its first items have finished, plus one once its table of coefficients is written.
  int* counters;

  MRCN_DEVICE int branches() const { return gate == Gate::cbam_channel ? 2 : 1; }
  MRCN_DEVICE int hidden() const { return gate == Gate::eca ? 0 : R; }
  MRCN_DEVICE int* arrivals(int64_t sample) const { return counters + 2 + sample; }
};

inline int64_t counter_bytes(int64_t samples) {
  return divided((2 + samples) * int64_t(sizeof(int)), 16) * 16;
}

// Whether every line of the maps that have data starts at a multiple of 16 bytes.
template <class T, int n>
inline bool lines_aligned(const FeatureMap (&maps)[n], const BlockShape& shape) {
  const auto whole = [](int64_t stride, int64_t count) { return count == 1 || stride % width<T> == 0; };
  for (const FeatureMap& map : maps) {
    if (map.data == nullptr) continue;
    const bool steps = shape.pixels ? whole(map.pixel, shape.length) : whole(map.channel, shape.channels);
    if (reinterpret_cast<uintptr_t>(map.data) % sizeof(Line) != 0 || !steps) return false;
    if (!whole(map.sample, shape.samples)) return false;
  }
  return true;
}

// The numbers at `data`, a parameter of the call or its gradient.
template <class A, class Call>
inline Numbers<A> numbers(const Call& call, const void* data) {
  constexpr Dtype wide = sizeof(A) == 8 ? Dtype::f64 : Dtype::f32;
  return {const_cast<void*>(data), call.parameters.precise ? wide : call.shape.dtype, 0};
}

// `last` is how many tickets follow those of the samples; `row` is the length of a row of scratch memory.
template <class T, class Call>
inline Common<acc_t<T>> common(
    const Call& call, int firsts_a_block, int64_t last, int64_t row, const void* saved, void* scratch) {
  using A = acc_t<T>;
  const BlockShape& s = call.shape;
  Common<A> c{};
  c.N = s.samples;
  c.C = s.channels;
  c.L = s.length;
  c.R = int(s.hidden);
  c.gate = s.gate;
  c.to_input = s.to_input;
  c.cut = cut<T>(s);
  c.firsts = firsts_a_block * c.cut.first.blocks;
  c.seconds = int(c.cut.second.blocks * c.cut.chunks);
  c.tickets = c.N * (c.firsts + c.seconds) + last;
  c.gamma = numbers<A>(call, call.parameters.norm_weight);
  c.beta = numbers<A>(call, call.parameters.norm_bias);
  for (int i = 0; i < 4; ++i) c.parameters[i] = numbers<A>(call, call.parameters.gate[i]);
  c.saved = static_cast<A*>(const_cast<void*>(saved));
  c.counters = static_cast<int*>(scratch);
  c.scratch = reinterpret_cast<A*>(static_cast<char*>(scratch) + counter_bytes(c.N));
  c.saved_row = saved_row(s);
  c.scratch_row = row;
  return c;
}

// As many samples ahead as keep every block busy, but not more than have their maps in half of L2.
template <class T>
inline int64_t samples_ahead(const Common<acc_t<T>>& c, const Device& device, int maps) {
  const int64_t bytes = maps * c.C * c.L * int64_t(sizeof(T));
  const int64_t busy = divided(device.blocks, c.firsts) + 1;
  const int64_t fit = device.l2_bytes / 2 / most<int64_t>(bytes, 1);
  return least(c.N, most<int64_t>(1, least(busy, fit)));
}

// --- tickets ------------------------------------------------------------------------------------------

enum class Phase { first, second, last };

struct Item {
  Phase phase;
  int64_t sample;
  int64_t number;  // among the items of its sample and phase
};

// The first items of sample t are followed by the second items of sample t - ahead.
template <class A>
MRCN_DEVICE Item item_of(const Common<A>& a, int64_t ticket) {
  const int64_t head = a.ahead * a.firsts, both = a.firsts + a.seconds;
  if (ticket < head) return {Phase::first, ticket / a.firsts, ticket % a.firsts};
  ticket -= head;
  const int64_t body = (a.N - a.ahead) * both;
  if (ticket < body) {
    const int64_t sample = ticket / both, number = ticket % both;
    if (number < a.firsts) return {Phase::first, a.ahead + sample, number};
    return {Phase::second, sample, number - a.firsts};
  }
  ticket -= body;
  if (ticket < a.ahead * a.seconds) {
    return {Phase::second, a.N - a.ahead + ticket / a.seconds, ticket % a.seconds};
  }
  return {Phase::last, 0, ticket - a.ahead * a.seconds};
}

// How many blocks a launch has: as many as run at once, but no more than there are tickets. 0, which makes
// the launch fail, where the tickets exceed an int.
template <class A>
inline int blocks_of(const Common<A>& c, const Device& device) {
  const int64_t asked_for = c.tickets + device.blocks;  // every block asks once more than it gets a ticket
  return asked_for < int64_t(1) << 31 ? int(least<int64_t>(c.tickets, device.blocks)) : 0;
}

// Calls f(item) for every ticket that the block gets, until there are no more. The block takes its next
// ticket while it works on an item. That ticket may lie idle meanwhile: blocks wait for lower tickets only,
// and the lowest unfinished ticket is never an idle one. Towards the end, where an idle ticket would keep
// another block without work, the block takes its next ticket after the item.
template <class A, class F>
MRCN_DEVICE void over_items(const Common<A>& a, int* shared, const F& f) {
  int next = threadIdx.x == 0 ? add_relaxed(a.counters, 1) : 0;
  for (;;) {
    if (threadIdx.x == 0) *shared = next;
    __syncthreads();
    const int ticket = *shared;
    if (ticket >= a.tickets) return;
    const bool ahead = a.tickets - ticket > 2 * int64_t(gridDim.x);
    if (ahead && threadIdx.x == 0) next = add_relaxed(a.counters, 1);
    f(item_of(a, ticket));
    if (!ahead && threadIdx.x == 0) next = add_relaxed(a.counters, 1);
    __syncthreads();  // the block is done with its shared memory
  }
}

// Counts this block at `counter`. True for the last of `number` blocks, which then sees what the others have
// written.
MRCN_DEVICE bool arrives_last(int* counter, int number, int* shared) {
  __syncthreads();
  if (threadIdx.x == 0) *shared = add_acquire_release(counter, 1);
  __syncthreads();
  return *shared == number - 1;
}

// Waits until the counter has reached `number`. Only the last look acquires: on a GPU, an acquire drops what
// the multiprocessor's first-level cache holds, also for the other blocks there.
MRCN_DEVICE void wait_for(const int* counter, int number) {
  if (threadIdx.x == 0) {
    while (load_relaxed(counter) < number) pause();
    load_acquire(counter);
  }
  __syncthreads();
}

// --- pixels -------------------------------------------------------------------------------------------

// A thread's share of a work item. Planes: each warp takes one channel after the other, and its lanes take
// the lines. Pixels: each thread keeps to one line of channels, and threads with the same line share the
// pixels.
template <class T, bool pixels>
struct Share {
  int64_t c;      // its first channel
  int channel;    // the same channel, counted within the item
  int64_t place;  // its first place, counted within the item
  int step;

  MRCN_DEVICE int64_t offset(const FeatureMap& map, int64_t at) const {
    return pixels ? at * map.pixel + c : c * map.channel + at * width<T>;
  }
  // How many elements of the line at a place exist.
  MRCN_DEVICE int filled(int64_t C, int64_t L, int64_t at) const {
    return int(least<int64_t>(width<T>, pixels ? C - c : L - at * width<T>));
  }
};

// The thread's first share of a block of channels. It may lie beyond the last channel.
template <class T, bool pixels>
MRCN_DEVICE Share<T, pixels> first_share(const Channels& channels, int64_t block) {
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
  const int64_t c0 = block * channels.each;
  if constexpr (pixels) {
    const int channel = lane % channels.across * width<T>, rows = warp_lanes / channels.across;
    return {c0 + channel, channel, warp * rows + lane / channels.across, block_warps * rows};
  } else {
    return {c0 + warp, warp, lane, warp_lanes};
  }
}

// Calls f(share) for each channel, or line of channels, of the thread. All threads of a warp call f together;
// for pixels also those beyond the last channel, whose lines have no elements.
template <class T, bool pixels, class A, class F>
MRCN_DEVICE void over_shares(const Common<A>& a, const Channels& channels, int64_t block, const F& f) {
  Share<T, pixels> share = first_share<T, pixels>(channels, block);
  if constexpr (pixels) {
    f(share);
  } else {
    for (; share.channel < channels.each && share.c < a.C; share.channel += block_warps) {
      f(share);
      share.c += block_warps;
    }
  }
}

enum class Reuse { soon, never };

// Reads the line at p. Elements after the first `filled` are zeros.
template <Reuse reuse, class T>
MRCN_DEVICE Line fetch(const T* p, int filled, bool wide) {
  if (wide && filled == width<T>) {
    const Line* line = reinterpret_cast<const Line*>(p);
    return reuse == Reuse::soon ? load_first(line) : load_last(line);
  }
  T elements[width<T>];
  Line line{};
  std::memcpy(elements, &line, sizeof(line));
  unroll<width<T>>([&](auto j) {
    if (j.v < filled) elements[j.v] = p[j.v];
  });
  std::memcpy(&line, elements, sizeof(line));
  return line;
}

template <class T>
MRCN_DEVICE void keep(T* p, Line line, int filled, bool wide) {
  if (wide && filled == width<T>) return store_once(reinterpret_cast<Line*>(p), line);
  T elements[width<T>];
  std::memcpy(elements, &line, sizeof(line));
  unroll<width<T>>([&](auto j) {
    if (j.v < filled) p[j.v] = elements[j.v];
  });
}

template <class T, class A>
MRCN_DEVICE void widen(Line line, A (&values)[width<T>]) {
  T elements[width<T>];
  std::memcpy(elements, &line, sizeof(line));
  unroll<width<T>>([&](auto j) { values[j.v] = get(&elements[j.v]); });
}

template <class T, class A>
MRCN_DEVICE Line narrow(const A (&values)[width<T>]) {
  T elements[width<T>];
  unroll<width<T>>([&](auto j) { put(&elements[j.v], values[j.v]); });
  Line line;
  std::memcpy(&line, elements, sizeof(line));
  return line;
}

template <class T>
MRCN_DEVICE T* sample_of(const FeatureMap& map, int64_t i) {
  return static_cast<T*>(map.data) + i * map.sample;
}

// --- planes and gates ---------------------------------------------------------------------------------

// The modality whose residual gate g sees; the gates are A_v1, A_n1, A_v2, A_n2.
template <class P>
MRCN_DEVICE int modality(int g) {
  return g % P::inputs;
}

// What the forward saves of a sample.
template <class P, class A>
struct Saved {
  const Common<A>& a;
  A* row;

  MRCN_DEVICE Saved(const Common<A>& all, int64_t i) : a(all), row(all.saved + i * all.saved_row) {}
  MRCN_DEVICE A* mean(int m) const { return row + 2 * m * a.C; }
  MRCN_DEVICE A* r(int m) const { return row + (2 * m + 1) * a.C; }
  MRCN_DEVICE A* hidden(int g, int b) const {
    return row + 2 * P::inputs * a.C + int64_t(g * a.branches() + b) * a.R;
  }
  // The plane without the offset of its mean.
  MRCN_DEVICE Plane<A> plane(int m, int64_t c) const {
    const int64_t at = m * a.C + c;
    return describe(
        load_shared_by_blocks(mean(m) + c), A(0), load_shared_by_blocks(r(m) + c), a.gamma[at], a.beta[at]);
  }
};

template <class A>
MRCN_DEVICE A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

// s of gate g for channel c, from the hidden layers or (ECA) from the pooled residuals of neighboring
// channels. The hidden layers come from this block or from an earlier launch.
template <class P, class A>
MRCN_DEVICE A gate_value(const Saved<P, A>& saved, int g, int64_t c) {
  const Common<A>& a = saved.a;
  if (a.gate == Gate::eca) {
    A x(0);
    for (int t = 0; t < a.R; ++t) {
      const int64_t from = c + t - a.R / 2;
      // The zeros of the padding count too: a weight that is not finite makes them NaN.
      const bool inside = from >= 0 && from < a.C;
      const A z = inside ? pooled_residual(saved.plane(modality<P>(g), from)) : A(0);
      x += a.parameters[0][g * a.R + t] * z;
    }
    return sigmoid(x);
  }
  const Numbers<A> weight = a.parameters[2].from((g * a.C + c) * a.R);
  A x = A(a.branches()) * a.parameters[3][g * a.C + c];
  for (int b = 0; b < a.branches(); ++b) {  // W (h + h') would lose the NaN of infinity times zero
    const A* h = saved.hidden(g, b);
    for (int j = 0; j < a.R; ++j) x += weight[j] * h[j];
  }
  return sigmoid(x);
}

// Calls f(n) for the numbers below `count`, distributed over the threads of the block.
template <class F>
MRCN_DEVICE void over_threads(int64_t count, const F& f) {
  for (int64_t n = threadIdx.x; n < count; n += block_threads) f(n);
}

// The sum of what all blocks of channels wrote at p, p + stride, ..., in this order.
template <class A>
MRCN_DEVICE A add_shares(const A* p, int64_t blocks, int64_t stride) {
  A total(0);
  for (int64_t n = 0; n < blocks; ++n) total += load_shared_by_blocks(p + n * stride);
  return total;
}

// Copies the coefficients of `channels` channels from c0 on from the table of a sample, which has a row of C
// numbers per coefficient, to shared memory.
template <int slots, class A, class Shared>
MRCN_DEVICE void copy_coefficients(
    const Common<A>& a, const A* table, int64_t c0, int channels, Shared& shared) {
  over_threads(slots * channels, [&](int64_t n) {
    const int slot = int(n / channels), channel = int(n % channels);
    if (c0 + channel < a.C) {
      shared.k[slot][channel] = load_shared_by_blocks(table + slot * a.C + c0 + channel);
    }
  });
  __syncthreads();
}

// Reads the coefficients of a plane from shared memory. For planes it is called once per plane. For pixels it
// is called for every pixel, because the coefficients of all channels of a line would fill the registers.
template <class A, class Shared, int slots>
MRCN_DEVICE void read_coefficients(const Shared& shared, int channel, A (&k)[slots]) {
  unroll<slots>([&](auto slot) { k[slot.v] = shared.k[slot.v][channel]; });
}

// --- launches -----------------------------------------------------------------------------------------

// The bytes of a call's scratch memory. row(shape, blocks) is how many numbers a sample has there if its
// channels are cut into so many blocks.
template <class F>
inline int64_t scratch_bytes(const BlockShape& shape, const F& row) {
  int64_t bytes = 0;
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t numbers = shape.samples * row(shape, cut<T>(shape).first.blocks);
    bytes = counter_bytes(shape.samples) + numbers * int64_t(sizeof(acc_t<T>));
    return 0;
  });
  return bytes;
}

// Launches a kernel whose first items read `maps` maps.
template <auto* kernel, class T, class Arguments>
inline int launch_items(
    Arguments& arguments, const BlockShape& shape, int shared, int maps, void* scratch, void* stream) {
  Device device;
  if (int error = device_of<kernel>(shared, &device); error != 0) return error;
  arguments.common.ahead = samples_ahead<T>(arguments.common, device, maps);
  if (int error = clear(scratch, counter_bytes(shape.samples), stream); error != 0) return error;
  return launch<kernel>(arguments, blocks_of(arguments.common, device), shared, stream);
}

// Calls f(element, Pattern, whether channels are contiguous). Modes that make the same sets run the same
// kernels.
template <class F>
inline int with_kernel(const BlockShape& shape, const F& f) {
  return with_element(shape.dtype, [&](auto element) {
    return with_pattern(shape.mode, [&](auto pattern) {
      using Made = typename decltype(pattern)::Made;
      return shape.pixels ? f(element, Made{}, std::true_type{}) : f(element, Made{}, std::false_type{});
    });
  });
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
