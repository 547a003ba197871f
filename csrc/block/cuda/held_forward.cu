// The block's forward on a GPU with each sample held in shared memory (see held.cuh): every input is read
// once. For gates that need the means of the planes alone.
//
// A block publishes the moments of its pixels and, of SE, its part in the hidden layers, which are linear in
// the pixels' sums. After the barrier, each block joins the moments of its own channels and adds the parts of
// the hidden layers.
#include "block/cuda/forward.cuh"
#include "block/cuda/held.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// --- memory -------------------------------------------------------------------------------------------

template <class T>
struct HeldForwardArguments {
  ForwardArguments<T> forward;
  Hold hold;
};

template <class P, class A, bool pixels>
struct alignas(16) HeldForwardShared {
  static constexpr int channels = channels_of_slots<pixels>(most_slots);
  struct Gates {
    A hidden[P::gate_count][most_hidden];
    A s[P::gate_count][channels];
  };
  union {
    Moments<A> part[P::inputs][pixels ? block_warps : 1][channels];  // before the barrier
    Gates gates;                                                     // after it
  };
  A pivot[P::inputs][channels];  // the first pixel of each plane
  A z[P::inputs][channels];      // the block's part in the gates' inputs
  alignas(16) A k[P::forward_slots][channels];

  MRCN_DEVICE HeldForwardShared() {}
};

// A sample's row of scratch memory: mean and squares of each range of each plane, relative to the plane's
// first pixel, then each block's part in the hidden layers.
template <class P, class A>
struct HeldForwardScratch {
  const Common<A>& a;
  const Hold& hold;
  A* row;

  MRCN_DEVICE HeldForwardScratch(const Common<A>& all, const Hold& held_in, int64_t i)
      : a(all), hold(held_in), row(all.scratch + i * all.scratch_row) {}
  MRCN_DEVICE A* mean(int m, int range) const { return row + int64_t(2 * (m * hold.ranges + range)) * a.C; }
  MRCN_DEVICE A* squares(int m, int range) const { return mean(m, range) + a.C; }
  MRCN_DEVICE int64_t layer() const { return int64_t(P::gate_count) * a.hidden(); }
  MRCN_DEVICE A* share(int rank, int g) const {
    return mean(P::inputs, 0) + rank * layer() + int64_t(g) * a.hidden();
  }
};

inline int64_t held_forward_row(const BlockShape& shape, const Hold& hold) {
  const Sets& sets = sets_of(shape.mode);
  return 2 * sets.inputs * hold.ranges * shape.channels + hold.group * sets.gates * hidden(shape);
}

// What the functions below need: the arguments, the block's part, and its memory.
template <class T, class P, bool pixels>
struct HeldForward {
  using A = acc_t<T>;
  const ForwardArguments<T>& arguments;
  const Common<A>& a;
  const Hold& hold;
  const Held held;
  HeldForwardShared<P, A, pixels>& shared;
  Line* lines;

  MRCN_DEVICE explicit HeldForward(const HeldForwardArguments<T>& all)
      : arguments(all.forward),
        a(all.forward.common),
        hold(all.hold),
        held(hold, a.cut.places),
        shared(*reinterpret_cast<HeldForwardShared<P, A, pixels>*>(shared_memory())),
        lines(reinterpret_cast<Line*>(shared_memory() + sizeof(shared))) {}

  MRCN_DEVICE const FeatureMap& input(int m) const { return arguments.inputs[m == 0 ? 0 : 1]; }
  MRCN_DEVICE int64_t first_channel() const { return held.channels * hold.channels.each; }
  MRCN_DEVICE int channels() const { return int(least<int64_t>(hold.channels.each, a.C - first_channel())); }
  // How many pixels of a plane a range has.
  MRCN_DEVICE A pixels_of(int range) const {
    const int64_t each = hold.places * (pixels ? 1 : width<T>);
    return A(least<int64_t>(each, a.L - range * each));
  }
};

