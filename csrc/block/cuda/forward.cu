// The block's forward on a GPU, in one launch (see schedule.cuh). First items compute the statistics, the
// last of a sample also the gates and the coefficients. Second items write the sets.
#include "block/cuda/forward.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// --- statistics ---------------------------------------------------------------------------------------

// The largest and the smallest pixel, for CBAM. NaNs are ignored.
template <class A>
struct Extremes {
  A maximum = -A(INFINITY), minimum = A(INFINITY);

  MRCN_DEVICE void join(const Extremes& other) {
    maximum = other.maximum > maximum ? other.maximum : maximum;
    minimum = other.minimum < minimum ? other.minimum : minimum;
  }
};

// The statistics of a part of a plane, and finally of the plane.
template <class A>
struct Found {
  Moments<A> moments;
  Extremes<A> extremes;

  MRCN_DEVICE void join(const Found& other) {
    moments.join(other.moments);
    extremes.join(other.extremes);
  }
  MRCN_DEVICE Found from_lane(int mask) const {
    return {moments.from_lane(mask), {exchange(extremes.maximum, mask), exchange(extremes.minimum, mask)}};
  }
};

// --- memory -------------------------------------------------------------------------------------------

template <class T, class P>
struct ForwardShared {
  using A = acc_t<T>;
  int ticket, arrived;
  Found<A> part[most_parts<T>];
  A pivot[most_channels];
  A z[2][most_channels];  // the gates' inputs of a plane, one per branch
  A k[P::forward_slots][most_channels];
};

// A sample's row of scratch memory: the rounding errors of the means, the gates and the coefficients of all
// channels, then the part of each block of channels in the hidden layers.
template <class P, class A>
struct ForwardScratch {
  const Common<A>& a;
  A* row;

  MRCN_DEVICE ForwardScratch(const Common<A>& all, int64_t i)
      : a(all), row(all.scratch + i * all.scratch_row) {}
  MRCN_DEVICE A* offset(int m) const { return row + m * a.C; }
  MRCN_DEVICE A* s(int g) const { return row + (P::inputs + g) * a.C; }
  MRCN_DEVICE A* coefficients(int slot) const { return row + (P::inputs + P::gate_count + slot) * a.C; }
  MRCN_DEVICE int64_t layer() const { return int64_t(P::gate_count) * a.branches() * a.hidden(); }
  MRCN_DEVICE A* share(int64_t block, int g, int b) const {
    return coefficients(P::forward_slots) + block * layer() + int64_t(g * a.branches() + b) * a.R;
  }
};

inline int64_t forward_row(const BlockShape& shape, int blocks) {
  return with_pattern(shape.mode, [&](auto pattern) {
    using P = decltype(pattern);
    return (P::inputs + P::gate_count + P::forward_slots) * shape.channels +
           blocks * P::gate_count * branches(shape) * hidden(shape);
  });
}

// --- first items: statistics --------------------------------------------------------------------------

constexpr int lines_under_way = 4;  // how many lines a thread requests before it uses the first

template <class T, bool pixels, class A>
MRCN_DEVICE void find(const Common<A>& a, const FeatureMap& map, const T* x, const Share<T, pixels>& share,
    A (&pivot)[seen<T, pixels>], Found<A> (&found)[seen<T, pixels>]) {
  const int64_t places = a.cut.places;
  const bool extremes = a.gate == Gate::cbam_channel;
  for (int64_t first = share.place; first < places; first += lines_under_way * share.step) {
    Line lines[lines_under_way];
    unroll<lines_under_way>([&](auto u) {
      const int64_t at = first + u.v * share.step;
      if (at < places) {
        lines[u.v] = fetch<Reuse::soon>(x + share.offset(map, at), share.filled(a.C, a.L, at), a.wide);
      }
    });
    unroll<lines_under_way>([&](auto u) {
      const int64_t at = first + u.v * share.step;
      if (at >= places) return;
      A values[width<T>];
      widen<T>(lines[u.v], values);
      if constexpr (pixels) {
        add_line(values, pivot, [&](auto j) -> Moments<A>& { return found[j.v].moments; });
      } else {
        add_line(values, pivot[0], share.filled(a.C, a.L, at), found[0].moments);
      }
      if (extremes) {
        unroll<width<T>>([&](auto j) {
          if (pixels || j.v < share.filled(a.C, a.L, at))
            found[pixels ? j.v : 0].extremes.join({values[j.v], values[j.v]});
        });
      }
    });
  }
}

