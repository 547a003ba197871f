// The block's backward on a GPU, in one launch (see schedule.cuh). First items sum the gradients over planes,
// second items write the gradients of the inputs, and last items (parameter_gradients.cuh) those of the
// parameters.
#include "block/cuda/backward.cuh"

namespace mrcn::MRCN_ISA {
namespace {

// --- shared memory ------------------------------------------------------------------------------------

// For CBAM: the largest value of x, or of -x where M has its maximum at the smallest x, and how often it
// occurs. NaNs are ignored.
template <class A>
struct Extreme {
  A value = -A(INFINITY), count{};

  MRCN_DEVICE void join(const Extreme& other) {
    count = other.value > value ? other.count : other.value == value ? count + other.count : count;
    value = other.value > value ? other.value : value;
  }
  MRCN_DEVICE Extreme from_lane(int mask) const { return {exchange(value, mask), exchange(count, mask)}; }
};

template <class T, class P>
struct BackwardShared {
  using A = acc_t<T>;
  int ticket, arrived;
  A part[P::sums][most_parts<T>];
  Extreme<A> extreme_part[P::inputs][most_parts<T>];
  A s[P::gate_count][most_channels];
  A before[P::gate_count][most_channels];  // gradient before the sigmoid
  A k[P::backward_slots][most_channels];
};

// --- pixels -------------------------------------------------------------------------------------------

// Reads the lines of all maps at one place; zeros where a map has no data.
template <Reuse reuse, class T, bool pixels, class A, int n>
MRCN_DEVICE void fetch_all(const Common<A>& a, const FeatureMap (&maps)[n], int64_t i,
    const Share<T, pixels>& share, int64_t at, int filled, int count, Line (&lines)[n]) {
  unroll<n>([&](auto m) {
    if (m.v >= count) return;
    const FeatureMap& map = maps[m.v];
    lines[m.v] = map.data == nullptr
                     ? Line{}
                     : fetch<reuse>(sample_of<const T>(map, i) + share.offset(map, at), filled, a.wide);
  });
}

// --- first items: sums --------------------------------------------------------------------------------

// How many places a thread sums one after the other: longer sums would be less exact than those of eager
// PyTorch. A map of 72 x 32 in channels_last has 18 per thread.
constexpr int places_per_sum = 20;

// Adds the terms of `places_per_sum` places from `begin` on.
template <class T, class P, bool pixels, class A>
MRCN_DEVICE void add_up(const BackwardArguments<T>& arguments, int64_t i, const Share<T, pixels>& share,
    int64_t begin, const A (&mean)[seen<T, pixels>][P::inputs], const A (&sign)[seen<T, pixels>][P::inputs],
    A (&sums)[seen<T, pixels>][P::sums], Extreme<A> (&extremes)[seen<T, pixels>][P::inputs]) {
  const Common<A>& a = arguments.common;
  const int64_t end = least<int64_t>(begin + places_per_sum * share.step, a.cut.places);
  for (int64_t at = begin + share.place; at < end; at += share.step) {
    const int filled = share.filled(a.C, a.L, at);
    Line x_lines[2], g_lines[4];
    fetch_all<Reuse::soon>(a, arguments.inputs, i, share, at, filled, P::inputs, x_lines);
    fetch_all<Reuse::soon>(a, arguments.gradients, i, share, at, filled, P::sets, g_lines);
    // The elements are converted one at a time: those of six lines would not fit into registers.
    T x[P::inputs][width<T>], g[P::sets][width<T>];
    unroll<P::inputs>([&](auto m) { std::memcpy(x[m.v], &x_lines[m.v], sizeof(Line)); });
    unroll<P::sets>([&](auto set) { std::memcpy(g[set.v], &g_lines[set.v], sizeof(Line)); });
    A line[P::sums]{};  // sums over a line of a plane, which are one term of the plane's sums
    unroll<width<T>>([&](auto j) {
      constexpr int own = pixels ? j.v : 0;
      A from[P::inputs], given[P::sets];
      unroll<P::inputs>([&](auto m) { from[m.v] = get(&x[m.v][j.v]); });
      unroll<P::sets>([&](auto set) { given[set.v] = get(&g[set.v][j.v]); });
      add_sums<P>(mean[own], from, given, pixels ? sums[own] : line);
      if (a.gate == Gate::cbam_channel && j.v < filled) {
        unroll<P::inputs>([&](auto m) { extremes[own][m.v].join({from[m.v] * sign[own][m.v], A(1)}); });
      }
    });
    if (!pixels) unroll<P::sums>([&](auto n) { sums[0][n.v] += line[n.v]; });
  }
}

// Writes the sums of the planes of the item to shared memory, one part for each warp that shares a plane.
template <class T, class P, bool pixels, class Shared>
MRCN_DEVICE void add_parts(const BackwardArguments<T>& arguments, int64_t i, int64_t block, Shared& shared) {
  using A = acc_t<T>;
  constexpr int K = seen<T, pixels>;
  const Common<A>& a = arguments.common;
  const Saved<P, A> saved(a, i);
  const int warp = threadIdx.x / warp_lanes, lane = threadIdx.x % warp_lanes;
  over_shares<T, pixels>(a, a.cut.first, block, [&](const Share<T, pixels>& share) {
    A mean[K][P::inputs]{}, sign[K][P::inputs]{};
    Extreme<A> extremes[K][P::inputs];
    unroll<K>([&](auto k) {
      unroll<P::inputs>([&](auto m) {
        extremes[k.v][m.v] = {};  // nvcc 13.0 leaves zeros in all rows of such an array but the first
        if (share.c + k.v >= a.C) return;
        const Plane<A> plane = saved.plane(m.v, share.c + k.v);
        mean[k.v][m.v] = plane.mean;
        sign[k.v][m.v] = extreme_pixel(plane, A(1), A(-1));
      });
    });
    const bool leaves = lane < a.cut.first.across;
    const int first = (pixels ? warp * a.cut.first.each : 0) + share.channel;
    for (int64_t begin = 0; begin < a.cut.places; begin += places_per_sum * share.step) {
      A sums[K][P::sums]{};
      if (share.c < a.C) add_up<T, P, pixels>(arguments, i, share, begin, mean, sign, sums, extremes);
      unroll<K>([&](auto k) {
        unroll<P::sums>([&](auto n) {
          for (int mask = a.cut.first.across; mask < warp_lanes; mask *= 2) {
            sums[k.v][n.v] += exchange(sums[k.v][n.v], mask);
          }
          if (!leaves) return;
          A& part = shared.part[n.v][first + k.v];
          part = (begin == 0 ? A(0) : part) + sums[k.v][n.v];
        });
      });
    }
    if (a.gate != Gate::cbam_channel) return;
    unroll<K>([&](auto k) {
      unroll<P::inputs>([&](auto m) {
        for (int mask = a.cut.first.across; mask < warp_lanes; mask *= 2) {
          extremes[k.v][m.v].join(extremes[k.v][m.v].from_lane(mask));
        }
        if (leaves) shared.extreme_part[m.v][first + k.v] = extremes[k.v][m.v];
      });
    });
  });
}

// Writes what the second items need of a plane to scratch memory, and the gradients before the sigmoids to
// shared memory.
template <class P, bool pixels, class A, class Shared>
MRCN_DEVICE void leave_sums(const Common<A>& a, int64_t i, int64_t c, int channel, Shared& shared) {
  const Saved<P, A> saved(a, i);
  const BackwardScratch<P, A> scratch(a, i);
  const int parts = pixels ? block_warps : 1;
  Plane<A> planes[P::inputs];
  A s[P::gate_count], sums[P::sums]{}, ds[P::gate_count], U[P::inputs], V[P::inputs];
  unroll<P::inputs>([&](auto m) { planes[m.v] = saved.plane(m.v, c); });
  unroll<P::gate_count>([&](auto g) { s[g.v] = shared.s[g.v][channel]; });
  unroll<P::sums>([&](auto n) {
    for (int part = 0; part < parts; ++part) sums[n.v] += shared.part[n.v][part * a.cut.first.each + channel];
  });
  drop_missing<P>(a, sums);
  unroll<P::gate_count>([&](auto g) {
    if (!has(a.given_gates, g.v)) s[g.v] = A(0);
  });
  make_gate_gradients<P>(planes, sums, ds);
  make_moments<P>(s, a.to_input, sums, U, V);
  unroll<P::inputs>([&](auto m) {
    scratch.U(m.v)[c] = U[m.v];
    scratch.V(m.v)[c] = V[m.v];
    if (a.gate != Gate::cbam_channel) return;
    Extreme<A> extreme;
    for (int part = 0; part < parts; ++part) {
      extreme.join(shared.extreme_part[m.v][part * a.cut.first.each + channel]);
    }
    scratch.extreme(m.v)[c] = extreme.value * extreme_pixel(planes[m.v], A(1), A(-1));
    scratch.count(m.v)[c] = extreme.count;
  });
  unroll<P::gate_count>([&](auto g) {
    const A before = has(a.given_gates, g.v) ? ds[g.v] * s[g.v] * (1 - s[g.v]) : A(0);
    scratch.s(g.v)[c] = s[g.v];
    scratch.before(g.v)[c] = before;
    shared.before[g.v][channel] = before;
  });
}

// Writes the part of these channels in the gradient of the hidden layers.
template <class P, class A, class Shared>
MRCN_DEVICE void leave_shares(const Common<A>& a, int64_t i, int64_t block, const Shared& shared) {
  const BackwardScratch<P, A> scratch(a, i);
  const int64_t c0 = block * a.cut.first.each;
  const int channels = int(least<int64_t>(a.cut.first.each, a.C - c0));
  over_threads(scratch.layer(), [&](int64_t n) {
    const int g = int(n / a.R), row = int(n % a.R);
    scratch.share(block, g)[row] = share_of_hidden(a, g, row, c0, channels, shared.before[g]);
  });
}

template <class P, class A>
MRCN_DEVICE void make_inner_gradients(const Common<A>& a, int64_t i) {
  const BackwardScratch<P, A> scratch(a, i);
  const Saved<P, A> saved(a, i);
  over_threads(scratch.layer(), [&](int64_t n) {
    const int g = int(n / a.R), row = int(n % a.R);
    const A gradient = add_shares(scratch.share(0, g) + row, a.cut.first.blocks, scratch.layer());
    for (int b = 0; b < a.branches(); ++b) {
      scratch.inner(g, b)[row] = saved.hidden(g, b)[row] <= A(0) ? A(0) : gradient;
    }
  });
}

// Computes the coefficients of ∂x of channel c, and the sample's part of ∂γ and ∂β.
template <class P, class A>
MRCN_DEVICE void map_gradients(const Common<A>& a, int64_t i, int64_t c) {
  const Saved<P, A> saved(a, i);
  const BackwardScratch<P, A> scratch(a, i);
  Plane<A> planes[P::inputs];
  A s[P::gate_count], k[P::backward_slots]{};
  unroll<P::inputs>([&](auto m) { planes[m.v] = saved.plane(m.v, c); });
  unroll<P::gate_count>([&](auto g) { s[g.v] = load_shared_by_blocks(scratch.s(g.v) + c); });
  make_scales<P>(a, planes, s, k);
  unroll<P::inputs>([&](auto m) {
    const bool used = has(a.given_inputs, m.v);
    const Plane<A>& plane = planes[m.v];
    A U = load_shared_by_blocks(scratch.U(m.v) + c), V = load_shared_by_blocks(scratch.V(m.v) + c);
    if (a.gate == Gate::cbam_channel) {
      // The gradient of GMP(M) goes to the pixel with the maximum of M, in equal parts if there are several.
      const A extreme = load_shared_by_blocks(scratch.extreme(m.v) + c), of = scratch.of_pooled(m.v, 1)[c];
      U -= (extreme - plane.mean) * of;
      V -= of;
      k[P::extreme(m.v)] = extreme;
      k[P::k3(m.v)] = (1 - plane.a) * of / load_shared_by_blocks(scratch.count(m.v) + c);
    }
    const PlaneGradient<A> of = plane_gradient(plane, U, V, scratch.of_pooled(m.v, 0)[c], A(a.L));
    k[P::k1(m.v)] = used ? of.k1 : A(0);
    k[P::k2(m.v)] = used ? of.k2 : A(0);
    scratch.norm(m.v, 0)[c] = used ? of.gamma : A(0);
    scratch.norm(m.v, 1)[c] = used ? of.beta : A(0);
  });
  unroll<P::backward_slots>([&](auto slot) { scratch.coefficients(slot.v)[c] = k[slot.v]; });
}

// Writes the coefficients of all planes of a sample to scratch memory.
template <class P, class A>
MRCN_DEVICE void make_coefficients(const Common<A>& a, int64_t i) {
  const BackwardScratch<P, A> scratch(a, i);
  over_threads(int64_t(P::inputs) * a.branches() * a.C, [&](int64_t n) {
    const int m = int(n / a.C % P::inputs), b = int(n / a.C / P::inputs);
    scratch.of_pooled(m, b)[n % a.C] = of_pooled<P>(
        a, m, n % a.C, [&](int g, int64_t c) { return load_shared_by_blocks(scratch.before(g) + c); },
        [&](int g) -> const A* { return scratch.inner(g, b); });
  });
  __syncthreads();
  over_threads(a.C, [&](int64_t c) { map_gradients<P>(a, i, c); });
}

template <class T, class P, bool pixels, class Shared>
MRCN_DEVICE void first_item(const BackwardArguments<T>& arguments, const Item& item, Shared& shared) {
  using A = acc_t<T>;
  const Common<A>& a = arguments.common;
  const int64_t i = item.sample, block = item.number, c0 = block * a.cut.first.each;
  add_parts<T, P, pixels>(arguments, i, block, shared);
  over_threads(P::gate_count * a.cut.first.each, [&](int64_t n) {
    const int g = int(n / a.cut.first.each), channel = int(n % a.cut.first.each);
    if (c0 + channel < a.C) shared.s[g][channel] = gate_value(Saved<P, A>(a, i), g, c0 + channel);
  });
  __syncthreads();
  over_threads(a.cut.first.each, [&](int64_t channel) {
    if (c0 + channel < a.C) leave_sums<P, pixels>(a, i, c0 + channel, int(channel), shared);
  });
  __syncthreads();
  leave_shares<P>(a, i, block, shared);
  if (!arrives_last(a.arrivals(i), a.firsts, &shared.arrived)) return;
  make_inner_gradients<P>(a, i);
  __syncthreads();
  make_coefficients<P>(a, i);
  __syncthreads();
  if (threadIdx.x > 0) return;
  add_acquire_release(a.arrivals(i), 1);
  add_acquire_release(a.counters + 1, 1);
}

// --- second items: gradients of the inputs ------------------------------------------------------------

// The lines of all maps at one place.
template <class P>
struct PlaceLines {
  Line x[2], g[4], passed[2];
};

template <class T, class P, bool pixels>
MRCN_DEVICE void fetch_place(const BackwardArguments<T>& arguments, int64_t i, const Share<T, pixels>& share,
    int64_t at, PlaceLines<P>& lines) {
  const auto& a = arguments.common;
  const int filled = share.filled(a.C, a.L, at);
  fetch_all<Reuse::never>(a, arguments.inputs, i, share, at, filled, P::inputs, lines.x);
  fetch_all<Reuse::never>(a, arguments.gradients, i, share, at, filled, P::sets, lines.g);
  fetch_all<Reuse::never>(a, arguments.passed, i, share, at, filled, P::inputs, lines.passed);
}

// Writes the gradients of the inputs at one place. `k` has the coefficients of a plane; those of pixels are
// read for each channel.
template <class T, class P, bool pixels, class A, class Shared>
MRCN_DEVICE void write_place(const BackwardArguments<T>& arguments, int64_t i, const Share<T, pixels>& share,
    int64_t at, const PlaceLines<P>& lines, A (&k)[P::backward_slots], const Shared& shared) {
  const Common<A>& a = arguments.common;
  // The elements are converted one at a time: those of six lines would not fit into registers.
  T x[P::inputs][width<T>], g[P::sets][width<T>];
  A dx[P::inputs][width<T>];
  unroll<P::inputs>([&](auto m) { std::memcpy(x[m.v], &lines.x[m.v], sizeof(Line)); });
  unroll<P::inputs>([&](auto m) { widen<T>(lines.passed[m.v], dx[m.v]); });
  unroll<P::sets>([&](auto set) { std::memcpy(g[set.v], &lines.g[set.v], sizeof(Line)); });
  unroll<width<T>>([&](auto j) {
    A from[P::inputs], given[P::sets], made[P::inputs];
    if (pixels) read_coefficients(shared, share.channel + j.v, k);
    unroll<P::inputs>([&](auto m) { from[m.v] = get(&x[m.v][j.v]); });
    unroll<P::sets>([&](auto set) { given[set.v] = get(&g[set.v][j.v]); });
    make_gradients<P>(k, from, given, made);
    unroll<P::inputs>([&](auto m) {
      dx[m.v][j.v] += made[m.v];
      const bool top = a.gate == Gate::cbam_channel && from[m.v] == k[P::extreme(m.v)];
      if (top) dx[m.v][j.v] += k[P::k3(m.v)];
    });
  });
  unroll<P::inputs>([&](auto m) {
    const FeatureMap& map = arguments.input_gradients[m.v];
    keep(
        sample_of<T>(map, i) + share.offset(map, at), narrow<T>(dx[m.v]), share.filled(a.C, a.L, at), a.wide);
  });
}

template <class T, class P, bool pixels, class Shared>
MRCN_DEVICE void second_item(const BackwardArguments<T>& arguments, const Item& item, Shared& shared) {
  using A = acc_t<T>;
  const Common<A>& a = arguments.common;
  const int64_t i = item.sample, block = item.number % a.cut.second.blocks,
                chunk = item.number / a.cut.second.blocks;
  const int64_t begin = chunk * a.cut.chunk, end = least(begin + a.cut.chunk, a.cut.places);
  // The first lines are on their way while the block waits for the coefficients.
  PlaceLines<P> lines{};
  const Share<T, pixels> first = first_share<T, pixels>(a.cut.second, block);
  const bool any = begin + first.place < end && first.c < a.C;
  if (any) fetch_place<T, P, pixels>(arguments, i, first, begin + first.place, lines);
  bool fetched = true;
  wait_for(a.arrivals(i), a.firsts + 1);
  const A* table = BackwardScratch<P, A>(a, i).coefficients(0);
  copy_coefficients<P::backward_slots>(a, table, block * a.cut.second.each, a.cut.second.each, shared);
  over_shares<T, pixels>(a, a.cut.second, block, [&](const Share<T, pixels>& share) {
    if (share.c >= a.C) return;
    A k[P::backward_slots];
    if (!pixels) read_coefficients(shared, share.channel, k);
    for (int64_t at = begin + share.place; at < end; at += share.step) {
      if (!fetched) fetch_place<T, P, pixels>(arguments, i, share, at, lines);
      fetched = false;
      write_place<T, P, pixels>(arguments, i, share, at, lines, k, shared);
    }
  });
}

// --- the kernel ---------------------------------------------------------------------------------------

// How many blocks per multiprocessor must find enough registers: with ten sums for each channel of a line,
// one.
template <class T, class P, bool pixels>
constexpr int backward_blocks = sizeof(T) == 8 || pixels ? 1 : 2;

template <class T, class P, bool pixels>
MRCN_KERNEL((backward_blocks<T, P, pixels>))
backward_kernel(BackwardArguments<T> arguments) {
  auto& shared = *reinterpret_cast<BackwardShared<T, P>*>(shared_memory());
  over_items(arguments.common, &shared.ticket, [&](const Item& item) {
    if (item.phase == Phase::first) {
      first_item<T, P, pixels>(arguments, item, shared);
    } else if (item.phase == Phase::second) {
      second_item<T, P, pixels>(arguments, item, shared);
    } else {
      wait_for(arguments.common.counters + 1, int(arguments.common.N));
      last_item<T, P>(arguments, item.number, arguments.singles);
    }
  });
}

template <class T, class P, bool pixels>
int run_backward(const BlockBackward& call, void* scratch, void* stream) {
  constexpr int shared = sizeof(BackwardShared<T, P>);
  static_assert(shared <= most_shared);
  BackwardArguments<T> a{};
  const int64_t row = backward_row(call.shape, cut<T>(call.shape).first.blocks);
  a.common = common<T>(call, 1, last_items(call.shape), row, call.statistics, scratch);
  set_maps<P>(call, a);
  constexpr auto* kernel = backward_kernel<T, P, pixels>;
  return launch_items<kernel, T>(a, call.shape, shared, P::inputs + P::sets, scratch, stream);
}

}  // namespace

int64_t backward_scratch(const BlockShape& shape) { return scratch_bytes(shape, backward_row); }

int block_backward(const BlockBackward& call, void* scratch, void* stream) {
  return with_kernel(call.shape, [&](auto element, auto pattern, auto pixels) {
    return run_backward<decltype(element), decltype(pattern), decltype(pixels)::value>(call, scratch, stream);
  });
}

}  // namespace mrcn::MRCN_ISA