// --- copies and moments -------------------------------------------------------------------------------

// Begins to copy one map of a sample, as one group of copies.
template <class T, class P, bool pixels>
MRCN_DEVICE void request_map(const HeldForward<T, P, pixels>& h, int64_t i, int m) {
  const T* x = sample_of<const T>(h.input(m), i);
  over_lines<T, pixels>(h.a, h.hold, h.held, [&](const Share<T, pixels>& share, int64_t at, int slot) {
    request(held_line<P::inputs>(h.lines, slot, m), x + share.offset(h.input(m), at),
        share.filled(h.a.C, h.a.L, at), h.a.wide);
  });
  commit_copies();
}

// Reads the first pixel of each plane of the block, from which its moments are taken.
template <class T, class P, bool pixels>
MRCN_DEVICE void read_pivots(const HeldForward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const int each = h.channels();
  over_threads(P::inputs * each, [&](int64_t n) {
    const int m = int(n / each), channel = int(n % each);
    const int64_t c = h.first_channel() + channel;
    h.shared.pivot[m][channel] = A(get(sample_of<const T>(h.input(m), i) + c * h.input(m).channel));
  });
}

// Writes the moments of the block's pixels of map m to shared memory.
template <class T, class P, bool pixels>
MRCN_DEVICE void find_moments(const HeldForward<T, P, pixels>& h, int m) {
  using A = acc_t<T>;
  constexpr int K = seen<T, pixels>;
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes, across = h.hold.channels.across;
  int slot = 0;
  over_shares<T, pixels>(h.a, h.hold.channels, h.held.channels, [&](const Share<T, pixels>& share) {
    A pivot[K];
    Moments<A> moments[K];
    unroll<K>(
        [&](auto k) { pivot[k.v] = share.c + k.v < h.a.C ? h.shared.pivot[m][share.channel + k.v] : A(0); });
    for (int64_t at = h.held.begin + share.place; at < h.held.end && share.c < h.a.C; at += share.step) {
      A values[width<T>];
      widen<T>(*held_line<P::inputs>(h.lines, slot++, m), values);
      if constexpr (pixels) {
        add_line(values, pivot, [&](auto j) -> Moments<A>& { return moments[j.v]; });
      } else {
        add_line(values, pivot[0], share.filled(h.a.C, h.a.L, at), moments[0]);
      }
    }
    for (int mask = across; mask < warp_lanes; mask *= 2) {
      unroll<K>([&](auto k) { moments[k.v].join(moments[k.v].from_lane(mask)); });
    }
    if (lane >= across) return;
    unroll<K>([&](auto k) { h.shared.part[m][pixels ? warp : 0][share.channel + k.v] = moments[k.v]; });
  });
}

// The part of some pixels of a plane in GAP(M), from their mean relative to the pivot. In the literal
// equations a mean or γ that is not finite makes GAP(M) NaN.
template <class A>
MRCN_DEVICE A pooled_part(A pivot, A mean, A pixels, A length, A gamma, A beta) {
  return ((pivot - beta) + mean) * (pixels / length) + nothing_if_finite(pivot + mean) +
         nothing_if_finite(gamma);
}

// Publishes the moments of the block's pixels, and keeps their part in the gates' inputs.
template <class T, class P, bool pixels>
MRCN_DEVICE void publish_moments(const HeldForward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldForwardScratch<P, A> scratch(h.a, h.hold, i);
  const int each = h.channels();
  over_threads(P::inputs * each, [&](int64_t n) {
    const int m = int(n / each), channel = int(n % each);
    const int64_t c = h.first_channel() + channel, at = m * h.a.C + c;
    Moments<A> all = h.shared.part[m][0][channel];
    for (int warp = 1; pixels && warp < block_warps; ++warp) all.join(h.shared.part[m][warp][channel]);
    scratch.mean(m, h.held.range)[c] = all.mean;
    scratch.squares(m, h.held.range)[c] = all.squares;
    h.shared.z[m][channel] = pooled_part(h.shared.pivot[m][channel], all.mean, h.pixels_of(h.held.range),
        A(h.a.L), h.a.gamma[at], h.a.beta[at]);
  });
}