// Writes the statistics of the planes of the item to shared memory, one part for each warp that shares a
// plane.
template <class T, bool pixels, class A, class Shared>
MRCN_DEVICE void find_parts(
    const Common<A>& a, const FeatureMap& map, int64_t i, int64_t block, Shared& shared) {
  constexpr int K = seen<T, pixels>;
  const T* x = sample_of<const T>(map, i);
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
  over_shares<T, pixels>(a, a.cut.first, block, [&](const Share<T, pixels>& share) {
    A pivot[K];
    Found<A> found[K];
    unroll<K>(
        [&](auto k) { pivot[k.v] = share.c + k.v < a.C ? A(get(x + share.offset(map, 0) + k.v)) : A(0); });
    if (share.c < a.C) find(a, map, x, share, pivot, found);
    for (int mask = a.cut.first.across; mask < warp_lanes; mask *= 2) {
      unroll<K>([&](auto k) { found[k.v].join(found[k.v].from_lane(mask)); });
    }
    if (lane >= a.cut.first.across) return;
    const int part = pixels ? warp * a.cut.first.each : 0;
    unroll<K>([&](auto k) {
      shared.part[part + share.channel + k.v] = found[k.v];
      if (!pixels || warp == 0) shared.pivot[share.channel + k.v] = pivot[k.v];
    });
  });
}

// Saves the statistics of a plane, and writes the gates' inputs to shared memory.
template <class T, class P, bool pixels, class A, class Shared>
MRCN_DEVICE void describe_plane(
    const ForwardArguments<T>& arguments, int64_t i, int m, int64_t c, int channel, Shared& shared) {
  const Common<A>& a = arguments.common;
  Found<A> found = shared.part[channel];
  for (int part = 1; pixels && part < block_warps; ++part) {
    found.join(shared.part[part * a.cut.first.each + channel]);
  }
  const A pivot = shared.pivot[channel], shift = found.moments.mean;
  const A mean = pivot + shift, kept = mean - pivot;
  const A offset = (pivot - (mean - kept)) + (shift - kept);  // the exact rounding error
  const A r = A(1) / std::sqrt(found.moments.squares / A(a.L) + arguments.eps);
  const Saved<P, A> saved(a, i);
  saved.mean(m)[c] = mean;
  saved.r(m)[c] = r;
  ForwardScratch<P, A>(a, i).offset(m)[c] = offset;
  const Plane<A> plane = describe(mean, A(0), r, a.gamma[m * a.C + c], a.beta[m * a.C + c]);
  shared.z[0][channel] = pooled_residual(plane);
  const A extreme = extreme_pixel(plane, found.extremes.maximum, found.extremes.minimum);
  shared.z[1][channel] = residual_at(plane, extreme);
}

// Writes the part of these channels in the hidden layers of the modality's gates.
template <class P, class A, class Shared>
MRCN_DEVICE void leave_shares(const Common<A>& a, int64_t i, int m, int64_t block, const Shared& shared) {
  const ForwardScratch<P, A> scratch(a, i);
  const int64_t c0 = block * a.cut.first.each;
  const int channels = int(least<int64_t>(a.cut.first.each, a.C - c0));
  over_threads(int64_t(P::gate_count / P::inputs) * a.hidden(), [&](int64_t n) {
    const int g = m + int(n / a.R) * P::inputs, row = int(n % a.R);
    const Numbers<A> weight = a.parameters[0].from((int64_t(g) * a.R + row) * a.C + c0);
    for (int b = 0; b < a.branches(); ++b) {
      A total(0);
      for (int c = 0; c < channels; ++c) total += weight[c] * shared.z[b][c];
      scratch.share(block, g, b)[row] = total;
    }
  });
}

template <class P, class A>
MRCN_DEVICE void make_hidden_layers(const Common<A>& a, int64_t i) {
  const ForwardScratch<P, A> scratch(a, i);
  const Saved<P, A> saved(a, i);
  over_threads(scratch.layer(), [&](int64_t n) {
    const int row = int(n % a.R), b = int(n / a.R % a.branches()), g = int(n / a.R / a.branches());
    const A x = add_shares(scratch.share(0, g, b) + row, a.cut.first.blocks, scratch.layer()) +
                a.parameters[1][g * a.R + row];
    saved.hidden(g, b)[row] = x < A(0) ? A(0) : x;  // a NaN passes, as in torch.relu
  });
}

