// The block's backward on a GPU with each sample held in shared memory (see held.cuh): every map is read
// once. For gates that need the means of the planes alone.
//
// Planes and gates are known from the forward, so that a block can scale a set's gradient as soon as it has
// read it. It publishes what is linear in the sums of its pixels: U and V of each plane (formulas.h), the
// gradient before the sigmoid of each gate and channel and, of SE, its part in the gradient of the hidden
// layers. After the barrier, each block adds the parts of its own channels and of the hidden layers. In the
// end all blocks meet, and make the gradients of the parameters.
#include "block/cuda/backward.cuh"
#include "block/cuda/held.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// --- memory -------------------------------------------------------------------------------------------

template <class T>
struct HeldBackwardArguments {
  BackwardArguments<T> backward;
  Hold hold;
  int64_t lasts;  // items of the gradients of the parameters
};

template <class T, class P, bool pixels>
struct alignas(16) HeldBackwardShared {
  using A = acc_t<T>;
  static constexpr int channels = channels_of_slots<pixels>(most_backward_slots<T>);
  static constexpr int parts = pixels ? 2 : 1;  // of the sums over a block's pixels
  static constexpr int slots = P::extreme(0);   // coefficients, without those of a plane's maximum
  static constexpr int scales = P::k1(0);       // of which these are made first
  struct Sums {
    A part[P::sums][parts][channels];
    A gate[P::gate_count][channels];  // s, then the gradient before the sigmoid
  };
  union {
    Sums sums;                            // before the barrier
    A inner[P::gate_count][most_hidden];  // after it: the gradient before the ReLU
  };
  A r[P::inputs][channels], a[P::inputs][channels], beta[P::inputs][channels];  // of `Plane`
  alignas(16) A k[slots][channels];

  MRCN_DEVICE HeldBackwardShared() {}
};

// `BackwardScratch` with a share of the hidden layers for each block, then the parts of the ranges.
template <class P, class A>
struct HeldBackwardScratch : BackwardScratch<P, A> {
  const Hold& hold;

  MRCN_DEVICE HeldBackwardScratch(const Common<A>& all, const Hold& held_in, int64_t i)
      : BackwardScratch<P, A>(all, i), hold(held_in) {}
  MRCN_DEVICE A* part(int number, int range) const {
    return this->share(hold.group, 0) + int64_t(number * hold.ranges + range) * this->a.C;
  }
  MRCN_DEVICE A* part_of_U(int m, int range) const { return part(m, range); }
  MRCN_DEVICE A* part_of_V(int m, int range) const { return part(P::inputs + m, range); }
  MRCN_DEVICE A* part_before(int g, int range) const { return part(2 * P::inputs + g, range); }
  // The sum of a channel's parts, from that of the first range.
  MRCN_DEVICE A added(const A* part) const { return add_shares(part, hold.ranges, this->a.C); }
};

inline int64_t held_backward_row(const BlockShape& shape, const Hold& hold) {
  const Sets& sets = sets_of(shape.mode);
  return backward_row(shape, hold.group) +
         (2 * sets.inputs + sets.gates) * int64_t(hold.ranges) * shape.channels;
}

// What the functions below need: the arguments, the block's part, and its memory.
template <class T, class P, bool pixels>
struct HeldBackward {
  using A = acc_t<T>;
  using Maps = HeldMaps<T, P>;
  const BackwardArguments<T>& arguments;
  const Common<A>& a;
  const Hold& hold;
  const Held held;
  HeldBackwardShared<T, P, pixels>& shared;
  Line* lines;
  Line* streams;

  MRCN_DEVICE explicit HeldBackward(const HeldBackwardArguments<T>& all)
      : arguments(all.backward),
        a(all.backward.common),
        hold(all.hold),
        held(hold, a.cut.places),
        shared(*reinterpret_cast<HeldBackwardShared<T, P, pixels>*>(shared_memory())),
        lines(reinterpret_cast<Line*>(shared_memory() + sizeof(shared))),
        streams(lines + int64_t(hold.slots) * Maps::held * block_threads) {}