// --- gates --------------------------------------------------------------------------------------------

// Publishes the block's part in the hidden layers. A warp computes one number at a time.
template <class T, class P, bool pixels>
MRCN_DEVICE void publish_hidden(const HeldForward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldForwardScratch<P, A> scratch(h.a, h.hold, i);
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes, each = h.channels();
  for (int n = warp; n < scratch.layer(); n += block_warps) {
    const int g = n / h.a.R, row = n % h.a.R;
    const Numbers<A> weight = h.a.parameters[0].from(int64_t(n) * h.a.C + h.first_channel());
    const A* z = h.shared.z[modality<P>(g)];
    A total(0);
    for (int channel = lane; channel < each; channel += warp_lanes) total += weight[channel] * z[channel];
    for (int mask = 1; mask < warp_lanes; mask *= 2) total += exchange(total, mask);
    if (lane == 0) scratch.share(h.held.rank, g)[row] = total;
  }
}

// Adds the parts of the hidden layers; the first block of the group saves them for the backward.
template <class T, class P, bool pixels>
MRCN_DEVICE void make_hidden(const HeldForward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const HeldForwardScratch<P, A> scratch(h.a, h.hold, i);
  const Saved<P, A> saved(h.a, i);
  over_threads(scratch.layer(), [&](int64_t n) {
    const int g = int(n / h.a.R), row = int(n % h.a.R);
    const A x = add_shares(scratch.share(0, g) + row, h.hold.group, scratch.layer()) + h.a.parameters[1][n];
    h.shared.gates.hidden[g][row] = x < A(0) ? A(0) : x;  // a NaN passes, as in torch.relu
    if (h.held.rank == 0) saved.hidden(g, 0)[row] = h.shared.gates.hidden[g][row];
  });
}

// GAP(M) of a plane of any block, from the published moments.
template <class T, class P, bool pixels, class A>
MRCN_DEVICE A pooled_of(const HeldForward<T, P, pixels>& h, const HeldForwardScratch<P, A>& scratch,
    int64_t i, int m, int64_t c) {
  const A pivot = A(get(sample_of<const T>(h.input(m), i) + c * h.input(m).channel));
  const int64_t at = m * h.a.C + c;
  A z(0);
  for (int range = 0; range < h.hold.ranges; ++range) {
    z += pooled_part(pivot, load_shared_by_blocks(scratch.mean(m, range) + c), h.pixels_of(range), A(h.a.L),
        h.a.gamma[at], h.a.beta[at]);
  }
  return z;
}

// s of gate g for a channel of the block.
template <class T, class P, bool pixels>
MRCN_DEVICE acc_t<T> held_gate(const HeldForward<T, P, pixels>& h, int64_t i, int g, int channel) {
  using A = acc_t<T>;
  const int64_t c = h.first_channel() + channel;
  if (h.a.gate == Gate::eca) {
    const HeldForwardScratch<P, A> scratch(h.a, h.hold, i);
    A x(0);
    for (int t = 0; t < h.a.R; ++t) {
      const int64_t from = c + t - h.a.R / 2;
      // The zeros of the padding count too: a weight that is not finite makes them NaN.
      const bool inside = from >= 0 && from < h.a.C;
      x +=
          h.a.parameters[0][g * h.a.R + t] * (inside ? pooled_of(h, scratch, i, modality<P>(g), from) : A(0));
    }
    return sigmoid(x);
  }
  const Numbers<A> weight = h.a.parameters[2].from((g * h.a.C + c) * h.a.R);
  A x = h.a.parameters[3][g * h.a.C + c];
  for (int j = 0; j < h.a.R; ++j) x += weight[j] * h.shared.gates.hidden[g][j];
  return sigmoid(x);
}

