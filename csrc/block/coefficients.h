// Which made set is a map of which input, mode by mode, and where its coefficients and sums stand.
#pragma once

#include "block/formulas.h"
#include "block/params.h"
#include "elements.h"

namespace mrcn::MRCN_ISA {
namespace {

// The made sets in the order of Mode, without those handed through: at[set][input] says what a set is made
// of, gate_of[set] by which gate, -1 by none.
template <Mode mode>
struct Uses;
template <>
struct Uses<Mode::pair> {
  static constexpr int inputs = 2, sets = 4;
  static constexpr bool at[4][2] = {{true, false}, {true, true}, {true, true}, {false, true}};
  static constexpr int gate_of[4] = {0, 3, 2, 1};
};
template <>
struct Uses<Mode::concat> : Uses<Mode::pair> {};
template <>
struct Uses<Mode::restitute> {
  static constexpr int inputs = 1, sets = 1;
  static constexpr bool at[1][1] = {{true}};
  static constexpr int gate_of[1] = {0};
};
template <>
struct Uses<Mode::snr> {
  static constexpr int inputs = 1, sets = 3;
  static constexpr bool at[3][1] = {{true}, {true}, {true}};
  static constexpr int gate_of[3] = {0, 0, -1};
};

template <Mode mode_>
struct Pattern : Uses<mode_> {
  using U = Uses<mode_>;
  static constexpr Mode mode = mode_;
  static constexpr bool passes = mode == Mode::concat;  // hands the inputs on as first and last set
  static constexpr int first = passes ? 1 : 0;          // the first made set among all
  static constexpr int all = U::sets + (passes ? 2 : 0);
  static constexpr int gate_count = U::inputs == 2 ? 4 : 1;

  static constexpr int rank(int set, int input) {
    int n = 0;
    for (int k = 0; k < U::sets; ++k) {
      for (int j = 0; j < U::inputs; ++j) {
        if (k == set && j == input) return n;
        n += U::at[k][j] ? 1 : 0;
      }
    }
    return n;
  }
  static constexpr int maps = rank(U::sets, 0);

  // Coefficients of the elementwise passes.
  static constexpr int mean(int j) { return j; }
  static constexpr int scale(int k, int j) { return U::inputs + rank(k, j); }
  static constexpr int shift(int k) { return U::inputs + maps + k; }
  static constexpr int forward_slots = U::inputs + maps + U::sets;
  static constexpr int k1(int j) { return U::inputs + maps + j; }
  static constexpr int k2(int j) { return k1(U::inputs) + j; }
  static constexpr int extreme(int j) { return k2(U::inputs) + j; }
  static constexpr int k3(int j) { return extreme(U::inputs) + j; }
  static constexpr int backward_slots = k3(U::inputs);

  // Sums of the reduction pass.
  static constexpr int S(int k) { return k; }
  static constexpr int T(int k, int j) { return U::sets + rank(k, j); }
  static constexpr int sums = U::sets + maps;
};

// The made sets that have a gradient, and the gates and inputs that any of them was made of. What only the
// others were made of gets no share of a gradient: not even the NaN that a zero times a NaN would be.
template <class P>
struct Given {
  bool sets[P::sets] = {}, gates[P::gate_count] = {}, inputs[P::inputs] = {};

  // has(set): whether the set has a gradient. On the host, for a GPU has no tables to look into.
  template <class F>
  explicit Given(const F& has) {
    for (int s = 0; s < P::sets; ++s) {
      sets[s] = has(s);
      if (!sets[s]) continue;
      if (P::gate_of[s] >= 0) gates[P::gate_of[s]] = true;
      for (int j = 0; j < P::inputs; ++j) inputs[j] = inputs[j] || P::at[s][j];
    }
  }
};

// --- one pixel, or a vector of them -------------------------------------------------------------------

// Set s.
template <class P, int s, class V>
MRCN_INLINE V made_set(const V* k, const V* x) {
  V value = k[P::shift(s)];
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::at[s][j.v]) value += k[P::scale(s, j.v)] * (x[j.v] - k[P::mean(j.v)]);
  });
  return value;
}
template <class P, class V>
MRCN_INLINE void make_sets(const V* k, const V* x, V* y) {
  unroll<P::sets>([&](auto s) MRCN_BODY { y[s.v] = made_set<P, s.v>(k, x); });
}

// What set s adds; `sums` are numbers, or what keeps more digits of theirs.
template <class P, int s, class V, class S>
MRCN_INLINE void add_sums_of(const V* mean, const V* x, V g, S* sums) {
  sums[P::S(s)] += g;
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::at[s][j.v]) sums[P::T(s, j.v)] += g * (x[j.v] - mean[j.v]);
  });
}
template <class P, class V, class S>
MRCN_INLINE void add_sums(const V* mean, const V* x, const V* g, S* sums) {
  unroll<P::sets>([&](auto s) MRCN_BODY { add_sums_of<P, s.v>(mean, x, g[s.v], sums); });
}