  MRCN_DEVICE int64_t first_channel() const { return held.channels * hold.channels.each; }
  MRCN_DEVICE int channels() const { return int(least<int64_t>(hold.channels.each, a.C - first_channel())); }
  // Where the thread has its line of map m: for as long as the sample is held, or until it is taken.
  template <int m>
  MRCN_DEVICE Line* line(int slot) const {
    if constexpr (m < Maps::held) {
      return held_line<Maps::held>(lines, slot, m);
    } else {
      return held_line<Maps::streamed>(streams, slot % stream_depth, m - Maps::held);
    }
  }
  MRCN_DEVICE Plane<A> plane(int m, int channel) const {
    const A mean = shared.k[m][channel], beta = shared.beta[m][channel];
    return {mean, A(0), shared.r[m][channel], shared.a[m][channel], beta, mean - beta};
  }
};

// --- copies -------------------------------------------------------------------------------------------

// Begins to copy the thread's line of map m, or sets it to zero where the map has no data.
template <int m, class T, class P, bool pixels>
MRCN_DEVICE void request_line(
    const HeldBackward<T, P, pixels>& h, int64_t i, const Share<T, pixels>& share, int64_t at, int slot) {
  const FeatureMap& map = m < P::inputs ? h.arguments.inputs[m] : h.arguments.gradients[m - P::inputs];
  Line* to = h.template line<m>(slot);
  if (map.data == nullptr) {
    *to = Line{};
  } else {
    request(to, sample_of<const T>(map, i) + share.offset(map, at), share.filled(h.a.C, h.a.L, at), h.a.wide);
  }
}

// Begins to copy the thread's lines of the maps that are held, at one place.
template <class T, class P, bool pixels>
MRCN_DEVICE void request_held(
    const HeldBackward<T, P, pixels>& h, int64_t i, const Share<T, pixels>& share, int64_t at, int slot) {
  unroll<HeldMaps<T, P>::held>([&](auto m) { request_line<m.v>(h, i, share, at, slot); });
}

// The places of a thread, one after the other, in the order of `over_lines`.
template <class T, class P, bool pixels>
struct Places {
  const HeldBackward<T, P, pixels>& h;
  Share<T, pixels> share = first_share<T, pixels>(h.hold.channels, h.held.channels);
  int64_t at = h.held.begin + share.place;
  int slot = 0;

  MRCN_DEVICE explicit Places(const HeldBackward<T, P, pixels>& of) : h(of) {}
  MRCN_DEVICE bool is_at_one() const {
    return at < h.held.end && share.c < h.a.C && (pixels || share.channel < h.hold.channels.each);
  }
  MRCN_DEVICE void advance() {
    ++slot;
    at += share.step;
    if (pixels || at < h.held.end) return;
    share.channel += block_warps;
    share.c += block_warps;
    at = h.held.begin + share.place;
  }
};

// Begins to copy the lines of the streamed maps at one place of the thread, if there is one, as one group of
// copies, and goes on to the next place.
template <class T, class P, bool pixels>
MRCN_DEVICE void request_streamed(
    const HeldBackward<T, P, pixels>& h, int64_t i, Places<T, P, pixels>& ahead) {
  using Maps = HeldMaps<T, P>;
  if (ahead.is_at_one()) {
    unroll<Maps::streamed>(
        [&](auto m) { request_line<Maps::held + m.v>(h, i, ahead.share, ahead.at, ahead.slot); });
    ahead.advance();
  }
  commit_copies();
}

// --- before the barrier -------------------------------------------------------------------------------