// Writes the gates and the coefficients of all planes of a sample to scratch memory.
template <class P, class A>
MRCN_DEVICE void make_coefficients(const Common<A>& a, int64_t i) {
  const Saved<P, A> saved(a, i);
  const ForwardScratch<P, A> scratch(a, i);
  over_threads(
      P::gate_count * a.C, [&](int64_t n) { scratch.s(0)[n] = gate_value(saved, int(n / a.C), n % a.C); });
  __syncthreads();
  over_threads(a.C, [&](int64_t c) {
    Plane<A> planes[P::inputs];
    A s[P::gate_count], k[P::forward_slots];
    unroll<P::inputs>([&](auto m) {
      const int64_t at = m.v * a.C + c;
      planes[m.v] =
          describe(load_shared_by_blocks(saved.mean(m.v) + c), load_shared_by_blocks(scratch.offset(m.v) + c),
              load_shared_by_blocks(saved.r(m.v) + c), a.gamma[at], a.beta[at]);
    });
    unroll<P::gate_count>([&](auto g) { s[g.v] = scratch.s(g.v)[c]; });
    make_maps<P>(planes, s, a.to_input, k, true);
    unroll<P::forward_slots>([&](auto slot) { scratch.coefficients(slot.v)[c] = k[slot.v]; });
  });
}

template <class T, class P, bool pixels, class Shared>
MRCN_DEVICE void first_item(const ForwardArguments<T>& arguments, const Item& item, Shared& shared) {
  using A = acc_t<T>;
  const Common<A>& a = arguments.common;
  const int m = int(item.number / a.cut.first.blocks);
  const int64_t block = item.number % a.cut.first.blocks, i = item.sample;
  find_parts<T, pixels>(a, m == 0 ? arguments.inputs[0] : arguments.inputs[1], i, block, shared);
  __syncthreads();
  over_threads(a.cut.first.each, [&](int64_t channel) {
    const int64_t c = block * a.cut.first.each + channel;
    if (c < a.C) describe_plane<T, P, pixels, A>(arguments, i, m, c, int(channel), shared);
  });
  __syncthreads();
  leave_shares<P>(a, i, m, block, shared);
  if (!arrives_last(a.arrivals(i), a.firsts, &shared.arrived)) return;
  make_hidden_layers<P>(a, i);
  __syncthreads();
  make_coefficients<P>(a, i);
  __syncthreads();
  if (threadIdx.x == 0) add_acquire_release(a.arrivals(i), 1);
}

// --- second items: outputs ----------------------------------------------------------------------------

// How many places a thread requests before it uses the first. In channels_last the lines of two would not fit
// into registers beside the coefficients.
template <bool pixels>
constexpr int places_under_way = pixels ? 1 : 2;

// Reads the lines of all inputs at that many places from `at` on.
template <class T, class P, bool pixels>
MRCN_DEVICE void fetch_places(const ForwardArguments<T>& arguments, int64_t i, const Share<T, pixels>& share,
    int64_t at, int64_t end, Line (&lines)[places_under_way<pixels>][P::inputs]) {
  const auto& a = arguments.common;
  unroll<places_under_way<pixels>>([&](auto u) {
    const int64_t place = at + u.v * share.step;
    if (place >= end || share.c >= a.C) return;
    unroll<P::inputs>([&](auto m) {
      const FeatureMap& map = arguments.inputs[m.v];
      lines[u.v][m.v] = fetch<Reuse::never>(
          sample_of<const T>(map, i) + share.offset(map, place), share.filled(a.C, a.L, place), a.wide);
    });
  });
}

// Writes the sets at one place. `k` has the coefficients of a plane; those of pixels are read for each
// channel.
template <class T, class P, bool pixels, class A, class Shared>
MRCN_DEVICE void write_place(const ForwardArguments<T>& arguments, int64_t i, const Share<T, pixels>& share,
    int64_t at, const Line (&lines)[P::inputs], A (&k)[P::forward_slots], const Shared& shared) {
  const Common<A>& a = arguments.common;
  const int filled = share.filled(a.C, a.L, at);
  A x[P::inputs][width<T>];
  unroll<P::inputs>([&](auto m) { widen<T>(lines[m.v], x[m.v]); });
  // One set after the other: the pixels of all of them would not fit into registers.
  unroll<P::sets>([&](auto set) {
    A y[width<T>];
    unroll<width<T>>([&](auto j) {
      A from[P::inputs];
      if (pixels) read_coefficients(shared, share.channel + j.v, k);
      unroll<P::inputs>([&](auto m) { from[m.v] = x[m.v][j.v]; });
      y[j.v] = made_set<P, set.v>(k, from);
    });
    const FeatureMap& map = arguments.made[set.v];
    keep(sample_of<T>(map, i) + share.offset(map, at), narrow<T>(y), filled, a.wide);
  });
  unroll<P::inputs>([&](auto m) {
    const FeatureMap& map = arguments.passed[m.v];
    if (map.data != nullptr) keep(sample_of<T>(map, i) + share.offset(map, at), lines[m.v], filled, a.wide);
  });
}