// The inputs' gradients: what comes through the statistics, and what set s adds.
template <class P, class V>
MRCN_INLINE void start_gradients(const V* k, const V* x, V* dx) {
  unroll<P::inputs>(
      [&](auto j) MRCN_BODY { dx[j.v] = k[P::k1(j.v)] + k[P::k2(j.v)] * (x[j.v] - k[P::mean(j.v)]); });
}
template <class P, int s, class V>
MRCN_INLINE void add_gradient(const V* k, V g, V* dx) {
  unroll<P::inputs>([&](auto j) MRCN_BODY {
    if constexpr (P::at[s][j.v]) dx[j.v] += k[P::scale(s, j.v)] * g;
  });
}
template <class P, class V>
MRCN_INLINE void make_gradients(const V* k, const V* x, const V* g, V* dx) {
  start_gradients<P>(k, x, dx);
  unroll<P::sets>([&](auto s) MRCN_BODY { add_gradient<P, s.v>(k, g[s.v], dx); });
}

// --- one plane, or a vector of them (V): coefficients from statistics and gates -------------------------

// The affine maps of one (sample, channel), shared by the forward and the backward; shifts where asked for.
template <class P, class V>
MRCN_INLINE void make_maps(const Plane<V>* p, const V* s, bool to_input, V* k, bool shifts) {
  const auto set = [&](int slot_scale, int slot_shift, Affine<V> map, bool add = false) {
    k[slot_scale] = map.scale;
    if (shifts) k[slot_shift] = (add ? k[slot_shift] : V{}) + map.shift;
  };
  unroll<P::inputs>([&](auto j) MRCN_BODY { k[P::mean(j.v)] = p[j.v].mean; });
  if constexpr (P::inputs == 2) {
    set(P::scale(0, 0), P::shift(0), restituted(p[0], s[0], to_input));
    set(P::scale(1, 0), P::shift(1), normalized(p[0]));
    set(P::scale(1, 1), P::shift(1), distilled(p[1], s[3]), true);
    set(P::scale(2, 1), P::shift(2), normalized(p[1]));
    set(P::scale(2, 0), P::shift(2), distilled(p[0], s[2]), true);
    set(P::scale(3, 1), P::shift(3), restituted(p[1], s[1], to_input));
  } else {
    set(P::scale(0, 0), P::shift(0), restituted(p[0], s[0], to_input));
    if constexpr (P::mode == Mode::snr) {
      set(P::scale(1, 0), P::shift(1), restituted<V>(p[0], 1 - s[0], false));
      set(P::scale(2, 0), P::shift(2), normalized(p[0]));
    }
  }
}

// Sets and inputs are constants below: a GPU has no table `at` to look into, and where nvcc does not know the
// place when it compiles, it makes a trap of it.

// ∂s of every gate.
template <class P, class V>
MRCN_INLINE void make_gate_gradients(const Plane<V>* p, const V* sums, V* ds) {
  const auto of = [&](auto k, auto j) MRCN_BODY {
    constexpr int S = P::S(k.v), T = P::T(k.v, j.v);
    return gate_gradient<V>(p[j.v], {sums[S], sums[T]});
  };
  constexpr constant<0> first{}, visible{};
  ds[0] = of(first, visible);
  if constexpr (P::inputs == 2) {
    constexpr constant<1> infrared{};
    ds[1] = of(constant<3>{}, infrared);
    ds[2] = of(constant<2>{}, visible);
    ds[3] = of(constant<1>{}, infrared);
  } else if constexpr (P::mode == Mode::snr) {
    ds[0] -= of(constant<1>{}, visible);
  }
}

// U = Σ H c and V = Σ H of every input.
template <class P, class R>
MRCN_INLINE void make_moments(const R* s, bool to_input, const R* sums, R* U, R* V) {
  const auto add = [&](auto weight, auto k, auto j) MRCN_BODY {
    constexpr int S = P::S(k.v), T = P::T(k.v, j.v);
    U[j.v] += weight * sums[T];
    V[j.v] += weight * sums[S];
  };
  constexpr constant<0> first{}, visible{};
  unroll<P::inputs>([&](auto j) MRCN_BODY { U[j.v] = V[j.v] = R{}; });
  add(share_of_normalized(s[0], to_input), first, visible);
  if constexpr (P::inputs == 2) {
    constexpr constant<1> infrared{};
    add(share_of_normalized(s[1], to_input), constant<3>{}, infrared);
    add(1, constant<1>{}, visible);
    add(1, constant<2>{}, infrared);
    add(-s[2], constant<2>{}, visible);
    add(-s[3], constant<1>{}, infrared);
  } else if constexpr (P::mode == Mode::snr) {
    add(s[0], constant<1>{}, visible);
    add(1, constant<2>{}, visible);
  }
}

}  // namespace
}  // namespace mrcn::MRCN_ISA