// Makes s of the block's gates, describes its planes, and makes the means and scales of its coefficients.
template <class T, class P, bool pixels>
MRCN_DEVICE void describe_planes(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const Saved<P, A> saved(h.a, i);
  const int each = h.channels();
  over_threads(P::gate_count * each, [&](int64_t n) {
    const int g = int(n / each), channel = int(n % each);
    h.shared.sums.gate[g][channel] =
        has(h.a.given_gates, g) ? gate_value(saved, g, h.first_channel() + channel) : A(0);
  });
  __syncthreads();
  over_threads(each, [&](int64_t channel) {
    Plane<A> planes[P::inputs];
    A s[P::gate_count], k[P::backward_slots];
    unroll<P::inputs>([&](auto m) {
      planes[m.v] = saved.plane(m.v, h.first_channel() + channel);
      h.shared.r[m.v][channel] = planes[m.v].r;
      h.shared.a[m.v][channel] = planes[m.v].a;
      h.shared.beta[m.v][channel] = planes[m.v].beta;
    });
    unroll<P::gate_count>([&](auto g) { s[g.v] = h.shared.sums.gate[g.v][channel]; });
    make_scales<P>(h.a, planes, s, k);
    unroll<h.shared.scales>([&](auto slot) { h.shared.k[slot.v][channel] = k[slot.v]; });
  });
  __syncthreads();
}

// Adds the terms of the thread's lines at one place. Of float32, the gradients there are then combined.
template <class T, class P, bool pixels, class A, int slots>
MRCN_DEVICE void add_place(const HeldBackward<T, P, pixels>& h, const Share<T, pixels>& share, int slot,
    const A (&k)[slots], A (&sums)[seen<T, pixels>][P::sums]) {
  using Maps = HeldMaps<T, P>;
  T values[Maps::all][width<T>];
  unroll<Maps::all>([&](auto m) { std::memcpy(values[m.v], h.template line<m.v>(slot), sizeof(Line)); });
  A combined[P::inputs][width<T>]{};
  A line[P::sums]{};  // sums over a line of a plane, which are one term of the plane's sums
  over_elements(share, k, h.shared, [&](auto j, const auto& own) {
    A x[P::inputs], g[P::sets], dx[P::inputs]{};
    unroll<P::inputs>([&](auto m) { x[m.v] = get(&values[m.v][j.v]); });
    unroll<P::sets>([&](auto set) { g[set.v] = get(&values[P::inputs + set.v][j.v]); });
    add_sums<P>(own + P::mean(0), x, g, pixels ? sums[pixels ? j.v : 0] : line);
    if (!Maps::combined) return;
    unroll<P::sets>([&](auto set) { add_gradient<P, set.v>(own, g[set.v], dx); });
    unroll<P::inputs>([&](auto m) { combined[m.v][j.v] = dx[m.v]; });
  });
  if (!pixels) unroll<P::sums>([&](auto n) { sums[0][n.v] += line[n.v]; });
  if (!Maps::combined) return;
  unroll<P::inputs>([&](auto m) { *h.template line<P::inputs + m.v>(slot) = narrow<T>(combined[m.v]); });
}

// Adds the sums of the threads that share a channel, and leaves them in shared memory: of planes a channel
// has one warp, of pixels the warps take turns.
template <class T, class P, bool pixels, class A>
MRCN_DEVICE void leave_sums(
    const HeldBackward<T, P, pixels>& h, const Share<T, pixels>& share, A (&sums)[seen<T, pixels>][P::sums]) {
  using Shared = HeldBackwardShared<T, P, pixels>;
  constexpr int K = seen<T, pixels>;
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes, across = h.hold.channels.across;
  unroll<K>([&](auto k) {
    unroll<P::sums>([&](auto n) {
      for (int mask = across; mask < warp_lanes; mask *= 2) sums[k.v][n.v] += exchange(sums[k.v][n.v], mask);
    });
  });
  if constexpr (pixels) {
    // All lanes of a channel have its sums. Each stores some of them.
    const int rows = warp_lanes / across, row = lane / across;
    for (int turn = 0; turn < block_warps / Shared::parts; ++turn) {
      if (warp / Shared::parts == turn) {
        unroll<P::sums>([&](auto n) {
          if (n.v % rows != row) return;
          A* part = &h.shared.sums.part[n.v][warp % Shared::parts][share.channel];
          unroll<K / 4>([&](auto quarter) {
            Line* to = reinterpret_cast<Line*>(part + 4 * quarter.v);
            A four[4]{};
            if (turn > 0) std::memcpy(four, to, sizeof(Line));
            unroll<4>([&](auto e) { four[e.v] += sums[4 * quarter.v + e.v][n.v]; });
            std::memcpy(to, four, sizeof(Line));
          });
        });
      }
      __syncthreads();
    }
  } else if (lane == 0) {
    unroll<P::sums>([&](auto n) { h.shared.sums.part[n.v][0][share.channel] = sums[0][n.v]; });
  }
}