// --- coefficients -------------------------------------------------------------------------------------

// A plane of the block from the published moments. The first block with pixels of it saves its statistics.
template <class T, class P, bool pixels>
MRCN_DEVICE Plane<acc_t<T>> join_plane(const HeldForward<T, P, pixels>& h, int64_t i, int m, int channel) {
  using A = acc_t<T>;
  const HeldForwardScratch<P, A> scratch(h.a, h.hold, i);
  const int64_t c = h.first_channel() + channel, at = m * h.a.C + c;
  Moments<A> all;
  for (int range = 0; range < h.hold.ranges; ++range) {
    all.join({h.pixels_of(range), load_shared_by_blocks(scratch.mean(m, range) + c),
        load_shared_by_blocks(scratch.squares(m, range) + c)});
  }
  const A pivot = h.shared.pivot[m][channel], mean = pivot + all.mean, kept = mean - pivot;
  const A offset = (pivot - (mean - kept)) + (all.mean - kept);  // the exact rounding error
  const A r = A(1) / std::sqrt(all.squares / A(h.a.L) + h.arguments.eps);
  if (h.held.range == 0) {
    const Saved<P, A> saved(h.a, i);
    saved.mean(m)[c] = mean;
    saved.r(m)[c] = r;
  }
  return describe(mean, offset, r, h.a.gamma[at], h.a.beta[at]);
}

// Makes the coefficients of the block's channels, after the barrier.
template <class T, class P, bool pixels>
MRCN_DEVICE void make_coefficients(const HeldForward<T, P, pixels>& h, int64_t i) {
  using A = acc_t<T>;
  const int each = h.channels();
  make_hidden(h, i);
  __syncthreads();
  over_threads(P::gate_count * each, [&](int64_t n) {
    const int g = int(n / each), channel = int(n % each);
    h.shared.gates.s[g][channel] = held_gate(h, i, g, channel);
  });
  __syncthreads();
  over_threads(each, [&](int64_t channel) {
    Plane<A> planes[P::inputs];
    A s[P::gate_count], k[P::forward_slots];
    unroll<P::inputs>([&](auto m) { planes[m.v] = join_plane(h, i, m.v, int(channel)); });
    unroll<P::gate_count>([&](auto g) { s[g.v] = h.shared.gates.s[g.v][channel]; });
    make_maps<P>(planes, s, h.a.to_input, k, true);
    unroll<P::forward_slots>([&](auto slot) { h.shared.k[slot.v][channel] = k[slot.v]; });
  });
  __syncthreads();
}

// --- outputs ------------------------------------------------------------------------------------------

// The line of a set at one place.
template <int set, class P, class T, bool pixels, class A, class Shared>
MRCN_DEVICE Line made_line(const Share<T, pixels>& share, const Line (&lines)[P::inputs],
    const A (&k)[P::forward_slots], const Shared& shared) {
  A x[P::inputs][width<T>], y[width<T>];
  unroll<P::inputs>([&](auto m) { widen<T>(lines[m.v], x[m.v]); });
  over_elements(share, k, shared, [&](auto j, const auto& own) {
    A from[P::inputs];
    unroll<P::inputs>([&](auto m) { from[m.v] = x[m.v][j.v]; });
    y[j.v] = made_set<P, set>(own, from);
  });
  return narrow<T>(y);
}