template <class T, class P, bool pixels, class Shared>
MRCN_DEVICE void second_item(const ForwardArguments<T>& arguments, const Item& item, Shared& shared) {
  using A = acc_t<T>;
  const Common<A>& a = arguments.common;
  const int64_t i = item.sample, block = item.number % a.cut.second.blocks,
                chunk = item.number / a.cut.second.blocks;
  const int64_t begin = chunk * a.cut.chunk, end = least(begin + a.cut.chunk, a.cut.places);
  // The first lines are on their way while the block waits for the coefficients.
  Line lines[places_under_way<pixels>][P::inputs]{};
  const Share<T, pixels> first = first_share<T, pixels>(a.cut.second, block);
  fetch_places<T, P, pixels>(arguments, i, first, begin + first.place, end, lines);
  bool fetched = true;
  wait_for(a.arrivals(i), a.firsts + 1);
  const A* table = ForwardScratch<P, A>(a, i).coefficients(0);
  copy_coefficients<P::forward_slots>(a, table, block * a.cut.second.each, a.cut.second.each, shared);
  over_shares<T, pixels>(a, a.cut.second, block, [&](const Share<T, pixels>& share) {
    if (share.c >= a.C) return;
    A k[P::forward_slots];
    if (!pixels) read_coefficients(shared, share.channel, k);
    for (int64_t at = begin + share.place; at < end; at += places_under_way<pixels> * share.step) {
      if (!fetched) fetch_places<T, P, pixels>(arguments, i, share, at, end, lines);
      fetched = false;
      unroll<places_under_way<pixels>>([&](auto u) {
        const int64_t place = at + u.v * share.step;
        if (place < end) write_place<T, P, pixels>(arguments, i, share, place, lines[u.v], k, shared);
      });
    }
  });
}

// --- the kernel ---------------------------------------------------------------------------------------

template <class T, class P, bool pixels>
MRCN_KERNEL(sizeof(T) == 8 ? 1 : 2)
forward_kernel(ForwardArguments<T> arguments) {
  auto& shared = *reinterpret_cast<ForwardShared<T, P>*>(shared_memory());
  over_items(arguments.common, &shared.ticket, [&](const Item& item) {
    if (item.phase == Phase::first) {
      first_item<T, P, pixels>(arguments, item, shared);
    } else {
      second_item<T, P, pixels>(arguments, item, shared);
    }
  });
}

template <class T, class P, bool pixels>
int run_forward(const BlockForward& call, void* scratch, void* stream) {
  constexpr int shared = sizeof(ForwardShared<T, P>);
  static_assert(shared <= most_shared);
  ForwardArguments<T> a{};
  const int blocks = cut<T>(call.shape).first.blocks;
  a.common = common<T>(call, P::inputs, 0, forward_row(call.shape, blocks), call.statistics, scratch);
  set_maps<P>(call, a);
  constexpr auto* kernel = forward_kernel<T, P, pixels>;
  return launch_items<kernel, T>(a, call.shape, shared, P::inputs, scratch, stream);
}

}  // namespace

const char* launch_error(int error) { return error_text(error); }

int64_t saved_row(const BlockShape& shape) {
  return 2 * sets_of(shape.mode).inputs * shape.channels +
         sets_of(shape.mode).gates * branches(shape) * hidden(shape);
}

int64_t forward_scratch(const BlockShape& shape) { return scratch_bytes(shape, forward_row); }

int block_forward(const BlockForward& call, void* scratch, void* stream) {
  return with_kernel(call.shape, [&](auto element, auto pattern, auto pixels) {
    return run_forward<decltype(element), decltype(pattern), decltype(pixels)::value>(call, scratch, stream);
  });
}

}  // namespace mrcn::MRCN_ISA