// Sums the block's pixels, whose lines have been requested.
template <class T, class P, bool pixels>
MRCN_DEVICE void find_sums(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  constexpr bool streams = HeldMaps<T, P>::streamed > 0;
  Places<T, P, pixels> ahead(h);
  if constexpr (streams) {
    for (int n = 0; n < stream_depth; ++n) request_streamed(h, i, ahead);
  } else {
    wait_for_copies<0>();
  }
  int slot = 0;
  over_shares<T, pixels>(h.a, h.hold.channels, h.held.channels, [&](const Share<T, pixels>& share) {
    A k[HeldBackwardShared<T, P, pixels>::slots]{}, sums[seen<T, pixels>][P::sums]{};
    if (!pixels) read_coefficients(h.shared, share.channel, k);
    for (int64_t at = h.held.begin + share.place; at < h.held.end && share.c < h.a.C; at += share.step) {
      if (streams) wait_for_copies<stream_depth - 1>();
      add_place(h, share, slot++, k, sums);
      if constexpr (streams) request_streamed(h, i, ahead);
    }
    leave_sums(h, share, sums);
  });
}

// Publishes what each channel of the block has of U, of V and of the gradients before the sigmoids.
template <class T, class P, bool pixels>
MRCN_DEVICE void publish_sums(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldBackwardScratch<P, A> scratch(h.a, h.hold, i);
  const int range = h.held.range;
  over_threads(h.channels(), [&](int64_t channel) {
    const int64_t c = h.first_channel() + channel;
    Plane<A> planes[P::inputs];
    A s[P::gate_count], sums[P::sums]{}, ds[P::gate_count], U[P::inputs], V[P::inputs];
    unroll<P::inputs>([&](auto m) { planes[m.v] = h.plane(m.v, int(channel)); });
    unroll<P::gate_count>([&](auto g) { s[g.v] = h.shared.sums.gate[g.v][channel]; });
    unroll<P::sums>([&](auto n) {
      for (const auto& part : h.shared.sums.part[n.v]) sums[n.v] += part[channel];
    });
    drop_missing<P>(h.a, sums);
    make_gate_gradients<P>(planes, sums, ds);
    make_moments<P>(s, h.a.to_input, sums, U, V);
    unroll<P::inputs>([&](auto m) {
      scratch.part_of_U(m.v, range)[c] = U[m.v];
      scratch.part_of_V(m.v, range)[c] = V[m.v];
    });
    unroll<P::gate_count>([&](auto g) {
      const A before = has(h.a.given_gates, g.v) ? ds[g.v] * s[g.v] * (1 - s[g.v]) : A(0);
      scratch.part_before(g.v, range)[c] = before;
      h.shared.sums.gate[g.v][channel] = before;
    });
  });
}

// Publishes the block's part in the gradient of the hidden layers.
template <class T, class P, bool pixels>
MRCN_DEVICE void publish_shares(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldBackwardScratch<P, A> scratch(h.a, h.hold, i);
  over_threads(scratch.layer(), [&](int64_t n) {
    const int g = int(n / h.a.R), row = int(n % h.a.R);
    scratch.share(h.held.rank, g)[row] =
        share_of_hidden(h.a, g, row, h.first_channel(), h.channels(), h.shared.sums.gate[g]);
  });
}

// --- after the barrier --------------------------------------------------------------------------------