// Writes the outputs of sample i, and begins to copy sample `next` to where its lines were held.
template <class T, class P, bool pixels>
MRCN_DEVICE void write_outputs(const HeldForward<T, P, pixels>& h, int64_t i, int64_t next) {
  using A = acc_t<T>;
  const Common<A>& a = h.a;
  int channel = -1;
  A k[P::forward_slots]{};
  over_lines<T, pixels>(a, h.hold, h.held, [&](const Share<T, pixels>& share, int64_t at, int slot) {
    if (!pixels && channel != share.channel) {
      channel = share.channel;
      read_coefficients(h.shared, channel, k);
    }
    const int filled = share.filled(a.C, a.L, at);
    Line lines[P::inputs];
    unroll<P::inputs>([&](auto m) { lines[m.v] = *held_line<P::inputs>(h.lines, slot, m.v); });
    if (next < a.N) {
      unroll<P::inputs>([&](auto m) {
        const FeatureMap& map = h.arguments.inputs[m.v];
        request(held_line<P::inputs>(h.lines, slot, m.v),
            sample_of<const T>(map, next) + share.offset(map, at), filled, a.wide);
      });
    }
    unroll<P::sets>([&](auto set) {
      const FeatureMap& map = h.arguments.made[set.v];
      keep(sample_of<T>(map, i) + share.offset(map, at), made_line<set.v, P>(share, lines, k, h.shared),
          filled, a.wide);
    });
    unroll<P::inputs>([&](auto m) {
      const FeatureMap& map = h.arguments.passed[m.v];
      if (map.data != nullptr) keep(sample_of<T>(map, i) + share.offset(map, at), lines[m.v], filled, a.wide);
    });
  });
  commit_copies();
}

// --- the kernel ---------------------------------------------------------------------------------------

template <class T, class P, bool pixels>
MRCN_KERNEL(2)
held_forward_kernel(HeldForwardArguments<T> arguments) {
  const HeldForward<T, P, pixels> h(arguments);
  const int64_t step = gridDim.x / h.hold.group;
  int64_t i = blockIdx.x / h.hold.group;
  unroll<P::inputs>([&](auto m) { request_map(h, i, m.v); });
  for (; i < h.a.N; i += step) {
    read_pivots(h, i);
    __syncthreads();
    if constexpr (P::inputs == 2) {
      wait_for_copies<1>();
      find_moments(h, 0);
    }
    wait_for_copies<0>();
    find_moments(h, P::inputs - 1);
    __syncthreads();
    publish_moments(h, i);
    __syncthreads();
    publish_hidden(h, i);
    meet(h.a.arrivals(i), h.hold.group);
    make_coefficients(h, i);
    write_outputs(h, i, i + step);
    // The first wait of the next sample leaves one group of copies under way. This empty group is that one,
    // so that both maps of the sample have arrived by then.
    if (P::inputs == 2) commit_copies();
  }
}

// Returns whether the kernel could run, and its error.
template <class T, class P, bool pixels>
bool run_held_forward(const BlockForward& call, int margin, void* scratch, void* stream, int* error) {
  using A = acc_t<T>;
  HeldForwardArguments<T> a{};
  a.hold = forward_hold<T>(call.shape);
  if (a.hold.group == 0) return false;
  const int64_t row = held_forward_row(call.shape, a.hold);
  a.forward.common = common<T>(call, P::inputs, 0, row, call.statistics, scratch);
  set_maps<P>(call, a.forward);
  const int shared = int(sizeof(HeldForwardShared<P, A, pixels>)) +
                     a.hold.slots * P::inputs * block_threads * int(sizeof(Line));
  return launch_held<held_forward_kernel<T, P, pixels>>(
      a, call.shape.samples, shared, margin, scratch, stream, error);
}

}  // namespace

int64_t held_forward_scratch(const BlockShape& shape) {
  int64_t bytes = 0;
  with_held_element(shape.dtype, [&](auto element) {
    bytes = held_scratch_bytes(shape, forward_hold<decltype(element)>(shape), held_forward_row);
  });
  return bytes;
}

bool held_forward(const BlockForward& call, int margin, void* scratch, void* stream, int* error) {
  return with_held_kernel(call.shape, [&](auto element, auto pattern, auto pixels) {
    return run_held_forward<decltype(element), decltype(pattern), decltype(pixels)::value>(
        call, margin, scratch, stream, error);
  });
}

}  // namespace mrcn::MRCN_ISA