// Adds the parts of the gradient of the hidden layers.
template <class T, class P, bool pixels>
MRCN_DEVICE void make_inner(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldBackwardScratch<P, A> scratch(h.a, h.hold, i);
  const Saved<P, A> saved(h.a, i);
  over_threads(scratch.layer(), [&](int64_t n) {
    const int g = int(n / h.a.R), row = int(n % h.a.R);
    const A gradient = add_shares(scratch.share(0, g) + row, h.hold.group, scratch.layer());
    const A inner = saved.hidden(g, 0)[row] <= A(0) ? A(0) : gradient;
    h.shared.inner[g][row] = inner;
    if (h.held.rank == 0) scratch.inner(g, 0)[row] = inner;
  });
}

// Makes the coefficients that come through the statistics, and leaves what the gradients of the parameters
// need of the sample: the first block with pixels of a channel leaves that channel's.
template <class T, class P, bool pixels>
MRCN_DEVICE void make_coefficients(const HeldBackward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldBackwardScratch<P, A> scratch(h.a, h.hold, i);
  const int each = h.channels();
  const bool leaves = h.held.range == 0;
  const auto before_of = [&](int g, int64_t c) { return scratch.added(scratch.part_before(g, 0) + c); };
  make_inner(h, i);
  __syncthreads();
  over_threads(P::inputs * each, [&](int64_t n) {
    const int m = int(n / each), channel = int(n % each);
    const int64_t c = h.first_channel() + channel;
    const bool used = has(h.a.given_inputs, m);
    const A dz = of_pooled<P>(h.a, m, c, before_of, [&](int g) -> const A* { return h.shared.inner[g]; });
    const A U = scratch.added(scratch.part_of_U(m, 0) + c), V = scratch.added(scratch.part_of_V(m, 0) + c);
    const PlaneGradient<A> of = plane_gradient(h.plane(m, channel), U, V, dz, A(h.a.L));
    h.shared.k[P::k1(m)][channel] = used ? of.k1 : A(0);
    h.shared.k[P::k2(m)][channel] = used ? of.k2 : A(0);
    if (!leaves) return;
    scratch.norm(m, 0)[c] = used ? of.gamma : A(0);
    scratch.norm(m, 1)[c] = used ? of.beta : A(0);
  });
  over_threads(leaves ? P::gate_count * each : 0, [&](int64_t n) {
    const int g = int(n / each);
    const int64_t c = h.first_channel() + n % each;
    scratch.before(g)[c] = before_of(g, c);
  });
  __syncthreads();
}

// Writes the gradients of the inputs for sample i, and begins to copy sample `next` to where its lines were
// held. The gradients of inputs that are handed through are read here.
template <class T, class P, bool pixels>
MRCN_DEVICE void write_gradients(const HeldBackward<T, P, pixels>& h, int64_t i, int64_t next) {
  using A = acc_t<T>;
  using Maps = HeldMaps<T, P>;
  const Common<A>& a = h.a;
  int channel = -1;
  A k[HeldBackwardShared<T, P, pixels>::slots]{};
  over_lines<T, pixels>(a, h.hold, h.held, [&](const Share<T, pixels>& share, int64_t at, int slot) {
    if (!pixels && channel != share.channel) {
      channel = share.channel;
      read_coefficients(h.shared, channel, k);
    }
    const int filled = share.filled(a.C, a.L, at);
    A dx[P::inputs][width<T>]{};
    unroll<P::inputs>([&](auto m) {
      const FeatureMap& map = h.arguments.passed[m.v];
      if (map.data == nullptr) return;
      widen<T>(
          fetch<Reuse::never>(sample_of<const T>(map, i) + share.offset(map, at), filled, a.wide), dx[m.v]);
    });
    T values[Maps::held][width<T>];
    unroll<Maps::held>([&](auto m) { std::memcpy(values[m.v], h.template line<m.v>(slot), sizeof(Line)); });
    if (next < a.N) request_held(h, next, share, at, slot);
    over_elements(share, k, h.shared, [&](auto j, const auto& own) {
      A x[P::inputs], g[Maps::held - P::inputs], made[P::inputs];
      unroll<P::inputs>([&](auto m) { x[m.v] = get(&values[m.v][j.v]); });
      unroll<Maps::held - P::inputs>([&](auto n) { g[n.v] = get(&values[P::inputs + n.v][j.v]); });
      if constexpr (Maps::combined) {
        start_gradients<P>(own, x, made);
        unroll<P::inputs>([&](auto m) { made[m.v] += g[m.v]; });
      } else {
        make_gradients<P>(own, x, g, made);
      }
      unroll<P::inputs>([&](auto m) { dx[m.v][j.v] += made[m.v]; });
    });
    unroll<P::inputs>([&](auto m) {
      const FeatureMap& map = h.arguments.input_gradients[m.v];
      keep(sample_of<T>(map, i) + share.offset(map, at), narrow<T>(dx[m.v]), filled, a.wide);
    });
  });
  commit_copies();
}

// --- the kernel ---------------------------------------------------------------------------------------

template <class T, class P, bool pixels>
MRCN_KERNEL(1)
held_backward_kernel(HeldBackwardArguments<T> arguments) {
  const HeldBackward<T, P, pixels> h(arguments);
  const int64_t step = gridDim.x / h.hold.group;
  int64_t i = blockIdx.x / h.hold.group;
  over_lines<T, pixels>(h.a, h.hold, h.held,
      [&](const Share<T, pixels>& share, int64_t at, int slot) { request_held(h, i, share, at, slot); });
  commit_copies();
  for (; i < h.a.N; i += step) {
    describe_planes(h, i);
    find_sums(h, i);
    __syncthreads();
    publish_sums(h, i);
    __syncthreads();
    publish_shares(h, i);
    meet(h.a.arrivals(i), h.hold.group);
    make_coefficients(h, i);
    if (i + step >= h.a.N) arrive(h.a.counters + 1);
    write_gradients(h, i, i + step);
    __syncthreads();  // the block is done with its coefficients
  }
  wait_for(h.a.counters + 1, int(gridDim.x));
  for (int64_t number = blockIdx.x; number < arguments.lasts; number += gridDim.x) {
    last_item<T, P>(h.arguments, number, h.arguments.singles);
  }
}

// Returns whether the kernel could run, and its error.
template <class T, class P, bool pixels>
bool run_held_backward(const BlockBackward& call, int margin, void* scratch, void* stream, int* error) {
  using Shared = HeldBackwardShared<T, P, pixels>;
  constexpr int line_bytes = block_threads * int(sizeof(Line));
  static_assert(sizeof(Shared) + most_backward_lines * line_bytes <= 227 << 10);
  HeldBackwardArguments<T> a{};
  a.hold = backward_hold<T>(call.shape);
  if (a.hold.group == 0) return false;
  a.lasts = last_items(call.shape);
  const int64_t row = held_backward_row(call.shape, a.hold);
  a.backward.common = common<T>(call, 1, 0, row, call.statistics, scratch);
  set_maps<P>(call, a.backward);
  const int shared = int(sizeof(Shared)) + backward_lines<T, P>(a.hold) * line_bytes;
  return launch_held<held_backward_kernel<T, P, pixels>>(
      a, call.shape.samples, shared, margin, scratch, stream, error);
}

}  // namespace

int64_t held_backward_scratch(const BlockShape& shape) {
  int64_t bytes = 0;
  with_held_element(shape.dtype, [&](auto element) {
    bytes = held_scratch_bytes(shape, backward_hold<decltype(element)>(shape), held_backward_row);
  });
  return bytes;
}

bool held_backward(const BlockBackward& call, int margin, void* scratch, void* stream, int* error) {
  return with_held_kernel(call.shape, [&](auto element, auto pattern, auto pixels) {
    return run_held_backward<decltype(element), decltype(pattern), decltype(pixels)::value>(
        call, margin, scratch, stream, error);
  });
}

}  // namespace mrcn::MRCN_ISA
